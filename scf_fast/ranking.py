"""Measures of an order: rank correlation, and the error of decisions as those of lowest quality are rejected."""

from dataclasses import dataclass

import numpy as np

from scf_fast.errors import InputError


@dataclass(frozen=True)
class RejectCurve:
    """Error rate as pairs are rejected one by one."""

    rejected: np.ndarray  # (P,) fraction of pairs rejected, from 0 to 1 - 1/P
    error: np.ndarray  # (P,) error rate of the pairs kept
    area: float  # mean of error over the rejected fractions

    def error_at(self, rejected: float) -> float:
        """Returns the error rate at the first point that rejects at least this fraction, in [0, 1)."""
        return float(self.error[min(int(np.searchsorted(self.rejected, rejected)), len(self.error) - 1)])


def error_versus_reject(wrong: np.ndarray, quality: np.ndarray) -> RejectCurve:
    """Computes the error rate of the pairs kept when those of lowest quality are rejected first; the decisions were
    made once, on all pairs.

    Pairs of equal quality are rejected in random order: the curve is the expectation over that order.

    Args:
        wrong: (P,) bool, the decision on the pair is an error.
        quality: (P,) float.
    Raises:
        InputError: a quality is not finite.
        ValueError: the shapes differ, or there are no pairs.
    """
    if wrong.shape != quality.shape or wrong.ndim != 1 or len(wrong) == 0:
        raise ValueError(f"wrong and quality must be (P,) with P >= 1, got {wrong.shape} and {quality.shape}")
    if not np.isfinite(quality).all():
        raise InputError(f"quality must be finite, got {np.count_nonzero(~np.isfinite(quality))} values that are not")
    _, group, size = np.unique(quality, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=wrong) / size)[group]
    best_first = np.argsort(-quality, kind="stable")
    kept = np.arange(1, len(wrong) + 1)
    error = (np.cumsum(expected[best_first]) / kept)[::-1]
    return RejectCurve(1 - kept[::-1] / len(wrong), error, float(error.mean()))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the rank correlation of two series, (N,) each, with mean ranks for ties; NaN where one is constant."""
    ranks = []
    for values in (a, b):
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[group])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])
