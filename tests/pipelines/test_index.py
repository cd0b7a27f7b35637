import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines.index import describe, main, open_source
from scf_fast.pipelines.sampling.selection import PerIdentity
from scf_fast.pipelines.sources.recordio import RecordIndex


def test_missing_and_unknown_paths(tmp_path):
    with pytest.raises(ValueError, match=r"there is no data set at .*nowhere; check the path"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"must hold train\.rec, \.tar or \.tfrecord shards, or a folder of images for each identity"
    ):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="the path of a data set must not be empty"):
        open_source("")


def test_several_sets_side_by_side(tmp_path, records, images_of):
    records.write(tmp_path / "a", num_classes=5)
    records.write(tmp_path / "b")
    (tmp_path / "c" / "someone").mkdir(parents=True)
    (tmp_path / "c" / "someone" / "1.jpg").write_bytes(b"face")
    source = open_source([tmp_path / "a", tmp_path / "b" / "train.rec", str(tmp_path / "c")])
    assert images_of(source) == [*records.images, *records.images, b"face"] and source.sizes == (6, 6, 1)
    assert (
        source.labels.tolist() == [*records.labels, *(label + 5 for label in records.labels), 8]
        and source.num_classes == 9
    )
    assert type(open_source([tmp_path / "a"])) is RecordIndex
    with pytest.raises(ValueError, match="at least one data set"):
        open_source([])


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_verify_records_broken_images_until_the_file_changes(tmp_path, capsys, records):
    images = [jpeg(i) for i in range(5)]
    images[2], images[4] = images[2][:900], b"no image"
    records.write(tmp_path, images, records.labels[:5])
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


def test_report_on_a_wrong_idx(tmp_path, capsys, records):
    records.write(tmp_path)
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
