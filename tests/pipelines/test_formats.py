"""Each format from a writer that is not ours, through the index and both loaders, against Pillow."""

import io
import json
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler

MAGIC = struct.pack("<I", 0xCED7230A)
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
KINDS = ["JPEG", "PNG", "JPEG", "WEBP", "PNG", "JPEG", "PNG", "JPEG"]
LABELS = [2, 0, 1, 1, 0, 2, 2, 0]


@pytest.fixture(scope="module")
def faces():
    """[(suffix, encoded)], smooth so that decoders agree."""
    rng = np.random.default_rng(0)
    found = []
    for number, kind in enumerate(KINDS):
        file = io.BytesIO()
        size = (90, 120) if number == 4 else (112, 112)
        Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).save(
            file, kind, quality=95
        )
        found.append((SUFFIXES[kind], file.getvalue()))
    return found


def frame(cflag, part):
    return MAGIC + struct.pack("<I", cflag << 29 | len(part)) + part + bytes(-len(part) % 4)


def records(folder, faces):
    """As MXNet's im2rec writes them: header and identity records, scalar labels and label arrays, a record in parts,
    and a wrong .idx.
    """
    frames = [frame(0, struct.pack("<IfQQ2f", 2, 0, 0, 0, 9, 12))]
    for number, ((_, image), label) in enumerate(zip(faces, LABELS), start=1):
        header = (
            struct.pack("<IfQQ2f", 2, 0, number, 0, label, 0.5)
            if number % 2
            else struct.pack("<IfQQ", 0, label, number, 0)
        )
        if (
            number == 3
        ):  # a magic at a multiple of 4 within the image, here between its data and its end mark, cuts the record
            frames.append(frame(1, header + image[:-2] + bytes((2 - len(image)) % 4)) + frame(3, image[-2:]))
        else:
            frames.append(frame(0, header + image))
    frames += [frame(0, struct.pack("<IfQQ2f", 2, 0, 9 + i, 0, 1, 3)) for i in range(3)]
    (folder / "train.rec").write_bytes(b"".join(frames))
    (folder / "train.idx").write_text("1\t7\n")
    return folder


def shards(folder, faces):
    for name, numbers in (("a.tar", range(5)), ("b.tar", range(5, 8))):
        with tarfile.open(folder / name, "w") as shard:
            for number in numbers:
                suffix, image = faces[number]
                label = (
                    (".cls", b"%d" % LABELS[number])
                    if number % 2
                    else (".json", json.dumps({"label": LABELS[number]}).encode())
                )
                for ending, content in ((suffix, image), label):
                    info = tarfile.TarInfo(f"{number:04d}{ending}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return folder


def files(folder, faces):
    for number, ((suffix, image), label) in enumerate(zip(faces, LABELS)):
        (folder / f"person {label} é").mkdir(exist_ok=True)
        (folder / f"person {label} é" / f"{number}{suffix}").write_bytes(image)
    return folder


def image_list(folder, faces):
    files(folder, faces)
    (folder / "list.txt").write_text(
        "".join(
            f"person {label} é/{number}{suffix} {label}\n"
            for number, ((suffix, _), label) in enumerate(zip(faces, LABELS))
        )
    )
    return folder / "list.txt"


def as_pillow_sees_it(image):
    face = Image.open(io.BytesIO(image)).convert("RGB")
    return np.asarray(face if face.size == (112, 112) else face.resize((112, 112), Image.Resampling.BILINEAR)).astype(
        float
    )


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("write", [records, shards, files, image_list])
def test_images_and_labels_reach_the_batch(tmp_path, faces, write, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    source = open_source(write(tmp_path, faces))
    with make_loader(
        source, EpochSampler(8, 4, shuffle=False), Preprocessing(horizontal_flip=False), backend=backend, num_workers=1
    ) as loader:
        batches = list(loader.batches(0))
        assert not len(loader.broken)
    order = np.argsort(LABELS, kind="stable") if write is files else np.arange(8)  # a folder is sorted by identity
    assert np.concatenate([batch.labels for batch in batches]).tolist() == np.array(LABELS)[order].tolist()
    pixels = np.concatenate([batch.images.permute(0, 2, 3, 1).double() for batch in batches]) * 127.5 + 127.5
    for face, number in zip(pixels, order):
        error = np.abs(face - as_pillow_sees_it(faces[number][1]))
        assert error.max() < 3.01 and error.mean() < 0.5
