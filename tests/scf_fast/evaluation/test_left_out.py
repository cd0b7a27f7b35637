"""Images that cannot be decoded: an evaluation gives what it gives of the data without them, and says so."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast.evaluation import __main__ as command
from scf_fast.evaluation import comparison, evaluate, plots
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.inference import Decoding, Embeddings
from scf_fast.objectives import Density, Objective
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, write_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.sources.base import ImageFiles


class PixelModel:
    """An embedder: features are a picture's 4 x 4 blocks of color, kappa their contrast."""

    radius, embedding_dim, normalization, device = 64.0, 48, "insightface", torch.device("cpu")
    is_settled, outputs, objective, density, key = True, 1, Objective.SCF, Density.VMF, "pixels"

    def __init__(self, model=None, options=None):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        features = torch.nn.functional.avg_pool2d(images.float(), 28).flatten(1)
        return Embeddings(features, 6 + torch.linalg.vector_norm(features, dim=1).log())


@pytest.fixture(autouse=True)
def pixel_models(monkeypatch):
    monkeypatch.setattr(comparison, "open_embedder", PixelModel)
    monkeypatch.setattr(plots, "_png", lambda figure: b"not rendered")
    monkeypatch.setattr(evaluate.Evaluation, "draws", False)  # figures take most of the time


def picture(identity, number=0):
    rng = np.random.default_rng((identity, number))
    colors = np.random.default_rng(identity).uniform(40, 215, (4, 4, 3)) + rng.normal(size=(4, 4, 3)) * 20
    pixels = colors.clip(0, 255).astype(np.uint8).repeat(28, axis=0).repeat(28, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def huge():
    """A photo of 20 megapixels, as far as its header says."""
    file = bytearray(picture(0))
    file[16:24] = (5000).to_bytes(4, "big") + (4100).to_bytes(4, "big")
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


CORRUPT, PHONE = picture(3)[:300], b"\0\0\0\x18ftypheic" + bytes(300)
BAD = {"truncated": CORRUPT, "5000 x 4100": huge(), "it is a HEIC image, which is not read here": PHONE}


def run(out, *arguments):
    flags = ["--model", out / "m", "--out", out, "--cache", out / "cache", "--device", "cpu", "--loader", "torch"]
    return command.main([*map(str, [*arguments, *flags]), "--num-workers", "0"])


def results(out):
    found = json.loads((out / "results.json").read_text())
    notes = found.pop("notes")
    return {key: value for key, value in found.items() if key not in ("request", "model", "seconds")}, notes


def write_pairs(path, bad=(), without=()):
    """30 pairs, every second genuine; images ``bad`` are broken, pairs ``without`` are not there."""
    same = np.arange(30) % 2 == 0
    images = [picture(k if side == 0 or same[k] else k + 100, side) for k in range(30) for side in (0, 1)]
    for i, content in zip(bad, BAD.values()):
        images[i] = content
    keep = [k for k in range(30) if k not in without]
    write_verification_set(path, [images[2 * k + side] for k in keep for side in (0, 1)], same[keep])


@pytest.mark.parametrize("task", ["verify", "risk"])
def test_pairs_with_an_image_that_cannot_be_decoded_are_left_out(tmp_path, task, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.Verification, "draws", True)
    write_pairs(tmp_path / "faces.bin", bad=(6, 7, 41))
    (tmp_path / "clean").mkdir()
    write_pairs(tmp_path / "clean/faces.bin", without=(3, 20))
    assert run(tmp_path / "out", task, "--data", tmp_path / "faces.bin") == 0
    printed = capsys.readouterr()
    assert run(tmp_path / "expected", task, "--data", tmp_path / "clean/faces.bin") == 0
    (found, notes), (expected, others) = results(tmp_path / "out"), results(tmp_path / "expected")
    (note,) = (note for note in notes if note not in others)
    assert found == expected and len(notes) == len(others) + 1
    assert note.startswith("faces: 3 images cannot be decoded; 2 of 30 pairs are left out: image 6 cannot be decoded: ")
    assert note in printed.out and all(reason in note for reason in BAD)
    assert run(tmp_path / "out", task, "--data", tmp_path / "faces.bin", "--strict", "--overwrite") == 2
    assert "3 images are broken: image 6 cannot be decoded" in capsys.readouterr().err  # of the stored embeddings
    assert run(tmp_path / "new", task, "--data", tmp_path / "faces.bin", "--strict") == 2
    assert "error: image 6 cannot be decoded" in capsys.readouterr().err


def write_people(root, bad=(), without=()):
    for person in range(20):
        for number in range(3):
            name = f"{person:02d}/{number}.png"
            if name not in without:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(dict(zip(bad, BAD.values())).get(name) or picture(person, number))
    return root


def test_search_leaves_out_images_and_the_subjects_that_have_no_other(tmp_path, capsys):
    bad = ("03/0.png", "03/1.png", "03/2.png")
    gallery, probe = write_people(tmp_path / "a", bad), write_people(tmp_path / "b", bad[:1])
    clean = write_people(tmp_path / "c", without=bad), write_people(tmp_path / "d", without=bad[:1])
    (tmp_path / "a/05/._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a/05/0.heic").write_bytes(PHONE)
    assert run(tmp_path / "out", "identify", "--gallery", gallery, "--probe", probe) == 0
    assert run(tmp_path / "expected", "identify", "--gallery", clean[0], "--probe", clean[1]) == 0
    (found, notes), (expected, _) = results(tmp_path / "out"), results(tmp_path / "expected")
    assert found == expected and found["identification"]["enrolled"] == 19
    first, second, third = notes
    assert first.startswith(
        "gallery: 3 images cannot be decoded; 3 of 60 images, 1 subjects that have no other are left"
    )
    assert (
        second == "gallery: skipped 1 hidden files and folders, 1 .heic images, which are not read here; convert them."
    )
    assert third.startswith("probes: 1 images cannot be decoded; 1 of 60 images are left out: ") and "03/0.png" in third
    capsys.readouterr()
    assert run(tmp_path / "strict", "identify", "--gallery", gallery, "--probe", probe, "--strict") == 2
    assert "03/0.png cannot be decoded" in capsys.readouterr().err


def write_templates(root, bad=(), without=()):
    """20 templates of two images, two of a subject; whole templates in ``without`` are not there."""
    images = np.array([i for i in range(40) if i not in without])
    names = [f"{i}.png" for i in images]
    templates = np.arange(40) // 2
    there = np.unique(templates[images])
    first, second = np.triu_indices(20, 1)
    kept = np.isin(first, there) & np.isin(second, there)

    def gallery(name, ids):
        enrolled, probes = np.intersect1d(ids, there), np.intersect1d(np.arange(1, 20, 2), there)
        return Gallery(name, enrolled, enrolled // 2, probes, probes // 2)

    contents = {f"{i}.png": picture(i // 4, i) for i in range(40)} | dict(zip(bad, BAD.values()))
    write_template_protocol(
        root,
        "tiny",
        names=names,
        images=[contents[name] for name in names],
        template_ids=templates[images],
        media_ids=images,
        landmarks=np.tile(TEMPLATE + [2, 1], (len(images), 1, 1)),
        detector_score=1 - images / 100,
        pair_template_ids=np.stack([first, second], axis=1)[kept],
        pair_labels=(first // 2 == second // 2)[kept],
        galleries=[gallery("G1", np.arange(0, 10, 2)), gallery("G2", np.arange(10, 20, 2))],
    )
    return root


@pytest.mark.parametrize("task", ["ijb", "risk"])
def test_templates_lose_the_images_that_cannot_be_decoded(tmp_path, task):
    """One loses one of its two images, another both and with them its pairs and its place in the gallery."""
    data = write_templates(tmp_path / "data", bad=("8.png", "9.png", "30.png"))
    clean = write_templates(tmp_path / "clean", without=(8, 9, 30))
    assert run(tmp_path / "out", task, "--data", data) == 0
    assert run(tmp_path / "expected", task, "--data", clean) == 0
    (found, notes), (expected, _) = results(tmp_path / "out"), results(tmp_path / "expected")
    found_text = json.dumps(found).replace("data", "clean")
    assert json.loads(found_text) == expected
    lost = "1 templates, 19 pairs, 1 enrolled templates are left out: "
    assert notes[0].startswith(f"tiny: 3 images cannot be decoded; {lost}") and "8.png" in notes[0]


def test_what_is_left_must_measure_something(tmp_path, capsys):
    write_people(tmp_path / "a")
    for person in range(1, 20):
        for number in range(3):
            (tmp_path / f"a/{person:02d}/{number}.png").write_bytes(CORRUPT)
    assert run(tmp_path / "out", "verify", "--data", tmp_path / "a", "--pairs", 20) == 2
    assert "images cannot be decoded, and the others measure nothing; the first: " in capsys.readouterr().err
    (tmp_path / "b/x").mkdir(parents=True)
    (tmp_path / "b/x/0.png").write_bytes(CORRUPT)
    assert run(tmp_path / "out", "identify", "--gallery", tmp_path / "b", "--probe", tmp_path / "b") == 2
    assert "1 of 1 images cannot be decoded, and the others measure nothing" in capsys.readouterr().err


def store(folder, embedder, **options):
    return EmbeddingStore(embedder, folder, batch_size=2, decoding=Decoding("torch", 0), **options)


def test_store_keeps_what_is_broken_but_not_what_the_disk_refuses(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(CORRUPT if i == 3 else picture(i))
    for expected in (5, 0):
        model = PixelModel()
        found = store(tmp_path / "store", model).load(ImageFiles(paths), "images")
        assert model.seen == expected and list(found.left_out) == [3] and "3.png cannot be decoded" in found.left_out[3]
        assert found.features.isnan().all(dim=1).tolist() == [i == 3 for i in range(5)]
    refuse = {str(paths[1])}
    read = Path.read_bytes

    class Failing(ImageFiles):
        def encoded(self, i):
            if self.name(i) in refuse:
                from scf_fast.errors import UnreadableError

                raise UnreadableError(f"cannot read image {self.name(i)}: Input/output error")
            return np.frombuffer(read(Path(self.name(i))), dtype=np.uint8)

    with pytest.raises(ValueError, match=r"cannot read image .*1\.png: Input/output error"):
        store(tmp_path / "other", PixelModel()).load(Failing(paths), "images")
    assert not list((tmp_path / "other").rglob("*.npz"))
    refuse.clear()
    assert list(store(tmp_path / "other", PixelModel()).load(Failing(paths), "images").left_out) == [3]


def test_image_that_was_broken_for_a_moment_is_no_broken_image(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(picture(i))

    class Changing(ImageFiles):
        asked = 0

        def encoded(self, i):
            Changing.asked += i == 1
            return np.frombuffer(CORRUPT, np.uint8) if i == 1 and Changing.asked == 1 else super().encoded(i)

    with pytest.raises(ValueError, match=r"1\.png could not be decoded, and can be now: .*start again"):
        store(tmp_path / "store", PixelModel()).load(Changing(paths), "images")
