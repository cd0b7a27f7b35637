"""Steps whose loss is not finite, and signals."""

import json
import os
import signal
import subprocess
import textwrap
import time

import pytest

from scf_fast.distributed import STOPPED, launcher

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from scf_fast import distributed
from scf_fast.engine import partitions
from scf_fast.engine.dropped import Dropped
from scf_fast.config import ConfidenceConfig
from scf_fast.engine.engine import Engine
from scf_fast.run.step_guard import StepGuard
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer

runtime = distributed.start()
x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))

def loss(net, step, bad):
    value = (net(x + step) ** 2).mean()
    return value * float("nan") if bad and runtime.rank == 1 else value

def run(zero_stage, bad_steps):
    options = {"data": "d", "output_dir": "o", "saved_bkb": "b", "saved_fc": "f", "batch_size": 16}
    config = ConfidenceConfig(**options, lr=1e-2, zero_stage=zero_stage)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.PReLU(), nn.Linear(3, 1))
    optimizer = build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device)
    engine = Engine(net, optimizer, config, runtime, "fp32")
    guard = StepGuard(engine.module, runtime, 3, Path(sys.argv[1]) / f"not_finite_rank{runtime.rank}.jsonl")
    applied, early = 0, None
    for step in range(len(bad_steps)):
        guard.before_step()
        value = loss(engine, 0 if bad_steps[step] else applied, bad_steps[step])
        guard.add_loss(value)
        guard.start_vote(False, False)
        engine.backward(value)
        votes = guard.votes()
        assert votes.not_finite == bad_steps[step], (step, votes)
        engine.step(skip=votes.not_finite)
        guard.count(Dropped.LOSS if votes.not_finite else None, step, lambda: ["first.jpg", "second.jpg"])
        applied += not bad_steps[step]
        early = early or partitions.shared_state(engine)  # as a checkpoint that is written while the steps go on
    assert early["optimizer_steps"] == 1, early
    pieces = {(p.name, p.start): {k: v.clone() for k, v in p.values.items()} for p in partitions.owned_pieces(engine)}
    buffers = {k: v.clone() for k, v in net.named_buffers() if v.is_floating_point()}
    return pieces, buffers, partitions.shared_state(engine)["optimizer_steps"], guard

for stage in (0, 1, 2, 3):
    pieces, buffers, steps, guard = run(stage, [False, True, False, True, True, False])
    assert guard.dropped == {Dropped.LOSS: 3}
    expected, expected_buffers, expected_steps, _ = run(stage, [False, False, False])
    assert pieces.keys() == expected.keys() and len(pieces) >= 2
    for key, values in expected.items():
        assert values.keys() == pieces[key].keys() == {"weight", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            assert torch.equal(value, pieces[key][name]), (stage, key, name)
    assert all(torch.equal(value, buffers[key]) for key, value in expected_buffers.items()), stage
    assert steps == expected_steps == 3, steps
    if runtime.is_main:
        print("stage", stage, "is as if the bad steps had not been", flush=True)
try:
    run(2, [False, True, True, True])
except FloatingPointError as error:
    if runtime.is_main:
        print("ended:", error, flush=True)

def fp16(zero_stage):
    options = {"data": "d", "output_dir": "o", "saved_bkb": "b", "saved_fc": "f", "batch_size": 16}
    config = ConfidenceConfig(**options, zero_stage=zero_stage, precision="fp16")
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizer = build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device)
    return Engine(net, optimizer, config, runtime, "fp16")

for stage in (0, 2):
    before, after = fp16(stage), fp16(stage)
    before.loss_scaler.load_state_dict({"scale": 2.0**10, "good_steps": 7})
    before.backward(loss(before, 0, False))
    before.step()
    parts = [None, None]
    torch.distributed.all_gather_object(parts, [tuple(piece) for piece in partitions.owned_pieces(before)])
    saved = [partitions.Piece(*piece) for part in parts for piece in part]
    partitions.restore(after, saved, partitions.shared_state(before), 1)
    assert after.loss_scaler.state_dict() == before.loss_scaler.state_dict() == {"scale": 2.0**10, "good_steps": 8}
    if runtime.is_main:
        print("loss scale resumed", flush=True)
distributed.finish()
distributed.leave(0)
"""


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(tmp_path, run_ranks):
    """Under every ZeRO stage: weights, both Adam moments, Adam's step count and BatchNorm statistics."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    output = run_ranks(
        2,
        tmp_path / "script.py",
        tmp_path,
    )
    assert [line.split()[1] for line in output.splitlines() if line.startswith("stage")] == list("0123")
    assert output.count("loss scale resumed") == 2
    assert "ended: no step of 1 to 3 has changed the weights: the loss is not finite" in output
    records = [json.loads(line) for line in (tmp_path / "not_finite_rank1.jsonl").read_text().splitlines()]
    assert (
        len(records) == 4 * 3 + 3
        and records[0]["step"] == 1
        and records[0]["rank"] == 1
        and records[0]["reason"] == "the loss is not finite"
        and records[0]["images"] == ["first.jpg", "second.jpg"]
    )
    assert not (tmp_path / "not_finite_rank0.jsonl").exists()


def test_stage_1_skips_and_goes_on(faces, flags, tmp_path, run_ranks):
    """The class centers, which change in the backward pass, are kept from it too; the images are named. ZeRO 3 must do
    with a forward pass alone.
    """
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import sys
        from scf_fast import distributed
        from scf_fast.stages.backbone import BackboneStage
        from scf_fast.train import main

        loss, calls = BackboneStage.loss, []
        def broken(self, engine, batch):
            calls.append(0)
            if len(calls) == 3:
                batch.images[:] = float("inf")
            return loss(self, engine, batch)
        BackboneStage.loss = broken
        distributed.leave(main())
        """)
    )
    output = run_ranks(
        2,
        tmp_path / "script.py",
        *flags["stage1"],
        "--zero_stage",
        3,
        "--data",
        faces / "train",
        "--output_dir",
        tmp_path / "run",
    )
    assert (
        "step 3 skipped: the loss is not finite on rank 0; its 16 images are in" in output
        and "1 skipped not finite" in output
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4, 5, 6, 7, 8] and all(
        record["loss"] > 0 for record in records
    )
    images = json.loads((tmp_path / "run" / "not_finite_rank1.jsonl").read_text())["images"]
    assert len(images) == 16 and all(name.startswith(str(faces / "train")) for name in images)


def ranks_of(process):
    """Process ids of a launch's ranks, by their number."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.getpgid(int(entry)) == process.pid:
                environment = dict(
                    item.split("=", 1) for item in open(f"/proc/{entry}/environ").read().split("\0") if "=" in item
                )
                if "RANK" in environment and b"scf_fast.train" in open(f"/proc/{entry}/cmdline", "rb").read():
                    found[int(environment["RANK"])] = int(entry)
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            pass
    return found


def wait_for_steps(process, folder, count, log):
    """Waits until a launch has logged this many steps."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def start_and_signal(flags, folder, number, after_steps):
    """Launches under deepspeed, waits until so many steps are logged, signals rank 1: (exit status, seconds that the
    end took, output).
    """
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*launcher(2), *map(str, flags)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    try:
        wait_for_steps(process, folder, after_steps, log)
        began = time.monotonic()
        os.kill(ranks_of(process)[1], number)
        return process.wait(90), time.monotonic() - began, log.read_text()
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def assert_stopped_in_order(run, status, output):
    assert status == STOPPED, output
    assert "--resume continues" in output
    saved = (run / "checkpoints" / "latest").read_text()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and saved == f"step{events[-1]['step']:08d}" and events[-1]["step"] < 200
    assert "Traceback" not in output


@pytest.fixture
def endless(faces, flags, tmp_path):
    """Flags of a run that does not end by itself."""
    return [*flags["stage1"], "--epochs", 500, "--data", faces / "train", "--output_dir", tmp_path / "run"]


def test_sigterm_to_one_rank_stops_all_after_a_checkpoint(endless, tmp_path):
    status, _, output = start_and_signal(endless, tmp_path / "run", signal.SIGTERM, 3)
    assert_stopped_in_order(tmp_path / "run", status, output)


def test_sigusr1_to_one_rank_does_too(endless, tmp_path, start_ranks):
    launch = start_ranks(2, "-m", "scf_fast.train", *endless)
    wait_for_steps(launch, tmp_path / "run", 3, launch.log)
    os.kill(launch.ranks[1], signal.SIGUSR1)
    assert_stopped_in_order(tmp_path / "run", launch.wait(90), launch.log.read_text())


def test_a_rank_that_dies_ends_the_job_soon(endless, tmp_path):
    status, seconds, output = start_and_signal(endless, tmp_path / "run", signal.SIGKILL, 2)
    assert status != 0 and seconds < 60, (status, seconds, output)
