import os
import pickle

import numpy as np
import pytest

from scf_fast.pipelines.formats.array_file import write_arrays
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.image_folder import FolderIndex, _pack


def fill(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


FILES = {
    "Zoë Ö/1.jpg": b"a",
    "Ann Lee/two words.PNG": b"b",
    "Ann Lee/older/3.webp": b"c",
    "bob/4.pgm": b"d",
    "bob/notes.txt": b"x",
    "bob/.hidden.jpg": b"x",
    ".cache/5.jpg": b"x",
    "stray.jpg": b"x",
    "bob/6.jpg": b"",
}


def test_identities_in_the_order_of_their_names(tmp_path):
    source = open_source(fill(tmp_path / "data", FILES))
    assert isinstance(source, FolderIndex)
    assert [source.encoded(i).tobytes() for i in range(4)] == [b"b", b"c", b"a", b"d"] and len(source) == 4
    assert [source.name(i) for i in range(4)] == [
        str(tmp_path / "data" / name) for name in list(FILES)[1:3] + list(FILES)[:1] + list(FILES)[3:4]
    ]
    assert source.labels.tolist() == [0, 0, 1, 2] and source.num_classes == 3
    assert source.skipped == {
        "images outside the folders of identities": 1,
        "empty images": 1,
        "hidden files and folders": 2,
        "files without the suffix of an image": 1,
    }
    assert pickle.loads(pickle.dumps(source)).encoded(3).tobytes() == b"d"
    assert (tmp_path / "data.index").exists()


def test_folders_without_an_image_keep_their_numbers_and_are_named(tmp_path):
    """The numbers of the others do not depend on what comes and goes in them."""
    root = fill(tmp_path / "data", {"ann/1.jpg": b"a", "bob/1.heic": b"b", "carl/1.jpg": b"c", "dora/1.jpg": b""})
    source = FolderIndex.open(root)
    assert source.labels.tolist() == [0, 2] and source.num_classes == 3
    assert source.skipped["folders without an image, whose class numbers stay unused"] == 2
    assert source.remarks() == ["without an image       bob, dora"]
    fill(root, {"bob/1.jpg": b"b"})
    source = FolderIndex.open(root)
    assert source.labels.tolist() == [0, 1, 2] and source.remarks() == ["without an image       dora"]
    numbered = fill(
        tmp_path / "numbered", {"0/a.jpg": b"a", "7/b.txt": b"", "9/a.jpg": b"a", "property": b"20,112,112"}
    )
    assert FolderIndex.open(numbered).remarks() == ["without an image       7"]


def test_index_of_an_earlier_version_is_kept_and_says_what_it_counts(tmp_path, caplog):
    """It has no rules noted, and took what a NAS keeps for itself as an identity; numbers of a run go by it."""
    root = fill(tmp_path / "data", {"@eaDir/1.jpg/thumb.jpg": b"t", "ann/1.jpg": b"a", "bob/1.jpg": b"b"})
    source = FolderIndex.open(root)
    assert source.labels.tolist() == [0, 1] and source.remarks() == []
    arrays = {
        "labels": np.arange(3),
        "broken": np.empty(0, dtype=np.int64),
        **_pack("files", [b"@eaDir/1.jpg/thumb.jpg", b"ann/1.jpg", b"bob/1.jpg"]),
        **_pack("folders", [b"", b"@eaDir", b"@eaDir/1.jpg", b"ann", b"bob"]),
    }
    meta = {**source._meta, "largest_label": 2, "fingerprint": FolderIndex._fingerprint(root, arrays)}
    del meta["rules"]
    write_arrays(tmp_path / "data.index", meta, arrays)
    source = FolderIndex.open(root)
    assert source.labels.tolist() == [0, 1, 2] and source.encoded(1).tobytes() == b"a"
    assert "counts the images in @eaDir, which a system or a program made for itself; for a new run" in caplog.text
    first, second = source.remarks()
    assert "of an earlier version, which chose the images in another way; runs that began with it go on" in first
    assert first.endswith(f"for a new one delete {tmp_path / 'data.index'}")
    assert second == "counted as images      those in @eaDir, which a system or a program made for itself"


def test_an_identity_may_be_a_link(tmp_path):
    fill(tmp_path / "elsewhere", {"1.jpg": b"a", "deeper/2.jpg": b"b"})
    data = fill(tmp_path / "data", {"ann/0.jpg": b"c", "carl/0.jpg": b"d"})
    (data / "bob").symlink_to(tmp_path / "elsewhere")
    (data / "carl/loop").symlink_to(data)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    source = open_source(data)
    assert [source.encoded(i).tobytes() for i in range(len(source))] == [b"c", b"a", b"b", b"d"]
    assert source.labels.tolist() == [0, 1, 1, 2]
    (tmp_path / "elsewhere/3.jpg").write_bytes(b"e")
    assert len(open_source(data)) == 5


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/data/\xff\xfe"
    os.makedirs(folder)
    with open(folder + b"/\x80.jpg", "wb") as file:
        file.write(b"face")
    source = FolderIndex.open(tmp_path / "data")
    assert source.encoded(0).tobytes() == b"face"


def test_names_are_numbers_where_a_property_file_says_so(tmp_path):
    root = fill(tmp_path / "data", {"0000010/a.jpg": b"a", "0000002/b.jpg": b"b", "property": b"20,112,112"})
    source = FolderIndex.open(root)
    assert source.labels.tolist() == [2, 10] and source.num_classes == 20
    fill(root, {"someone/c.jpg": b"c"})
    with pytest.raises(
        ValueError, match=r"property file, so its folders must be named by class numbers, but one is 'someone'"
    ):
        FolderIndex.open(root)
    (root / "property").unlink()
    assert FolderIndex.open(root).labels.tolist() == [0, 1, 2]


def test_index_notices_files_that_come_and_go(tmp_path, monkeypatch):
    root = fill(tmp_path / "data", FILES)
    FolderIndex.open(root)
    with monkeypatch.context() as patch:
        patch.setattr(FolderIndex, "_scan", None)
        assert len(FolderIndex.open(root)) == 4
    fill(root, {"Ann Lee/older/new.jpg": b"n"})
    assert len(FolderIndex.open(root)) == 5
    (root / "bob/4.pgm").unlink()
    assert len(FolderIndex.open(root)) == 4
    fill(root, {"carl/1.jpg": b"n"})
    assert FolderIndex.open(root).num_classes == 4


def test_file_that_is_gone_is_named(tmp_path):
    source = FolderIndex.open(fill(tmp_path / "data", FILES))
    (tmp_path / "data/bob/4.pgm").unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*bob/4\.pgm: No such file"):
        source.encoded(3)


def test_folders_without_identities(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold train\.rec, \.tar or \.tfrecord shards, or a folder of images for each identity"
    ):
        open_source(fill(tmp_path / "flat", {"1.jpg": b"a"}))
    with pytest.raises(ValueError, match=r"it holds no image; .*skipped 1 images outside the folders of identities"):
        open_source(fill(tmp_path / "flat", {"empty/readme.txt": b"a"}))
    with pytest.raises(ValueError, match=r"must be a folder; check the path"):
        FolderIndex.open(tmp_path / "none")


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = fill(tmp_path / "data", FILES)
    scandir = os.scandir

    def refuse(path):
        if os.fsencode(path).endswith(b"bob"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot list .*data/bob: Permission denied; restore it or leave it out"):
        FolderIndex.open(root)
