"""The table command from model files to its report, on small backbones."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast.errors import InputError
from scf_fast.evaluation import __main__ as command
from scf_fast.evaluation import plots
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.evaluation.systems import match_systems
from scf_fast.inference import Decoding, Embedder
from scf_fast.model import SCF, save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.objectives import Objective
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.sources.base import ImageFiles

WIDTH, PIXELS = 24, "published"  # as the family of these backbones has it


def backbone(seed):
    torch.manual_seed(seed)
    return Backbone("ir_tiny", WIDTH).eval()


def save(folder, of, objective, seed=0, outputs=1):
    """Writes the model of a run in a folder, and returns it."""
    torch.manual_seed(seed)
    net = build_confidence_net("conv", 16, 7, initial_kappa=300.0, outputs=outputs)
    folder.mkdir(parents=True)
    settings = {"radius": 64.0, "normalization": PIXELS, "objective": objective}
    save_model(folder / "scf_model.pt", of.state_dict(), net.state_dict(), **settings)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two backbones, and models of the first."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in ("first", 1), ("second", 2):
        (root / name).mkdir()
        torch.save(backbone(seed).state_dict(), root / name / "backbone.pth")
    save(root / "scf", backbone(1), Objective.SCF, 1)
    save(root / "pairs" / "pfe", backbone(1), Objective.PFE, 2, outputs=WIDTH)
    save(root / "pairs" / "pfe_vmf", backbone(1), Objective.PFE_VMF, 3)
    return root


def test_models_belong_to_the_backbone_whose_weights_they_hold(files):
    other = save(files / "of second", backbone(2), Objective.SCF)
    systems = match_systems([f"a={files / 'first'}", f"b={files / 'second'}"], [str(files / "pairs"), str(other)])
    assert systems == {
        "a": {
            None: str(files / "first"),
            Objective.PFE: str(files / "pairs" / "pfe"),
            Objective.PFE_VMF: str(files / "pairs" / "pfe_vmf"),
        },
        "b": {None: str(files / "second"), Objective.SCF: str(other)},
    }
    assert match_systems([str(files / "first")], [str(files / "scf")], PIXELS)
    with pytest.raises(InputError, match=r"trained with published pixels, and --backbone first takes insightface ones"):
        match_systems([str(files / "first")], [str(files / "scf")], "insightface")
    with pytest.raises(InputError, match=r"--models .*of second: its backbone is none of --backbone first, so"):
        match_systems([str(files / "first")], [str(files / "scf"), str(other)])


def test_models_that_the_table_has_no_row_for(files):
    again = save(files / "again", backbone(1), Objective.SCF, 5)
    first = str(files / "first")
    with pytest.raises(
        InputError, match=r"--models .*scf and .*again are both SCF on first, and the table has one row"
    ):
        match_systems([first], [str(files / "scf"), str(again)])
    with pytest.raises(InputError, match=r"must hold a confidence net"):
        match_systems([first], [first])
    with pytest.raises(InputError, match=r"--backbone b and a hold the same weights"):
        match_systems([f"a={first}", f"b={files / 'scf'}"], [])
    with pytest.raises(InputError, match=r"two models are named first; .*as in --backbone first=PATH"):
        match_systems([first, first], [])


def face(rng):
    file = io.BytesIO()
    pixels = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8).repeat(28, axis=0).repeat(28, axis=1)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two verification sets of random faces."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in "clean", "mixed":
        write_verification_set(
            root / "verification" / f"{name}.bin", (face(rng) for _ in range(60)), np.arange(30) < 15
        )
    return root


def test_the_table_from_files_to_report(files, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(plots, "_png")  # the table draws nothing
    calls = []
    run_backbone = FrozenBackbone.__call__
    monkeypatch.setattr(
        FrozenBackbone, "__call__", lambda self, images: (calls.append(len(images)), run_backbone(self, images))[1]
    )
    words = ["table", "--data", data, "--backbone", f"cosface={files / 'first'}", "--models", files / "pairs"]
    words += [files / "scf", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    words += ["--device", "cpu", "--loader", "torch", "--num-workers", 0]
    assert command.main(list(map(str, words))) == 0
    assert sum(calls) == 120 + 32  # four models; and once to settle the precision
    printed = capsys.readouterr().out
    names = [line.split("  ")[0] for line in printed.splitlines() if line.startswith(("cosface", "+ "))]
    assert names[:5] == ["cosface", "+ PFE-G", "+ PFE-v", "+ SCF-G", "+ SCF"]
    assert "Verification of pairs of images" in printed and "Risk-controlled recognition" in printed
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["tables"] == json.loads((out / "table.json").read_text())
    assert results["request"]["backbone"] == [f"cosface={files / 'first'}"]
    rows = {row["system"]: row["values"] for row in results["tables"]["verification"]["rows"]}
    assert rows["SCF-G"] == [None, None] and rows["SCF"] == [
        results["models"]["cosface + SCF"]["verification"]["accuracy_vmf"],
        results["models"]["cosface + SCF"]["verification"]["others"]["mixed"]["accuracy_vmf"],
    ]
    assert rows["PFE-G"][0] == results["models"]["cosface + PFE-G"]["verification"]["accuracy_mls"]
    risk = {row["system"]: row["values"] for row in results["tables"]["risk"]["rows"]}
    assert risk["PFE-G"][0] == results["models"]["cosface + PFE-G"]["reject_area"]["precision"]
    assert risk[None][0] == results["models"]["cosface"]["reject_area"]["feature_norm"]
    assert r"+ SCF-G & -- & --" in (out / "table.tex").read_text()
    assert (out / "table.txt").read_text() == printed
    assert (out / "report.md").read_text().index("Risk-controlled") < (out / "report.md").read_text().index(
        "## Quality"
    )
    assert command.main([*map(str, words), "--format", "markdown", "--with-published"]) == 2
    assert "--with-published" in (line := capsys.readouterr().err) or "with_published" in line


def test_one_pass_of_a_backbone_gives_what_each_model_alone_gives(files, tmp_path):
    rng = np.random.default_rng(1)
    images = [tmp_path / f"{i}.png" for i in range(5)]
    for path in images:
        path.write_bytes(face(rng))

    def stores(folder):
        paths = files / "pairs" / "pfe", files / "scf", files / "first"
        models = [SCF.from_checkpoint(path, backbone_alone=True) for path in paths]
        decoding = Decoding("torch", num_workers=0)
        return [
            EmbeddingStore(Embedder(model, flip=True), tmp_path / folder, batch_size=2, decoding=decoding)
            for model in models
        ]

    source = ImageFiles(images)
    first, *others = stores("together")
    others[0].fill(source, "one that is there already")
    first.fill(source, "images", others)
    for together, alone in zip([first, *others], stores("alone")):
        assert not together.fill(source, "nothing is missing")
        found, expected = together.load(source, "images"), alone.load(source, "images")
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=0)
        if expected.prediction is None:
            assert found.prediction is None
        else:
            torch.testing.assert_close(found.prediction, expected.prediction, rtol=0, atol=0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--with-published"], "the paper has the backbones cosface and arcface, and --backbone first; name one so"),
        (["--data", "{data}", "{data}"], "both have a data set "),
    ],
)
def test_bad_input_is_one_line(words, message, files, data, tmp_path, capsys):
    given = ["table", "--backbone", str(files / "first"), "--data", str(data), "--cache", str(tmp_path / "cache")]
    assert command.main([*given, *(word.format(data=data) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "cache").exists()
