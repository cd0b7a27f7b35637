"""Runs resume with another implementation of their optimizer: Apex's, DeepSpeed's and PyTorch's, in all pairs, under
every ZeRO stage on two ranks, against plain PyTorch that never stopped.

DeepSpeed's classes are the real ones on kernels of a few lines. Apex needs a GPU: classes that keep their state as
Apex's do stand for it.
"""

import gc
import importlib.machinery
import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from scf_fast.config import ConfidenceConfig
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.engine.step_count import read_step_count, saved_step_count, write_step_count

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Name for --optimizer and the device that decides which class it is.
ADAMS = {
    "apex": ("apex", GPU),
    "deepspeed": ("deepspeed", GPU),
    "deepspeed on a cpu": ("deepspeed", CPU),
    "torch": ("torch", CPU),
}
SGDS = {"apex": ("apex", GPU), "torch": ("torch", CPU)}
PAIRS = [
    (rule, before, after)
    for rule, makers in ((OptimizerRule.ADAM, ADAMS), (OptimizerRule.SGD, SGDS))
    for before, after in itertools.product(makers, makers)
]
OLDER = dict(zip(ADAMS, [*ADAMS][1:] + [*ADAMS][:1]))  # who goes on from whose checkpoint of an earlier version
STAGES = (0, 1, 2, 3)
SKIPPED, STOP, STEPS = 1, 4, 6  # the step whose gradient is not finite; steps before the checkpoint, and in all
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-2, 0.9, 0.1


def adam(step, weight, gradient, mean, square, lr, beta1, beta2, eps, weight_decay):
    """One step of Adam with the L2 term in the gradient, in place."""
    gradient = gradient + weight_decay * weight
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight -= lr / (1 - beta1**step) * mean / ((square / (1 - beta2**step)).sqrt() + eps)


class FusedAdam(torch.optim.Optimizer):
    """Counts in the group, before it looks at gradients; the moments are the only state."""

    __module__ = "apex.optimizers.fused_adam"

    def __init__(self, parameters, lr, weight_decay, adam_w_mode):
        assert not adam_w_mode
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[weight]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                moments = state["exp_avg"], state["exp_avg_sq"]
                options = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
                adam(group["step"], weight, weight.grad, *moments, *options)


class FusedSGD(torch.optim.Optimizer):
    """Counts nowhere; ``momentum_buffer`` is the only state, and the first gradient fills it."""

    __module__ = "apex.optimizers.fused_sgd"

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in (parameter for parameter in group["params"] if parameter.grad is not None):
                state, gradient = self.state[weight], weight.grad + group["weight_decay"] * weight
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                else:
                    state["momentum_buffer"] = gradient
                weight -= group["lr"] * state["momentum_buffer"]


class Kernels:
    """Stands for DeepSpeed's compiled extensions."""

    def load(self):
        return self

    def multi_tensor_adam(self, chunk, skip, tensors, lr, beta1, beta2, eps, step, mode, correct, weight_decay):
        assert isinstance(step, int) and mode == 0 and correct
        for gradient, weight, mean, square in zip(*tensors):
            adam(step, weight.detach(), gradient, mean, square, lr, beta1, beta2, eps, weight_decay)

    def create_adam(self, *arguments):
        assert arguments[6] is False, arguments

    def adam_update(self, _, step, lr, beta1, beta2, eps, weight_decay, correct, weight, gradient, mean, square):
        assert isinstance(step, int) and correct
        adam(step, weight, gradient, mean, square, lr, beta1, beta2, eps, weight_decay)

    def destroy_adam(self, _):
        pass


def install(set_item, set_attribute):
    """Puts the stand-ins into place."""
    import cpuinfo
    import deepspeed.ops.adam

    modules = {name: types.ModuleType(name) for name in ("apex", "apex.optimizers", "amp_C")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        set_item(sys.modules, name, module)
    modules["apex.optimizers"].FusedAdam, modules["apex.optimizers"].FusedSGD = FusedAdam, FusedSGD
    set_attribute(sys.modules[deepspeed.ops.adam.FusedAdam.__module__], "FusedAdamBuilder", Kernels)
    set_attribute(sys.modules[deepspeed.ops.adam.DeepSpeedCPUAdam.__module__], "CPUAdamBuilder", Kernels)
    set_attribute(cpuinfo, "get_cpu_info", dict)  # a process of a second for each optimizer, to warn of AMD's in fp16


def make_config(**options):
    paths = {"data": "-", "output_dir": "-", "saved_bkb": "-", "saved_fc": "-"}
    return ConfidenceConfig(
        **paths, batch_size=2, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=0.0, **options
    )


def make_optimizer(rule, implementation, parameters, **options):
    name, device = (ADAMS if rule is OptimizerRule.ADAM else SGDS)[implementation]
    return build_optimizer(rule, parameters, make_config(optimizer=name, **options), device, momentum=MOMENTUM)


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))


def loss_of(net, step):
    """A loss whose gradients change their size from step to step, as Adam's bias correction shows only then."""
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return net(inputs).square().mean() * (float("nan") if step == SKIPPED else 3.0**step)


def expected_weights(rule):
    net = make_net()
    options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    optimizer = (
        torch.optim.Adam(net.parameters(), **options)
        if rule is OptimizerRule.ADAM
        else torch.optim.SGD(net.parameters(), momentum=MOMENTUM, **options)
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        if step != SKIPPED:
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def older_form(shared, implementation):
    """The step counter as earlier versions wrote it, with Adam of this implementation."""
    older = {key: value for key, value in shared.items() if key != "optimizer_steps"}
    count = shared["optimizer_steps"]
    return (
        older
        | {
            "apex": {"counters": {}, "group_steps": [count]},
            "deepspeed": {"counters": {"step": count}, "group_steps": [0]},
            "deepspeed on a cpu": {"counters": {"step": count}, "group_steps": [None]},
            "torch": {"counters": {"step": torch.tensor(float(count))}, "group_steps": [None]},
        }[implementation]
    )


def work(folder):
    """Runs on each rank: every implementation up to a checkpoint on the disk, every one from there on."""
    from scf_fast import distributed
    from scf_fast.engine.engine import Engine
    from scf_fast.run import checkpoints
    from scf_fast.run.run_state import RunState

    install(dict.__setitem__, setattr)
    gc.freeze()  # ZeRO 3 collects garbage with each engine: not through all that is imported
    runtime, results = distributed.start(), {}

    def steps(engine, first, last):
        for step in range(first, last):
            engine.backward(loss_of(engine, step))
            engine.step()

    def make_engine(rule, implementation, stage, point=None):
        net = make_net()
        if point:
            checkpoints.load_weights(net, point)
        optimizer = make_optimizer(rule, implementation, net.parameters(), zero_stage=stage)
        return Engine(net, optimizer, make_config(zero_stage=stage), runtime, "fp32")

    def resume(rule, implementation, stage, point):
        engine = make_engine(rule, implementation, stage, point)
        checkpoints.load(engine, point)
        steps(engine, STOP, STEPS)
        weights = torch.cat([value.flatten() for value in engine.full_state_dict().values()]).tolist()
        count = read_step_count(engine.optimizer)
        engine.close()
        return weights, count

    for stage in STAGES:
        for rule, makers in ((OptimizerRule.ADAM, ADAMS), (OptimizerRule.SGD, SGDS)):
            for before in makers:
                engine = make_engine(rule, before, stage)
                steps(engine, 0, STOP)
                writer = checkpoints.Checkpoints(folder / f"{stage} {rule.value} {before}", runtime, 1, False, False)
                writer.folder.mkdir(exist_ok=True)
                writer.save(engine, RunState(STOP, {}, 1, 1, None, [0.0, 0.0], runtime.world_size, stage))
                writer.close()
                engine.close()
                point = checkpoints.newest_intact(writer.folder)
                for after in makers:
                    results[f"{stage} {rule.value} {before} {after}"] = resume(rule, after, stage, point)
                if stage == 0 and rule is OptimizerRule.ADAM:
                    torch.distributed.barrier()
                    if runtime.is_main:
                        content = torch.load(point.folder / "rank0.pt", weights_only=True)
                        content["shared"] = older_form(content["shared"], before)
                        torch.save(content, point.folder / "rank0.pt")
                    torch.distributed.barrier()
                    after = OLDER[before]
                    results[f"older {rule.value} {before} {after}"] = resume(rule, after, stage, point)
    if runtime.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.finish()
    distributed.leave(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, __file__, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("stage", [*STAGES, "older"])
def test_any_implementation_goes_on_from_any_other(stage, results):
    expected = {rule: expected_weights(rule) for rule in OptimizerRule}
    older = [(OptimizerRule.ADAM, *pair) for pair in OLDER.items()]
    for rule, before, after in older if stage == "older" else PAIRS:
        weights, count = results[f"{stage} {rule.value} {before} {after}"]
        torch.testing.assert_close(torch.tensor(weights), expected[rule], rtol=1e-5, atol=1e-6, msg=f"{before} {after}")
        assert count == (STEPS - 1 if rule is OptimizerRule.ADAM else None), (before, after)


@pytest.mark.parametrize("implementation", list(ADAMS))
def test_a_count_is_written_where_the_implementation_looks_for_it(implementation, monkeypatch):
    """As a step of the implementation leaves it, of the same type; and none is read before the first step."""
    install(monkeypatch.setitem, monkeypatch.setattr)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = make_optimizer(OptimizerRule.ADAM, implementation, parameters)
    assert read_step_count(optimizer) is None
    for made in (1, 2, 3):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        assert read_step_count(optimizer) == made
    before = str(optimizer.state_dict())
    write_step_count(optimizer, 3)
    if implementation == "deepspeed":  # which has left a 0 in the first parameter's state
        before = before.replace("'step': 0, 'exp_avg'", "'step': 3, 'exp_avg'")
    assert str(optimizer.state_dict()) == before
    write_step_count(optimizer, 41)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert read_step_count(optimizer) == 42


def test_what_counts_nothing_is_saved_as_nothing():
    assert saved_step_count({"optimizer_steps": None}) is None
    assert saved_step_count({"counters": {}, "group_steps": [None]}) is None


if __name__ == "__main__":
    work(Path(sys.argv[1]))
