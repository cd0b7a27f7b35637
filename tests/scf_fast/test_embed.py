import io
import re
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scf_fast import embed
from scf_fast.inference import Embedder
from scf_fast.model import SCF, save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.objectives import Objective
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.weights.contents import Part
from scf_fast.weights.digest import digest_weights
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model with random weights, BatchNorm statistics included."""
    torch.manual_seed(0)
    backbone, net = Backbone("ir_tiny", 24), build_confidence_net("conv", 16, 7, initial_kappa=300.0)
    for module in (*backbone.modules(), *net.modules()):
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    path = tmp_path_factory.mktemp("model") / "scf_model.pt"
    save_model(path, backbone.state_dict(), net.state_dict(), radius=32.0, normalization="published")
    return path


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Pictures in a folder and one beside it, and (N, 112, 112, 3) uint8 of them in the order of their names."""
    root = tmp_path_factory.mktemp("faces")
    pixels = (
        np.random.default_rng(0).integers(0, 256, (7, 14, 14, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    )
    (root / "album" / "deep").mkdir(parents=True)
    for number, face in enumerate(pixels):
        Image.fromarray(face).save(
            root / ("single.png" if number == 6 else f"album/{'deep/' if number > 3 else ''}{number}.png")
        )
    (root / "album" / "notes.txt").write_text("no picture")
    return root, pixels[[0, 1, 2, 3, 4, 5, 6]]


def main(*arguments):
    return embed.main([*map(str, arguments), "--device", "cpu", "--loader", "torch", "--num-workers", "0"])


def test_command_writes_what_the_model_says(model_file, faces, tmp_path, capsys):
    root, pixels = faces
    assert (
        main(
            root / "album", root / "single.png", "--model", model_file, "--out", tmp_path / "out.npz", "--batch-size", 3
        )
        == 0
    )
    model = SCF.from_checkpoint(model_file)
    mu, kappa = model(Preprocessing("published").normalize(torch.from_numpy(pixels)))
    with np.load(tmp_path / "out.npz") as found:
        assert [path.rpartition("/")[2] for path in found["path"]] == [f"{i}.png" for i in range(6)] + ["single.png"]
        np.testing.assert_allclose(found["mu"], mu.detach(), atol=1e-5)
        np.testing.assert_allclose(found["kappa"], kappa.detach(), rtol=1e-4)
        assert found["mu"].dtype == found["kappa"].dtype == np.float32
    assert "7 images, " in capsys.readouterr().out


def test_command_on_a_backbone_alone_writes_directions_and_says_so(model_file, faces, tmp_path, capsys):
    """Of any family; the pixels are those of its family, of the fc.pth beside it, or as told."""
    model, images = SCF.from_checkpoint(model_file), torch.from_numpy(faces[1][:6])
    write_weights(read_weights(model_file).only(Part.BACKBONE), tmp_path / "backbone.pth")
    seen = {}
    for case, words in (
        ("family", []),
        ("told", ["--normalization", "insightface"]),
        ("noted", []),
        ("told again", ["--normalization", "published"]),
    ):
        if case == "noted":
            torch.save(
                {"arc_face_state_dict": {"weight": torch.ones(3, 24)}, "normalization": "insightface"},
                tmp_path / "fc.pth",
            )
        assert (
            main(
                faces[0] / "album",
                "--model",
                tmp_path / "backbone.pth",
                "--out",
                tmp_path / "out.npz",
                *words,
                "--flip",
            )
            == 0
        )
        assert f"no kappa: {tmp_path / 'backbone.pth'} is a backbone alone" in capsys.readouterr().out
        with np.load(tmp_path / "out.npz") as found:
            assert sorted(found) == ["mu", "path"]
            seen[case] = found["mu"]
    for case, normalization in (
        ("family", "published"),
        ("told", "insightface"),
        ("noted", "insightface"),
        ("told again", "published"),
    ):
        normalized = Preprocessing(normalization).normalize(images)
        expected = F.normalize(model.embed(normalized)[0] + model.embed(normalized.flip(3))[0])
        np.testing.assert_allclose(seen[case], expected, atol=1e-5)
    assert np.abs(seen["family"] - seen["told"]).max() > 1e-4
    assert (
        main(faces[0] / "album", "--model", tmp_path, "--out", tmp_path / "out.npz", "--normalization", "published")
        == 2
    )
    assert (
        "was trained with normalization 'insightface', got 'published'" in capsys.readouterr().err
    )  # the folder of a stage 1 holds the note


@pytest.mark.parametrize("outputs", [1, 24], ids=["scalar", "diagonal"])
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_command_writes_precision_and_log_variances_of_gaussians(model_file, faces, tmp_path, outputs, suffix):
    model = SCF.from_checkpoint(model_file)
    net = build_confidence_net("pfe", 16, 7, initial_kappa=1e-2, outputs=outputs)
    net.scale.data.fill_(0.1)
    model = SCF(model.backbone, net, normalization="published", objective=Objective.PFE)
    states, out = (model.backbone.state_dict(), net.state_dict()), tmp_path / f"out.{suffix}"
    save_model(tmp_path / "m.pt", *states, radius=64.0, normalization="published", objective=Objective.PFE)
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert main(faces[0] / "album", "--model", tmp_path / "m.pt", "--out", out, "--flip") == 0
    if suffix == "parquet":
        table = parquet.read_table(out)
        assert table.column_names == ["path", "precision", "log_variance", "mu"]
        found = {name: np.stack(table[name].to_numpy()) for name in ("precision", "log_variance")}
    else:
        with np.load(out) as file:
            assert list(file) == ["mu", "precision", "log_variance", "path"]
            found = dict(file)
    images = Preprocessing("published").normalize(torch.from_numpy(faces[1][:6]))
    expected = (model.log_variance(images) + model.log_variance(images.flip(3))).double() / 2
    np.testing.assert_allclose(found["log_variance"], expected, atol=1e-4)
    assert found["log_variance"].shape == ((6,) if outputs == 1 else (6, 24)) and expected.std(dim=0).min() > 1e-4
    np.testing.assert_allclose(found["precision"], (-expected).exp().reshape(6, outputs).mean(dim=1), rtol=1e-3)


def test_a_backbone_alone_is_refused_unless_asked_for(model_file, tmp_path):
    write_weights(read_weights(model_file).only(Part.BACKBONE), tmp_path / "b.pth")
    with pytest.raises(
        ValueError, match="must hold a confidence net's state_dict of tensors, but holds backbone ir_tiny"
    ):
        SCF.from_checkpoint(tmp_path / "b.pth")
    model = SCF.from_checkpoint(tmp_path / "b.pth", backbone_alone=True)
    mu, kappa = model(torch.zeros(2, 3, 112, 112))
    assert (
        mu.shape == (2, 24) and kappa is None and Embedder(model).key != Embedder(SCF.from_checkpoint(model_file)).key
    )
    assert SCF.from_checkpoint(model_file, backbone_alone=True).confidence_net is not None


def test_flip_adds_the_mirror_image(model_file, faces):
    model, images = SCF.from_checkpoint(model_file), Preprocessing("published").normalize(torch.from_numpy(faces[1]))
    found = Embedder(model, flip=True)(images)
    with torch.no_grad():
        (f, k), (g, m) = model.embed(images), model.embed(images.flip(3))
    torch.testing.assert_close(found.features, f + g, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_kappa, (k + m) / 2, rtol=1e-5, atol=1e-5)
    assert F.cosine_similarity(found.features, f).max() < 0.9999  # so the mirror image did count


def test_key_tells_models_and_settings_apart(model_file):
    model = SCF.from_checkpoint(model_file)
    keys = [Embedder(model).key, Embedder(model, flip=True).key, Embedder(model, precision="bf16").key]
    with torch.no_grad():
        model.confidence_net._log_kappa[-1].bias += 1
    keys.append(Embedder(model).key)
    assert len(set(keys)) == 4 and Embedder(SCF.from_checkpoint(model_file)).key == keys[0]
    # As it was before there were Gaussians, so that what was stored then is still found.
    same = SCF.from_checkpoint(model_file)
    assert keys[0] == digest_weights(same.state_dict(), "published auto cpu False")
    gaussian = SCF(same.backbone, same.confidence_net, 32.0, "published", Objective.SCF_GAUSSIAN)
    assert Embedder(gaussian).key != keys[0]


def test_weights_that_are_not_finite_are_refused(model_file):
    model = SCF.from_checkpoint(model_file)
    with torch.no_grad():
        model.backbone.input_layer[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"those of backbone\.input_layer\.0\.weight are not"):
        Embedder(model)


def test_a_model_is_left_as_it_is(model_file, faces):
    model = SCF.from_checkpoint(model_file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Embedder(model)(Preprocessing("published").normalize(torch.from_numpy(faces[1])))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and isinstance(model, SCF)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "there is no absent"),
        (["{root}/album/deep", "--out", "out.csv"], "must end in .npz or .parquet"),
        (["{empty}"], "no images under"),
        (["{root}/album/notes.txt"], "none of the 1 images can be decoded, the first: "),
        (["{root}/album", "{root}/album/notes.txt", "--strict"], "notes.txt cannot be decoded: unknown format"),
        (["{root}/album", "--model", "{root}/single.png"], "single.png: is a PNG image; give a state_dict"),
    ],
)
def test_command_refuses_in_one_line(model_file, faces, tmp_path, capsys, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [argument.format(root=faces[0], empty=empty) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", tmp_path / "out.npz"]
    assert main("--model", model_file, *out, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and last.startswith("python -m scf_fast.embed: error: ")
    assert not (tmp_path / "out.npz").exists()


def test_parquet(model_file, faces, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert main(faces[0] / "album", "--model", model_file, "--out", tmp_path / "out.parquet") == 0
    assert main(faces[0] / "album", "--model", model_file, "--out", tmp_path / "out.npz") == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(np.stack(table["mu"].to_numpy()), found["mu"]) and np.array_equal(
            table["kappa"].to_numpy(), found["kappa"]
        )
        assert table["path"].to_pylist() == found["path"].tolist()


def test_parquet_without_pyarrow_says_what_to_do(model_file, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(faces[0] / "album", "--model", model_file, "--out", tmp_path / "out.parquet") == 2
    assert "pip install '.[embed]' in the checkout), or write .npz" in capsys.readouterr().err


def test_an_image_of_another_size_is_resized_whole(model_file, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(112, 0).repeat(112, 1)).save(file, "PNG")
    (tmp_path / "large.png").write_bytes(file.getvalue())
    assert main(tmp_path / "large.png", "--model", model_file, "--out", tmp_path / "out.npz") == 0
    with np.load(tmp_path / "out.npz") as found:
        assert found["mu"].shape == (1, 24)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_images_that_cannot_be_decoded_are_left_out_and_listed(model_file, faces, tmp_path, capfd, caplog, backend):
    """Among good ones: a truncated file, a photo of 20 megapixels, a phone's, a text; and files that are no images."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    root = tmp_path / "photos"
    shutil.copytree(faces[0] / "album", root)
    good = (root / "0.png").read_bytes()
    large = good[:16] + (5000).to_bytes(4, "big") + (4100).to_bytes(4, "big") + good[24:29]
    large += zlib.crc32(large[12:29]).to_bytes(4, "big") + good[33:]
    bad = {"1b.png": good[:900], "2b.png": large, "3b.jpg": b"\0\0\0\x18ftypheic" + bytes(200), "4b.jpg": b"<html>"}
    for name, content in bad.items():
        (root / name).write_bytes(content)
    skipped = {".ipynb_checkpoints/0.png": good, "deep/._4.png": good, "a.heic": good, "b.AVIF": good}
    for name, content in skipped.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    out, listed = tmp_path / "out.npz", tmp_path / "out.npz.left_out.txt"
    command = [root, "--model", model_file, "--device", "cpu", "--loader", backend, "--batch-size", 4]
    command = [*map(str, command), "--num-workers", "1" if backend == "dali" else "0"]
    assert embed.main([*command, "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert "6 images, " in printed.out and f"4 images left out, listed with the reasons in {listed}" in printed.out
    assert "; skipped 2 hidden files and folders" in printed.out
    assert "; skipped 1 files without the suffix of an image" in printed.out
    for suffix in (".heic", ".avif"):
        assert f"; skipped 1 {suffix} images, which are not read here; convert them" in printed.out
    reasons = [
        "truncated|broken|cut off",
        "says 5000 x 4100",
        "it is a HEIC image, which is not read here",
        "it is a web page",
    ]
    lines = listed.read_text().splitlines()
    for line, name, reason in zip(lines, bad, reasons, strict=True):
        assert re.search(rf"photos/{name} cannot be decoded: .*({reason})", line) and line in caplog.text
    assert main(faces[0] / "album", "--model", model_file, "--out", tmp_path / "good.npz") == 0
    with np.load(out) as found, np.load(tmp_path / "good.npz") as expected:
        assert found["path"].tolist() == [path.replace(str(faces[0] / "album"), str(root)) for path in expected["path"]]
        np.testing.assert_allclose(found["mu"], expected["mu"], atol=1e-5)
    assert embed.main([*command, "--strict", "--out", str(tmp_path / "strict.npz")]) == 2
    assert "1b.png cannot be decoded" in capfd.readouterr().err and not (tmp_path / "strict.npz").exists()
    for name in bad:
        (root / name).unlink()
    assert embed.main([*command, "--out", str(out)]) == 0 and not listed.exists()
