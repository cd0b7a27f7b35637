"""Checkpoints: which one a run starts from, and what a disk that is full leaves. Launches that resume are in
test_train.py.
"""

import json
import resource
import shutil

import pytest
import torch

from scf_fast.distributed import Runtime
from scf_fast.run.checkpoints import Checkpoints, newest_intact
from scf_fast.run.reporting import StepLines, forget_after
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
    for text in ("", "step00000099"):
        (folder / "latest").write_text(text)
        assert newest_intact(folder).tag == "step00000008"
    (folder / "latest").unlink()
    assert newest_intact(folder).tag == "step00000008"


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


def test_lines_wait_for_room_and_come_once(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = StepLines(tmp_path / "m.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        for step in range(10):
            lines.add({"step": step, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) < 10
    lines.add({"step": 99})
    lines.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert steps == [*range(10), 99]
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"step": 100, "lo')
    forget_after(tmp_path / "m.jsonl", 7)
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == list(range(8))
    with open(tmp_path / "m.jsonl", "ab") as file:
        file.write(b"\0" * 64 + b'1}\n{"step": 3}\n')  # as a file system leaves a block that it had not written
    forget_after(tmp_path / "m.jsonl", 7)
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == list(range(8))


def test_what_cannot_be_deleted_or_read_costs_no_other_checkpoint(folder, monkeypatch):
    """An old folder whose files stay, as on a network file system, and an old state that is damaged."""
    checkpoints = Checkpoints(folder, Runtime(0, 1, torch.device("cpu")), keep=1, keep_best=True, background=False)
    (folder / "step00000004" / "state.json").write_text("{")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    shutil.copytree(folder / "step00000008", folder / "step00000012")
    state = json.loads((folder / "step00000012" / "state.json").read_text())
    (folder / "step00000012" / "state.json").write_text(json.dumps({**state, "metric": state["metric"] + 1}))
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
