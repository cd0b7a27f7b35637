"""Shared by the similarity of pairs and that of all pairs: argument checks, unit rows, and phi.

    phi_v(kappa) = psi_v(kappa) - psi_v(0)

is the part of the von Mises-Fisher log normalizer that varies with kappa: it starts at 0 and never exceeds kappa.
"""

import functools
import math

import numpy as np
import torch

from scf_fast.kernels._common import MAX_DIM, check_floating, check_radius, promoted_dtype
from scf_fast.kernels._debye_series import DebyePlan, debye_plan
from scf_fast.kernels.debye import debye_torch


def check_faces(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float
) -> torch.dtype:
    """Checks the arguments that all public functions share, and returns the type of their results."""
    for name, tensor in {"mu1": mu1, "kappa1": kappa1, "mu2": mu2, "kappa2": kappa2}.items():
        check_floating(name, tensor)
    if mu1.ndim != 2 or mu2.ndim != 2 or mu1.shape[1] != mu2.shape[1] or not 2 <= mu1.shape[1] <= MAX_DIM:
        raise ValueError(
            f"mu1 and mu2 must be (N, D) and (M, D) with D in 2 .. {MAX_DIM}, got {tuple(mu1.shape)} and "
            f"{tuple(mu2.shape)}"
        )
    for index, mu, kappa in (1, mu1, kappa1), (2, mu2, kappa2):
        if kappa.shape != mu.shape[:1]:
            raise ValueError(f"kappa{index} must be ({len(mu)},), one per row of mu{index}, got {tuple(kappa.shape)}")
    check_radius(radius)
    return promoted_dtype(mu1, kappa1, mu2, kappa2)


def row_lengths(mu: torch.Tensor, kappa: torch.Tensor) -> torch.Tensor:
    """Returns |mu| in float64, and 1 for a zero row with kappa 0, whose direction has no effect."""
    length = torch.linalg.vector_norm(mu, dim=1, dtype=torch.float64)
    return torch.where((length == 0) & (kappa == 0), 1.0, length)


def unit_rows(mu: torch.Tensor, kappa: torch.Tensor) -> torch.Tensor:
    """Returns the unit rows of float64 directions; a zero row stays zero where kappa is 0, and is NaN elsewhere."""
    return mu / row_lengths(mu, kappa)[:, None]


def log_uniform(dim: int) -> float:
    """Returns log C_d(0): minus the logarithm of the area of the unit sphere."""
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def score_constant(dim: int, radius: float) -> float:
    """Returns the part of a score that depends on neither face: 0 at the neutral radius."""
    return log_uniform(dim) - dim * math.log(radius)


@functools.lru_cache(maxsize=64)
def phi_plan(dim: int, dtype: torch.dtype) -> DebyePlan:
    """Returns the ``debye_plan`` whose psi is phi: float32 in two floats; float64 in one, which leaves 1e-16 of kappa
    and of the order.
    """
    order = dim / 2 - 1
    return debye_plan(order, dtype, order * math.log(2) + math.lgamma(order + 1), compensated=dtype == torch.float32)


@functools.lru_cache(maxsize=64)
def fold_series(plan: DebyePlan) -> list[float]:
    """Returns sum_k p^k Q_k(t^2) of an unshifted order m as one polynomial of t = m p in [0, 1], to 1e-12; the highest
    power first.
    """
    powers = np.zeros(3 * plan.terms + 1)
    coefficients = iter(plan.zeroth)
    for k in range(1, plan.terms + 1):
        for j in reversed(range(k + 1)):
            powers[k + 2 * j] += next(coefficients) / plan.shifted[0] ** k
    chebyshev = np.polynomial.Polynomial(powers).convert(kind=np.polynomial.Chebyshev, domain=[0, 1])
    return chebyshev.trim(1e-13).convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()


def phi_of_square(square: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns phi(kappa) for float64 kappa^2, which it overwrites."""
    plan = phi_plan(dim, torch.float64)
    if plan.steps:
        terms = debye_torch(square.sqrt_(), plan)
        return torch.add(terms.psi, terms.psi_tail, out=square)
    m = plan.shifted[0]
    s = square.add_(m * m).sqrt_()
    t = s.reciprocal().mul_(m)
    highest, *others = fold_series(plan)
    series = torch.full_like(t, highest)
    for coefficient in others:
        series.mul_(t).add_(coefficient)
    series.add_(t.add_(1).log_(), alpha=0.5)
    return series.add_(s).sub_(s.add_(m).log_().add_(sum(plan.offset)), alpha=plan.order_and_half[0])


def phi(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns phi of each face in float64, a part of all its scores; NaN for a negative kappa."""
    kappa = kappa.double()
    return phi_of_square(torch.where(kappa < 0, math.nan, kappa).square(), dim)
