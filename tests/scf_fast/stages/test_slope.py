"""The weighted slope: bounded, of the same sign as the loss's, and with the same optimum."""

import math

import pytest
import torch

from scf_fast.kernels import inverse_mean_resultant_length, scf_loss
from scf_fast.stages.slope import weight_slope


def slopes(log_kappa, cosines, dim, weighted):
    """(B,) gradient of log kappa for images at given cosines from one center."""
    cosines = torch.as_tensor(cosines)
    center = torch.zeros(1, dim)
    center[0, 0] = 1
    features = torch.zeros(len(cosines), dim)
    features[:, 0], features[:, 1] = cosines, (1 - cosines.square()).sqrt()
    log_kappa = torch.full((len(cosines),), log_kappa).requires_grad_()
    taken = weight_slope(log_kappa, dim) if weighted else log_kappa
    loss = scf_loss(features, taken, center, torch.zeros(len(cosines), dtype=torch.int64), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, log_kappa)
    return gradient, loss


@pytest.mark.parametrize("dim", [2, 128, 512])
@pytest.mark.parametrize("log_kappa", [-13.8, -3.0, 2.0, 5.0, 8.0, 12.0, 30.0, 41.5, 700.0])
def test_slope_is_bounded_and_has_the_sign_of_the_exact_one(dim, log_kappa):
    cosines = [-1.0, -0.3, 0.2, 0.7, 0.95]
    (exact, loss), (weighted, same) = (slopes(log_kappa, cosines, dim, weighted) for weighted in (False, True))
    assert torch.equal(loss, same) and torch.equal(exact.sign(), weighted.sign())
    assert weighted.max() <= 64.001 * (dim - 1) and weighted.min() >= -0.501 * (dim - 1)
    if (
        log_kappa < math.log((dim - 1) / 2) - 3
    ):  # the flat end: at least a twentieth of the largest slope for cosine 0.7
        assert weighted[3] < -0.025 * (dim - 1)
    if math.log((dim - 1) / 2) <= log_kappa <= math.log(32 * (dim - 1)):
        assert torch.equal(exact, weighted)


def test_optimum_is_that_of_the_loss():
    """Of scattered cosines, outliers among them; where the weight is not kappa."""
    cosines = torch.cat((0.15 + 0.1 * torch.linspace(-1, 1, 50), torch.tensor([-0.9, 0.9])))
    best = inverse_mean_resultant_length(cosines.double().mean(), 512).log().item()
    assert best < math.log(255)
    below, at, above = (slopes(best + shift, cosines, 512, True)[0].sum().item() for shift in (-0.01, 0.0, 0.01))
    assert below < 0 < above and abs(at) < 0.01 * (above - below)
