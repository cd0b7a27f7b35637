import io
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines.formats.recordio import RecordWriter, write_property
from scf_fast.pipelines.index import RecordIndex, describe, main, open_source
from scf_fast.pipelines.sampling.selection import PerIdentity

IMAGES = [bytes([i]) * (i + 1) for i in range(6)]
LABELS = [2, 0, 1, 1, 0, 2]


def write(folder, images=IMAGES, labels=LABELS, num_classes=3):
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        writer.write_header_record(len(images), 1)
        for record_id, (image, label) in enumerate(zip(images, labels), start=1):
            writer.write_image(record_id, label, image)
        writer.write_identity_record(len(images) + 1, 1, len(images))
    if num_classes:
        write_property(folder, num_classes)
    return folder


def images_of(source):
    return [source.encoded(i).tobytes() for i in range(len(source))]


def index_files(folder):
    return sorted(folder.rglob("*.index"))


def forbid_scanning(monkeypatch):
    def scan(data, progress):
        raise AssertionError("the file was scanned although its index is up to date")

    monkeypatch.setattr("scf_fast.pipelines.sources.recordio.scan_image_records", scan)


@pytest.mark.parametrize("opener", [RecordIndex.open, open_source])
@pytest.mark.parametrize("name", ["", "train.rec"])
def test_images_and_labels(tmp_path, opener, name):
    source = opener(write(tmp_path) / name)
    assert images_of(source) == IMAGES
    assert source.labels.tolist() == LABELS and source.labels.dtype == np.int64 and source.num_classes == 3
    assert source.name(4) == f"{tmp_path / 'train.rec'} record 5"
    assert not source.encoded(0).flags.writeable
    order = np.array([3, 0, 5, 0])
    data, starts, lengths = source.read(order)
    assert [data[start : start + length].tobytes() for start, length in zip(starts, lengths)] == [
        IMAGES[i] for i in order
    ]
    assert [len(part) for part in source.read(order[:0])] == [0, 0, 0]


def test_index_is_reused_until_the_file_changes(tmp_path, monkeypatch):
    RecordIndex.open(write(tmp_path))
    before = [path.read_bytes() for path in index_files(tmp_path)]
    with monkeypatch.context() as patch:
        forbid_scanning(patch)
        assert images_of(RecordIndex.open(tmp_path)) == IMAGES
    write(tmp_path, IMAGES[:3], LABELS[:3])
    assert images_of(RecordIndex.open(tmp_path)) == IMAGES[:3]
    after = [path.read_bytes() for path in index_files(tmp_path)]
    assert len(before) == len(after) == 1 and before != after

    stat = os.stat(tmp_path / "train.rec")
    os.utime(tmp_path / "train.rec", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        forbid_scanning(patch)
        RecordIndex.open(tmp_path)


def test_cache_dir_keeps_data_sets_apart(tmp_path):
    for name, count in (("a", 4), ("b", 5)):
        write(tmp_path / name, IMAGES[:count], LABELS[:count])
    for name, count in (("a", 4), ("b", 5)) * 2:
        assert len(RecordIndex.open(tmp_path / name, cache_dir=tmp_path / "cache")) == count
    assert len(index_files(tmp_path / "cache")) == 2 and not index_files(tmp_path / "a")


def test_read_only_data_is_indexed_in_the_user_cache(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert images_of(RecordIndex.open(tmp_path / "data")) == IMAGES
    assert len(index_files(tmp_path / "xdg" / "scf_fast")) == 1 and not index_files(tmp_path / "data")


def test_pickled_copy_is_small_and_forked_process_reads(tmp_path):
    many = write(tmp_path, [b"face"] * 2000, [1] * 2000)
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


def test_classes_without_property_file(tmp_path):
    assert RecordIndex.open(write(tmp_path, num_classes=None)).num_classes == 3


def test_label_outside_the_classes_names_the_record(tmp_path):
    with pytest.raises(ValueError, match=r"train\.rec record 1 has label 2, but .*property says 2 classes; correct"):
        RecordIndex.open(write(tmp_path, num_classes=2))


@pytest.mark.parametrize("label", [1.5, -1, float("nan"), 2.0**25])
def test_label_that_is_no_class(tmp_path, label):
    with pytest.raises(
        ValueError, match=r"train\.rec: record 2 has label .*; a label must be a whole number in 0\.\.16777216"
    ):
        RecordIndex.open(write(tmp_path, IMAGES[:2], [0, label]))
    assert not index_files(tmp_path)


def test_truncated_file(tmp_path):
    rec = write(tmp_path) / "train.rec"
    os.truncate(rec, rec.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train\.rec: the file is truncated: the record at byte"):
        RecordIndex.open(tmp_path)


def test_file_that_changes_while_open(tmp_path):
    source = RecordIndex.open(write(tmp_path))
    with open(tmp_path / "train.rec", "r+b") as file:
        file.write(bytes(200))
    with pytest.raises(ValueError, match=r"train\.rec changed while in use, at byte \d+: byte 0 must start a record"):
        source.encoded(0)
    lengths = source.read(np.arange(6))[2]
    assert lengths[0] == 0 and lengths[5] == len(IMAGES[5])  # whether an image is there, encoded() says


def test_empty_and_imageless_files(tmp_path):
    (tmp_path / "train.rec").touch()
    with pytest.raises(ValueError, match=r"train\.rec: the file is empty"):
        RecordIndex.open(tmp_path)
    with pytest.raises(ValueError, match=r"it holds no image; check that it is the right one"):
        RecordIndex.open(write(tmp_path, [], []))


def test_missing_and_unknown_paths(tmp_path):
    with pytest.raises(ValueError, match=r"cannot open .*train\.rec: No such file or directory; check the path"):
        RecordIndex.open(tmp_path)
    with pytest.raises(ValueError, match=r"there is no data set at .*nowhere; check the path"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"must hold train\.rec, \.tar or \.tfrecord shards, or a folder of images for each identity"
    ):
        open_source(tmp_path)


def test_parts_of_one_set(tmp_path):
    """Several .rec in a folder share their identities; the index lies in the folder."""
    for name, images, labels in (("b", IMAGES[3:], LABELS[3:]), ("a", IMAGES[:3], LABELS[:3])):
        with RecordWriter(tmp_path / f"{name}.rec", tmp_path / f"{name}.idx") as writer:
            for record_id, (image, label) in enumerate(zip(images, labels), start=1):
                writer.write_image(record_id, label, image)
    source = open_source(tmp_path)
    assert images_of(source) == IMAGES and source.labels.tolist() == LABELS and source.num_classes == 3
    assert source.name(4) == f"{tmp_path / 'b.rec'} record 2" and source.rec_paths == [
        tmp_path / "a.rec",
        tmp_path / "b.rec",
    ]
    assert index_files(tmp_path) == [tmp_path / "recordio.index"]
    source.will_need(np.array([0, 5]))
    (tmp_path / "a.rec").unlink()
    assert images_of(open_source(tmp_path)) == IMAGES[3:]


def test_several_sets_side_by_side(tmp_path):
    write(tmp_path / "a", num_classes=5)
    write(tmp_path / "b")
    (tmp_path / "c" / "someone").mkdir(parents=True)
    (tmp_path / "c" / "someone" / "1.jpg").write_bytes(b"face")
    source = open_source([tmp_path / "a", tmp_path / "b" / "train.rec", str(tmp_path / "c")])
    assert images_of(source) == [*IMAGES, *IMAGES, b"face"] and source.sizes == (6, 6, 1)
    assert source.labels.tolist() == [*LABELS, *(label + 5 for label in LABELS), 8] and source.num_classes == 9
    assert type(open_source([tmp_path / "a"])) is RecordIndex
    with pytest.raises(ValueError, match="at least one data set"):
        open_source([])


def test_images_of_no_bytes_are_skipped_and_counted(tmp_path, caplog):
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
def test_damaged_index_is_made_anew(tmp_path, damage, caplog):
    open_source(write(tmp_path))
    (index,) = index_files(tmp_path)
    damage(index)
    assert images_of(open_source(tmp_path)) == IMAGES
    assert "making the index again" in caplog.text


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_verify_records_broken_images_until_the_file_changes(tmp_path, capsys):
    images = [jpeg(i) for i in range(5)]
    images[2], images[4] = images[2][:900], b"no image"
    write(tmp_path, images, LABELS[:5])
    assert main([str(tmp_path)]) == 0
    report = capsys.readouterr().out
    for line in (
        "format                 RecordIO",
        "images                 5",
        "identities             3 with images, 0 numbers without",
        "images per identity    1 to 2, median 2, mean 1.7",
        "kind                   4 JPEG 112 x 112",
        "broken                 not known",
        "unreadable             1 unknown format",
        "train.idx              agrees; not used",
    ):
        assert line in report
    assert main([str(tmp_path), "--verify", "--workers", "1"]) == 1
    report = capsys.readouterr().out
    assert "broken                 2 of 5" in report
    assert (
        f"broken                 {tmp_path / 'train.rec'} record 3 cannot be decoded: image file is truncated" in report
    )
    source = open_source(tmp_path)
    assert (
        source.broken.tolist() == [2, 4]
        and source.verified
        and pickle.loads(pickle.dumps(source)).broken.tolist() == [2, 4]
    )
    assert open_source([tmp_path, tmp_path]).broken.tolist() == [2, 4, 7, 9]
    os.utime(tmp_path / "train.rec")
    assert not len(open_source(tmp_path).broken)


def test_report_on_labels_with_wide_gaps(tmp_path):
    """A table of all numbers up to the largest would take 16 GB."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.txt").write_text("a.jpg 0\na.jpg 2147483647\n")
    source = open_source(tmp_path / "list.txt")
    assert "identities             2 with images, 2,147,483,646 numbers without" in describe(source)
    assert PerIdentity(source.labels, 1).size == 2


def test_report_on_a_wrong_idx(tmp_path, capsys):
    write(tmp_path)
    (tmp_path / "train.idx").write_text("1\t0\n2\t40\n")
    assert (
        main([str(tmp_path)]) == 0
        and "train.idx              wrong: 5 images are not where it says; not used" in capsys.readouterr().out
    )
    (tmp_path / "train.idx").write_text("not an index")
    assert main([str(tmp_path)]) == 0 and "train.idx              wrong: 6 images" in capsys.readouterr().out
    (tmp_path / "train.idx").unlink()
    assert main([str(tmp_path)]) == 0 and "train.idx              missing; not needed" in capsys.readouterr().out


def test_command_line_errors_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err
        == f"python -m scf_fast.pipelines.index: error: there is no data set at {tmp_path / 'none'}; check the path\n"
    )


def test_unreadable_directory(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot list .*: Permission denied; check its permissions"):
        open_source(tmp_path)
