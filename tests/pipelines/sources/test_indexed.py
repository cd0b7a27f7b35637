import errno
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.recordio import RecordIndex


def index_files(folder):
    return sorted(folder.rglob("*.index"))


def forbid_scanning(monkeypatch):
    def scan(data, progress):
        raise AssertionError("the file was scanned although its index is up to date")

    monkeypatch.setattr("scf_fast.pipelines.sources.recordio.scan_image_records", scan)


@pytest.mark.parametrize("opener", [RecordIndex.open, open_source])
@pytest.mark.parametrize("name", ["", "train.rec"])
def test_images_and_labels(tmp_path, opener, name, records, images_of):
    source = opener(records.write(tmp_path) / name)
    assert images_of(source) == records.images
    assert source.labels.tolist() == records.labels and source.labels.dtype == np.int64 and source.num_classes == 3
    assert source.name(4) == f"{tmp_path / 'train.rec'} record 5"
    assert not source.encoded(0).flags.writeable
    order = np.array([3, 0, 5, 0])
    data, starts, lengths = source.read(order)
    assert [data[start : start + length].tobytes() for start, length in zip(starts, lengths)] == [
        records.images[i] for i in order
    ]
    assert [len(part) for part in source.read(order[:0])] == [0, 0, 0]


def test_index_is_reused_until_the_file_changes(tmp_path, monkeypatch, records, images_of):
    RecordIndex.open(records.write(tmp_path))
    before = [path.read_bytes() for path in index_files(tmp_path)]
    with monkeypatch.context() as patch:
        forbid_scanning(patch)
        assert images_of(RecordIndex.open(tmp_path)) == records.images
    records.write(tmp_path, records.images[:3], records.labels[:3])
    assert images_of(RecordIndex.open(tmp_path)) == records.images[:3]
    after = [path.read_bytes() for path in index_files(tmp_path)]
    assert len(before) == len(after) == 1 and before != after

    stat = os.stat(tmp_path / "train.rec")
    os.utime(tmp_path / "train.rec", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        forbid_scanning(patch)
        RecordIndex.open(tmp_path)


def test_cache_dir_keeps_data_sets_apart(tmp_path, records):
    for name, count in (("a", 4), ("b", 5)):
        records.write(tmp_path / name, records.images[:count], records.labels[:count])
    for name, count in (("a", 4), ("b", 5)) * 2:
        assert len(RecordIndex.open(tmp_path / name, cache_dir=tmp_path / "cache")) == count
    assert len(index_files(tmp_path / "cache")) == 2 and not index_files(tmp_path / "a")


def test_read_only_data_is_indexed_in_the_user_cache(tmp_path, monkeypatch, records, images_of):
    records.write(tmp_path / "data")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert images_of(RecordIndex.open(tmp_path / "data")) == records.images
    assert len(index_files(tmp_path / "xdg" / "scf_fast")) == 1 and not index_files(tmp_path / "data")


def test_a_user_without_a_home_indexes_beside_the_data_or_is_told_what_helps(tmp_path, monkeypatch, records, images_of):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    records.write(tmp_path / "data")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        patch.setattr("scf_fast.pipelines.sources.indexed.write_arrays", refuse)
        with pytest.raises(
            ValueError, match=r"cannot write the index .*Read-only file system; .* give another folder for"
        ):
            RecordIndex.open(tmp_path / "data")
    assert images_of(RecordIndex.open(tmp_path / "data")) == records.images and len(index_files(tmp_path / "data")) == 1


def test_pickled_copy_is_small_and_forked_process_reads(tmp_path, records, images_of):
    many = records.write(tmp_path, [b"face"] * 2000, [1] * 2000)
    source = RecordIndex.open(many)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000 and images_of(pickle.loads(pickled)) == images_of(source)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(images_of, (source,)) == [b"face"] * 2000
    child_reads = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(images_of(source) != [b"face"] * 2000)
    )
    child_reads.start()
    child_reads.join()
    assert child_reads.exitcode == 0


def test_classes_without_property_file(tmp_path, records):
    assert RecordIndex.open(records.write(tmp_path, num_classes=None)).num_classes == 3


def test_label_outside_the_classes_names_the_record(tmp_path, records):
    with pytest.raises(ValueError, match=r"train\.rec record 1 has label 2, but .*property says 2 classes; correct"):
        RecordIndex.open(records.write(tmp_path, num_classes=2))


@pytest.mark.parametrize("label", [1.5, -1, float("nan"), 2.0**25])
def test_label_that_is_no_class(tmp_path, label, records):
    with pytest.raises(
        ValueError, match=r"train\.rec: record 2 has label .*; a label must be a whole number in 0\.\.16777216"
    ):
        RecordIndex.open(records.write(tmp_path, records.images[:2], [0, label]))
    assert not index_files(tmp_path)


def test_truncated_file(tmp_path, records):
    rec = records.write(tmp_path) / "train.rec"
    os.truncate(rec, rec.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train\.rec: the file is truncated: the record at byte"):
        RecordIndex.open(tmp_path)


def test_file_that_changes_while_open(tmp_path, records):
    source = RecordIndex.open(records.write(tmp_path))
    with open(tmp_path / "train.rec", "r+b") as file:
        file.write(bytes(200))
    with pytest.raises(ValueError, match=r"train\.rec changed while in use, at byte \d+: byte 0 must start a record"):
        source.encoded(0)
    lengths = source.read(np.arange(6))[2]
    assert lengths[0] == 0 and lengths[5] == len(records.images[5])  # whether an image is there, encoded() says


def test_empty_and_imageless_files(tmp_path, records):
    (tmp_path / "train.rec").touch()
    with pytest.raises(ValueError, match=r"train\.rec: the file is empty"):
        RecordIndex.open(tmp_path)
    with pytest.raises(ValueError, match=r"it holds no image; check that it is the right one"):
        RecordIndex.open(records.write(tmp_path, [], []))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot open .*train\.rec: No such file or directory; check the path"):
        RecordIndex.open(tmp_path)


def test_parts_of_one_set(tmp_path, records, images_of):
    """Several .rec in a folder share their identities; the index lies in the folder."""
    for name, images, labels in (
        ("b", records.images[3:], records.labels[3:]),
        ("a", records.images[:3], records.labels[:3]),
    ):
        with RecordWriter(tmp_path / f"{name}.rec", tmp_path / f"{name}.idx") as writer:
            for record_id, (image, label) in enumerate(zip(images, labels), start=1):
                writer.write_image(record_id, label, image)
    source = open_source(tmp_path)
    assert images_of(source) == records.images and source.labels.tolist() == records.labels and source.num_classes == 3
    assert source.name(4) == f"{tmp_path / 'b.rec'} record 2" and source.rec_paths == [
        tmp_path / "a.rec",
        tmp_path / "b.rec",
    ]
    assert index_files(tmp_path) == [tmp_path / "recordio.index"]
    source.will_need(np.array([0, 5]))
    (tmp_path / "a.rec").unlink()
    assert images_of(open_source(tmp_path)) == records.images[3:]


def test_images_of_no_bytes_are_skipped_and_counted(tmp_path, caplog, images_of):
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        writer._write(1, 0, b"")
        writer.write_image(2, 1, b"face")
    with caplog.at_level("INFO"):
        source = open_source(tmp_path)
    assert images_of(source) == [b"face"] and source.skipped == {"empty images": 1}
    assert "1 images in RecordIO, indexed in" in caplog.text and "; skipped 1 empty images" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.write_bytes(index.read_bytes()[:-1]),
        lambda index: index.write_bytes(b"nothing"),
        lambda index: index.write_bytes(index.read_bytes()[:-70] + bytes([9]) * 70),
    ],
)
def test_damaged_index_is_made_again(tmp_path, damage, caplog, records, images_of):
    open_source(records.write(tmp_path))
    (index,) = index_files(tmp_path)
    damage(index)
    assert images_of(open_source(tmp_path)) == records.images
    assert "making the index again" in caplog.text
