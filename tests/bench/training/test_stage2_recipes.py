"""The recipes that ``bench.stage2_recipes`` compares, and its tiny run."""

import json
import math

import pytest
import torch

from bench.training.stage2_recipes import _Average, main, recipes


def test_rates_of_the_recipes():
    published, started, fast, warm, constant, *_ = recipes()
    assert [published.factor(epoch * 10, 10) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert published.variant.start is None and started.variant.start == fast.variant.start == "auto"
    assert fast.epochs * 10 <= published.epochs
    steps = fast.epochs * 10
    assert fast.factor(0, 10) == 1 and fast.factor(steps // 2, 10) == pytest.approx(0.5)
    assert fast.factor(steps, 10) == pytest.approx(0)
    assert warm.factor(0, 10) == pytest.approx(10 / steps) and warm.factor(steps // 2, 10) == pytest.approx(0.5)
    assert constant.factor(steps - 1, 10) == 1


def test_average_of_parameters():
    parameters = [torch.tensor([1.0]), torch.tensor([10.0, 20.0])]
    average = _Average(parameters, 0.5)
    average.add()
    parameters[0].fill_(4.0)
    average.add()
    with average.applied():
        assert parameters[0].item() == pytest.approx((0.5 * 1 + 4) / 1.5) and parameters[1].tolist() == [10.0, 20.0]
    assert parameters[0].item() == 4


def test_tiny(tmp_path, capsys):
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
    outcomes = json.loads((tmp_path / "stage2_recipes.json").read_text())["outcomes"]
    assert [outcome["recipe"] for outcome in outcomes] == [recipe.name for recipe in recipes()]
    published, _, fast, *others = outcomes
    assert all(math.isfinite(outcome["loss"]) for outcome in others)
    assert fast["steps"] * 10 <= published["steps"] and fast["loss"] < published["loss"]
    assert "| drawn, d = 32 | mlp | confidence_fast | 0 |" in capsys.readouterr().out
