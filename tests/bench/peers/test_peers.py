"""Other projects' losses are called the way they are meant to be, here with stand-ins of their documented signatures,
and checked as any other.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.kernels import margin_softmax
from bench.peers import peers


class CombinedMarginLoss:
    """Scaled logits with arcface_torch's margin at the target."""

    def __init__(self, s, m1, m2, m3):
        self.s, self.m2 = s, m2
        assert (m1, m3) == (1.0, 0.0)

    def __call__(self, logits, labels):
        rows = torch.arange(len(labels))
        with torch.no_grad():
            shift = torch.cos(logits[rows, labels].acos() + self.m2) - logits[rows, labels]
        return self.s * logits.index_put((rows, labels), shift, accumulate=True)


class LigerFusedLinearCrossEntropyLoss:
    def __call__(self, lin_weight, _input, target):
        return F.cross_entropy(_input @ lin_weight.t(), target)


def linear_cross_entropy(e, c, targets):
    return F.cross_entropy(e @ c.t(), targets)


@pytest.fixture
def stand_ins(monkeypatch):
    for name, content in (
        ("losses", {"CombinedMarginLoss": CombinedMarginLoss}),
        ("cut_cross_entropy", {"linear_cross_entropy": linear_cross_entropy}),
        ("liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": LigerFusedLinearCrossEntropyLoss}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))


@pytest.mark.parametrize("name", ["arcface_torch", "cut_cross_entropy", "liger"])
def test_peers_pass_the_check_that_every_way_must(name, stand_ins):
    torch.manual_seed(0)
    margin_softmax.check(name, "cpu")


def test_a_peer_that_computes_something_else_is_not_timed(stand_ins, monkeypatch):
    monkeypatch.setattr(
        sys.modules["cut_cross_entropy"],
        "linear_cross_entropy",
        lambda e, c, targets: F.cross_entropy(1.01 * e @ c.t(), targets),
    )
    with pytest.raises(AssertionError):
        margin_softmax.check("cut_cross_entropy", "cpu")


def test_what_is_missing_is_named():
    assert peers.problem("dense", "cpu") is None
    assert peers.problem("liger", "cpu") in ("the module liger_kernel is not installed", "liger runs on GPUs only")
