import numpy as np
import pytest
from PIL import Image

from scf_fast.evaluation.alignment import AlignedFaces
from scf_fast.evaluation.datasets import open_pair_sets, open_subjects, open_template_set, read_pair_list
from scf_fast.pipelines.convert import FORMATS, convert
from scf_fast.pipelines.evaluation_sets.template_protocol import write_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.sources.base import EncodedImages


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (112, 112)).save(path)


def bin_file(path, same=(True, False) * 5):
    write_verification_set(path, [b"image"] * 2 * len(same), same)


def test_files_and_folders_of_pairs(tmp_path):
    bin_file(tmp_path / "sets" / "verification" / "lfw.bin")
    bin_file(tmp_path / "cfp_fp.bin")
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "own.txt").write_text("a/1.png a/1.png 1\na/1.png a/1.png 0\n\n" * 5)
    (tmp_path / "cfp_fp.csv").write_text("image,severity\n" + "".join(f"{i},0.5\n" for i in range(20)))
    sets = open_pair_sets([tmp_path / "sets", tmp_path / "cfp_fp.bin", tmp_path / "own.txt"])
    assert list(sets) == ["lfw", "cfp_fp", "own"]
    assert sets["lfw"].severity is None and sets["cfp_fp"].severity.tolist() == [0.5] * 20
    assert sets["own"].same.tolist() == [True, False] * 5 and len(sets["own"].source) == 20
    assert sets["own"].source.name(1) == str(tmp_path / "a" / "1.png")


@pytest.mark.parametrize("same", [[True, False] * 4, [True] * 10])
def test_sets_that_measure_nothing_are_refused_by_name(tmp_path, same):
    bin_file(tmp_path / "few.bin", same)
    with pytest.raises(ValueError, match=r"few\.bin must have at least 10 pairs"):
        open_pair_sets([tmp_path])


def test_two_sets_of_one_name_are_refused(tmp_path):
    bin_file(tmp_path / "a" / "lfw.bin")
    bin_file(tmp_path / "b" / "lfw.bin")
    with pytest.raises(ValueError, match="two verification sets are named lfw"):
        open_pair_sets([tmp_path / "a", tmp_path / "b"])


def test_a_folder_without_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold verification sets"):
        open_pair_sets([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under"):
        open_pair_sets([tmp_path])


def test_pairs_of_an_identity_folder_are_labeled_by_folder(tmp_path):
    for identity in range(20):
        for number in range(2):
            draw(tmp_path / "people" / f"{identity}" / f"{number}.png")
    pairs = open_pair_sets([tmp_path / "people"], num_pairs=20, seed=3)["people"]
    names = np.array([pairs.source.name(i).split("/")[-2:] for i in range(40)]).reshape(20, 2, 2)
    np.testing.assert_array_equal(names[:, 0, 0] == names[:, 1, 0], pairs.same)
    assert pairs.same.sum() == 10 and pairs.drawn.endswith("drawn with seed 3")
    (tmp_path / "list.txt").write_text(pairs.as_list())
    source, same = read_pair_list(tmp_path / "list.txt")
    assert np.array_equal(same, pairs.same) and [source.name(i) for i in range(40)] == [
        pairs.source.name(i) for i in range(40)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png b.png\n", "line 1 must be `path path label`"),
        ("a.png a.png 1\n\na.png a.png 2\n", "line 3 must be `path path label`"),
        ("a.png b.png 1\n", r"line 1 names .*b\.png, and there is no such file"),
        (b"\xff\xfe", "must be text in UTF-8, and is text in UTF-16; save it in UTF-8"),
        (None, "cannot read the pairs"),
    ],
)
def test_pair_lists_that_are_refused(tmp_path, text, message):
    draw(tmp_path / "a.png")
    if text is not None:
        (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_pair_list(tmp_path / "list.txt")


@pytest.mark.parametrize(("prefix", "name"), [("ijbc", "IJB-C"), ("synthetic", "synthetic")])
def test_templates_are_aligned_unless_they_are_already(tmp_path, prefix, name):
    count = 12
    write_template_protocol(
        tmp_path,
        prefix,
        names=[f"{i}.jpg" for i in range(count)],
        images=[b"image"] * count,
        template_ids=np.arange(count),
        media_ids=np.arange(count),
        landmarks=np.tile(TEMPLATE, (count, 1, 1)),
        detector_score=np.ones(count),
        pair_template_ids=np.stack([np.arange(count), np.arange(count)[::-1]], 1),
        pair_labels=np.arange(count) % 2 == 0,
    )
    templates = open_template_set(tmp_path)
    assert (
        isinstance(templates.source, AlignedFaces)
        and templates.name == name
        and templates.galleries == []
        and templates.severity is None
    )
    assert open_template_set(tmp_path, align=False).source is not templates.source
    assert not isinstance(open_template_set(tmp_path, align=False).source, AlignedFaces)
    (tmp_path / "meta" / f"{prefix}_template_pair_label.txt").write_text("1 99 1\n")
    with pytest.raises(ValueError, match=r"names 1 templates that have no image in .*, the first in row 1: 99"):
        open_template_set(tmp_path)
    (tmp_path / "meta" / f"{prefix}_name_5pts_score.txt").unlink()
    with pytest.raises(ValueError, match="the protocol is incomplete"):
        open_template_set(tmp_path)


def test_subjects_of_folders_and_lists(tmp_path):
    for name in ("ann/1.png", "ann/2.png", "bob/deep/3.png"):
        draw(tmp_path / "people" / name)
    assert open_subjects(tmp_path / "people").names.tolist() == ["ann", "ann", "bob"]
    (tmp_path / "list.txt").write_text("people/ann/1.png 4\npeople/bob/deep/3.png 17\n")
    assert open_subjects(tmp_path / "list.txt").names.tolist() == ["4", "17"]
    draw(tmp_path / "people" / "loose.png")
    with pytest.raises(ValueError, match=r"holds the image loose\.png"):
        open_subjects(tmp_path / "people")
    with pytest.raises(ValueError, match="no data set at"):
        open_subjects(tmp_path / "nowhere")


@pytest.mark.parametrize("to", FORMATS)
def test_subjects_of_every_format(tmp_path, to):
    """Folders of shards too, whose subjects are the labels."""
    convert(EncodedImages([b"P5 1 1 255\n0"] * 4, labels=[2, 0, 2, 1]), tmp_path / to, to)
    subjects = open_subjects(tmp_path / to)
    assert len(subjects.source) == 4 and len(set(subjects.names.tolist())) == 3
