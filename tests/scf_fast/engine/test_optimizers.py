import contextlib
import logging
import sys

import pytest
import torch

from scf_fast.config import BackboneConfig
from scf_fast.engine import optimizers
from scf_fast.engine.optimizers import OptimizerRule, StepGate, build_optimizer, nvidia_apex_problem

CPU = torch.device("cpu")


def stage1(**changes):
    return BackboneConfig(data="d", output_dir="o", **changes)


def steps(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_update_rule_against_its_formula(rule):
    """L2 term in the gradient for both; Adam is not AdamW."""
    torch.manual_seed(0)
    p, gradients = torch.nn.Parameter(torch.randn(5)), [torch.randn(5) for _ in range(3)]
    w, m, v = p.detach().clone().double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, g in enumerate(gradients, 1):
        g = g.double() + 5e-4 * w
        if rule == "sgd":
            m = g if t == 1 else 0.9 * m + g
            w = w - 0.1 * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    got = steps(build_optimizer(OptimizerRule(rule), [p], stage1(lr=0.1), CPU), p, gradients)
    torch.testing.assert_close(got.double(), w, rtol=1e-5, atol=1e-6)


def test_values_are_clipped_at_the_step():
    p = torch.nn.Parameter(torch.zeros(3))
    got = steps(
        build_optimizer(OptimizerRule.SGD, [p], stage1(lr=1.0, weight_decay=0.0, max_grad_clip=0.5), CPU),
        p,
        [torch.tensor([2.0, -2.0, 0.1])],
    )
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.5, -0.1]))


class CountsInTheGroup(torch.optim.SGD):
    """Counts its steps where fused Adam of Apex and of DeepSpeed does."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("make", [torch.optim.Adam, CountsInTheGroup])
def test_a_closed_gate_leaves_weights_moments_and_counters_alone(make):
    """Against an optimizer that was never asked for the steps behind the gate."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    gated, plain = (make([p], lr=0.1) for p in parameters)
    gate = StepGate(gated)
    for step, closed in enumerate([True, False, True, False]):
        gradient = torch.full((3,), float("nan") if closed else 1.0 + step)
        parameters[0].grad = gradient
        with gate.closed() if closed else contextlib.nullcontext():
            gated.step()
        assert parameters[0].grad is gradient  # offloading writes into its memory
        if not closed:
            parameters[1].grad = gradient.clone()
            plain.step()
    assert torch.equal(*parameters)
    assert str(gated.state_dict()) == str(plain.state_dict())


def test_named_implementation_that_is_absent_is_an_error_and_auto_says_what_it_took(caplog):
    p = [torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="--optimizer apex cannot be used here"):
        build_optimizer(OptimizerRule.SGD, p, stage1(optimizer="apex"), CPU)
    with caplog.at_level(logging.INFO):
        build_optimizer(OptimizerRule.SGD, p, stage1(), CPU)
    assert "optimizer: fused SGD of torch" in caplog.text


@pytest.mark.parametrize("rule", OptimizerRule)
def test_auto_compiles_nothing(rule, monkeypatch):
    """DeepSpeed's fused Adam runs nvcc for a minute."""
    asked = []
    for name, make in optimizers._IMPLEMENTATIONS.items():
        monkeypatch.setitem(
            optimizers._IMPLEMENTATIONS, name, lambda *args, name=name, make=make: (asked.append(name), make(*args))[1]
        )
    made = build_optimizer(rule, [torch.nn.Parameter(torch.zeros(3))], stage1(), torch.device("cuda"))
    assert asked == ["apex", "torch"] and made.defaults["fused"]
    with pytest.raises(ValueError, match="deepspeed: has no fused SGD"):
        build_optimizer(OptimizerRule.SGD, [], stage1(optimizer="deepspeed"), torch.device("cuda"))
    assert asked[-1] == "deepspeed"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"apex/__init__.py": "import pyramid_that_is_not_there"}, "does not import"),
        ({"apex/__init__.py": "", "apex/models.py": ""}, "not NVIDIA Apex"),
        ({"apex/__init__.py": "", "apex/optimizers.py": ""}, "without its CUDA extensions"),
        ({}, "not installed"),
        ({"apex/__init__.py": "", "apex/optimizers.py": "", "amp_C.py": ""}, "None"),
    ],
)
def test_the_unrelated_apex_is_not_mistaken_for_nvidias(tmp_path, files, expected, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    try:
        assert expected in str(nvidia_apex_problem())
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
            del sys.modules[name]
