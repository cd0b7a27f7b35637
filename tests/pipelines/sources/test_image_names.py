"""One rule for all commands: the same folder, as people have them, through every way in."""

import os

import numpy as np
import pytest

from scf_fast.evaluation.datasets import open_pair_sets, open_subjects
from scf_fast.inference_arguments import find_images
from scf_fast.pipelines import index
from scf_fast.pipelines.index import open_source

PEOPLE = [f"person {i:02d}" for i in range(20)]
GOOD = [f"{person}/{name}" for person in PEOPLE for name in ("0.jpg", "1.JPEG")]
CLUTTER = {
    "hidden files and folders": [
        "person 01/._0.jpg",
        "person 02/.ipynb_checkpoints/0-checkpoint.jpg",
        ".ipynb_checkpoints/0.jpg",
        "person 03/.DS_Store",
        ".DS_Store",
    ],
    "folders of a system or a program (__MACOSX, @eaDir, lost+found, ...)": [
        "__MACOSX/person 01/0.jpg",
        "@eaDir/0.jpg",
        "person 04/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        "lost+found/0.jpg",
        "$RECYCLE.BIN/0.jpg",
    ],
    "files without the suffix of an image": ["person 05/Thumbs.db", "person 05/desktop.ini", "person 05/0.jpg.part"],
    ".heic images, which are not read here; convert them": ["person 06/photo.HEIC"],
    ".avif images, which are not read here; convert them": ["person 06/photo.avif"],
    "empty images": ["person 07/2.jpg"],
    "links to folders below the first level": ["person 08/back"],
    "images that are no regular files, or links that lead nowhere": ["person 09/gone.jpg"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("people") / "set"
    for name in [*GOOD, *(name for names in CLUTTER.values() for name in names)]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("back"):
            path.symlink_to(root)
        elif name.endswith("gone.jpg"):
            path.symlink_to(root / "nowhere")
        else:
            path.write_bytes(b"" if name.endswith("2.jpg") else b"a face")
    return root


def images_in_training(root):
    source = open_source(root)
    assert source.labels.tolist() == np.repeat(np.arange(20), 2).tolist() and source.num_classes == 20
    return [source.name(i) for i in range(len(source))], source.skipped


def images_to_embed(root):
    found = find_images([root])
    return list(map(str, found.paths)), found.skipped


def images_to_identify(root):
    subjects = open_subjects(root)
    assert subjects.names.tolist() == np.repeat(PEOPLE, 2).tolist()
    return [subjects.source.name(i) for i in range(len(subjects.source))], subjects.skipped


def images_to_verify(root):
    pairs = open_pair_sets([root], num_pairs=20)["set"]
    names = sorted({pairs.source.name(i) for i in range(len(pairs.source))})
    assert {name.rpartition("/")[0] for name in names} == {str(root / person) for person in PEOPLE}
    assert set(names) <= {str(root / name) for name in GOOD}
    return [str(root / name) for name in GOOD], pairs.skipped


@pytest.mark.parametrize(
    "find", [images_in_training, images_to_embed, images_to_identify, images_to_verify], ids=lambda find: find.__name__
)
def test_every_command_finds_the_same_images_and_counts_the_rest(folder, find):
    names, skipped = find(folder)
    assert names == [str(folder / name) for name in GOOD]
    assert skipped == {reason: len(found) for reason, found in CLUTTER.items()}


def test_report_shows_what_was_skipped(folder, capsys):
    assert index.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for reason, found in CLUTTER.items():
        assert f"skipped                {len(found)} {reason}" in lines


def test_hidden_shards_and_sets_are_none(tmp_path):
    """What macOS leaves beside every file on a disk that is not its own."""
    from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
    from scf_fast.pipelines.formats.recordio import RecordWriter
    from scf_fast.pipelines.formats.tfrecord import write_shard as write_tfrecords
    from scf_fast.pipelines.sources.tar import write_shard as write_tar
    from scf_fast.pipelines.sources.tfrecord import TFRecordIndex

    for kind in ("tar", "tfrecord", "rec", "bin"):
        (tmp_path / kind).mkdir()
    write_tar(tmp_path / "tar/0.tar", [("0", ".jpg", b"face", 0)])
    write_tfrecords(tmp_path / "tfrecord/0.tfrecord", [(b"face", 0)])
    with RecordWriter(tmp_path / "rec/part.rec", tmp_path / "rec/part.idx") as writer:
        writer.write_image(1, 0, b"face")
    write_verification_set(tmp_path / "bin/lfw.bin", [b"face"] * 20, [True, False] * 5)
    for name in ("tar/._0.tar", "tfrecord/._0.tfrecord", "rec/._part.rec", "bin/._lfw.bin"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7Mac OS X")
    for kind in ("tar", "tfrecord", "rec"):
        assert open_source(tmp_path / kind).encoded(0).tobytes() == b"face"
    assert isinstance(open_source(tmp_path / "tfrecord"), TFRecordIndex)
    assert list(open_pair_sets([tmp_path / "bin"])) == ["lfw"]


def test_a_file_that_is_given_is_taken_as_it_is(folder):
    given = [folder / "person 01/._0.jpg", folder / "person 06/photo.HEIC"]
    assert find_images(given).paths == given
    assert find_images([folder / "@eaDir"]).paths == [folder / "@eaDir/0.jpg"]


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fsencode(path).endswith(b"person 03"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot list .*person 03: Permission denied; restore it or leave it out"):
        find_images([folder])
