import numpy as np
import pytest
import torch
from scipy.stats import vonmises_fisher

from scf_fast.evaluation import likelihoods, metrics, pair_scores, protocols
from scf_fast.evaluation.likelihoods import COSINE, Faces, VMFLikelihood
from scf_fast.evaluation.pair_scores import score_pairs
from scf_fast.evaluation.results import Quality, Score, SearchResult, Weighting
from scf_fast.inference import Embeddings
from scf_fast.kernels import neutral_radius, pool_templates, vmf_similarity
from scf_fast.pipelines.evaluation_sets.template_protocol import TemplateProtocol
from scf_fast.pipelines.sources.base import EncodedImages


def random_embeddings(count, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(5 * torch.randn(count, dim, generator=generator), 3 + torch.randn(count, generator=generator))


@pytest.mark.parametrize("cells", [0, 1000], ids=["rows", "bands"])
def test_pairs_are_scored_alike_in_pieces(monkeypatch, cells):
    e = random_embeddings(10)
    first, second = torch.tensor([0, 3, 3, 9, 2, 5, 7]), torch.tensor([1, 4, 3, 0, 8, 6, 7])
    monkeypatch.setitem(likelihoods.PAIRS_AT_ONCE, "cpu", 3)
    monkeypatch.setattr(pair_scores, "_SCORES_AT_ONCE", 14)  # two rows of seven columns
    monkeypatch.setattr(likelihoods, "_SCORES_AT_ONCE", 2)
    monkeypatch.setattr(pair_scores, "_CELLS_PER_PAIR", cells)
    kappas, likelihood = torch.from_numpy(e.kappa), VMFLikelihood(32.0)
    faces = likelihood.faces_of(e)
    cosines, vmfs = score_pairs(faces, first, second, likelihood).values()
    for scores in score_pairs(faces, first, second), score_pairs(Faces(e.mu), first, second, likelihood):
        assert scores.keys() == {Score.COSINE}
    f = e.features.double().numpy()
    for i, j, cosine, vmf in zip(first.tolist(), second.tolist(), cosines, vmfs, strict=True):
        # mu is float32: its rounding, not the score's arithmetic, is what the tolerance covers.
        assert cosine == pytest.approx(f[i] @ f[j] / np.linalg.norm(f[i]) / np.linalg.norm(f[j]), abs=3e-7)
        expected = vmf_similarity(
            e.features[i : i + 1].double(),
            kappas[i : i + 1],
            e.features[j : j + 1].double(),
            kappas[j : j + 1],
            radius=32.0,
        )
        assert vmf == pytest.approx(expected.item(), abs=1e-3)
    assert cosines[2] == pytest.approx(1, abs=1e-12)
    assert score_pairs(faces, first[:0], second[:0], likelihood)[Score.VMF].shape == (0,)


def test_a_set_pairs_its_neighboring_images():
    e = random_embeddings(6)
    scores = protocols.score_verification_set(e, VMFLikelihood(64.0))
    f = torch.nn.functional.normalize(e.features.double()).numpy()
    np.testing.assert_allclose(scores[Score.COSINE], (f[0::2] * f[1::2]).sum(axis=1), atol=3e-7)


def random_protocol(
    count=40, templates=(900, 17, -4), media=(5, 6, 10**9), pairs=((900, 17), (17, -4), (900, 900)), seed=4
):
    rng = np.random.default_rng(seed)
    template_ids = np.concatenate([templates, rng.choice(templates, count - len(templates))])
    return TemplateProtocol(
        [f"{i}.jpg" for i in range(count)],
        template_ids,
        rng.choice(media, count),
        np.zeros((count, 5, 2)),
        rng.random(count).astype(np.float32),
        np.array(pairs),
        np.arange(len(pairs)) % 2 == 0,
        EncodedImages([b""] * count),
    )


def loop_over_templates(e, protocol, weights, by_media=True):
    """Direction and length by template id, by the definition: the sum over media of the medium's mean, or over all
    images.
    """
    pooled = {}
    for template in set(protocol.template_ids.tolist()):
        total = np.zeros(e.features.shape[1])
        for medium in set(protocol.media_ids[protocol.template_ids == template].tolist()):
            rows = np.flatnonzero((protocol.template_ids == template) & (protocol.media_ids == medium))
            total += sum(e.mu[row].double().numpy() * weights[row] for row in rows) / (len(rows) if by_media else 1)
        pooled[template] = total / np.linalg.norm(total), np.linalg.norm(total)
    return pooled


def test_templates_against_a_loop():
    protocol, e, likelihood = random_protocol(), random_embeddings(40), VMFLikelihood(64.0)
    expected_weights = {
        Weighting.AVERAGE: np.ones(40),
        Weighting.NORM: e.feature_norm,
        Weighting.DETECTOR: protocol.detector_score,
        Weighting.NORM_DETECTOR: e.feature_norm * protocol.detector_score,
        Weighting.KAPPA_IMAGES: e.kappa,
        Weighting.KAPPA: e.kappa,
    }
    pooled = dict(protocols.pool_every_way(e, protocol, likelihood))
    assert pooled.keys() == expected_weights.keys()
    for weighting, weights in expected_weights.items():
        by_media = weighting is not Weighting.KAPPA_IMAGES
        pooling, expected = pooled[weighting], loop_over_templates(e, protocol, weights, by_media)
        scores = protocols.score_templates(pooling, protocol, likelihood)
        np.testing.assert_allclose(
            scores[Score.COSINE], [expected[a][0] @ expected[b][0] for a, b in protocol.pair_template_ids], atol=1e-6
        )
        assert (Score.VMF in scores) == (weighting in (Weighting.KAPPA, Weighting.KAPPA_IMAGES))
    for (a, b), score in zip(protocol.pair_template_ids.tolist(), scores[Score.VMF]):
        (mu1, kappa1), (mu2, kappa2) = (
            (torch.tensor(mu)[None], torch.tensor([kappa])) for mu, kappa in (expected[a], expected[b])
        )
        assert score == pytest.approx(vmf_similarity(mu1, kappa1, mu2, kappa2).item(), abs=1e-4)
    quality = protocols.template_quality(e, protocol, likelihood)
    for row, template in enumerate(protocols.template_ids(protocol).tolist()):
        members = protocol.template_ids == template
        assert quality[Quality.KAPPA][row] == pytest.approx(expected[template][1], rel=1e-6)
        assert quality[Quality.FEATURE_NORM][row] == pytest.approx(e.feature_norm[members].mean())
        assert quality[Quality.DETECTOR][row] == pytest.approx(protocol.detector_score[members].mean())


def test_eqn_13_is_best_at_the_concentration_that_made_the_images():
    """Images drawn around their subject's direction with known kappa, pooled by Eqn (14): the likelihood ratio
    separates better than the cosine, and loses that where kappa is half or twice what it was.
    """
    rng = np.random.default_rng(0)
    subjects, dim = 60, 128
    centers = rng.normal(size=(subjects, dim))
    template_ids = np.concatenate([np.arange(4 * subjects), rng.integers(0, 4 * subjects, 8 * subjects)])
    kappa = np.exp(rng.uniform(np.log(10), np.log(100), len(template_ids)))
    mu = [
        vonmises_fisher(center / np.linalg.norm(center), k, seed=rng).rvs(1)[0]
        for center, k in zip(centers[template_ids % subjects], kappa)
    ]
    directions, kappas = pool_templates(
        torch.from_numpy(np.array(mu)), torch.from_numpy(kappa), torch.from_numpy(template_ids)
    )
    first, second = np.triu_indices(4 * subjects, 1)
    same = first % subjects == second % subjects

    def separation(factor):
        faces, pairs = Faces(directions, factor * kappas), map(torch.from_numpy, (first, second))
        cosine, vmf = score_pairs(faces, *pairs, VMFLikelihood(64.0)).values()
        return metrics.area_under_roc(cosine, same), metrics.area_under_roc(vmf, same)

    cosine, exact = separation(1.0)
    assert exact > cosine + 0.02 and exact > separation(0.5)[1] + 0.01 and exact > separation(2.0)[1] + 0.03


def test_equal_detector_scores_are_left_out():
    protocol, e = random_protocol()._replace(detector_score=np.ones(40)), random_embeddings(40)
    assert protocols.pooling_weights(e, protocol).keys() == {Weighting.AVERAGE, Weighting.NORM}
    assert protocols.template_quality(e, protocol, VMFLikelihood(64.0)).keys() == {Quality.KAPPA, Quality.FEATURE_NORM}


def test_a_confident_frame_outweighs_blurred_ones():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    e = Embeddings(features, torch.tensor([300.0, 1.0, 1.0, 300.0]).log())
    protocol = TemplateProtocol(
        list("abcd"),
        np.array([1, 1, 1, 2]),
        np.array([1, 2, 3, 4]),
        None,
        np.ones(4),
        np.array([[1, 2]]),
        np.array([True]),
        None,
    )
    scores = {
        weighting: protocols.score_templates(pooling, protocol, None)[Score.COSINE]
        for weighting, pooling in protocols.pool_every_way(e, protocol, VMFLikelihood(64.0))
    }
    assert scores[Weighting.AVERAGE] == pytest.approx(1 / np.sqrt(5)) and scores[Weighting.KAPPA] > 0.9999


def all_scores(probes, gallery, radius):
    """Eqn (13) of every probe with every gallery entry (Q, G), as a list of pairs."""
    q, g = (part.flatten() for part in torch.meshgrid(torch.arange(40), torch.arange(15), indexing="ij"))
    probe_kappa, gallery_kappa = torch.from_numpy(probes.kappa), torch.from_numpy(gallery.kappa)
    pairs = probes.mu[q].double(), probe_kappa[q], gallery.mu[g].double(), gallery_kappa[g]
    return vmf_similarity(*pairs, radius).reshape(40, 15)


@pytest.mark.parametrize("similarity", [COSINE, VMFLikelihood(64.0)], ids=["cosine", "vmf"])
def test_search_against_brute_force(monkeypatch, similarity):
    monkeypatch.setattr(likelihoods, "_SCORES_AT_ONCE", 45)  # three probes at a time
    rng = np.random.default_rng(0)
    gallery_subjects, probe_subjects = rng.permutation(100)[:15], rng.integers(0, 100, 40)
    gallery, probes = random_embeddings(15, seed=1), random_embeddings(40, seed=2)
    sets = [VMFLikelihood(64.0).faces_of(e) for e in (gallery, probes)]
    searches, shallow = (
        protocols.search(sets[0], gallery_subjects, sets[1], probe_subjects, similarity, depth) for depth in (15, 3)
    )
    assert 0 < searches.mated.sum() < 40
    if similarity is COSINE:
        scores = probes.mu.double() @ gallery.mu.double().T
    else:
        scores = all_scores(probes, gallery, 64.0)
    for q in range(40):
        values = scores[q].tolist()
        own = [value for value, subject in zip(values, gallery_subjects) if subject == probe_subjects[q]]
        others = [value for value, subject in zip(values, gallery_subjects) if subject != probe_subjects[q]]
        assert searches.best_other[q] == pytest.approx(max(others), abs=1e-6)
        assert searches.mated[q] == bool(own)
        if own:
            assert searches.mate_score[q] == pytest.approx(own[0], abs=1e-6)
            assert searches.mate_rank[q] == 1 + sum(value > own[0] for value in others)
            assert shallow.mate_rank[q] == min(searches.mate_rank[q], 4)
    np.testing.assert_array_equal(shallow.best_other, searches.best_other)


def test_a_gallery_of_one():
    gallery, probes = random_embeddings(1, seed=1), random_embeddings(2, seed=2)
    searches = protocols.search(Faces(gallery.mu), np.array([7]), Faces(probes.mu), np.array([7, 8]), COSINE)
    assert (
        searches.mate_rank.tolist() == [1, 0]
        and searches.best_other[0] == -np.inf
        and np.isfinite(searches.best_other[1])
    )


def test_score_histogram_counts_every_comparison():
    rng = np.random.default_rng(0)
    gallery_subjects, probe_subjects = rng.permutation(30)[:15], rng.integers(0, 30, 40)
    gallery, probes = random_embeddings(15, seed=1), random_embeddings(40, seed=2)
    likelihood = VMFLikelihood(64.0)
    histogram = likelihood.count_comparisons(
        likelihood.faces_of(gallery), gallery_subjects, likelihood.faces_of(probes), probe_subjects
    )
    radius = neutral_radius(8)
    scores = all_scores(probes, gallery, radius).numpy()
    same = probe_subjects[:, None] == gallery_subjects
    for counts, kind in (histogram.genuine, same), (histogram.impostor, ~same):
        np.testing.assert_array_equal(counts, np.histogram(scores[kind], histogram.edges)[0])
        assert counts.sum() == kind.sum()
    # The range is that of the scores, to a bin of the range that they could have had.
    assert (
        histogram.edges[0] <= scores.min()
        and scores.max() <= histogram.edges[-1] < scores.max() + 0.01 * np.ptp(scores) + 1
    )


def test_searches_without_unmated_ones_have_no_open_set():
    searches = metrics.Searches(np.full(20, 0.5), np.ones(20, np.int64), np.zeros(20))
    assert protocols.summarize_searches(searches) == SearchResult(20, 20, {"1": 1.0, "5": 1.0, "10": 1.0}, {})


def test_summary_of_a_verification_set():
    same = np.arange(40) % 2 == 0
    cosine = np.where(same, 0.8, 0.1)
    cosine[[1, 2]] = 0.9, 0.05  # one impostor above every genuine pair, one genuine pair below every impostor
    scores = {Score.COSINE: cosine, Score.VMF: np.where(same, -1000.0, -1200.0)}
    summary = protocols.summarize_verification(scores, same).as_json()
    assert summary["pairs"] == 40
    assert (
        summary["accuracy"] == pytest.approx(38 / 40)
        and summary["accuracy_vmf"] == 1
        and summary["accuracy_vmf_std"] == 0
    )
    assert summary["tar_at_far"] == {}  # 20 impostors measure no FAR of at most 0.1
    assert summary["eer"] == pytest.approx(1 / 20) and summary["eer_vmf"] == 0
    assert summary["auc"] == pytest.approx(1 - (20 + 20 - 1) / 400) and summary["auc_vmf"] == 1
    assert protocols.tar_table(np.tile(cosine, 5), np.tile(same, 5)) == {"1e-01": 0.95}
