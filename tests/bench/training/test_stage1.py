"""The step through the engine trains what the step without it does."""

import copy
import sys

import pytest
import torch

from bench.measuring.case import NotMeasured, measure
from bench.measuring.roofline import Machine
from bench.training import stage1

CLASSES, BATCH = 40, 4
MACHINE = Machine(1e9, {"float32": 1e9, "bfloat16": 1e9}, 1e-6)


def work():
    """Runs in a process of its own, which joins a group."""
    torch.manual_seed(0)
    backbone = stage1.Backbone("ir_tiny", stage1.DIM, dropout=0.0)
    config = stage1.config_of("ir_tiny", BATCH)
    plain = stage1.our_step(copy.deepcopy(backbone), CLASSES, config, half=False, compiled=False)
    engine = stage1.EngineStep(backbone, CLASSES, config, half=False)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(BATCH, 3, 112, 112, generator=generator), torch.arange(BATCH) + step
        losses = engine(images, labels), plain(images, labels)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert engine.engine.applied_steps == 4
    engine.close()
    closed, (case,) = [], [case for case in stage1.cases("cpu", tiny=True) if case.way == "scf_fast, engine"]
    stage1.EngineStep.close = lambda self: closed.append(self)
    assert "seconds" in measure(case, "cpu", MACHINE, budget=0.001) and len(closed) == 1
    stage1.process_group.end_process(0)


def test_the_engines_step_is_ours_and_is_closed(run_ranks):
    run_ranks(0, __file__)


def test_without_deepspeed_the_reason_is_stated(monkeypatch):
    monkeypatch.setattr(stage1, "is_installed", lambda module: module != "deepspeed")
    with pytest.raises(NotMeasured, match="deepspeed is not installed"):
        stage1.prepare("scf_fast, engine", "ir_tiny", BATCH, CLASSES, "cpu")


if __name__ == "__main__":
    sys.exit(work())
