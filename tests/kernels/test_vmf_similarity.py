import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import dblquad, quad

from scf_fast.kernels import reference
from scf_fast.kernels.vmf_similarity import (
    _vmf_similarity,
    neutral_radius,
    vmf_similarity,
    vmf_similarity_from_cosine,
)
from scf_fast.kernels.vmf_similarity_tiles import vmf_similarity_matrix

KAPPAS = [0.0, 1e-2, 1.0, 37.0, 255.0, 1e3, 1e5]


def at_angle(angle, dim):
    """The first axis and a unit row at ``angle`` radians from it."""
    first, second = torch.zeros(1, dim, dtype=torch.float64), torch.zeros(1, dim, dtype=torch.float64)
    first[0, 0], second[0, 0], second[0, 1] = 1, math.cos(angle), math.sin(angle)
    return first, second


def scalar(x):
    return torch.tensor([x], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kappa1", "kappa2", "angle"), [(0.5, 3.0, 0.7), (20.0, 4.0, 2.5), (6.0, 6.0, math.pi), (0.0, 9.0, 1.0)]
)
def test_circle_against_integration(kappa1, kappa2, angle):
    """d = 2: the integral of the product of the densities, each 1/(2 pi I_0(kappa)) exp(kappa cos), over the unit
    circle.
    """
    normalizer = [quad(lambda t, k=k: math.exp(k * math.cos(t)), -math.pi, math.pi)[0] for k in (kappa1, kappa2)]
    product = quad(
        lambda t: math.exp(kappa1 * math.cos(t) + kappa2 * math.cos(t - angle)),
        -math.pi,
        math.pi,
        epsabs=0,
        epsrel=1e-12,
    )[0]
    mu1, mu2 = at_angle(angle, 2)
    score = vmf_similarity(mu1, scalar(kappa1), mu2, scalar(kappa2), radius=1.0)
    assert score.item() == pytest.approx(math.log(product / normalizer[0] / normalizer[1]), abs=1e-9)


@pytest.mark.parametrize(("kappa1", "kappa2", "angle"), [(0.5, 3.0, 0.7), (12.0, 4.0, 2.5), (5.0, 5.0, math.pi)])
def test_sphere_against_integration(kappa1, kappa2, angle):
    """d = 3: as above, with density kappa / (4 pi sinh kappa) exp(kappa cos) over the unit sphere."""

    def product(azimuth, polar):
        cos1 = math.cos(polar)
        cos2 = math.cos(angle) * cos1 + math.sin(angle) * math.sin(polar) * math.cos(azimuth)
        return math.exp(kappa1 * cos1 + kappa2 * cos2) * math.sin(polar)

    integral = dblquad(product, 0, math.pi, 0, 2 * math.pi, epsabs=0, epsrel=1e-9)[0]
    log_density = [math.log(k / (4 * math.pi * math.sinh(k))) for k in (kappa1, kappa2)]
    mu1, mu2 = at_angle(angle, 3)
    score = vmf_similarity(mu1, scalar(kappa1), mu2, scalar(kappa2), radius=1.0)
    assert score.item() == pytest.approx(math.log(integral) + sum(log_density), abs=1e-8)


def log_c(kappa, dim):
    order = mpmath.mpf(dim) / 2 - 1
    if kappa == 0:
        return mpmath.loggamma(order + 1) + order * mpmath.log(2) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi)
    bessel = mpmath.log(mpmath.besseli(order, kappa, maxterms=10**6))
    return order * mpmath.log(kappa) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) - bessel


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.4, 3.0, math.pi])
def test_published_dimension_against_mpmath(angle):
    dim, radius = 512, 64.0
    mu1, mu2 = at_angle(angle, dim)
    with mpmath.workdps(40):
        cos = mpmath.fsum(mpmath.mpf(a.item()) * mpmath.mpf(b.item()) for a, b in zip(mu1[0, :2], mu2[0, :2]))
        cos /= mpmath.sqrt(mpmath.fsum(mpmath.mpf(b.item()) ** 2 for b in mu2[0, :2]))
        expected = np.empty((len(KAPPAS), len(KAPPAS)))
        for i, kappa1 in enumerate(map(mpmath.mpf, KAPPAS)):
            for j, kappa2 in enumerate(map(mpmath.mpf, KAPPAS)):
                kappa_sum = mpmath.sqrt(kappa1**2 + kappa2**2 + 2 * kappa1 * kappa2 * cos)
                expected[i, j] = (
                    log_c(kappa1, dim) + log_c(kappa2, dim) - log_c(kappa_sum, dim) - dim * mpmath.log(radius)
                )
    kappas = torch.tensor(KAPPAS, dtype=torch.float64)
    rows, columns = torch.meshgrid(kappas, kappas, indexing="ij")
    pairs = vmf_similarity(
        mu1.expand(rows.numel(), -1), rows.reshape(-1), mu2.expand(rows.numel(), -1), columns.reshape(-1), radius
    )
    matrix = vmf_similarity_matrix(mu1.expand(len(kappas), -1), kappas, mu2.expand(len(kappas), -1), kappas, radius)
    # The terms reach 1e5, of which float64 keeps 1e-11; the matrix form resolves kt to sqrt(1e-16) kappa where the
    # directions oppose.
    np.testing.assert_allclose(pairs.reshape(rows.shape), expected, rtol=1e-13, atol=1e-9)
    np.testing.assert_allclose(matrix, expected, rtol=1e-13, atol=1e-6 if angle == math.pi else 1e-9)


@pytest.mark.parametrize("dim", [2, 37, 512])
def test_pairs_against_the_reference(dim, faces):
    (mu1, kappa1), (mu2, kappa2) = (
        faces(30, dim, "cpu", 1, torch.float64),
        faces(30, dim, "cpu", 2, torch.float64),
    )
    arguments = [tensor.double().requires_grad_() for tensor in (mu1, kappa1, mu2, kappa2)]
    scores, expected = vmf_similarity(*arguments, 3.0), reference.vmf_similarity(*arguments, 3.0)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-9)
    gradients = zip(torch.autograd.grad(scores.sum(), arguments), torch.autograd.grad(expected.sum(), arguments))
    for gradient, exact in gradients:
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-8 * exact.abs().max().item())


def test_float32_inputs_keep_float64_scores_apart():
    """A step of 1e-6 in cosine moves the score by about kappa 1e-6 / 2, less than float32 arithmetic on the terms would
    show.
    """
    kappa = torch.full((2,), 300.0)
    mu1, mu2 = torch.zeros(2, 512), torch.zeros(2, 512)
    mu1[:, 0] = 1
    mu2[:, 0], mu2[:, 1] = 0.5, torch.tensor([math.sqrt(0.75), math.sqrt(0.75) * (1 + 1.4e-6)])
    rounded = vmf_similarity(mu1, kappa, mu2, kappa)
    exact = vmf_similarity(mu1.double(), kappa.double(), mu2.double(), kappa.double())
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact.float())
    assert 1e-5 < exact[0] - exact[1] < 1e-3


def test_symmetric_in_the_faces_and_blind_to_the_length_of_mu(unit_rows):
    mu1, mu2 = unit_rows(9, 64, seed=1), unit_rows(9, 64, seed=2)
    kappa1, kappa2 = torch.logspace(0, 3, 9, dtype=torch.float64), torch.full((9,), 200.0, dtype=torch.float64)
    score = vmf_similarity(mu1, kappa1, mu2, kappa2)
    torch.testing.assert_close(vmf_similarity(mu2, kappa2, mu1, kappa1), score, rtol=1e-13, atol=0)
    torch.testing.assert_close(vmf_similarity(3 * mu1, kappa1, mu2 / 7, kappa2), score, rtol=1e-13, atol=0)


def test_the_uniform_distribution_says_nothing_about_direction(unit_rows):
    mu = unit_rows(4, 512)
    scores = vmf_similarity_matrix(
        mu, torch.zeros(4, dtype=torch.float64), mu, torch.full((4,), 500.0, dtype=torch.float64)
    )
    torch.testing.assert_close(scores, scores[0, 0].expand(4, 4), rtol=1e-14, atol=0)
    without = vmf_similarity(torch.zeros_like(mu), torch.zeros(4), mu, torch.full((4,), 500.0, dtype=torch.float64))
    torch.testing.assert_close(without, scores[0], rtol=1e-14, atol=0)


def test_radius_shifts_every_score_by_the_same_amount(unit_rows):
    mu, kappa = unit_rows(3, 8), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    shift = vmf_similarity(mu, kappa, mu, kappa, radius=1.0) - vmf_similarity(mu, kappa, mu, kappa, radius=64.0)
    torch.testing.assert_close(shift, torch.full((3,), 8 * math.log(64), dtype=torch.float64))


@pytest.mark.parametrize("dim", [2, 37])
def test_from_cosine_is_the_pair(dim, unit_rows):
    mu1, mu2 = unit_rows(30, dim, seed=1), unit_rows(30, dim, seed=2)
    kappa1, kappa2 = torch.logspace(-2, 5, 30, dtype=torch.float64), torch.logspace(4, -1, 30, dtype=torch.float64)
    cos = (mu1 * mu2).sum(dim=1)
    scores = vmf_similarity_from_cosine(cos, kappa1, kappa2, dim, radius=3.0)
    torch.testing.assert_close(scores, vmf_similarity(mu1, kappa1, mu2, kappa2, radius=3.0), rtol=1e-12, atol=1e-9)
    assert torch.equal(cos, (mu1 * mu2).sum(dim=1))  # not written over
    with pytest.raises(ValueError, match="radius must be a positive number"):
        vmf_similarity_from_cosine(cos, kappa1, kappa2, dim, radius=0.0)


def test_neutral_radius_makes_zero_mean_nothing(unit_rows):
    mu = unit_rows(2, 37)
    radius = neutral_radius(37)
    with_uniform = vmf_similarity(mu[:1], scalar(0.0), mu[1:], scalar(500.0), radius)
    assert with_uniform.item() == pytest.approx(0, abs=1e-10)
    assert vmf_similarity(mu[:1], scalar(500.0), mu[:1], scalar(500.0), radius).item() > 10


@pytest.mark.parametrize("dim", [2, 300])
def test_triton_pairs_against_float64(triton_device, poisoned, dim, faces):
    (mu1, kappa1), (mu2, kappa2) = faces(9, dim, triton_device, 1), faces(9, dim, triton_device, 2)
    mu1[0], kappa1[0] = 0, 0
    mu1[1], kappa1[1] = -2 * mu2[1], kappa2[1]
    exact = vmf_similarity(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), backend="torch")
    torch.testing.assert_close(
        vmf_similarity(mu1, kappa1, mu2, kappa2, backend="triton"), exact.float(), rtol=1.2e-7, atol=1e-6
    )
    double = vmf_similarity(
        mu1.t().contiguous().t().double(), kappa1.double(), mu2.double(), kappa2.double(), backend="triton"
    )
    torch.testing.assert_close(double, exact, rtol=1e-13, atol=1e-9)


def test_nan_stays_where_it_is(triton_device):
    mu, kappa = torch.eye(4, device=triton_device), torch.tensor([1.0, math.nan, 2.0, 3.0], device=triton_device)
    mu[3] = 0
    expected = torch.tensor([False, True, False, True], device=triton_device)
    for backend in ("torch", "triton"):
        assert torch.equal(vmf_similarity(mu, kappa, mu, kappa, backend=backend).isnan(), expected)
        assert torch.equal(
            vmf_similarity_matrix(mu, kappa, mu, kappa, backend=backend).isnan(), expected[:, None] | expected
        )


def test_a_negative_kappa_gives_nan():
    mu, kappa = torch.eye(3), torch.tensor([1.0, -1.0, 2.0])
    expected = torch.tensor([False, True, False])
    assert torch.equal(vmf_similarity_matrix(mu, kappa, mu, kappa).isnan(), expected[:, None] | expected)
    assert torch.equal(vmf_similarity_from_cosine(torch.zeros(3), kappa, kappa.abs(), 3).isnan(), expected)


def test_operators(faces):
    (mu1, kappa1), (mu2, kappa2) = faces(4, 6, "cpu", 1), faces(4, 6, "cpu", 2)
    leaves = [tensor.requires_grad_() for tensor in (mu1.clone(), kappa1.clone(), mu2.clone(), kappa2.clone())]
    for triton_kernel in (False, True):
        torch.library.opcheck(_vmf_similarity, (*leaves, 64.0, triton_kernel))


def test_gradients(unit_rows):
    mu1, mu2 = unit_rows(3, 6, seed=1).requires_grad_(), unit_rows(3, 6, seed=2).requires_grad_()
    kappa1, kappa2 = (
        torch.tensor(k, dtype=torch.float64, requires_grad=True) for k in ([0.5, 8.0, 30.0], [20.0, 0.1, 6.0])
    )
    assert torch.autograd.gradcheck(vmf_similarity, (mu1, kappa1, mu2, kappa2))
    assert torch.autograd.gradgradcheck(vmf_similarity, (mu1, kappa1, mu2, kappa2))


def test_gradients_at_the_uniform_distribution(unit_rows):
    """kappa = 0 with a zero direction: by autograd through the reference no gradient would be finite there."""
    mu1, mu2 = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True), unit_rows(1, 6).requires_grad_()
    kappa1, kappa2 = scalar(0.0).requires_grad_(), scalar(9.0).requires_grad_()
    gradients = torch.autograd.grad(vmf_similarity(mu1, kappa1, mu2, kappa2).sum(), (mu1, kappa1, mu2, kappa2))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_nothing_to_compare():
    assert vmf_similarity(torch.empty(0, 4), torch.empty(0), torch.empty(0, 4), torch.empty(0)).shape == (0,)


def test_a_zero_direction_with_a_concentration_gives_nan():
    assert vmf_similarity(torch.zeros(1, 4), torch.ones(1), torch.eye(4)[:1], torch.ones(1)).isnan().all()


@pytest.mark.parametrize("function", [vmf_similarity, vmf_similarity_matrix])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu1": torch.ones(3)}, "mu1 and mu2 must be"),
        ({"mu2": torch.ones(3, 5)}, "mu1 and mu2 must be"),
        ({"mu1": torch.ones(3, 1), "mu2": torch.ones(3, 1)}, "D in 2"),
        ({"mu2": torch.ones(3, 4, dtype=torch.int64)}, "mu2 must be float16, bfloat16, float32 or float64"),
        ({"kappa1": torch.ones(2)}, "kappa1 must be"),
        ({"kappa2": torch.ones(3, 1)}, "kappa2 must be"),
        ({"radius": 0.0}, "radius must be a positive number, got 0.0"),
        ({"radius": math.nan}, "radius must be a positive number"),
    ],
)
def test_refuses(function, change, message):
    arguments = {
        "mu1": torch.ones(3, 4),
        "kappa1": torch.ones(3),
        "mu2": torch.ones(3, 4),
        "kappa2": torch.ones(3),
        "radius": 64.0,
    }
    with pytest.raises(ValueError, match=message):
        function(**arguments | change)


def test_pairs_need_one_count():
    with pytest.raises(ValueError, match="vmf_similarity_matrix"):
        vmf_similarity(torch.ones(3, 4), torch.ones(3), torch.ones(2, 4), torch.ones(2))
