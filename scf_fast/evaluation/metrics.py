"""Verification, identification and error-versus-reject metrics in NumPy, each exact over the scores it is given.

A pair is accepted where score > threshold. Throughout, ``scores`` is (P,) float, larger for more similar faces, and
``same`` is (P,) bool, True for genuine pairs.
"""

import math
from dataclasses import dataclass

import numpy as np

from scf_fast.errors import InputError
from scf_fast.ranking import RejectCurve as RejectCurve
from scf_fast.ranking import error_versus_reject as error_versus_reject

# Of fewer impostor pairs ten are more than a tenth, which leaves too little of a curve to see.
FEW_IMPOSTORS = 100


@dataclass(frozen=True)
class Roc:
    """Operating points, one per distinct score, from the threshold that accepts nothing to the one that accepts
    everything.
    """

    false_accept_rate: np.ndarray  # (K,) fraction of impostor pairs accepted, rising from 0 to 1
    true_accept_rate: np.ndarray  # (K,) fraction of genuine pairs accepted, rising from 0 to 1
    threshold: np.ndarray  # (K,) falling


@dataclass(frozen=True)
class KFoldAccuracy:
    """Verification accuracy with the threshold chosen on the other folds."""

    mean: float  # over the folds
    std: float  # over the folds
    threshold: np.ndarray  # (folds,) chosen on the other folds


def roc(scores: np.ndarray, same: np.ndarray) -> Roc:
    """Computes every operating point that the scores can tell apart.

    Raises:
        InputError: a score is not finite, or genuine or impostor pairs are missing.
        ValueError: the shapes differ.
    """
    genuine, impostor = _split(scores, same)
    threshold = np.concatenate([np.unique(scores)[::-1], [-np.inf]])
    false_accepts, true_accepts = (
        (len(part) - np.searchsorted(np.sort(part), threshold, side="right")) / len(part)
        for part in (impostor, genuine)
    )
    return Roc(false_accepts, true_accepts, threshold)


def measurable_fars(fars: tuple[float, ...], num_impostors: int, least_accepts: int = 10) -> list[float]:
    """Returns the false accept rates at which at least ``least_accepts`` impostor pairs are accepted; with fewer the
    estimate is mostly noise.
    """
    return [far for far in fars if far * num_impostors >= least_accepts * (1 - 1e-9)]  # 1e-3 * 10,000 must count as 10


def tar_at_far(scores: np.ndarray, same: np.ndarray, fars: list[float]) -> dict[float, float]:
    """Computes the true accept rate for each of ``fars`` in [0, 1], at the lowest threshold whose false accept rate
    does not exceed it.

    Raises:
        InputError, ValueError: as in roc.
    """
    genuine, impostor = (np.sort(part)[::-1] for part in _split(scores, same))
    # searchsorted wants rising scores: accepted are those above the threshold.
    return {far: float(np.searchsorted(-genuine, -_threshold(impostor, far)) / len(genuine)) for far in fars}


def threshold_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float:
    """Returns the lowest threshold whose false accept rate does not exceed ``far``, in [0, 1).

    Raises:
        InputError, ValueError: as in roc.
    """
    return _threshold(np.sort(_split(scores, same)[1])[::-1], far)


def _threshold(falling: np.ndarray, rate: float) -> float:
    """Returns the highest of the falling scores that must be refused, with all its ties, so that a share of at most
    ``rate`` passes.
    """
    allowed = math.floor(rate * len(falling) + 1e-9)  # 1e-9: a product such as 0.29 * 100 rounds to 28.999...
    return float(falling[allowed]) if allowed < len(falling) else -math.inf


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """Returns the threshold of highest accuracy among every cut between distinct scores: the middle of the best gap.

    Of several best cuts the strictest wins, as in insightface's search. Accepting nothing and accepting everything are
    cuts too.
    """
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    # Right answers when the first n are accepted, up to a constant.
    correct = np.concatenate([[0], np.cumsum(np.where(same, 1, -1))])
    is_cut = np.concatenate([[True], scores[1:] < scores[:-1], [True]])
    cut = int(np.argmax(np.where(is_cut, correct, np.iinfo(correct.dtype).min)))
    if cut in (0, len(scores)):
        return -math.inf if cut else math.inf
    # The mean of two neighboring floats may round up to the upper one, which must stay accepted.
    middle = scores[cut] + (scores[cut - 1] - scores[cut]) / 2
    return float(middle if middle < scores[cut - 1] else scores[cut])


def k_fold_accuracy(scores: np.ndarray, same: np.ndarray, folds: int = 10) -> KFoldAccuracy:
    """Computes the accuracy of the LFW protocol as insightface runs it.

    Folds are contiguous in file order; the threshold is chosen on the others and tested on each. The search for it is
    exact, where insightface's steps over a grid of 0.01 in squared distance.

    Raises:
        InputError, ValueError: as in roc, or there are fewer pairs than folds.
    """
    _split(scores, same)
    if len(scores) < folds:
        raise InputError(f"{folds}-fold accuracy needs at least {folds} pairs, got {len(scores)}")
    accuracy, thresholds = [], []
    for test in np.array_split(np.arange(len(scores)), folds):
        train = np.ones(len(scores), bool)
        train[test] = False
        thresholds.append(best_threshold(scores[train], same[train]))
        accuracy.append(np.mean((scores[test] > thresholds[-1]) == same[test]))
    return KFoldAccuracy(float(np.mean(accuracy)), float(np.std(accuracy)), np.array(thresholds))


def equal_error_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """Returns the threshold at which false accept and false reject rates are closest; the strictest of several.

    Raises:
        InputError, ValueError: as in roc.
    """
    curve = roc(scores, same)
    return float(curve.threshold[np.argmin(np.abs(curve.false_accept_rate - (1 - curve.true_accept_rate)))])


def area_under_roc(scores: np.ndarray, same: np.ndarray) -> float:
    """Returns the probability that a genuine pair scores above an impostor pair; a tie counts half.

    Raises:
        InputError, ValueError: as in roc.
    """
    genuine, impostor = _split(scores, same)
    impostor = np.sort(impostor)
    below, not_above = (np.searchsorted(impostor, genuine, side=side).mean() for side in ("left", "right"))
    return float((below + not_above) / (2 * len(impostor)))


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """Returns the mean of the false accept and the false reject rate at the operating point where they are closest.

    Raises:
        InputError, ValueError: as in roc.
    """
    curve = roc(scores, same)
    false_reject_rate = 1 - curve.true_accept_rate
    point = np.argmin(np.abs(curve.false_accept_rate - false_reject_rate))
    return float((curve.false_accept_rate[point] + false_reject_rate[point]) / 2)


@dataclass(frozen=True)
class Searches:
    """Q searches of a gallery that holds one entry a subject."""

    mate_score: np.ndarray  # (Q,) float, with the entry of the probe's subject; NaN where the gallery has none
    # (Q,) int64, place of the mate among the best entries, from 1; one more than the search's depth where it lies
    # deeper; 0: no mate
    mate_rank: np.ndarray
    best_other: np.ndarray  # (Q,) float, the highest score with another subject's entry; -inf where there is no other

    @property
    def mated(self) -> np.ndarray:
        """(Q,) bool, True where the probe's subject is in the gallery."""
        return self.mate_rank > 0


def rank_rates(searches: Searches, ranks: tuple[int, ...]) -> dict[int, float]:
    """Computes the closed-set rates: for each of ``ranks`` the share of mated searches with the mate among the best.

    Raises:
        InputError: no search is mated.
    """
    if not searches.mated.any():
        raise InputError("closed-set identification needs probes whose subject is in the gallery, got none")
    found = searches.mate_rank[searches.mated]
    return {rank: float(np.mean(found <= rank)) for rank in ranks}


def tpir_at_fpir(searches: Searches, fpirs: list[float]) -> dict[float, float]:
    """Computes the open-set rates: the share of mated searches that return the mate first and above the threshold.

    The threshold is, for each of ``fpirs``, the lowest at which at most that share of the searches without mate
    returns anything.

    Raises:
        InputError: all searches are mated, or none.
    """
    mated = searches.mated
    if mated.all() or not mated.any():
        raise InputError(
            "open-set identification needs probes with and without their subject in the gallery, "
            f"got {np.count_nonzero(mated)} with it of {len(mated)}"
        )
    falling = np.sort(searches.best_other[~mated])[::-1]
    first = searches.mate_rank[mated] == 1
    return {fpir: float(np.mean(first & (searches.mate_score[mated] > _threshold(falling, fpir)))) for fpir in fpirs}


def _split(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns genuine and impostor scores, after checking them."""
    if scores.shape != same.shape or scores.ndim != 1 or same.dtype != bool:
        raise ValueError(f"scores (P,) and same (P,) bool must agree, got {scores.shape} and {same.shape} {same.dtype}")
    if not np.isfinite(scores).all():
        raise InputError(
            f"scores must be finite, got {np.count_nonzero(~np.isfinite(scores))} of {len(scores)} that are not"
        )
    if same.all() or not same.any():
        raise InputError(
            f"verification needs genuine and impostor pairs, got {np.count_nonzero(same)} genuine of {len(same)}"
        )
    return scores[same], scores[~same]
