"""What an engine's steps cost beside the mathematics: waits of the host for the device, and operations that a GPU would
launch one by one. Counted on the CPU.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scf_fast.config import BackboneConfig, ConfidenceConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import deepspeed_config
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer

STAGES = range(4)
STEPS = 6  # the throughput timer waits from the third on
PLAIN = {"data": "-", "output_dir": "-", "batch_size": 2}
CLIPPING = {
    "norm": {"max_grad_norm": 1e-3},
    "values": {"max_grad_clip": 1e-3},
    "both, fp16": {"max_grad_norm": 1e-3, "max_grad_clip": 1e-3, "precision": "fp16"},
}
LAYERS = 2, 20  # with two parameters each
CUDA = torch.device("cuda")


def make_config(**options):
    return ConfidenceConfig(**{**PLAIN, "precision": "fp32", "saved_bkb": "-", "saved_fc": "-", **options})


def make_engine(config, runtime, layers=2):
    from scf_fast.engine.engine import Engine

    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)))
    optimizer = build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device)
    return Engine(net, optimizer, config, runtime, config.precision)


def make_step(engine):
    engine.backward(engine(torch.ones(2, 4)).float().square().mean())
    engine.step()


class Anything:
    """A stream, or an event, of a device that runs behind the host."""

    def __getattr__(self, name):
        return lambda *_: None


@contextmanager
def waits_for_the_device():
    """Has DeepSpeed take this machine for a device that runs behind the host; yields the list of its waits."""
    from deepspeed.accelerator import get_accelerator

    accelerator, waits = get_accelerator(), []
    behind = dict.fromkeys(("current_stream", "default_stream", "Stream", "Event"), Anything())
    behind["is_synchronized_device"] = False
    with (
        mock.patch.multiple(
            type(accelerator), **{name: lambda *_, value=value: value for name, value in behind.items()}
        ),
        mock.patch.object(accelerator, "synchronize", lambda *_: waits.append(1)),
    ):
        yield waits


def count_waits(folder, runtime):
    """Waits in each step, by ZeRO stage; the last entry is ZeRO 2 with DeepSpeed's overlap, from a user's file."""
    overlapping = folder / "overlap.json"
    overlapping.write_text('{"zero_optimization": {"overlap_comm": true}}')
    counts = []
    for options in [*({"zero_stage": stage} for stage in STAGES), {"zero_stage": 2, "deepspeed_config": overlapping}]:
        with waits_for_the_device() as waits:
            engine, made = make_engine(make_config(**options), runtime), []
            for _ in range(STEPS):
                waits.clear()
                make_step(engine)
                made.append(len(waits))
            engine.close()
        counts.append(made)
    return counts


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operations(runtime):
    """Operations of an optimizer step without ZeRO, by case and number of layers."""
    counts = {}
    for name, options in CLIPPING.items():
        for layers in LAYERS:
            engine = make_engine(make_config(zero_stage=0, **options), runtime, layers)
            make_step(engine)  # the first one makes the optimizer's state
            engine.backward(engine(torch.ones(2, 4)).float().square().mean())
            with Operations() as operations:
                engine.step()
            counts[f"{name} {layers}"] = operations.counts
            engine.close()
    return counts


def work(folder):
    """Runs on the rank of a launch and writes down the results."""
    from scf_fast import distributed

    runtime = distributed.start()
    results = {"waits": count_waits(folder, runtime), "operations": count_operations(runtime)}
    (folder / "results.json").write_text(json.dumps(results))
    distributed.finish()
    distributed.leave(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("overhead")
    run_ranks(1, __file__, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_step_never_waits_for_the_whole_device(zero_stage, results):
    """Such a wait is one for the frozen backbone of the next batch, too."""
    assert results["waits"][zero_stage] == [0] * STEPS


def test_overlap_that_a_users_file_asks_for_waits(results):
    """So the counter counts, and the key of a user's file wins."""
    assert all(results["waits"][-1])


@pytest.mark.parametrize("case", CLIPPING)
def test_clipping_takes_two_operations_for_any_number_of_parameters(case, results):
    """One for all norms and one for all products, or one for each bound of the values."""
    few, many = (Counter(results["operations"][f"{case} {layers}"]) for layers in LAYERS)
    assert few == many
    norms, products = many["aten._foreach_norm.Scalar"], many["aten._foreach_mul_.Tensor"]
    assert norms == 1 and products == ("max_grad_norm" in CLIPPING[case])
    bounds = many["aten._foreach_clamp_min_.Scalar"] + many["aten._foreach_clamp_max_.Scalar"]
    assert bounds == 2 * ("max_grad_clip" in CLIPPING[case])
    assert sum(many.values()) < 30, many


@pytest.mark.parametrize(
    ("config", "world_size", "device", "expected"),
    [
        (BackboneConfig(**PLAIN, zero_stage=2), 2, CUDA, True),
        (make_config(zero_stage=2, finetune_bkb=True), 2, CUDA, True),
        (make_config(zero_stage=1), 2, CUDA, False),
        (make_config(zero_stage=2), 2, CUDA, False),
        (make_config(zero_stage=3), 2, CUDA, True),
        (BackboneConfig(**PLAIN, zero_stage=2), 1, CUDA, False),
        (BackboneConfig(**PLAIN, zero_stage=2), 2, torch.device("cpu"), False),
    ],
)
def test_gradients_are_summed_beside_the_backward_pass_of_a_backbone(config, world_size, device, expected):
    """And not where that makes the host wait for a frozen one."""
    generated = deepspeed_config(config, Runtime(0, world_size, device), "fp32")
    assert generated["zero_optimization"]["overlap_comm"] is expected


if __name__ == "__main__":
    work(Path(sys.argv[1]))
