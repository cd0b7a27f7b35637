import math

import mpmath
import pytest
import torch

from scf_fast.kernels import _debye_series as module
from scf_fast.kernels._debye_series import SERIES, debye_plan


def exact_derivatives(order, kappa):
    """psi and its first three derivatives by mpmath, from the differential equation."""
    order, kappa = mpmath.mpf(order), mpmath.mpf(kappa)
    bessel, following = mpmath.besseli(order, kappa), mpmath.besseli(order + 1, kappa)
    ratio = following / bessel
    second = 1 - ratio**2 - (2 * order + 1) * ratio / kappa
    third = -2 * ratio * second - (2 * order + 1) / kappa * (second - ratio / kappa)
    return mpmath.log(bessel) - order * mpmath.log(kappa), ratio, second, third


def test_first_polynomials():
    """Q_1 and Q_2 follow from U_1 and U_2 of DLMF 10.41.10."""
    t2 = mpmath.mpf(1) / 3
    u1, u2 = (3 - 5 * t2) / 24, (81 - 462 * t2 + 385 * t2**2) / 1152
    q1, q2 = (sum(mpmath.mpf(c.numerator) / c.denominator * t2**j for j, c in enumerate(q)) for q in SERIES.zeroth[:2])
    assert mpmath.almosteq(q1, u1, 1e-14) and mpmath.almosteq(q2, u2 - u1**2 / 2, 1e-14)


@pytest.mark.parametrize("kappa", [1, 20, 45, 200])
@pytest.mark.parametrize("terms", [1, 4, 13])
def test_series_is_as_good_as_its_first_neglected_term(kappa, terms):
    """The bound that the plan chooses N and K by, for psi and A, in exact arithmetic at m = 40; A' and A'' to the same
    power of m.
    """
    with mpmath.workdps(60):
        m, kappa = mpmath.mpf(40), mpmath.mpf(kappa)
        s = mpmath.sqrt(m**2 + kappa**2)
        p, x = 1 / s, (m / s) ** 2

        def series(polynomials):
            return sum(
                p**k * sum(mpmath.mpf(c.numerator) / c.denominator * x**j for j, c in enumerate(f))
                for k, f in enumerate(polynomials[:terms], 1)
            )

        zeroth, first, second, third = (series(polynomials) for polynomials in SERIES)
        y = m + s
        psi = s - m * mpmath.log(y) - mpmath.log(2 * mpmath.pi * s) / 2 + zeroth
        ratio = kappa * (1 / y - p**2 / 2 - p**2 * first)
        slope = m * p / y + p**2 * (mpmath.mpf(1) / 2 - x + second)
        curvature = -kappa * p**2 * (m / y * (p + 1 / y) + p**2 * (1 - 4 * x + third))
        exact = exact_derivatives(m, kappa)
        assert abs(psi - exact[0]) <= 1.1 * module._NEXT_ZEROTH[terms] / m ** (terms + 1)
        assert abs(ratio / exact[1] - 1) <= 1.1 * module._NEXT_FIRST[terms] / m ** (terms + 2)
        for value, expected, degree in ((slope, exact[2], 2), (curvature, exact[3], 3)):
            assert abs(value / expected - 1) <= (2 * terms + 4) ** degree * module._NEXT_FIRST[terms] / m ** (terms + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [0.0, 255.0, 4095.0, 1e6])
def test_plan_bounds_the_truncation(order, dtype):
    plan = debye_plan(order, dtype)
    m = plan.shifted[0]
    assert m == order + plan.steps
    assert module._NEXT_ZEROTH[plan.terms] / m ** (plan.terms + 1) <= module._TRUNCATION[dtype] * (1 + 1e-12)
    assert len(plan.zeroth) == sum(range(2, plan.terms + 2)) and len(plan.second) == sum(range(3, plan.terms + 3))
    assert math.isclose(
        plan.half_ln2[0] + plan.half_ln2[1], math.log(2) / 2, rel_tol=1e-15 if dtype == torch.float64 else 1e-11
    )
