"""Scores, pooling and confidence of Gaussian models against the formulas of the PFE paper in plain NumPy."""

import numpy as np
import pytest
import torch

from scf_fast.evaluation import likelihoods, protocols, quality
from scf_fast.evaluation.likelihoods import COSINE, Faces, GaussianLikelihood, VMFLikelihood, likelihood_of
from scf_fast.evaluation.pair_scores import score_pairs
from scf_fast.evaluation.results import Quality, Score, Weighting
from scf_fast.inference import Embeddings
from scf_fast.objectives import Density
from scf_fast.pipelines.evaluation_sets.template_protocol import TemplateProtocol
from scf_fast.pipelines.sources.base import EncodedImages

DIM = 6
shapes = pytest.mark.parametrize("outputs", [1, DIM], ids=["scalar", "diagonal"])


def random_embeddings(count, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_variance = torch.randn(count, outputs, generator=generator) - 3
    features = 5 * torch.randn(count, DIM, generator=generator)
    return Embeddings(features, log_variance[:, 0] if outputs == 1 else log_variance, Density.GAUSSIAN)


def as_numpy(e):
    """Unit directions (N, D) and variances (N, D), float64."""
    mu = e.features.double().numpy()
    variance = np.exp(e.log_variance.double().numpy())
    return mu / np.linalg.norm(mu, axis=1, keepdims=True), np.broadcast_to(variance.reshape(len(mu), -1), mu.shape)


def mutual_likelihood(mu1, variance1, mu2, variance2):
    """Eqn (3) of the paper, over the last axis."""
    v = variance1 + variance2
    return -0.5 * ((mu1 - mu2) ** 2 / v + np.log(v)).sum(axis=-1) - DIM / 2 * np.log(2 * np.pi)


def all_scores(probes, gallery):
    """(Q, G)."""
    (a, u), (b, v) = as_numpy(probes), as_numpy(gallery)
    return mutual_likelihood(a[:, None], u[:, None], b[None], v[None])


@shapes
def test_pairs_are_scored_by_the_formula_in_pieces(monkeypatch, outputs):
    monkeypatch.setitem(likelihoods.PAIRS_AT_ONCE, "cpu", 3)
    monkeypatch.setattr(likelihoods, "_SCORES_AT_ONCE", 3)
    e, likelihood = random_embeddings(10, outputs), GaussianLikelihood()
    first, second = np.array([0, 3, 3, 9, 2, 5, 7]), np.array([1, 4, 3, 0, 8, 6, 7])
    found = score_pairs(likelihood.faces_of(e), *map(torch.from_numpy, (first, second)), likelihood)
    mu, variance = as_numpy(e)
    assert list(found) == [Score.COSINE, Score.MLS]
    # mu and log variance are float32: their rounding, not the score's arithmetic, is what the tolerances cover.
    np.testing.assert_allclose(found[Score.COSINE], (mu[first] * mu[second]).sum(axis=1), atol=3e-7)
    expected = mutual_likelihood(mu[first], variance[first], mu[second], variance[second])
    np.testing.assert_allclose(found[Score.MLS], expected, atol=1e-4)
    assert score_pairs(Faces(e.mu), torch.tensor([0]), torch.tensor([1]), likelihood).keys() == {Score.COSINE}


@shapes
def test_templates_are_fused_by_the_formula(outputs):
    """By media each image counts one part of its medium; over all images it is the paper's fusion as it stands."""
    rng = np.random.default_rng(4)
    template_ids = np.concatenate([[900, 17, -4], rng.choice([900, 17, -4], 37)])
    media_ids, pairs = rng.choice([5, 6, 10**9], 40), np.array([[900, 17], [17, -4], [900, 900]])
    same, names = np.array([True, False, True]), [f"{i}.jpg" for i in range(40)]
    protocol = TemplateProtocol(
        names, template_ids, media_ids, np.zeros((40, 5, 2)), np.ones(40), pairs, same, EncodedImages([b""] * 40)
    )
    e, likelihood = random_embeddings(40, outputs), GaussianLikelihood()
    mu, variance = as_numpy(e)
    pooled = dict(protocols.pool_every_way(e, protocol, likelihood))
    assert list(pooled)[-2:] == [Weighting.PRECISION, Weighting.PRECISION_IMAGES]
    for weighting in Weighting.PRECISION, Weighting.PRECISION_IMAGES:
        fused = {}
        for row, template in enumerate(protocols.template_ids(protocol).tolist()):
            total, moment = np.zeros(DIM), np.zeros(DIM)
            for i in np.flatnonzero(template_ids == template):
                frames = np.count_nonzero((template_ids == template) & (media_ids == media_ids[i]))
                weight = 1 / variance[i] / (frames if weighting is Weighting.PRECISION else 1)
                total, moment = total + weight, moment + weight * mu[i]
            direction = moment / total
            fused[template] = direction / np.linalg.norm(direction), 1 / total
            np.testing.assert_allclose(pooled[weighting].mu[row], fused[template][0], atol=1e-6)
            concentration = pooled[weighting].concentration[row]
            np.testing.assert_allclose(concentration, total if outputs > 1 else total[0], rtol=1e-5)
            assert pooled[weighting].confidence[row] == pytest.approx(total.mean(), rel=1e-5)
        scores = protocols.score_templates(pooled[weighting], protocol, likelihood)
        expected = [mutual_likelihood(*fused[a], *fused[b]) for a, b in pairs.tolist()]
        np.testing.assert_allclose(scores[Score.MLS], expected, atol=1e-4)
    assert protocols.score_templates(pooled[Weighting.AVERAGE], protocol, likelihood).keys() == {Score.COSINE}
    found = protocols.template_quality(e, protocol, likelihood)
    assert found.keys() == {Quality.PRECISION, Quality.FEATURE_NORM}
    np.testing.assert_allclose(found[Quality.PRECISION], pooled[Weighting.PRECISION].confidence)


@shapes
def test_search_and_histogram_against_brute_force(outputs):
    rng = np.random.default_rng(0)
    gallery_subjects, probe_subjects = rng.permutation(30)[:15], rng.integers(0, 30, 40)
    gallery, probes = random_embeddings(15, outputs, seed=1), random_embeddings(40, outputs, seed=2)
    likelihood, scores = GaussianLikelihood(), all_scores(probes, gallery)
    faces = [likelihood.faces_of(e) for e in (gallery, probes)]
    searches = protocols.search(faces[0], gallery_subjects, faces[1], probe_subjects, likelihood)
    same = probe_subjects[:, None] == gallery_subjects
    np.testing.assert_allclose(searches.best_other, np.where(same, -np.inf, scores).max(axis=1), atol=1e-4)
    np.testing.assert_array_equal(searches.mated, same.any(axis=1))
    assert 0 < searches.mated.sum() < 40
    for q in np.flatnonzero(searches.mated):
        own = scores[q][same[q]].item()
        assert searches.mate_score[q] == pytest.approx(own, abs=1e-4)
        assert searches.mate_rank[q] == min(1 + np.count_nonzero(scores[q] > own), 11)
    by_cosine = protocols.search(faces[0], gallery_subjects, faces[1], probe_subjects, COSINE)
    assert not np.array_equal(by_cosine.mate_rank, searches.mate_rank)  # so the variances did count
    histogram = likelihood.count_comparisons(faces[0], gallery_subjects, faces[1], probe_subjects)
    assert histogram.score is Score.MLS
    for counts, kind in (histogram.genuine, same), (histogram.impostor, ~same):
        # A score within its rounding of an edge may be counted on either side of it.
        rounding = 1e-3 * np.diff(histogram.edges)[0]
        low, high = (np.searchsorted(np.sort(scores[kind]), histogram.edges + e) for e in (-rounding, rounding))
        cumulated = np.concatenate([[0], counts.cumsum()])[1:-1]
        assert (low[1:-1] <= cumulated).all() and (cumulated <= high[1:-1]).all() and counts.sum() == kind.sum()
    # The range is that of the scores: at least half of the bins lie between the lowest and the highest.
    assert np.ptp(scores) >= np.ptp(histogram.edges) / 2


def test_histogram_of_scores_far_narrower_than_their_bounds():
    """Two faces of tiny variances could differ by half a million nats, and agree."""
    gallery, probes = random_embeddings(8, 1, seed=1), random_embeddings(30, 1, seed=2)
    gallery.prediction[0] = probes.prediction[0] = -13.0
    gallery.features[0] = probes.features[0]
    likelihood, scores = GaussianLikelihood(), all_scores(probes, gallery)
    faces = [likelihood.faces_of(e) for e in (gallery, probes)]
    low, high = likelihood._score_range(*faces)
    assert low < scores.min() - 4e5 and scores.max() <= high + 1e-4
    histogram = likelihood.count_comparisons(faces[0], np.arange(8), faces[1], np.arange(30))
    assert np.ptp(histogram.edges) < 2 * np.ptp(scores)


def test_confidence_is_the_inverse_harmonic_mean():
    e = random_embeddings(5, DIM)
    variance = np.exp(e.log_variance.double().numpy())
    harmonic = DIM / (1 / variance).sum(axis=1)
    np.testing.assert_allclose(e.confidence, 1 / harmonic, rtol=1e-12)
    assert e.kappa is None and e.log_kappa is None
    assert quality.image_quality(e).keys() == {Quality.PRECISION, Quality.FEATURE_NORM}


def test_the_density_decides_the_likelihood():
    gaussian = random_embeddings(3, 1)
    assert isinstance(likelihood_of(gaussian, 64.0), GaussianLikelihood)
    assert isinstance(likelihood_of(Embeddings(gaussian.features, gaussian.prediction), 64.0), VMFLikelihood)
    assert likelihood_of(Embeddings(gaussian.features, None, Density.GAUSSIAN), 64.0) is None
