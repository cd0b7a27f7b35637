"""The recipes that ``bench.stage2_recipes`` compares, and its tiny run."""

import json

import pytest

from bench.training.stage2_recipes import main, recipes


def test_rates_of_the_recipes():
    published, started, fast = recipes()
    assert [published.factor(epoch * 10, 10) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert published.variant.start is None and started.variant.start == fast.variant.start == "auto"
    assert fast.epochs * 10 <= published.epochs
    steps = fast.epochs * 10
    assert fast.factor(0, 10) == 1 and fast.factor(steps // 2, 10) == pytest.approx(0.5)
    assert fast.factor(steps, 10) == pytest.approx(0)


def test_tiny(tmp_path, capsys):
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
    outcomes = json.loads((tmp_path / "stage2_recipes.json").read_text())["outcomes"]
    assert [outcome["recipe"] for outcome in outcomes] == ["published", "published, auto start", "confidence_fast"]
    published, _, fast = outcomes
    assert fast["steps"] * 10 <= published["steps"] and fast["loss"] < published["loss"]
    assert "| drawn, d = 32 | mlp | confidence_fast | 0 |" in capsys.readouterr().out
