import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scf_fast.pipelines.evaluation_sets.template_protocol import (
    Gallery,
    TemplateProtocol,
    read_galleries,
    read_template_protocol,
    write_template_protocol,
)

# Rows in the layout of the IJB-C files, among them Windows line ends, tabs and a missing last line end.
IMAGES = "1.jpg 1 69544\n2.jpg 1 50525\r\n3.jpg 7 50525"
LANDMARKS = (
    "1.jpg 44.5 51 67.25 50 56 63 47 77 66 76 0.9996\n"
    "2.jpg 1 2 3 4 5 6 7 8 9 10 1\n"
    "3.jpg -1.5 2e1 3 4 5 6 7 8 9 10 0.25\n"
)
PAIRS = "1 7 0\n7\t7  1\n1 1 1"


@pytest.fixture
def root(tmp_path):
    for name, text in (
        ("ijbc_face_tid_mid", IMAGES),
        ("ijbc_name_5pts_score", LANDMARKS),
        ("ijbc_template_pair_label", PAIRS),
    ):
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / f"{name}.txt").write_bytes(text.encode())
    (tmp_path / "loose_crop").mkdir()
    for i in (1, 2, 3):
        (tmp_path / "loose_crop" / f"{i}.jpg").write_bytes(f"image {i}".encode())
    return tmp_path


def test_reads_ijb_layout(root):
    protocol = read_template_protocol(root)
    assert protocol.names == ["1.jpg", "2.jpg", "3.jpg"]
    assert protocol.template_ids.tolist() == [1, 1, 7] and protocol.media_ids.tolist() == [69544, 50525, 50525]
    assert protocol.landmarks.shape == (3, 5, 2) and protocol.landmarks.dtype == np.float32
    np.testing.assert_array_equal(protocol.landmarks[0], [[44.5, 51], [67.25, 50], [56, 63], [47, 77], [66, 76]])
    np.testing.assert_array_equal(protocol.landmarks[2, 0], [-1.5, 20])
    np.testing.assert_array_equal(protocol.detector_score, np.float32([0.9996, 1, 0.25]))
    assert protocol.pair_template_ids.tolist() == [[1, 7], [7, 7], [1, 1]] and protocol.pair_labels.tolist() == [
        False,
        True,
        True,
    ]
    assert [protocol.source.encoded(i).tobytes() for i in range(3)] == [b"image 1", b"image 2", b"image 3"]


def test_written_protocol_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    landmarks, score = np.float32(rng.uniform(0, 112, (4, 5, 2)).round(2)), np.float32(rng.random(4).round(4))
    write_template_protocol(
        tmp_path,
        "synth",
        names=[f"{i}.png" for i in range(4)],
        images=(bytes([i]) for i in range(4)),
        template_ids=np.array([5, 5, 6, 8]),
        media_ids=np.array([1, 2, 2, 3]),
        landmarks=landmarks,
        detector_score=score,
        pair_template_ids=np.array([[5, 6], [6, 8]]),
        pair_labels=np.array([True, False]),
        galleries=[
            Gallery("G1", np.array([5]), np.array([1]), np.array([8]), np.array([2])),
            Gallery("G2", np.array([6]), np.array([2]), np.array([8]), np.array([2])),
        ],
    )
    protocol = read_template_protocol(tmp_path)
    np.testing.assert_array_equal(protocol.template_ids, [5, 5, 6, 8])
    np.testing.assert_array_equal(protocol.media_ids, [1, 2, 2, 3])
    np.testing.assert_array_equal(protocol.landmarks, landmarks)
    np.testing.assert_array_equal(protocol.detector_score, score)
    np.testing.assert_array_equal(protocol.pair_template_ids, [[5, 6], [6, 8]])
    assert protocol.pair_labels.tolist() == [True, False] and protocol.source.encoded(3).tobytes() == b"\x03"
    assert (tmp_path / "meta" / "synth_face_tid_mid.txt").read_text().splitlines()[2] == "2.png 6 2"
    first, second = read_galleries(tmp_path, protocol)
    assert (first.name, first.gallery_ids, first.gallery_subjects) == ("G1", [5], [1]) and (
        second.name,
        second.gallery_ids,
    ) == ("G2", [6])
    assert second.probe_ids == [8] and second.probe_subjects == [2]
    assert (
        tmp_path / "meta" / "synth_1N_gallery_G1.csv"
    ).read_text() == "TEMPLATE_ID,SUBJECT_ID,FILENAME\n5,1,0.png\n5,1,1.png\n"
    assert (tmp_path / "meta" / "synth_template_pair_label.txt").read_text() == "5 6 1\n6 8 0\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "face_tid_mid",
            "1.jpg 1 69544\n2.jpg 1\n3.jpg 7 5",
            r"face_tid_mid\.txt row 2 must hold 3 columns \(2 of them int64\), got '2\.jpg 1'",
        ),
        ("face_tid_mid", "1.jpg 1 69544\n2.jpg 1 x\n3.jpg 7 5", r"row 2 must hold 3 columns"),
        (
            "name_5pts_score",
            LANDMARKS.replace(" 0.9996", ""),
            r"5pts_score\.txt row 1 must hold 12 columns \(11 of them float32\)",
        ),
        (
            "name_5pts_score",
            "".join(LANDMARKS.splitlines(True)[:2]),
            "must list the images of ijbc_face_tid_mid.txt in the same order; .* row 3",
        ),
        ("name_5pts_score", LANDMARKS.replace("2.jpg", "9.jpg"), "they differ in row 2"),
        (
            "name_5pts_score",
            LANDMARKS.replace("0.9996", "nan").replace("0.25", "-1"),
            "2 of 3 are not, the first in row 1: nan",
        ),
        ("face_tid_mid", "", "must list images, and is empty"),
        ("face_tid_mid", "1.jpg 1 69544\n2.jpg 1 5\xff\n3.jpg 7 5", r"row 2 must hold 3 columns"),
        ("template_pair_label", "1 7 0\n7 \xff 1\n", r"row 2 must hold 3 columns"),
        (
            "template_pair_label",
            "1 7 0\n7 7 one\n",
            r"pair_label\.txt row 2 must hold 3 columns \(3 of them int64\), got '7 7 one'",
        ),
        ("template_pair_label", "1 7 0\n7 7\n", "row 2 must hold 3 columns"),
        (
            "template_pair_label",
            "1 7 0\n7 8 1\n9 8 0\n",
            "names 2 templates that have no image in .*, the first in row 2: 8",
        ),
        ("template_pair_label", "1 7 0\n7 7 2\n", "row 2 must end in label 0 or 1, got 2"),
    ],
)
def test_malformed_rows_are_named(root, name, text, message):
    (root / "meta" / f"ijbc_{name}.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_template_protocol(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta/ijbc_face_tid_mid.txt", r"must hold exactly one '\*_face_tid_mid\.txt', found \[\]"),
        ("meta/ijbc_name_5pts_score.txt", r"cannot read .*ijbc_name_5pts_score\.txt: No such file"),
        ("meta/ijbc_template_pair_label.txt", r"cannot read .*ijbc_template_pair_label\.txt: No such file"),
        ("loose_crop/2.jpg", r"loose_crop lacks 1 of the 3 images, the first is 2\.jpg"),
    ],
)
def test_missing_files_are_named(root, name, message):
    (root / name).unlink()
    with pytest.raises(ValueError, match=message):
        read_template_protocol(root)


def test_two_protocols_or_no_crops(root):
    (root / "loose_crop").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="cannot list the crops"):
        read_template_protocol(root)
    (root / "meta" / "ijbb_face_tid_mid.txt").write_text(IMAGES)
    with pytest.raises(ValueError, match=r"found .*ijbb.*ijbc.*give the folder of one protocol"):
        read_template_protocol(root)


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))


HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME"


def templates(*ids):
    """A protocol of which only the template ids count."""
    return TemplateProtocol(None, np.array(ids), None, None, None, None, None, None)


def test_galleries_of_the_released_layout(tmp_path):
    protocol, meta = templates(1, 2, 3, 4, 4, 5), tmp_path / "meta"
    assert read_galleries(tmp_path, protocol) == []
    write_lines(meta / "ijbc_1N_gallery_G1.csv", HEADER, "1,70,img/a.jpg", "1,70,img/b.jpg", "2,71,img/c.jpg")
    write_lines(meta / "ijbc_1N_gallery_G2.csv", HEADER, "3,72,img/d.jpg")
    write_lines(meta / "ijbc_1N_probe_mixed.csv", HEADER, "4,70,frames/e.png", "5,72,img/f.jpg")
    first, second = read_galleries(tmp_path, protocol)
    assert (first.name, second.name) == ("G1", "G2")
    assert first.gallery_ids.tolist() == [1, 2] and first.gallery_subjects.tolist() == [70, 71]
    assert second.probe_ids.tolist() == [4, 5] and second.probe_subjects.tolist() == [70, 72]


@pytest.mark.parametrize(
    ("gallery", "probes", "message"),
    [
        (["1,70"], None, "found 1 and 0"),
        (["1,70"], ["x,70"], "line 2 must start with a template id"),
        (["1,70"], ["\xff,70"], "line 2 must start with a template id"),
        (["1,70"], ["4"], "line 2 must start with a template id"),
        (["1,70", "1,71"], ["4,70"], "line 3 gives template 1 to subject 71, an earlier one to 70"),
        (["1,70", "2,70"], ["4,70"], "several of 1 subjects, the first 70"),
        (["1,70", "99,71", "98,72"], ["4,70"], "names 2 templates without images, the first 99"),
        ([], ["4,70"], "is empty"),
    ],
)
def test_galleries_that_are_refused(tmp_path, gallery, probes, message):
    write_lines(tmp_path / "meta" / "ijbc_1N_gallery_G1.csv", HEADER, *gallery)
    if probes is not None:
        write_lines(tmp_path / "meta" / "ijbc_1N_probe_mixed.csv", HEADER, *probes)
    with pytest.raises(ValueError, match=message):
        read_galleries(tmp_path, templates(1, 2, 3, 4, 5))


META = {
    "face_tid_mid.txt": IMAGES,
    "name_5pts_score.txt": LANDMARKS,
    "template_pair_label.txt": PAIRS,
    "1N_gallery_G1.csv": f"{HEADER}\n1,7,a\n",
    "1N_probe_mixed.csv": f"{HEADER}\n7,7,b\n",
}


@pytest.mark.parametrize("name", META)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 200),
            st.integers(0, 20),
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from([b"-", b"nan", b"1_0", b"9" * 30, b"\r", b'"', b"\0", b",", "٣".encode()]),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_bytes_are_a_protocol_or_a_value_error(root, name, edits):
    for other, text in META.items():
        (root / "meta" / f"ijbc_{other}").write_bytes(text.encode())
    content = bytearray(META[name].encode())
    for place, removed, added in edits:
        place %= len(content) + 1
        content[place : place + removed] = added
    (root / "meta" / f"ijbc_{name}").write_bytes(bytes(content))
    try:
        read_galleries(root, read_template_protocol(root))
    except ValueError as error:
        assert str(root) in str(error)
