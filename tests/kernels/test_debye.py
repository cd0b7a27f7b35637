import mpmath
import pytest
import torch

from scf_fast.kernels import debye
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels.debye import debye_torch

ORDERS = [0.0, 0.3, 0.5, 2.71828, 15.0, 127.0, 1023.5]


def exact_derivatives(order, kappa):
    """psi and its first three derivatives by mpmath, from the differential equation."""
    order, kappa = mpmath.mpf(order), mpmath.mpf(kappa)
    bessel, following = mpmath.besseli(order, kappa), mpmath.besseli(order + 1, kappa)
    ratio = following / bessel
    second = 1 - ratio**2 - (2 * order + 1) * ratio / kappa
    third = -2 * ratio * second - (2 * order + 1) / kappa * (second - ratio / kappa)
    return mpmath.log(bessel) - order * mpmath.log(kappa), ratio, second, third


@pytest.mark.parametrize("order", ORDERS)
def test_float64_against_mpmath(order):
    kappas = [1e-6, 0.01, 1.0, 7.3, order + 1, 3 * order + 5, 1e3, 1e4]
    plan = debye_plan(order, torch.float64)
    result = debye_torch(torch.tensor(kappas, dtype=torch.float64), plan, highest=3)
    for i, kappa in enumerate(kappas):
        with mpmath.workdps(60):
            psi, ratio, second, third = exact_derivatives(order, kappa)
            got = mpmath.mpf(result.psi[i].item()) + mpmath.mpf(result.psi_tail[i].item())
            assert abs(got - psi) <= 2e-14 * max(1, abs(psi))
            assert abs(result.ratio[i].item() / ratio - 1) <= 5e-16
            assert abs(result.complement[i].item() / (1 - ratio) - 1) <= 1e-12
            assert abs(result.second[i].item() / second - 1) <= 2e-12
            assert abs(result.third[i].item() / third - 1) <= 2e-12


@pytest.mark.parametrize("order", [255.0, 4095.0])
def test_psi_keeps_its_digits_where_it_crosses_zero(order):
    """At large orders psi is a difference of terms of thousands: near its zero only two floats hold it to 1e-13."""
    plan = debye_plan(order, torch.float64)

    def psi(kappa):
        result = debye_torch(torch.tensor([kappa], dtype=torch.float64), plan)
        return mpmath.mpf(result.psi.item()) + mpmath.mpf(result.psi_tail.item())

    low, high = 1.0, 100 * order
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if psi(middle) < 0 else (low, middle)
    with mpmath.workdps(60):
        exact = mpmath.log(mpmath.besseli(order, mpmath.mpf(low), maxterms=10**6)) - order * mpmath.log(mpmath.mpf(low))
        assert abs(exact) < 1e-9
        assert abs(psi(low) - exact) < 1e-14


@pytest.mark.parametrize("constant", [0.0, 2600.5, -0.125])
def test_constant_is_added(constant):
    kappa = torch.tensor([0.0, 3.0, 1e3], dtype=torch.float64)
    plain, shifted = (debye_torch(kappa, debye_plan(255.0, torch.float64, c)) for c in (0.0, constant))
    torch.testing.assert_close(
        shifted.psi + shifted.psi_tail, plain.psi + plain.psi_tail + constant, rtol=3e-16, atol=0
    )


def test_logarithm_in_two_floats():
    """To a thousandth of a rounding of 1, for all exponents and fractions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.empty(200, dtype=torch.float64).uniform_(-300, 300, generator=generator))
    x = torch.cat([x, torch.empty(200, dtype=torch.float64).uniform_(0.5, 2.0, generator=generator)])
    tail = x * torch.empty(400, dtype=torch.float64).uniform_(-1e-16, 1e-16, generator=generator)
    head, rest = debye._log_pair(x, tail, (0.0, 0.0), debye_plan(0.0, torch.float64))
    with mpmath.workdps(50):
        for i in range(400):
            exact = mpmath.log(mpmath.mpf(x[i].item()) + mpmath.mpf(tail[i].item()))
            assert abs(mpmath.mpf(head[i].item()) + mpmath.mpf(rest[i].item()) - exact) <= 2.0**-61, x[i]
