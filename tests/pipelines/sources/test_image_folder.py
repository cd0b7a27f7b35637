import os
import pickle

import pytest

from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.image_folder import FolderIndex


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
    assert source.skipped == {"images outside the folders of identities": 1, "empty images": 1}
    assert pickle.loads(pickle.dumps(source)).encoded(3).tobytes() == b"d"
    assert (tmp_path / "data.index").exists()


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
