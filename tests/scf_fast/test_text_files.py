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
    for text, said in (
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
