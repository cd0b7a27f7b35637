"""The formulas that other tests compare with, against digits of mpmath and each other."""

import json
import math
from pathlib import Path

import pytest
import torch

from scf_fast.kernels import reference

ENTRIES = json.loads((Path(__file__).parent / "reference.json").read_text())["entries"]


@pytest.mark.parametrize("dim", [2, 3, 32, 512, 8192])
def test_bessel_function_against_mpmath(dim):
    entries = [entry for entry in ENTRIES if entry["dim"] == dim and entry["kappa"] <= 1e5]
    kappa = torch.tensor([entry["kappa"] for entry in entries], dtype=torch.float64)
    psi, ratio = (torch.tensor([float(entry[name]) for entry in entries], dtype=torch.float64) for name in ("psi", "A"))
    torch.testing.assert_close(reference.psi(dim / 2 - 1, kappa), psi, rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(reference.mean_resultant_length(kappa, dim), ratio, rtol=1e-9, atol=0)
    small = ratio < 0.9
    torch.testing.assert_close(
        reference.inverse_mean_resultant_length(ratio[small], dim), kappa[small], rtol=1e-8, atol=0
    )


def test_zero_kappa():
    assert reference.psi(3.0, torch.zeros(1)).item() == pytest.approx(-3 * math.log(2) - math.lgamma(4), rel=1e-14)
    assert reference.psi(3.0, torch.zeros(0)).shape == (0,)


def test_published_loss_differs_where_its_epsilon_swallows_the_bessel_function():
    """At d = 512, ive(255, 1e5) is far above 1e-6, ive(255, 100) far below."""
    generator = torch.Generator().manual_seed(0)
    features, centers = (torch.randn(2, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    arguments = features, torch.tensor([1e5, 100.0], dtype=torch.float64).log(), centers, torch.tensor([0, 1])
    difference = reference.published_scf_loss(*arguments) - reference.scf_loss(*arguments)
    assert abs(difference[0]) < 1e-2 < difference[1]
