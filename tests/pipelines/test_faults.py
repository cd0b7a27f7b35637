"""Injected faults have the consequences that docs/data.md states."""

import errno
import io
import os
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast.pipelines.formats.array_file import map_arrays, write_arrays
from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.sampling.sampler import EpochSampler

COUNT = 240


def png(shade, size=(112, 112)):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(i) for i in range(COUNT)]


def records(folder):
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        for i, image in enumerate(IMAGES):
            writer.write_image(i, i // 8, image)
    return folder / "train.rec"


def shards(folder):
    with tarfile.open(folder / "a.tar", "w") as shard:
        for i, image in enumerate(IMAGES):
            for name, content in ((f"{i:04d}.png", image), (f"{i:04d}.cls", b"%d" % (i // 8))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return folder / "a.tar"


def files(folder):
    for i, image in enumerate(IMAGES):
        (folder / "faces" / f"{i // 8:03d}").mkdir(parents=True, exist_ok=True)
        (folder / "faces" / f"{i // 8:03d}" / f"{i:04d}.png").write_bytes(image)
    return folder / "faces"


def images_list(folder):
    files(folder)
    (folder / "list.txt").write_text("".join(f"faces/{i // 8:03d}/{i:04d}.png {i // 8}\n" for i in range(COUNT)))
    return folder / "list.txt"


def loader_of(source, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    return make_loader(
        source,
        EpochSampler(COUNT, 8, seed=1),
        backend=backend,
        num_workers=2 if backend == "dali" else 0,
        on_broken="replace",
    )


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize(
    ("make", "vanish"),
    [
        (records, lambda path: os.truncate(path, 0)),
        (shards, lambda path: os.truncate(path, 0)),
        (files, shutil.rmtree),
        (images_list, lambda path: shutil.rmtree(path.with_name("faces"))),
    ],
)
def test_data_that_vanishes_ends_the_epoch_with_one_error(tmp_path, caplog, backend, make, vanish):
    path = make(tmp_path)
    source = open_source(path)
    with loader_of(source, backend) as loader:
        batches = loader.batches(0)
        next(batches)
        vanish(path)
        with pytest.raises(
            ValueError,
            match=r"/(train\.rec|a\.tar|faces/\d+/\d+\.png).* and the 99 images after it cannot be read or decoded: .*"
            "; check that the data is still there",
        ):
            list(batches)
        assert len(loader.broken) < COUNT  # the search for a good image ended, it did not go through millions


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_input_output_errors_are_told_apart_by_their_number(tmp_path, monkeypatch, backend):
    """A bad sector costs an image, a dead disk ends the run; both name the file."""
    source = open_source(records(tmp_path))
    bad = {int(source._offsets[17])}

    def fails(read):
        def wrapped(descriptor, what, offset):
            if bad is None or offset in bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, what, offset)

        return wrapped

    monkeypatch.setattr(os, "pread", fails(os.pread))
    monkeypatch.setattr(os, "preadv", fails(os.preadv))
    with loader_of(source, backend) as loader:
        shown = torch.cat([batch.indices for batch in loader.batches(0)]).tolist()
        assert sorted(shown) == sorted([*(i for i in range(COUNT) if i != 17), 18])
        assert loader.broken.found == {
            17: f"cannot read image 17 in {tmp_path / 'train.rec'}: Input/output error; check that the data is still "
            "there"
        }
        bad = None
        with pytest.raises(
            ValueError, match=r"train\.rec.* and the 99 images after it cannot be read or decoded: .*Input/output error"
        ):
            list(loader.batches(1))


def test_full_disk_leaves_no_half_index(tmp_path, monkeypatch):
    path = records(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ValueError,
            match=r"cannot write the index .*train\.rec\.index: No space left on device; make room there, or give "
            r"another",
        ):
            open_source(path)
        assert sorted(tmp_path.iterdir()) == before
    assert len(open_source(path)) == COUNT


def read_only(patch, folder):
    """As a read-only mount, also where the tests run as root."""
    access = os.access
    patch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode == os.W_OK and str(path) == str(folder))
    )


def test_stale_index_in_a_read_only_folder(tmp_path, monkeypatch):
    """As when a data set was copied with its index: new dates. The new index goes to the cache, and is found there."""
    data = tmp_path / "data"
    data.mkdir()
    path = records(data)
    open_source(path)
    os.utime(path, (1, 1))
    stale = (data / "train.rec.index").read_bytes()
    read_only(monkeypatch, data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_source(path)) == COUNT and (data / "train.rec.index").read_bytes() == stale
    (index,) = (tmp_path / "cache").rglob("*.index")
    monkeypatch.setattr("scf_fast.pipelines.sources.recordio.scan_image_records", None)
    assert open_source(path)._index_path == index


@pytest.mark.parametrize("make", [records, shards, files, images_list])
def test_dates_in_the_future_are_dates(tmp_path, monkeypatch, make):
    """Only a change of a date counts: a clock that jumps invalidates no index, and a later change is still noticed."""
    path = make(tmp_path)
    future = time.time() + 1e8
    for place in (path, *path.rglob("*")):
        os.utime(place, (future, future))
    kind = type(open_source(path))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "_scan", None)
        patch.setattr(time, "time", lambda: 0.0)
        assert len(open_source(path)) == COUNT
    scanned = []
    monkeypatch.setattr(
        kind,
        "_scan",
        classmethod(lambda cls, *arguments, scan=kind._scan.__func__: scanned.append(1) or scan(cls, *arguments)),
    )
    os.utime(path)
    assert len(open_source(path)) == COUNT and scanned


TAMPERINGS = {
    "labels below 0": lambda meta, arrays: arrays["labels"].__setitem__(3, -1),
    "labels that are other": lambda meta, arrays: arrays["labels"].__setitem__(3, 99),
    "labels of another type": lambda meta, arrays: arrays.update(labels=arrays["labels"].astype(float)),
    "labels of another shape": lambda meta, arrays: arrays.update(labels=arrays["labels"][:, None]),
    "no labels": lambda meta, arrays: arrays.pop("labels"),
    "offsets below 0": lambda meta, arrays: arrays["offsets"].__setitem__(0, -5),
    "fewer offsets": lambda meta, arrays: arrays.update(offsets=arrays["offsets"][1:]),
    "files without end": lambda meta, arrays: arrays.update(first=np.array([0, 10**9])),
    "broken images that are none": lambda meta, arrays: arrays.update(broken=np.array([COUNT])),
    "text for numbers": lambda meta, arrays: meta.update(largest_label="29"),
    "a list for a dict": lambda meta, arrays: meta.update(skipped=[1]),
    "no version": lambda meta, arrays: meta.pop("version"),
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS)
def test_index_that_contradicts_itself_is_made_again(tmp_path, caplog, tamper):
    """With checksums that are right: by intent, or by another program."""
    path = records(tmp_path)
    open_source(path)
    index = tmp_path / "train.rec.index"
    meta, arrays = map_arrays(index)
    arrays = {name: array.copy() for name, array in arrays.items()}
    tamper(meta, arrays)
    write_arrays(index, meta, arrays)
    source = open_source(path)
    assert "making the index again" in caplog.text
    assert [source.encoded(i).tobytes() for i in range(COUNT)] == IMAGES and source.labels.tolist() == [
        i // 8 for i in range(COUNT)
    ]


def test_files_that_would_wait_or_fill_memory(tmp_path):
    """A pipe, a device, a folder, and a file of a terabyte that is nearly all hole."""
    folder = tmp_path / "faces" / "someone"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", 1 << 40)
    (folder / "good.png").write_bytes(IMAGES[0])
    names = ["pipe.png", "zero.png", "huge.png", "good.png", ".", "\0.png"]
    (tmp_path / "list.txt").write_text("".join(f"faces/someone/{name} 0\n" for name in names))
    source = open_source(tmp_path / "list.txt")
    assert source.encoded(3).tobytes() == IMAGES[0]
    for i, reason in (
        (0, "must be a regular file"),
        (1, "must be a regular file"),
        (2, "at most 33554432 bytes and has 1099511627776"),
        (4, "must be a regular file"),
        (5, "no file can have that name"),
    ):
        with pytest.raises(ValueError, match=reason):
            source.encoded(i)
    data, starts, lengths = source.read(np.arange(6))
    assert lengths.tolist() == [0, 0, 0, len(IMAGES[0]), 0, 0] and data.tobytes() == IMAGES[0] and starts[3] == 0
    assert len(open_source(tmp_path / "faces")) == 2  # what is a regular file


def test_huge_records_are_broken_images(tmp_path):
    """40 MB that are nearly all hole."""
    path = records(tmp_path)
    start = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write((0xCED7230A).to_bytes(4, "little") + (40 << 20).to_bytes(4, "little") + bytes(24) + b"\xff\xd8")
        file.truncate(start + 8 + (40 << 20))
    source = open_source(path)
    assert len(source) == COUNT + 1 and source.read(np.array([COUNT]))[2].tolist() == [0]
    with pytest.raises(
        ValueError, match=r"image 240 in .*train\.rec must have at most 33554432 bytes and has 41943048"
    ):
        source.encoded(COUNT)


def test_huge_tar_members_are_broken_images(tmp_path):
    """5 GB that are all hole."""
    with open(tmp_path / "a.tar", "wb") as file:
        for name, size in (("a.cls", 1), ("a.png", 5 << 30)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf() + (b"7" + bytes(511) if size == 1 else b""))
        file.truncate(file.tell() + (5 << 30) + 1024)
    source = open_source(tmp_path / "a.tar")
    assert source.labels.tolist() == [7] and source.read(np.array([0]))[2].tolist() == [0]
    with pytest.raises(ValueError, match=r"image 0 in .*a\.tar must have at most 33554432 bytes"):
        source.encoded(0)
