import collections
import concurrent.futures
import csv
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines import waiting
from scf_fast.pipelines.synthetic import dataset, parts
from scf_fast.pipelines.synthetic.__main__ import main
from scf_fast.pipelines.synthetic.dataset import write_synthetic_set
from scf_fast.pipelines.synthetic.pictures import Parameters, evaluation_pictures, train_pictures

ROOT = Path(__file__).parents[3]
SMALL = Parameters(identities=12, images_per_identity=3, eval_identities=20, seed=3)
TINY = Parameters(identities=11, images_per_identity=1, eval_identities=0, seed=9)  # two parts


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _size(encoded):
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image.format, image.mode, image.size


def _arguments(parameters):
    flags = ("--identities", "--images-per-identity", "--eval-identities", "--seed")
    values = (parameters.identities, parameters.images_per_identity, parameters.eval_identities, parameters.seed)
    return [str(word) for pair in zip(flags, values) for word in pair]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "set"
    write_synthetic_set(out, SMALL, workers=1)
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "set"
    write_synthetic_set(out, TINY, workers=1)
    return out


@pytest.fixture
def short_sheet(monkeypatch):
    """A contact sheet of one row, where it does not matter."""
    monkeypatch.setattr(dataset, "_SHEET_ROWS", 1)


def _records(rec):
    """Yields (offset, flag, labels, id, image bytes) of every record, read as the format's description has it."""
    offset = 0
    while offset < len(rec):
        magic, length = struct.unpack_from("<II", rec, offset)
        assert magic == 0xCED7230A and length >> 29 == 0
        flag, label, record_id, _ = struct.unpack_from("<IfQQ", rec, offset + 8)
        labels = list(struct.unpack_from(f"<{flag}f", rec, offset + 32)) if flag else [label]
        yield offset, flag, labels, record_id, rec[offset + 32 + 4 * flag : offset + 8 + length]
        offset += 8 + (length + 3) // 4 * 4


def test_training_files_are_as_ms1m_ships_them(small):
    folder = small / "train"
    records = list(_records((folder / "train.rec").read_bytes()))
    total = 12 * 3
    assert records[0][1:] == (2, [total + 1, total + 1 + 12], 0, b"")
    images, identities = records[1 : 1 + total], records[1 + total :]
    assert [record[3] for record in records] == list(range(len(records)))
    assert [labels for _, _, labels, _, _ in images] == [[number // 3] for number in range(total)]
    assert {_size(encoded) for *_, encoded in images} == {("JPEG", "RGB", (112, 112))}
    assert [(flag, labels, encoded) for _, flag, labels, _, encoded in identities] == [
        (2, [1 + 3 * k, 4 + 3 * k], b"") for k in range(12)
    ]
    index = [line.split("\t") for line in (folder / "train.idx").read_text().splitlines()]
    assert [(int(number), int(offset)) for number, offset in index] == [(record[3], record[0]) for record in records]
    assert (folder / "property").read_text().strip() == "12,112,112"


def test_training_severities_stand_in_the_csv(small):
    rows = _rows(small / "train" / "severity.csv")
    expected = [picture.severity for identity in range(12) for picture in train_pictures(SMALL, identity)]
    assert [(int(row["record_id"]), int(row["label"])) for row in rows] == [
        (number + 1, number // 3) for number in range(36)
    ]
    np.testing.assert_allclose([float(row["severity"]) for row in rows], expected, atol=1e-6)
    assert min(expected) < 0.1 and max(expected) > 0.7


@pytest.mark.parametrize("split", ["clean", "mixed"])
def test_verification_sets_are_as_insightface_ships_them(small, split):
    images, same = pickle.loads((small / "verification" / f"{split}.bin").read_bytes())
    rows = _rows(small / "verification" / f"{split}.csv")
    assert len(images) == len(rows) == 2 * len(same) == 600
    assert {_size(encoded) for encoded in images[:20]} == {("JPEG", "RGB", (112, 112))}
    assert [int(row["image"]) for row in rows] == list(range(600))
    identities = np.array([int(row["identity"]) for row in rows]).reshape(10, 30, 2)
    assert identities.min() >= 12  # none was trained on
    same = np.array(same).reshape(10, 30)
    np.testing.assert_array_equal(same, identities[..., 0] == identities[..., 1])
    assert (same.sum(axis=1) == 15).all()
    assert (
        sum(len(set(fold.ravel())) for fold in identities) == len(set(identities.ravel())) == 20
    )  # folds share no identity
    assert all(images[2 * pair] != images[2 * pair + 1] for pair in range(300))
    assert len({frozenset(images[2 * pair : 2 * pair + 2]) for pair in range(300)}) == 300
    severities = np.array([float(row["severity"]) for row in rows])
    if split == "clean":
        assert (severities == 0).all()
    else:
        assert severities.min() < 0.1 and severities.max() > 0.9 and 0.4 < severities.mean() < 0.6


def test_templates_have_the_ijb_layout(small):
    folder = small / "templates"
    rows = _rows(folder / "severity.csv")
    faces = [line.split() for line in (folder / "meta" / "synthetic_face_tid_mid.txt").read_text().splitlines()]
    points = [line.split() for line in (folder / "meta" / "synthetic_name_5pts_score.txt").read_text().splitlines()]
    pairs = np.loadtxt(folder / "meta" / "synthetic_template_pair_label.txt", dtype=int)
    assert [row["name"] for row in rows] == [face[0] for face in faces] == [point[0] for point in points]
    assert sorted(path.name for path in (folder / "loose_crop").iterdir()) == sorted(face[0] for face in faces)
    assert _size((folder / "loose_crop" / "1.jpg").read_bytes()) == ("JPEG", "RGB", (112, 112))
    landmarks = np.array([point[1:11] for point in points], dtype=float).reshape(-1, 5, 2)
    template = [38.3, 51.7, 73.5, 51.5, 56.0, 71.7, 41.5, 92.4, 70.7, 92.2]
    np.testing.assert_allclose(landmarks.mean(axis=0).ravel(), template, atol=2.5)
    assert {point[11] for point in points} == {"1"}

    template_of = {name: template_id for name, template_id, _ in faces}
    identity_of, media_of, severities = {}, collections.defaultdict(set), collections.defaultdict(list)
    for (_, template_id, medium_id), row in zip(faces, rows):
        assert identity_of.setdefault(int(template_id), int(row["identity"])) == int(row["identity"]) >= 12
        media_of[medium_id].add(template_id)
        severities[template_id].append(float(row["severity"]))
    assert collections.Counter(identity_of.values()) == {identity: 4 for identity in range(12, 32)}
    assert all(len(templates) == 1 for templates in media_of.values()) and len(media_of) > 80
    assert {len(values) for values in severities.values()} == {3, 4, 5, 6, 7, 8}
    assert np.mean([np.ptp(values) for values in severities.values()]) > 0.5  # mixed inside a template
    first, second, label = pairs.T
    assert [identity_of[a] == identity_of[b] for a, b in zip(first, second)] == label.astype(bool).tolist()
    enrolled, probes = {}, {}
    for name, subjects in ("gallery_G1", enrolled), ("gallery_G2", enrolled), ("probe_mixed", probes):
        rows = _rows(folder / "meta" / f"synthetic_1N_{name}.csv")
        subjects |= {int(row["TEMPLATE_ID"]): int(row["SUBJECT_ID"]) for row in rows}
        assert all(template_of[row["FILENAME"]] == row["TEMPLATE_ID"] for row in rows)
    assert len(enrolled) == 20 and len(probes) == 60 and enrolled.keys() | probes.keys() == identity_of.keys()
    assert len(set(enrolled.values())) == 20
    assert all(identity_of[template] == subject + 11 for template, subject in {**enrolled, **probes}.items())
    assert (
        label.sum() == 20 * 6
        and len(pairs) == 80 * 79 // 2
        and len({frozenset(pair) for pair in pairs[:, :2].tolist()}) == len(pairs)
    )


def test_frames_of_a_medium_share_the_background():
    corners = collections.defaultdict(list)
    for picture in evaluation_pictures(SMALL, 15):
        if picture.split == "templates" and picture.severity < 0.25:
            pixels = np.asarray(
                Image.open(io.BytesIO(picture.encoded)).resize((28, 28), Image.Resampling.BOX), dtype=float
            )
            corners[picture.template, picture.medium].append(pixels[0, 0])
    same = [np.abs(a - b).max() for group in corners.values() for a, b in itertools.combinations(group, 2)]
    other = [np.abs(a[0] - b[0]).max() for a, b in itertools.combinations(corners.values(), 2)]
    assert np.median(same) < 0.5 * np.median(other)


def test_manifest_and_contact_sheet(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["parameters"] == {
        "format": 2,
        "identities": 12,
        "images_per_identity": 3,
        "eval_identities": 20,
        "seed": 3,
    }
    assert manifest["counts"]["train"] == {"images": 36, "identities": 12}
    assert manifest["counts"]["templates"]["images"] == len(list((small / "templates" / "loose_crop").iterdir()))
    sheet = Image.open(small / "contact_sheet.png")
    assert sheet.format == "PNG" and sheet.width > 9 * 112 and sheet.height > 6 * 112
    assert not (small / ".parts").exists()


def test_a_picture_depends_on_seed_identity_and_index_alone(small):
    def encoded(parameters, identity):
        return [picture.encoded for picture in train_pictures(parameters, identity)]

    base = encoded(SMALL, 7)
    assert encoded(Parameters(identities=5000, images_per_identity=5, eval_identities=0, seed=3), 7)[:3] == base
    assert base[0] in (small / "train" / "train.rec").read_bytes()
    assert len({*base, *encoded(SMALL, 8), *encoded(Parameters(12, 3, 20, seed=4), 7)}) == 9


def test_two_processes_from_the_command_line_write_the_same_files(tiny, tmp_path):
    command = [sys.executable, "-m", "scf_fast.pipelines.synthetic", str(tmp_path), *_arguments(TINY), "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr and json.loads(done.stdout.split(": ", 1)[1])["train"]["images"] == 11
    assert _files(tmp_path) == _files(tiny)


def test_an_interrupted_set_is_completed(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "_IDENTITIES_PER_PART", 4)  # three parts; the files do not show it
    render, calls = parts.Part.render, []

    def render_until_interrupted(part, *arguments):
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(part, *arguments)

    monkeypatch.setattr(parts.Part, "render", render_until_interrupted)
    command = [str(tmp_path), *_arguments(TINY), "--workers", "1"]
    assert main(command) == 130
    assert f"the same command goes on with what lies in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "train").exists()
    assert main(command) == 0
    assert len(calls) == 2 + 2  # three parts: the first was kept
    assert _files(tmp_path) == _files(tiny)

    before = {name: (tmp_path / name).stat().st_mtime_ns for name in _files(tmp_path)}
    assert main(command) == 0 and len(calls) == 4  # complete: nothing to do
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in _files(tmp_path)} == before


def test_a_process_that_dies_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    class Pool(concurrent.futures.ProcessPoolExecutor):
        def submit(self, *arguments):
            return super().submit(os._exit, 9)

    monkeypatch.setattr(waiting, "ProcessPoolExecutor", Pool)
    message = _refusal(capsys, [str(tmp_path), *_arguments(TINY), "--workers", "2"])
    assert "a process that should render pictures has died" in message and "--workers" in message


def _refusal(capsys, arguments):
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (message,) = (line for line in captured.err.splitlines() if line and "rendering:" not in line)  # without the bar
    assert captured.out == "" and message.startswith("python -m scf_fast.pipelines.synthetic: error: ")
    return message


def test_another_set_is_refused_unless_told_otherwise(tiny, tmp_path, capsys, short_sheet):
    out = tmp_path / "set"
    shutil.copytree(tiny, out)
    before = _files(out)
    other = [*_arguments(TINY)[:-1], "10"]
    message = _refusal(capsys, [str(out), *other])
    assert str(out) in message and "seed is 9 there and 10 here" in message and "--overwrite" in message
    assert _files(out) == before
    assert main([str(out), *other, "--workers", "1", "--overwrite"]) == 0
    assert _files(out)["train/train.rec"] != before["train/train.rec"]

    for damaged in (b"{", b"[]", b"{}", b'{"parameters": 1}', b"\xff"):
        (out / "manifest.json").write_bytes(damaged)
        assert "damaged" in _refusal(capsys, [str(out), *other])


def test_a_folder_of_other_files_is_refused(tmp_path, capsys, short_sheet):
    one = _arguments(Parameters(identities=1, images_per_identity=1, eval_identities=0))
    (tmp_path / "photo.txt").write_text("mine")
    assert "holds other files" in _refusal(capsys, [str(tmp_path), *one])
    assert main([str(tmp_path), *one, "--workers", "1", "--overwrite"]) == 0
    assert (tmp_path / "photo.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--identities", "0", "identities"),
        ("--images-per-identity", "0", "images_per_identity"),
        ("--eval-identities", "19", "eval_identities"),
        ("--seed", "-1", "seed"),
        ("--workers", "0", "workers"),
    ],
)
def test_counts_out_of_range_are_refused(tmp_path, capsys, flag, value, name):
    assert name in _refusal(capsys, [str(tmp_path / "set"), flag, value])
    assert not (tmp_path / "set").exists()
