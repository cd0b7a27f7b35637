"""The confidence that each objective asks for, against mpmath and formulas written out; docs/objectives.md shows it."""

import math

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from bench.kernels import objectives
from bench.kernels.objectives import TABLE_COSINES, best_confidence
from bench.measuring.environment import ROOT
from scf_fast.kernels import scf_loss
from scf_fast.objectives import Objective

DIM = 512
ROUNDING = mpf("0.05")  # of the table
TITLES = {objective.title: objective for objective in Objective}


def mean_resultant_length(kappa):
    return mp.besseli(mpf(DIM) / 2, kappa) / mp.besseli(mpf(DIM) / 2 - 1, kappa)


def slope(objective, cos, confidence):
    """Derivative of the loss, per unit of kappa or precision, at one cosine; of a pair for PFE, by definition of each
    likelihood: ||mu - w||^2 = 2 (1 - cos), the variances of a pair add up.
    """
    cos, q = mpf(cos), mpf(confidence)
    if objective is Objective.SCF:
        return mean_resultant_length(q) - cos
    if objective is Objective.PFE_VMF:
        s = mp.sqrt(2 + 2 * cos)
        return 2 * mean_resultant_length(q) - s * mean_resultant_length(q * s)
    if objective is Objective.SCF_GAUSSIAN:  # (1 - cos) q - (d/2) log q
        return (1 - cos) - mpf(DIM) / (2 * q)
    return (2 * (1 - cos) / 2 - mpf(DIM) / q) / 2  # 1/2 (2 (1 - cos) / (2 s^2) + d log(2 s^2)), s^2 = 1 / q


def rows_of_the_page():
    lines = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    start = lines.index(objectives.make_table(DIM).splitlines()[0])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 7]]


def test_the_page_shows_the_table():
    assert objectives.make_table(DIM) in (ROOT / "docs" / "objectives.md").read_text()
    assert {row[0] for row in rows_of_the_page()} == {*TITLES, "SCF as published code"}


@pytest.mark.parametrize("title", TITLES)
def test_each_entry_is_where_mpmath_has_the_least_loss(title):
    (row,) = (row for row in rows_of_the_page() if row[0] == title)
    with mp.workdps(30):
        for cos, cell in zip(TABLE_COSINES, row[1:]):
            low, high = (slope(TITLES[title], str(cos), mpf(cell) + side * ROUNDING) for side in (-1, 1))
            assert low < 0 < high, (title, cos, cell)


def published_slope(kappa, cos):
    """Slope in log kappa of the published code's SCF, by autograd in float64."""
    mu, center = torch.zeros(2, 1, DIM, dtype=torch.float64)
    mu[0, 0], center[0, 0], center[0, 1] = 1, cos, math.sqrt(1 - cos * cos)
    log_kappa = torch.tensor([math.log(kappa)], dtype=torch.float64, requires_grad=True)
    scf_loss(mu, log_kappa, center, torch.tensor([0]), normalizer="published").backward()
    return log_kappa.grad.item()


def gaussian_slope(kappa, cos, dim):
    """Slope in log(1 / variance) of -log N(w; mu, variance) in ``dim`` dimensions, by autograd of the density."""
    mu, center = torch.zeros(2, dim, dtype=torch.float64)
    mu[0], center[0], center[1] = 1, cos, math.sqrt(1 - cos * cos)
    log_precision = torch.tensor(math.log(kappa), dtype=torch.float64, requires_grad=True)
    scale = torch.exp(-log_precision / 2).expand(dim)
    (-torch.distributions.Normal(mu, scale).log_prob(center).sum()).backward()
    return log_precision.grad.item()


@pytest.mark.parametrize("cos", [0.0, 0.6, 0.95])
def test_the_published_code_trains_scf_gaussian_in_two_dimensions_fewer(cos):
    order = DIM / 2 - 1
    tolerances = dict.fromkeys((1, 30, 255, 1000, 1500), 1e-5) | dict.fromkeys((2500, 3200), 1e-2)
    for kappa, tolerance in tolerances.items():
        gap = abs(published_slope(kappa, cos) - gaussian_slope(kappa, cos, DIM - 2)) / order
        assert gap < tolerance, kappa
        assert abs(published_slope(kappa, cos) - gaussian_slope(kappa, cos, DIM)) / order > 0.9 / order - tolerance
    # Beyond, its normalizer becomes that of the vMF, and it leaves the Gaussian.
    assert abs(published_slope(1e4, cos) - gaussian_slope(1e4, cos, DIM - 2)) / order > 0.01


def test_pairs_ask_for_more_than_class_centers_do_at_the_same_cosine():
    of_pairs, of_centers = (best_confidence(which, TABLE_COSINES, DIM) for which in (Objective.PFE_VMF, Objective.SCF))
    ratios = dict(zip(TABLE_COSINES, of_pairs / of_centers))
    assert list(ratios.values()) == sorted(ratios.values(), reverse=True)
    assert ratios[0.05] == pytest.approx(4.7, abs=0.05) and ratios[0.9] == pytest.approx(2.0, abs=0.05)


def test_both_vmf_objectives_ask_for_the_same_kappa_of_images_around_one_center():
    """Images with a mean cosine of rho with their center have one of rho^2 with each other."""
    rho = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    of_pairs = best_confidence(Objective.PFE_VMF, rho**2, DIM)
    np.testing.assert_allclose(of_pairs, best_confidence(Objective.SCF, rho, DIM), rtol=2e-3)
    of_pairs = best_confidence(Objective.PFE, rho**2, DIM)
    np.testing.assert_allclose(of_pairs, 2 / (1 + rho) * best_confidence(Objective.SCF_GAUSSIAN, rho, DIM))


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    path = tmp_path / "plot.png"
    assert objectives.main(["--dim", "16", "--out", str(path)]) == 0
    assert objectives.make_table(16) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert objectives.main(["--dim", "3", "--out", str(path)]) == 2
    assert "--dim must be at least 4, got 3" in capsys.readouterr().err
