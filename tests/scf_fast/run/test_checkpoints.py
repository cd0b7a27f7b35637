"""Checkpoints: which one a run starts from, and what a disk that is full leaves. Launches that resume are in
test_train.py.
"""

import json
import os
import resource
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from scf_fast.distributed import Runtime
from scf_fast.pipelines.waiting import TimedOut
from scf_fast.run.checkpoints import Checkpoints, _Pending, clear_away, newest_intact
from scf_fast.run.run_state import DamagedStateError, fingerprint_of, read_state, write_state
from scf_fast.weights.files import save_torch_file


@pytest.fixture
def folder(stage1, tmp_path):
    """Checkpoints of steps 4 and 8, of two ranks."""
    return shutil.copytree(stage1[0] / "checkpoints", tmp_path / "checkpoints")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of rank 1": lambda f: flip_a_bit(f / "rank1.pt"),
    "the end of the class centers": lambda f: (f / "class_centers_rank0.pt").write_bytes(
        (f / "class_centers_rank0.pt").read_bytes()[:-1]
    ),
    "a file": lambda f: (f / "rank0.pt").unlink(),
    "the list of files": lambda f: (f / "state.json").write_text("{"),
    "its keys": lambda f: (f / "state.json").write_text('{"files": {"rank0.pt": 3}}'),
    "the whole state": lambda f: (f / "state.json").unlink(),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(what, folder):
    point = newest_intact(folder)
    assert point.tag == "step00000008" and point.state.step == 8 and point.state.world_size == 2
    DAMAGE[what](point.folder)
    point = newest_intact(folder)
    assert point.tag == "step00000004" and point.state.step == 4


def test_latest_chooses_where_it_names_one(folder):
    (folder / "latest").write_text("step00000004\n")
    assert newest_intact(folder).tag == "step00000004"
    for content in (b"", b"step00000099", b"\xff\xfe\x00", b"0" * 5000):
        (folder / "latest").write_bytes(content)
        assert newest_intact(folder).tag == "step00000008"
    (folder / "latest").unlink()
    assert newest_intact(folder).tag == "step00000008"
    (folder / "latest").mkdir()
    assert newest_intact(folder).tag == "step00000008"


def flips(content, count):
    """The content with one bit flipped, at places all over it."""
    for bit in np.linspace(0, 8 * len(content) - 1, count).astype(int):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_no_flipped_bit_changes_a_state(folder):
    """Each is found, or changes nothing: a blank into another."""
    path = folder / "step00000008" / "state.json"
    written, found = read_state(path.parent), 0
    for content in flips(path.read_bytes(), 400):
        path.write_bytes(content)
        try:
            assert read_state(path.parent) == written
        except DamagedStateError:
            found += 1
    assert found > 300


def test_a_state_without_checksum_is_read_and_said(folder, caplog):
    """Of an older version; what its numbers and names can be is checked all the same."""
    path = folder / "step00000008" / "state.json"
    content = json.loads(path.read_text())
    del content["crc32"]
    path.write_text(json.dumps(content))
    with caplog.at_level("INFO"):
        assert newest_intact(folder).tag == "step00000008" and "older version, without a checksum" in caplog.text
    rest = dict(list(content["files"].items())[1:])
    for key, value, problem in (
        ("step", 4, "is of step 4"),
        ("step", True, "step in state.json is none"),
        ("world_size", 10**15, "has 4 files of 1000000000000000 ranks"),
        ("zero_stage", 7, "zero_stage in state.json is none"),
        ("schedule", None, "schedule in state.json is none"),
        ("slopf", None, "an entry 'slopf', which this version does not know"),
        ("metric", "low", "metric in state.json is none"),
        ("files", {**rest, "/dev/zero": [1, 2]}, "other files than those of 2 ranks: '/dev/zero'"),
        ("files", {**rest, "../latest": [1, 2]}, "other files than those of 2 ranks: '../latest'"),
        ("files", {**content["files"], "rank0.pt": [1]}, "files in state.json is none"),
    ):
        path.write_text(json.dumps({**content, key: value}))
        with pytest.raises(DamagedStateError, match=problem):
            read_state(path.parent)
        assert newest_intact(folder).tag == "step00000004"
    for text in ("[" * 5000, "[]", '"x"'):
        path.write_text(text)
        assert newest_intact(folder).tag == "step00000004"


def test_a_device_in_the_place_of_a_file_is_not_read(folder):
    for name in ("rank1.pt", "state.json"):
        path = folder / "step00000008" / name
        path.rename(folder / "kept")
        path.symlink_to("/dev/zero")
        assert newest_intact(folder).tag == "step00000004"
        (folder / "kept").replace(path)
    assert newest_intact(folder).tag == "step00000008"


def test_only_half_written_checkpoints_are_deleted(folder):
    """A folder of a like name is the user's, and one of our name with something else in it is set aside."""
    (folder / "steps").mkdir()
    (folder / "steps" / "notes.txt").write_text("mine")
    (folder / "step00000006").mkdir()
    (folder / "step00000006" / "rank0.pt").write_bytes(b"half")
    (folder / "step00000006" / ".rank1.pt.x7.part").write_bytes(b"half")
    for name in ("step00000007", "aside-step00000007"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    (folder / "step00000011").symlink_to(folder / "steps")
    clear_away(folder, "step00000004")
    left = {path.name for path in folder.iterdir()}
    assert left == {
        "latest", "steps", "step00000004", "step00000011", "aside-step00000007", "aside-step00000007-2",
        "aside-step00000008",
    }  # fmt: skip
    assert (folder / "steps" / "notes.txt").exists() and (folder / "aside-step00000007" / "notes.txt").exists()


def test_none_and_none_that_is_intact(folder, tmp_path):
    assert newest_intact(tmp_path) is None
    for path in folder.glob("step*/rank0.pt"):
        flip_a_bit(path)
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .* is intact .*step00000008: rank0.pt has other bytes.*--overwrite starts again",
    ):
        newest_intact(folder)


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path):
    """The limit on a file's size stands for it: writing fails in the middle, as there."""
    save_torch_file({"x": torch.zeros(3)}, tmp_path / "f.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"f\.pt"):
            save_torch_file({"x": torch.randn(100_000)}, tmp_path / "f.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["f.pt"]
    assert torch.equal(torch.load(tmp_path / "f.pt")["x"], torch.zeros(3))


def test_what_cannot_be_deleted_or_read_costs_no_other_checkpoint(folder, monkeypatch):
    """An old folder whose files stay, as on a network file system, and an old state that is damaged."""
    checkpoints = Checkpoints(folder, Runtime(0, 1, torch.device("cpu")), keep=1, keep_best=True, background=False)
    (folder / "step00000004" / "state.json").write_text("{")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    shutil.copytree(folder / "step00000008", folder / "step00000012")
    saved = read_state(folder / "step00000008")
    assert saved.has_checksum
    write_state(folder / "step00000012", replace(saved.state, step=12, metric=saved.state.metric + 1), saved.files)
    checkpoints._prune()
    checkpoints.close()
    assert sorted(path.parent.name for path in folder.glob("*/state.json")) == ["step00000008", "step00000012"]


def test_a_run_outlives_a_full_disk_and_resumes_when_there_is_room(faces, flags, tmp_path, fork_ranks):
    """Checkpoints in the background, of which none fits; then with room, to the same end as without any trouble."""
    command = [
        *flags["stage1"],
        "--zero_stage",
        2,
        "--data",
        faces / "train",
        "--background_checkpoints",
        "--keep_best",
        "--output_dir",
        tmp_path / "run",
    ]
    status, output = fork_ranks(2, *command, "--no_tensorboard", file_bytes=100_000)
    assert status == 1, output
    assert "checkpoint of step 4 could not be written" in output and "training goes on" in output
    assert "Traceback" not in output and "free some space and --resume" in output
    assert not list((tmp_path / "run").rglob("*.part")) and not list((tmp_path / "run" / "checkpoints").glob("step*"))
    status, output = fork_ranks(2, *command, "--resume")
    assert status == 0, output
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [4, 8]
    assert sum(e["event"] == "checkpoint_failed" for e in events) == 2
    assert (
        events[-1]["event"] == "done"
        and any(e["message"].startswith("precision") for e in events)
        and events[-1]["counts"]["steps"] == 8
    )


def test_keep_and_keep_best(faces, flags, tmp_path, fork_ranks):
    command = [
        *flags["stage1"],
        "--epochs",
        4,
        "--lr_scheduler",
        "MultiStep",
        "--milestones",
        2,
        "--gamma",
        500,
        "--keep_checkpoints",
        1,
        "--keep_best",
        "--data",
        faces / "train",
        "--output_dir",
        tmp_path / "run",
    ]
    status, output = fork_ranks(0, *command)
    assert status == 0, output
    states = {
        path.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "run" / "checkpoints").glob("*/state.json")
    }
    assert sorted(states) == ["step00000008", "step00000016"]  # from epoch 3 on the rate is far too high
    assert states["step00000008"]["metric"] < states["step00000016"]["metric"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert states["step00000008"]["metric"] == pytest.approx(sum(r["loss"] for r in records[4:8]) / 4, rel=1e-6)


def test_a_disk_that_hangs_ends_the_run_with_the_checkpoints_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("scf_fast.pipelines.waiting._JOIN", 0.1)
    runtime, hang = Runtime(0, 1, torch.device("cpu")), threading.Event()
    writer = Checkpoints(tmp_path, runtime, keep=1, keep_best=False, background=True, timeout=0.3)
    writer._pending = _Pending(
        "step00000001", read_state(folder / "step00000004").state, writer._writer.submit(hang.wait)
    )
    with pytest.raises(
        TimedOut, match=f"^rank 0 has waited 0 s for the background writer of checkpoint {tmp_path}/step00"
    ):
        writer.finish()
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 2
    hang.set()


def test_a_slow_disk_is_seen_to_move_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """A file of 40 pieces; its bytes reach the disk step by step, not in one sync at its end."""
    synced, moved, fdatasync = [], [], os.fdatasync
    monkeypatch.setattr("scf_fast.weights.files._SYNC_BYTES", 1 << 20)
    monkeypatch.setattr(os, "fdatasync", lambda file: (synced.append(sum(moved)), fdatasync(file))[1])
    value = {str(i): torch.full((1 << 16,), i, dtype=torch.float32) for i in range(40)}
    save_torch_file(value, tmp_path / "a.pt", moved.append)
    size = (tmp_path / "a.pt").stat().st_size
    assert sum(moved) == size and len(moved) > 40 and len(synced) in range(8, 11)
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(torch.equal(again[key], value[key]) for key in value)
    read = []
    assert fingerprint_of(tmp_path / "a.pt", read.append)[0] == size == sum(read)
