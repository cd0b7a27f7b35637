"""Text as other systems write it (mark at the start, line ends, blank lines at the end) through every text reader."""

import json

import numpy as np
import pytest

from scf_fast.command_line import load_recipe
from scf_fast.engine.deepspeed_config import load_deepspeed_config
from scf_fast.evaluation.datasets import read_pair_list
from scf_fast.evaluation.quality import read_severity
from scf_fast.pipelines.evaluation_sets.template_protocol import read_galleries, read_template_protocol
from scf_fast.pipelines.formats import text_file
from scf_fast.pipelines.formats.recordio import read_num_classes
from scf_fast.pipelines.formats.tfrecord import write_shard
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources import digest, image_list

WRITTEN = {
    "plain": lambda text: text.encode(),
    "mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "windows": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "blank lines": lambda text: text.encode() + b"\n\n \n",
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "windows, blank lines": lambda text: text.replace("\n", "\r\n").encode() + b"\r\n\r\n",
}
FACES = ["脸/0.jpg", "b c/1.jpg"]
IJB = {
    "face_tid_mid.txt": "1.jpg 1 5\n2.jpg 2 6\n",
    "name_5pts_score.txt": "1.jpg 1 2 3 4 5 6 7 8 9 10 0.5\n2.jpg 1 2 3 4 5 6 7 8 9 10 0.5\n",
    "template_pair_label.txt": "1 2 0\n1 1 1\n",
    "1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n1,10,1.jpg\n",
    "1N_probe_mixed.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n2,10,2.jpg\n",
}


def listed(path):
    source = open_source(path)
    return [source.name(i).removeprefix(str(path.parent)) for i in range(len(source))], source.labels.tolist()


def template_protocol(path):
    protocol = read_template_protocol(path.parents[1])
    (gallery,) = read_galleries(path.parents[1], protocol)
    return [
        protocol.names,
        protocol.template_ids.tolist(),
        protocol.media_ids.tolist(),
        protocol.landmarks.tolist(),
        protocol.pair_template_ids.tolist(),
        protocol.pair_labels.tolist(),
        *(values.tolist() for values in vars(gallery).values() if isinstance(values, np.ndarray)),
    ]


def pairs(path):
    source, same = read_pair_list(path)
    return [source.name(i) for i in range(len(source))], same.tolist()


READERS = {  # file -> text, reader
    "list.txt": (f"{FACES[0]} 5\n{FACES[1]} 0\n", listed),
    "im2rec.lst": (f"0\t5.000000\t{FACES[0]}\n1\t0.000000\t{FACES[1]}\n", listed),
    "insightface.lst": (f"1\t{FACES[0]}\t5\n1\t{FACES[1]}\t0\n", listed),
    "TFR.txt": ("TFR\t0\t0\t5\nTFR\t0\t0\t0\n", listed),
    "property": ("85742,112,112\n", read_num_classes),
    "pairs.txt": (f"{FACES[0]}\t{FACES[1]}\t1\n{FACES[0]}\t{FACES[1]}\t0\n", pairs),
    "severity.csv": ("name,severity\na,0.5\nb,1\n", lambda path: read_severity(path, "name", ["a", "b"]).tolist()),
    "recipe.yaml": ("stage: backbone\nlr: 0.5\nmilestones: [1, 2]\n", lambda path: load_recipe(str(path))),
    "ds.json": (json.dumps({"zero_optimization": {}}) + "\n", lambda path: load_deepspeed_config(str(path))),
    **{f"meta/ijbc_{name}": (text, template_protocol) for name, text in IJB.items()},
}


@pytest.fixture
def folder(tmp_path):
    for name in FACES:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"face")
    write_shard(tmp_path / "TFR" / "TFR-00000.tfrecord", [(b"face", 0)])
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "loose_crop").mkdir(exist_ok=True)
        (tmp_path / "loose_crop" / name).write_bytes(b"face")
    for name, text in IJB.items():
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / f"ijbc_{name}").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_text_of_any_system_is_the_same_text(name, folder):
    text, read = READERS[name]
    found = {}
    for how, write in WRITTEN.items():
        (folder / name).write_bytes(write(text))
        found[how] = read(folder / name)
    assert found["plain"] and all(value == found["plain"] for value in found.values())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", READERS)
def test_utf_16_is_said(name, encoding, folder):
    text, read = READERS[name]
    (folder / name).write_bytes(text.replace("脸", "b c").encode(encoding))
    with pytest.raises(ValueError, match=r"text in UTF-16.*; save it in UTF-8: iconv -f UTF-16 -t UTF-8 FILE"):
        read(folder / name)


def test_an_index_from_before_the_mark_was_skipped_is_made_again(folder, monkeypatch):
    (folder / "list.txt").write_bytes(WRITTEN["mark"](READERS["list.txt"][0]))
    with monkeypatch.context() as before:
        before.setattr(text_file.codecs, "BOM_UTF8", b"\0")  # as the first versions read it
        before.setattr(digest, "fingerprint_of_text", lambda path: digest.fingerprint_of_files([path]))
        before.setattr(image_list, "fingerprint_of_text", digest.fingerprint_of_text)
        assert open_source(folder / "list.txt").name(0).endswith("\ufeff" + FACES[0])
    assert open_source(folder / "list.txt").name(0) == str(folder / FACES[0])


def test_lists_are_told_by_their_columns(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"face")
    for name in ("list.lst", "list.txt"):
        for text, labels in (
            ("1\ta.jpg\t3\n1\ta.jpg\t0\n", [3, 0]),
            ("1\ta.jpg\t3\t0\t0\t112\t112\t1.5\t2\n", [3]),  # with box and landmarks
            ("0\t3.0\ta.jpg\n", [3]),
            ("0\t3\t1.5\ta.jpg\n", [3]),
        ):
            (tmp_path / name).write_text(text)
            source = open_source(tmp_path / name)
            assert source.labels.tolist() == labels and source.encoded(0).tobytes() == b"face"
    for text, labels in (  # columns of a .lst that somebody has separated otherwise
        ("1\ta.jpg 3\n", [3]),
        ("1 a.jpg 3\n1  a.jpg\t0\n", [3, 0]),
        ("a.jpg 3\n", [3]),
        ("1 b c/1.jpg 3\n", [3]),
    ):
        (tmp_path / "b c").mkdir(exist_ok=True)
        (tmp_path / "b c" / "1.jpg").write_bytes(b"face")
        (tmp_path / "words.lst").write_text(text)
        source = open_source(tmp_path / "words.lst")
        assert source.labels.tolist() == labels and source.encoded(0).tobytes() == b"face"
    for text, said in (
        ("0 a.jpg 3\n", "line 1 says that its face is not aligned"),
        ("1\t2.0\n", "line 1 must be number, label and path, separated by tabs,"),
        ("0\ta.jpg\t3\n", "line 1 says that its face is not aligned (0 in the first column)"),
        ("1\ta.jpg\t3\n0\ta.jpg\t3\n", "line 2 says that its face is not aligned"),
        ("1\ta.jpg\t3\n1\t2.0\ta.jpg\n", "line 2 must be 1 for an aligned face, path and label"),
        ("1\ta.jpg\t3\n1\ta.jpg\t2.5\n", "line 2 must be 1 for an aligned face, path and label"),
        ("1\t \t3\n", "line 1 must be 1 for an aligned face, path and label"),
    ):
        (tmp_path / "bad.lst").write_text(text)
        with pytest.raises(ValueError) as raised:
            open_source(tmp_path / "bad.lst")
        assert said in str(raised.value)


def test_a_recipe_that_is_no_yaml_is_told_where(tmp_path):
    for text, said in (
        ("lr: 0.1\n  momentum: 0.9\n", r"is no valid YAML \(line 2: mapping values are not allowed here\)"),
        ("lr: [1, 2\n", "is no valid YAML"),
        ("seed: 2020-13-45\n", "is no valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines, got list"),
        ("# nothing\n", "must hold `key: value` lines, got nothing"),
        ("", "is an empty file"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            load_recipe(str(tmp_path / "r.yaml"))


def test_commas_windows_and_other_machines(tmp_path):
    for name in ("a.jpg", "b,c.jpg"):
        (tmp_path / name).write_bytes(b"face")
    (tmp_path / "list.csv").write_text("a.jpg,3\nb,c.jpg,0\n")
    source = open_source(tmp_path / "list.csv")
    assert source.labels.tolist() == [3, 0] and source.name(1) == str(tmp_path / "b,c.jpg")
    (tmp_path / "mixed.txt").write_text("b,c.jpg 3\na.jpg 0\n")
    assert open_source(tmp_path / "mixed.txt").labels.tolist() == [3, 0]
    for text, said in (
        ("faces\\a\\0.jpg 0\n", "its paths have backslashes, as on Windows: write them with / instead"),
        ("/home/someone/faces/0.jpg 0\n", "its paths are absolute, of another machine"),
        ("faces/0.jpg 0\n", "give the folder that its paths start from"),
        ("a.jpg,3\nb.jpg,x\n", "line 2 must be `path,label`"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError) as raised:
            open_source(tmp_path / "bad.txt")
        assert said in str(raised.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("header", ["2\t1", "2"])
def test_pairs_as_lfw_has_them(suffix, header, tmp_path):
    for name, number in (("Ann_B", 1), ("Ann_B", 12), ("Çem", 3)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{name}_{number:04d}{suffix}").write_bytes(b"face")
    (tmp_path / "pairs.txt").write_text(f"{header}\nAnn_B\t1\t12\nAnn_B 12 Çem 3\n\n", encoding="utf-8-sig")
    names, same = pairs(tmp_path / "pairs.txt")
    assert same == [True, False] and [name.rpartition("/")[2].partition(".")[0] for name in names] == [
        "Ann_B_0001",
        "Ann_B_0012",
        "Ann_B_0012",
        "Çem_0003",
    ]
    for line in ("Ann_B\t1\tx", "Ann_B 1", "Ann_B 1 Çem 3 1"):
        (tmp_path / "bad.txt").write_text(f"{header}\nAnn_B 1 12\n{line}\n")
        with pytest.raises(ValueError, match="line 3 must be `name i j` or `name i name j`"):
            pairs(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text(f"{header}\nAnn_B 1 13\n")
    with pytest.raises(ValueError, match=r"line 2 names .*Ann_B_0013.*, and there is no such file"):
        pairs(tmp_path / "bad.txt")
