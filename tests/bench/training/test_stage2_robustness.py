"""Verdicts, slopes and the grid of ``bench.stage2_robustness``."""

import json
import math

import pytest
import torch

from bench.training.stage2_features import draw
from bench.training.stage2_robustness import best_constant, main, verdict
from bench.training.stage2_slopes import Slope, global_norm, optimum, rate_limit


@pytest.fixture(scope="module")
def features():
    return draw(64, 4, 20, 30)


def test_drawn_cosines_have_the_kappa_that_the_map_shows(features):
    assert features.mu.norm(dim=1).sub(1).abs().max() < 1e-5
    bright = features.convf.square().mean(dim=(1, 2, 3))  # grows with quality
    assert torch.corrcoef(torch.stack((bright, features.cos)))[0, 1] > 0.5
    train, held_out = features.split()
    assert not torch.isin(train.labels, held_out.labels).any() and len(held_out.labels.unique()) == 4


def test_a_weight_keeps_the_optimum_and_a_bound_moves_it(features):
    exact = optimum(Slope.EXACT, features.cos, features.dim)
    assert exact == pytest.approx(features.fitting_kappa, rel=1e-6)
    assert math.log(exact) == pytest.approx(best_constant(features, "exact"), abs=0.03)  # of a grid
    assert optimum(Slope.WEIGHTED, features.cos, features.dim) == pytest.approx(exact, rel=1e-6)
    assert optimum(Slope.BOUNDED, features.cos, features.dim) > 1.01 * exact


def test_the_limit_is_what_a_step_of_adam_can_do():
    net, x = torch.nn.Linear(50, 1), torch.rand(8, 50)
    rate = rate_limit(net, list(net.parameters()), x, 2.0)
    before = net(x).mean().item()
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net(x).mean().backward()
    optimizer.step()
    assert before - net(x).mean().item() == pytest.approx(2.0, rel=1e-4)


def test_norm_does_not_overflow():
    assert global_norm([torch.full((2,), 3e19), torch.full((2,), 3e19)]) == pytest.approx(6e19, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "log_kappa", "found"),
    [
        (math.inf, [5.0, 6.0], "diverged"),
        (3.0, [19.0, 20.0], "diverged"),
        (3.0, [-8.0, -7.0], "collapsed"),
        (3.0, [0.0, 0.1], "collapsed"),
        (3.0, [5.0, 5.0], "collapsed"),
        (0.9, [5.0, 6.0], "trained"),
        (1.1, [5.0, 6.0], "unfinished"),
    ],
)
def test_verdict(loss, log_kappa, found):
    assert verdict(loss, torch.tensor(log_kappa), 5.5, 1.0) == found


def test_tiny_grid(tmp_path, capsys):
    status = main(["--tiny", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "stage2_robustness.json").read_text())
    assert status == (1 if result["against"] else 0)
    cells = {(cell["normalizer"], cell["variant"], cell["lr"]): cell["verdict"] for cell in result["cells"]}
    assert cells["exact", "before", 0.1] == "diverged" and len(cells) == 28
    assert cells["exact", "chosen", 0.1] not in ("diverged", "collapsed")
    assert "| d | net | normalizer | way |" in capsys.readouterr().out
