import itertools

import numpy as np
import pytest
from scipy.integrate import trapezoid

from scf_fast.evaluation import metrics


def tied_scores(seed, count=60):
    """Few distinct values, so that ties within and between genuine and impostor pairs are common."""
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    return np.round(rng.normal(loc=same * 1.5), 1), same


def every_threshold(scores):
    return [-np.inf, *np.unique(scores)]


def test_roc_by_hand():
    curve = metrics.roc(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
    assert curve.threshold.tolist() == [0.9, 0.8, 0.1, -np.inf]
    assert curve.true_accept_rate.tolist() == [0, 0.5, 1, 1]
    assert curve.false_accept_rate.tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize("seed", range(5))
def test_roc_counts_at_each_threshold(seed):
    scores, same = tied_scores(seed)
    curve = metrics.roc(scores, same)
    for threshold, far, tar in zip(curve.threshold, curve.false_accept_rate, curve.true_accept_rate):
        assert far == np.mean(scores[~same] > threshold) and tar == np.mean(scores[same] > threshold)
    assert np.all(np.diff(curve.false_accept_rate) >= 0)


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    reference, selection = (pytest.importorskip(f"sklearn.{part}") for part in ("metrics", "model_selection"))
    scores, same = tied_scores(seed, count=103)
    false_accepts, true_accepts, _ = reference.roc_curve(same, scores, drop_intermediate=False)
    curve = metrics.roc(scores, same)
    np.testing.assert_allclose(curve.false_accept_rate, false_accepts, atol=1e-15)
    np.testing.assert_allclose(curve.true_accept_rate, true_accepts, atol=1e-15)
    assert metrics.area_under_roc(scores, same) == pytest.approx(reference.roc_auc_score(same, scores), abs=1e-12)
    for far, tar in metrics.tar_at_far(scores, same, [0.0, 0.05, 0.2]).items():
        assert tar == pytest.approx(true_accepts[false_accepts <= far + 1e-12].max(), abs=1e-15)
    miss = 1 - true_accepts
    closest = np.argmin(np.abs(false_accepts - miss))
    assert metrics.equal_error_rate(scores, same) == pytest.approx(
        (false_accepts[closest] + miss[closest]) / 2, abs=1e-15
    )
    folds = selection.KFold(10).split(scores)
    accuracies = [
        reference.accuracy_score(same[test], scores[test] > metrics.best_threshold(scores[train], same[train]))
        for train, test in folds
    ]
    assert metrics.k_fold_accuracy(scores, same).mean == pytest.approx(np.mean(accuracies), abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_tar_at_far_is_the_best_allowed_operating_point(seed):
    scores, same = tied_scores(seed)
    fars = [0.0, 0.01, 0.1, 0.29, 0.5, 1.0]
    for far, tar in metrics.tar_at_far(scores, same, fars).items():
        allowed = [t for t in every_threshold(scores) if np.mean(scores[~same] > t) <= far]
        assert tar == max(np.mean(scores[same] > t) for t in allowed)


def test_far_that_rounds_down_in_floating_point():
    impostors = np.arange(100.0)
    assert 0.29 * 100 < 29
    # 29 impostors may pass, so the threshold is the 30th highest of them, 70.
    assert metrics.tar_at_far(np.append(impostors, 70.5), np.arange(101) == 100, [0.29]) == {0.29: 1.0}


def test_measurable_fars():
    assert metrics.measurable_fars((1e-1, 1e-2, 1e-3, 1e-4), 10_000) == [1e-1, 1e-2, 1e-3]
    assert metrics.measurable_fars((1e-1, 1e-2), 99) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_against_every_cut(seed):
    scores, same = tied_scores(seed, count=15)
    found = metrics.best_threshold(scores, same)
    accuracy = {t: np.mean((scores > t) == same) for t in every_threshold(scores)}
    strictest = max(t for t in accuracy if accuracy[t] == max(accuracy.values()))
    assert np.array_equal(scores > found, scores > strictest)


def test_best_threshold_lies_in_the_middle_of_the_gap():
    assert metrics.best_threshold(np.array([0.2, 0.8, 0.4]), np.array([False, True, False])) == pytest.approx(0.6)
    neighbors = np.array([1.0, np.nextafter(1.0, 2)])
    assert np.array_equal(neighbors > metrics.best_threshold(neighbors, np.array([False, True])), [False, True])


def test_k_fold_accuracy_by_hand():
    # The threshold comes from the other half: 0.5 for the first, 0.3 for the second, and each half then has one error
    # in four.
    scores = np.array([0.6, 0.4, 0.2, 0.0, 0.7, 0.9, 0.3, 0.25])
    same = np.array([True, True, False, False, True, True, False, False])
    result = metrics.k_fold_accuracy(scores, same, folds=2)
    assert result.threshold.tolist() == pytest.approx([0.5, 0.3])
    assert result.mean == 7 / 8 and result.std == 1 / 8


def test_k_fold_uses_contiguous_folds_in_file_order():
    scores, same = tied_scores(3, count=103)  # folds of 11, 11, 11, 10, ...
    result = metrics.k_fold_accuracy(scores, same)
    sizes = [11] * 3 + [10] * 7
    accuracies, start = [], 0
    for size in sizes:
        test = (np.arange(103) >= start) & (np.arange(103) < start + size)
        threshold = metrics.best_threshold(scores[~test], same[~test])
        accuracies.append(np.mean((scores[test] > threshold) == same[test]))
        start += size
    assert result.mean == pytest.approx(np.mean(accuracies), abs=1e-15) and result.std == pytest.approx(
        np.std(accuracies), abs=1e-15
    )


def test_equal_error_threshold():
    scores = np.array([5.0, 4.0, 3.0, 2.0, 4.5, 1.0, 0.5, 0.1])
    same = np.array([True] * 4 + [False] * 4)
    threshold = metrics.equal_error_threshold(scores, same)
    assert np.mean(scores[~same] > threshold) == 0.25 == np.mean(scores[same] <= threshold)


def test_error_versus_reject_by_hand():
    curve = metrics.error_versus_reject(np.array([True, False, False, True]), np.array([1.0, 4.0, 3.0, 2.0]))
    assert curve.rejected.tolist() == [0, 0.25, 0.5, 0.75]
    assert curve.error.tolist() == pytest.approx([1 / 2, 1 / 3, 0, 0])
    assert curve.area == pytest.approx((1 / 2 + 1 / 3) / 4)


def test_ties_in_quality_give_the_expected_curve():
    wrong, quality = np.array([True, False, True, False, False]), np.array([1.0, 1.0, 1.0, 2.0, 0.0])
    curves = []
    for order in itertools.permutations(range(3)):
        broken = quality.copy()
        broken[:3] += 1e-3 * np.array(order)
        curves.append(metrics.error_versus_reject(wrong, broken).error)
    np.testing.assert_allclose(metrics.error_versus_reject(wrong, quality).error, np.mean(curves, axis=0), atol=1e-15)


def test_rejecting_by_correctness_is_best_and_at_random_is_flat():
    wrong = np.random.default_rng(0).random(400) < 0.2
    oracle = metrics.error_versus_reject(wrong, -wrong.astype(float))
    random = metrics.error_versus_reject(wrong, np.zeros(400))
    opposite = metrics.error_versus_reject(wrong, wrong.astype(float))
    assert oracle.area < random.area < opposite.area
    np.testing.assert_allclose(random.error, wrong.mean(), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_area_under_roc_is_the_share_of_ordered_pairs(seed):
    scores, same = tied_scores(seed)
    genuine, impostor = scores[same][:, None], scores[~same]
    assert metrics.area_under_roc(scores, same) == pytest.approx(
        np.mean((genuine > impostor) + 0.5 * (genuine == impostor))
    )
    curve = metrics.roc(scores, same)
    assert metrics.area_under_roc(scores, same) == pytest.approx(
        trapezoid([0, *curve.true_accept_rate], [0, *curve.false_accept_rate])
    )


def test_equal_error_rate_by_hand():
    scores = np.array([5.0, 4.0, 3.0, 2.0, 4.5, 1.0, 0.5, 0.1])
    assert metrics.equal_error_rate(scores, np.array([True] * 4 + [False] * 4)) == 0.25
    # The rates meet nowhere: 0 and 1/4 are as close as 1/2 and 1/4, and the stricter point counts.
    assert (
        metrics.equal_error_rate(np.array([4.0, 3.0, 2.0, 0.5, 1.0, 0.0]), np.array([True] * 4 + [False] * 2)) == 1 / 8
    )


@pytest.mark.parametrize("seed", range(5))
def test_threshold_at_far_is_the_lowest_allowed(seed):
    scores, same = tied_scores(seed)
    for far in (0.0, 0.1, 0.5):
        assert metrics.threshold_at_far(scores, same, far) == min(
            t for t in every_threshold(scores) if np.mean(scores[~same] > t) <= far
        )


def test_searches_by_hand():
    # Three mated searches: first and sure, first but weak, third; four without mate, of which one returns a high score.
    searches = metrics.Searches(
        np.array([0.9, 0.3, 0.5, np.nan, np.nan, np.nan, np.nan]),
        np.array([1, 1, 3, 0, 0, 0, 0]),
        np.array([0.2, 0.2, 0.7, 0.8, 0.4, 0.1, 0.05]),
    )
    assert metrics.rank_rates(searches, (1, 2, 3)) == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 1})
    # No search without mate may pass: threshold 0.8. One of four may: threshold 0.4; three may: 0.05.
    assert metrics.tpir_at_fpir(searches, [0.0, 0.25, 0.75, 1.0]) == pytest.approx(
        {0.0: 1 / 3, 0.25: 1 / 3, 0.75: 2 / 3, 1.0: 2 / 3}
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_searches_of_one_kind_are_refused(rank):
    searches = metrics.Searches(np.full(3, 0.5), np.full(3, rank), np.zeros(3))
    with pytest.raises(ValueError, match="with and without"):
        metrics.tpir_at_fpir(searches, [0.1])
    if rank == 0:
        with pytest.raises(ValueError, match="got none"):
            metrics.rank_rates(searches, (1,))


SAME = np.array([True, False])


@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        (np.zeros(3), SAME, "must agree"),
        (np.zeros(2), SAME.astype(int), "must agree"),
        (np.array([0.0, np.nan]), SAME, "1 of 2 that are not"),
        (np.zeros(2), np.array([True, True]), "genuine and impostor"),
    ],
)
def test_scores_that_are_refused(scores, same, message):
    for metric in (metrics.roc, metrics.k_fold_accuracy, lambda scores, same: metrics.tar_at_far(scores, same, [0.1])):
        with pytest.raises(ValueError, match=message):
            metric(scores, same)


def test_more_folds_than_pairs_are_refused():
    with pytest.raises(ValueError, match="at least 10 pairs, got 2"):
        metrics.k_fold_accuracy(np.zeros(2), SAME)


@pytest.mark.parametrize(
    ("wrong", "quality", "message"),
    [(SAME, np.zeros(3), "must be"), (SAME[:0], np.zeros(0), "must be"), (SAME, np.array([0.0, np.inf]), "finite")],
)
def test_rejection_orders_that_are_refused(wrong, quality, message):
    with pytest.raises(ValueError, match=message):
        metrics.error_versus_reject(wrong, quality)
