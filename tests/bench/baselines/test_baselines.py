"""The baselines compute what they claim to; otherwise a benchmark would compare with something nobody published."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from bench.baselines.compiled import compiled_log_bessel_i
from bench.baselines.eager import eager_log_bessel_i, eager_scf_loss
from bench.baselines.published_normalizer import published_log_bessel_i
from bench.baselines.published_scf_loss import published_scf_loss
from bench.kernels.accuracy import load_reference

RADIUS = 64.0


def value_and_gradient(function, order, kappas, dtype):
    kappa = torch.tensor(kappas, dtype=dtype, requires_grad=True)
    value = function(order, kappa)
    return value.detach().numpy(), torch.autograd.grad(value.sum(), kappa)[0].numpy()


def a_batch(batch=16, dim=512, classes=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    centers = RADIUS * directions / directions.norm(dim=1, keepdim=True)
    labels = torch.randint(classes, (batch,), generator=generator)
    features = 3 * torch.randn(batch, dim, generator=generator, dtype=torch.float64) + centers[labels]
    log_kappa = torch.linspace(math.log(20), math.log(20000), batch, dtype=torch.float64)
    return features.to(dtype), log_kappa.to(dtype).requires_grad_(), centers.to(dtype), labels


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 15.0, 255.0])
def test_published_normalizer_is_its_formula(order):
    """Against the unscaled scipy.special.iv and its derivative ivp, which the published code does not call."""
    kappas = np.array([0.5, 3.0, 40.0, 200.0, 600.0])
    bessel, derivative = scipy.special.iv(order, kappas), scipy.special.ivp(order, kappas)
    expected = np.log(1e-6 + np.exp(-kappas) * bessel) + kappas
    expected_gradient = 1 + np.exp(-kappas) * (derivative - bessel) / (1e-6 + np.exp(-kappas) * bessel)
    value, gradient = value_and_gradient(published_log_bessel_i, order, kappas, torch.float64)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9)


def test_published_normalizer_ignores_moderate_kappa():
    """At d = 512 in float32: off by hundreds, with a gradient of exactly 1, where the true one runs from 25.5 to
    1.03.
    """
    value, gradient = value_and_gradient(published_log_bessel_i, 255.0, [10.0, 100.0, 1000.0, 10000.0], torch.float32)
    np.testing.assert_allclose(value, [-3.8, 86.2, 986.2, 9991.23], atol=0.05)
    np.testing.assert_allclose(gradient, [1.0, 1.0, 1.0, 1.0003], atol=5e-5)
    assert value.dtype == gradient.dtype == np.float32


def test_published_loss_is_its_formula():
    features, log_kappa, centers, labels = a_batch(dtype=torch.float64)
    features.requires_grad_()
    result = published_scf_loss(features, log_kappa, centers, labels, RADIUS)

    x, w = features.detach().numpy(), centers.numpy()[labels.numpy()]
    kappa = 1e-6 + np.exp(log_kappa.detach().numpy())
    cos = np.einsum("bd,bd->b", x, w) / np.linalg.norm(x, axis=1) / RADIUS
    l1, l2 = -kappa * cos, -255 * np.log(1e-6 + kappa)
    l3 = np.log(1e-6 + scipy.special.ive(255, kappa)) + kappa
    np.testing.assert_allclose(result.l1.detach(), l1, rtol=1e-11)
    np.testing.assert_allclose(result.l2.detach(), l2, rtol=1e-11)
    np.testing.assert_allclose(result.l3.detach(), l3, rtol=1e-11)
    np.testing.assert_allclose(
        result.loss.detach(), l1 + l2 + l3 + 256 * np.log(2 * np.pi) + 512 * np.log(64), rtol=1e-11
    )

    to_features, to_log_kappa = torch.autograd.grad(result.loss.sum(), (features, log_kappa))
    kappa, cos = kappa[:6], cos[:6]  # up to 200, where iv and ivp do not overflow
    slope = (
        np.exp(-kappa)
        * (scipy.special.ivp(255, kappa) - scipy.special.iv(255, kappa))
        / (1e-6 + scipy.special.ive(255, kappa))
    )
    expected = (kappa - 1e-6) * (-cos - 255 / (1e-6 + kappa) + 1 + slope)
    np.testing.assert_allclose(to_log_kappa[:6], expected, rtol=1e-9)
    # The loss sees the direction of a feature only, so its gradient has no part along the feature.
    assert (to_features * features).sum(dim=1).abs().max() < 1e-9 * to_features.norm() * features.detach().norm()


@pytest.mark.parametrize("dim", [128, 512, 4096])
def test_eager_expansion_is_log_bessel_i(dim):
    """Within its first omitted term, about 1/v^4, of 60-digit values."""
    order = dim / 2 - 1
    entries = [entry for entry in load_reference()[dim] if entry["kappa"] >= 1e-2]
    kappas = np.array([entry["kappa"] for entry in entries])
    value, gradient = value_and_gradient(eager_log_bessel_i, order, kappas, torch.float64)
    np.testing.assert_allclose(
        value, [float(entry["psi"]) for entry in entries] + order * np.log(kappas), rtol=1e-12, atol=order**-4
    )
    np.testing.assert_allclose(gradient, [float(entry["A"]) for entry in entries] + order / kappas, rtol=order**-4)


def test_eager_loss_is_the_vmf_likelihood():
    """loss = -log vMF(w / r; mu, kappa) + d log r, by SciPy's own distribution."""
    features, log_kappa, centers, labels = a_batch(batch=4, dtype=torch.float64)
    # The length of a class center does not matter.
    loss = eager_scf_loss(features, log_kappa, 5 * centers, labels, RADIUS)
    for i in range(len(labels)):
        mu = (features[i] / features[i].norm()).numpy()
        vmf = scipy.stats.vonmises_fisher(mu, math.exp(log_kappa[i].item()))
        expected = -vmf.logpdf(centers[labels[i]].numpy() / RADIUS) + 512 * math.log(RADIUS)
        assert loss[i].item() == pytest.approx(float(expected), rel=1e-9)


def test_compiled_is_eager():
    kappas = np.geomspace(50, 5000, 100)
    for compiled, eager in zip(
        *(value_and_gradient(f, 255.0, kappas, torch.float32) for f in (compiled_log_bessel_i, eager_log_bessel_i))
    ):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-3)
