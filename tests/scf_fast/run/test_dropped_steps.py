"""Runs of stage 2 whose steps change nothing end with status 1 and name the reason and the batch."""

import json

import pytest
import torch

from scf_fast.networks.backbones import Backbone

# FACTOR, a formula of the step, is the gradient of the loss in place of 1.
SCRIPT = """
import dataclasses
import torch
from scf_fast import distributed
from scf_fast.stages.confidence import ConfidenceStage
from scf_fast.train import main

class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None

loss, calls = ConfidenceStage.loss, []
def steep(self, engine, batch):
    calls.append(0)
    step, result = len(calls), loss(self, engine, batch)
    return dataclasses.replace(result, loss=Steep.apply(result.loss, FACTOR))
ConfidenceStage.loss = steep
distributed.leave(main())
"""


@pytest.fixture
def train(faces, flags, tmp_path, start_ranks):
    """``train(factor, *flags, status=0)``: the output of a run of 8 steps, 4 an epoch, on random weights."""
    torch.manual_seed(0)
    backbone = Backbone("ir_small", 32)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(torch.randn(8, 32), tmp_path / "fc.pth")

    def run(factor, *more, status=0):
        (tmp_path / "script.py").write_text(SCRIPT.replace("FACTOR", factor))
        weights = [
            "--saved_bkb",
            tmp_path / "backbone.pth",
            "--saved_fc",
            tmp_path / "fc.pth",
            "--initial_kappa",
            "none",
        ]
        folders = ["--data", faces / "train", "--output_dir", tmp_path / "run"]
        launch = start_ranks(1, tmp_path / "script.py", *flags["stage2"], *weights, *folders, *more)
        assert launch.wait() == status, launch.log.read_text()
        return launch.log.read_text()

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gradients_that_stay_not_finite_end_the_run(train, tmp_path):
    output = train("float('inf') if step > 2 else 1.0", "--max_skipped_steps", 3, status=1)
    assert "stopped: no step of 3 to 5 has changed the weights: a gradient is not finite" in output
    assert "done" not in output.replace("DONE", "")
    records = lines_of(tmp_path / "run" / "not_finite_rank0.jsonl")
    assert [record["step"] for record in records] == [3, 4, 5]
    assert all(record["reason"] == "a gradient is not finite" and len(record["images"]) == 32 for record in records)


def test_a_gradient_that_overflows_once_is_counted_as_such(train, tmp_path):
    train("float('nan') if step == 2 else 1.0")
    done = lines_of(tmp_path / "run" / "events.jsonl")[-1]
    assert done["event"] == "done"
    assert done["counts"] == {
        "steps": 8,
        "skipped_not_finite": 0,
        "skipped_gradient_not_finite": 1,
        "skipped_by_loss_scale": 0,
        "broken_images": 0,
    }


def test_a_last_epoch_that_trains_nothing_is_not_done(train, tmp_path):
    """In fp16, where no number of steps that the loss scale costs ends a run."""
    output = train("float('inf') if step > 4 else 1.0", "--precision", "fp16", status=1)
    assert "no step of epoch 2 has changed the weights (" in output
    assert "gradients overflow under the loss scale" in output
    events = lines_of(tmp_path / "run" / "events.jsonl")
    assert events[-1]["event"] != "done" and [event["step"] for event in events if event["event"] == "export"] == [4]
