"""Folders and files whose names are not UTF-8 (here GBK, as archives from other systems leave them) through every way
in: their bytes are kept, and messages show them escaped.
"""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast import embed
from scf_fast.evaluation import __main__ as evaluation
from scf_fast.evaluation import comparison, evaluate, plots
from scf_fast.evaluation.datasets import read_pair_list
from scf_fast.inference import Embeddings
from scf_fast.objectives import Density
from scf_fast.pipelines import convert, index
from scf_fast.pipelines.evaluation_sets.template_protocol import write_template_protocol
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.sampling.sampler import EpochSampler

PEOPLE = [f"李明{number:02d}".encode("gbk") for number in range(20)]
FILES = ["面.png".encode("gbk"), "面　孔.png".encode()]  # the second is UTF-8, with a blank that is not ASCII's
SHOWN = r"\xc0\xee\xc3\xf703/\xc3\xe6.png"


class PixelModel:
    """An embedder: features are a picture's blocks of color."""

    radius, embedding_dim, normalization, device = 64.0, 48, "insightface", torch.device("cpu")
    is_settled, outputs, objective, density, key = True, 0, None, Density.VMF, "pixels"

    def __call__(self, images):
        return Embeddings(torch.nn.functional.avg_pool2d(images.float(), 28).flatten(1))


@pytest.fixture(autouse=True)
def pixel_models(monkeypatch):
    monkeypatch.setattr(comparison, "open_embedder", lambda *_: PixelModel())
    monkeypatch.setattr(embed, "open_embedder", lambda *_: PixelModel())
    monkeypatch.setattr(plots, "_png", lambda figure: b"not rendered")
    monkeypatch.setattr(evaluate.Evaluation, "draws", False)


def picture(number):
    colors = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors.repeat(28, axis=0).repeat(28, axis=1)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two faces of each of 20 people, below a folder whose own name is GBK too; one is broken."""
    root = os.path.join(os.fsencode(tmp_path_factory.mktemp("names")), "数据".encode("gbk"))
    for number, person in enumerate(PEOPLE):
        os.makedirs(os.path.join(root, person))
        for file in FILES:
            with open(os.path.join(root, person, file), "wb") as face:
                face.write(picture(number) if number != 3 or file != FILES[0] else b"no picture")
    return os.fsdecode(root)


def names(folder):
    root = os.fsencode(folder)
    return [os.path.join(root, person, file) for person in PEOPLE for file in FILES]


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("listed", [False, True], ids=["folder", "list"])
def test_training_reads_them(folder, tmp_path, backend, listed):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data = folder
    if listed:
        data = tmp_path / "list.txt"
        data.write_bytes(b"".join(name + b" %d\n" % (i // 2) for i, name in enumerate(names(folder))))
    source = open_source(data, cache_dir=tmp_path)
    assert [os.fsencode(source.name(i)) for i in range(len(source))] == names(folder)
    sampler = EpochSampler(40, 40, shuffle=False)
    workers = 1 if backend == "dali" else 0
    with make_loader(source, sampler, backend=backend, num_workers=workers, on_broken="replace") as loader:
        (batch,) = loader.batches(0)
        assert list(loader.broken.found) == [6]
    assert batch.indices.tolist() == [7 if i == 6 else i for i in range(40)]


def test_index_and_convert(folder, tmp_path, capsys):
    assert index.main([folder, "--verify", "--workers", "1", "--cache-dir", str(tmp_path)]) == 1
    assert f"{SHOWN} cannot be decoded: unknown format" in capsys.readouterr().out
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), "李".encode("gbk")))
    clean = tmp_path / "list.txt"
    clean.write_bytes(b"".join(name + b" 0\n" for name in names(folder)[:6]))
    for kind in ("tar", "tfrecord", "recordio", "folder"):
        assert convert.main([str(clean), f"{out}{kind}", "--to", kind]) == 0
        assert len(open_source(f"{out}{kind}")) == 6
    assert r"\xc0\xeetar: 6 images" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed_keeps_the_bytes(folder, tmp_path, suffix, capsys):
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / f"out.{suffix}"
    assert embed.main([folder, "--model", "m", "--out", str(out), "--loader", "torch", "--num-workers", "0"]) == 0
    if suffix == "parquet":
        paths = parquet.read_table(out)["path"].to_pylist()
    else:
        with np.load(out) as found:
            paths = list(map(os.fsencode, found["path"].tolist()))
    assert sorted(paths) == sorted(names(folder)[:6] + names(folder)[7:])
    assert f"{SHOWN} cannot be decoded: unknown format" in (tmp_path / f"out.{suffix}.left_out.txt").read_text()


def run(out, *arguments):
    flags = ["--model", "m", "--out", out, "--cache", out / "cache", "--device", "cpu", "--loader", "torch"]
    status = evaluation.main([*map(str, [*arguments, *flags]), "--num-workers", "0"])
    return status, json.loads((out / "results.json").read_text()) if status == 0 else None


def test_verify_identify_and_their_reports(folder, tmp_path, capsys):
    status, drawn = run(tmp_path / "a", "verify", "--data", folder, "--pairs", "20")
    assert status == 0 and SHOWN in capsys.readouterr().out
    (listed,) = (name for name in os.listdir(os.fsencode(tmp_path / "a")) if name.startswith(b"pairs-"))
    assert listed == b"pairs-" + "数据".encode("gbk") + b".txt"
    listed = os.fsdecode(os.path.join(os.fsencode(tmp_path / "a"), listed))
    source, _ = read_pair_list(tmp_path / listed)
    assert {os.fsencode(source.name(i)) for i in range(len(source))} <= set(names(folder))
    status, again = run(tmp_path / "b", "verify", "--data", listed)
    assert status == 0 and again["verification"]["accuracy"] == drawn["verification"]["accuracy"]
    for file in ("report.md", "report.html"):
        assert r"\xc0\xee\xc3\xf703" in (tmp_path / "a" / file).read_text().replace("\\\\", "\\")
    status, found = run(tmp_path / "c", "identify", "--gallery", folder, "--probe", folder)
    assert status == 0 and found["identification"]["enrolled"] == 20
    assert run(tmp_path / "a", "verify", "--data", folder, "--pairs", "20")[0] == 0  # the same request as before


def test_templates(folder, tmp_path, capsys):
    root, crops = tmp_path / "ijb", [f"{person.decode('gbk')}.png".encode("gbk") for person in PEOPLE]
    first, second = np.triu_indices(20)
    write_template_protocol(
        root,
        "tiny",
        names=list(map(os.fsdecode, crops)),
        images=[picture(i) for i in range(19)] + [b"no picture"],
        template_ids=range(20),
        media_ids=range(20),
        landmarks=np.tile(TEMPLATE + 2, (20, 1, 1)),
        detector_score=np.arange(20) / 20,
        pair_template_ids=np.stack([first, second], axis=1),
        pair_labels=first == second,
    )
    assert sorted(os.listdir(os.fsencode(root / "loose_crop"))) == sorted(crops)
    status, _ = run(tmp_path / "out", "ijb", "--data", root)
    assert status == 0 and r"\xc0\xee\xc3\xf719.png cannot be decoded" in capsys.readouterr().out
