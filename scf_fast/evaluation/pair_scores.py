"""Cosine and likelihood of many pairs of embeddings, in float64 and bounded memory."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.evaluation.likelihoods import PAIRS_AT_ONCE, Faces, Similarity
from scf_fast.evaluation.results import Score

_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64
# of a matrix product, which cost less than fetching the two rows of a pair (measured at d = 512: about 100)
_CELLS_PER_PAIR = 64
PairScores = dict[Score, np.ndarray]  # (P,) float64 each


def score_pairs(
    faces: Faces, first: torch.Tensor, second: torch.Tensor, similarity: Similarity | None = None
) -> PairScores:
    """Scores rows first[k] and second[k] by cosine and, where there is one, by another similarity, in float64.

    Args:
        faces: N of them; the cosine with a zero row is 0. Without a concentration it is by cosine alone.
        first, second: (P,) int64.
    """
    unit, first, second = F.normalize(faces.mu.double()), first.to(faces.mu.device), second.to(faces.mu.device)
    rows, columns = _DistinctRows.of(first, len(unit)), _DistinctRows.of(second, len(unit))
    if len(rows.numbers) * len(columns.numbers) <= _CELLS_PER_PAIR * len(first):
        cosine = _cosines_by_bands(unit, rows, columns)
    else:
        cosine = _cosines_by_pairs(unit, first, second)
    scores = {Score.COSINE: cosine}
    if similarity is not None and faces.concentration is not None:
        scores[similarity.score] = similarity.score_pairs(faces, cosine, first, second)
    return {score: values.cpu().numpy() for score, values in scores.items()}


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
    at_once = min(PAIRS_AT_ONCE["cuda" if unit.is_cuda else "cpu"], len(first))
    # Used again and again: new ones of this size cost more than the sums.
    a, b = unit.new_empty(2, at_once, unit.shape[1])
    cosine = unit.new_empty(len(first))
    for start in range(0, len(first), at_once or 1):
        i, j = first[start : start + at_once], second[start : start + at_once]
        torch.index_select(unit, 0, i, out=a[: len(i)])
        torch.index_select(unit, 0, j, out=b[: len(j)])
        torch.sum(a[: len(i)].mul_(b[: len(j)]), dim=1, out=cosine[start : start + at_once])
    return cosine
