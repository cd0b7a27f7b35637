"""Measures of held-out people: on images drawn from known von Mises-Fisher distributions."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bench.training.stage2_features import draw
from scf_fast.errors import InputError
from scf_fast.held_out import Held, _People, measure
from scf_fast.kernels import mean_resultant_length
from scf_fast.ranking import spearman


@pytest.fixture(scope="module")
def people():
    """(images with their own kappa, their cosine with the true center)."""
    generator = torch.Generator().manual_seed(0)
    images = draw(64, 1, 60, 12, 5)
    log_kappa = torch.empty(len(images.labels)).uniform_(3.0, 5.5, generator=generator)
    kappa = log_kappa.double().exp()
    mean = mean_resultant_length(kappa, 64)
    deviation = (1 - mean.square() - 63 * mean / kappa).sqrt()
    cos = mean + deviation * torch.randn(len(kappa), generator=generator, dtype=torch.float64)
    centers = images.centers.double()[images.labels]
    away = images.mu.double() - images.cos.double()[:, None] * centers
    mu = cos[:, None] * centers + (1 - cos.square()).sqrt()[:, None] * torch.nn.functional.normalize(away)
    return Held(mu.numpy().astype(np.float32), kappa.numpy(), images.labels.numpy()), cos.numpy()


def test_cosines_with_centers_never_seen(people):
    held, cos = people
    estimated = _People(held).own_cosines(1.0)
    assert abs(estimated.mean() - cos.mean()) < 0.005
    assert np.corrcoef(estimated, cos)[0, 1] > 0.9


def test_a_true_kappa_is_reliable_and_a_wrong_one_is_mended(people):
    held, _ = people
    found = measure(held, is_vmf=True)
    assert found.reliability.error < 0.02 and found.reliability.factor == pytest.approx(1, abs=0.02)
    assert (np.diff(found.reliability.predicted) > 0).all() and len(found.reliability.lines()) == 11
    wrong = measure(Held(held.mu, 3 * held.kappa, held.labels), is_vmf=True).reliability
    assert wrong.error > 0.1 and wrong.factor == pytest.approx(found.reliability.factor / 3, rel=1e-6)
    assert wrong.observed == pytest.approx(found.reliability.observed, rel=1e-6)


def test_kappa_orders_errors_and_noise_does_not(people):
    held, _ = people
    noise = Held(held.mu, np.random.default_rng(0).permutation(held.kappa), held.labels)
    found, random = measure(held, is_vmf=False), measure(noise, is_vmf=False)
    assert found.reliability is None
    assert found.spearman > 0.8 and abs(random.spearman) < 0.1
    assert found.reject_area < 0.6 * random.reject_area


def test_people_with_one_image_say_nothing():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((6, 8)).astype(np.float32)
    mu /= np.linalg.norm(mu, axis=1, keepdims=True)
    with pytest.raises(InputError, match="0 of 6 people held out have two images"):
        measure(Held(mu, np.ones(6), np.arange(6)), is_vmf=True)


def test_spearman_is_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40).astype(float), rng.standard_normal(40)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), b[:5]))
