"""Cosine and Eqn (13) of many pairs of embeddings, in float64 and bounded memory."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.evaluation.results import Score
from scf_fast.kernels import vmf_similarity_from_cosine

# 8 and 512 MiB for each of two float64 copies of 512-wide rows; IJB-C has 15.7 M pairs
_PAIRS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 17}
_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64
# of a matrix product, which cost less than fetching the two rows of a pair (measured at d = 512: about 100)
_CELLS_PER_PAIR = 64


class PairScores(NamedTuple):
    """Scores of P pairs."""

    cosine: np.ndarray  # (P,) float64
    vmf: np.ndarray | None  # (P,) float64, Eqn (13), nats; None without kappa

    def by_score(self) -> dict[Score, np.ndarray]:
        """Returns the scores that there are."""
        return {Score.COSINE: self.cosine} | ({} if self.vmf is None else {Score.VMF: self.vmf})


def score_pairs(
    mu: torch.Tensor, kappa: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor, radius: float
) -> PairScores:
    """Scores rows first[k] and second[k] by cosine and, where there is a kappa, by Eqn (13), in float64.

    Args:
        mu: (N, D) floating point, of any length; the cosine with a zero row is 0.
        kappa: (N,) floating point, or None.
        first, second: (P,) int64.
        radius: of the sphere.
    """
    unit, first, second = F.normalize(mu.double()), first.to(mu.device), second.to(mu.device)
    rows, columns = _DistinctRows.of(first, len(unit)), _DistinctRows.of(second, len(unit))
    if len(rows.numbers) * len(columns.numbers) <= _CELLS_PER_PAIR * len(first):
        cosine = _cosines_by_bands(unit, rows, columns)
    else:
        cosine = _cosines_by_pairs(unit, first, second)
    if kappa is None:
        return PairScores(cosine.cpu().numpy(), None)
    vmf = torch.empty_like(cosine)
    for start in range(0, len(first), _SCORES_AT_ONCE):
        piece = slice(start, start + _SCORES_AT_ONCE)
        vmf[piece] = vmf_similarity_from_cosine(
            cosine[piece], kappa[first[piece]], kappa[second[piece]], mu.shape[1], radius
        )
    return PairScores(cosine.cpu().numpy(), vmf.cpu().numpy())


class _DistinctRows(NamedTuple):
    """The distinct values among (P,) row numbers."""

    numbers: torch.Tensor  # (U,) int64, rising
    places: torch.Tensor  # (P,) int64, position of each row number in `numbers`

    @classmethod
    def of(cls, rows: torch.Tensor, count: int) -> "_DistinctRows":
        occurs = torch.zeros(count, dtype=torch.bool, device=rows.device)
        occurs[rows] = True
        return cls(occurs.nonzero()[:, 0], (occurs.cumsum(0) - 1)[rows])


def _cosines_by_bands(unit: torch.Tensor, rows: _DistinctRows, columns: _DistinctRows) -> torch.Tensor:
    """Returns (P,) cosines, picked from the matrix of all rows and columns, of which a band of rows exists at a time.

    Right where a matrix product costs less than fetching two rows for each pair.
    """
    order = torch.argsort(rows.places)
    height = max(1, _SCORES_AT_ONCE // max(1, len(columns.numbers)))
    starts = torch.arange(0, len(rows.numbers) + height, height, device=unit.device)
    ends = torch.searchsorted(rows.places[order], starts).tolist()
    others, cosine = unit[columns.numbers].T.contiguous(), unit.new_empty(len(order))
    for start, begin, end in zip(starts.tolist(), ends, ends[1:]):
        pairs = order[begin:end]
        band = unit[rows.numbers[start : start + height]] @ others
        cosine[pairs] = band[rows.places[pairs] - start, columns.places[pairs]]
    return cosine


def _cosines_by_pairs(unit: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns (P,) cosines, computed for some pairs at a time."""
    at_once = min(_PAIRS_AT_ONCE["cuda" if unit.is_cuda else "cpu"], len(first))
    # Used again and again: new ones of this size cost more than the sums.
    a, b = unit.new_empty(2, at_once, unit.shape[1])
    cosine = unit.new_empty(len(first))
    for start in range(0, len(first), at_once or 1):
        i, j = first[start : start + at_once], second[start : start + at_once]
        torch.index_select(unit, 0, i, out=a[: len(i)])
        torch.index_select(unit, 0, j, out=b[: len(j)])
        torch.sum(a[: len(i)].mul_(b[: len(j)]), dim=1, out=cosine[start : start + at_once])
    return cosine
