"""Scores of all pairs of two sets, band by band of rows: what the operators of every score share.

A band is a slice of the rows and their scores with every column. Bands bound the memory of whatever is made of the
scores: a histogram, or the best columns of each row.
"""

import math
from collections.abc import Iterable, Iterator

import torch

from scf_fast.kernels._common import forward_mode, slices, use_triton

# Scores that exist at once where they are not written out: 512 and 8 MiB as float64.
BAND = {"cuda": 1 << 26, "cpu": 1 << 20}
CHUNK = {"cuda": 1 << 22, "cpu": 1 << 14}  # of them in plain PyTorch, so that their temporaries stay in cache
MAX_BINS = 1024  # of a histogram that one program counts in registers

Band = tuple[slice, torch.Tensor]


def _device_kind(tensor: torch.Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


def row_bands(rows: torch.Tensor, columns: int) -> Iterator[slice]:
    """Cuts the rows into bands whose scores with every column fit into memory."""
    return slices(len(rows), max(1, BAND[_device_kind(rows)] // max(1, columns)))


def chunks(scores: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts a band into chunks whose temporaries stay in cache, each as (rows, columns)."""
    n, m = scores.shape
    at_once = CHUNK[_device_kind(scores)]
    width = max(1, min(m, at_once))
    for rows in slices(n, max(1, at_once // width)):
        for cols in slices(m, width):
            yield rows, cols


def add_to_histogram(
    counts: torch.Tensor,
    bands: Iterable[Band],
    ids1: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    distinct: bool,
) -> None:
    """Adds the scores to counts, (2, bins) int64, impostors first; overwrites the bands."""
    bins = counts.shape[1]
    row, column = (torch.arange(len(ids), device=ids.device) for ids in (ids1, ids2))
    not_counted = 2 * bins  # beyond the counts
    for rows, scores in bands:
        position = scores.sub_(low).mul_(bins / (high - low)).clamp_(0, bins - 1).floor_()
        position.add_(ids1[rows, None] == ids2, alpha=bins)
        position.nan_to_num_(not_counted)
        if distinct:
            position.masked_fill_(row[rows, None] >= column, not_counted)
        counts += torch.bincount(position.long().view(-1), minlength=2 * bins + 1)[:-1].view(2, bins)


def top_k_of_bands(
    bands: Iterable[Band], n: int, k: int, constant: torch.Tensor | float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (n, k) scores, falling, to which the constant is added after they are ranked, and (n, k) columns."""
    scores = torch.empty(n, k, dtype=dtype, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    for rows, band in bands:
        best, indices[rows] = torch.topk(band, k, dim=1)
        scores[rows] = (best.double() + constant).to(dtype)
    return scores, indices


# ---- argument checks


def use_tiles(backend: str, dtype: torch.dtype, tensor: torch.Tensor, pairs: str) -> bool:
    """Returns whether the Triton kernels run. Their arithmetic is float32, so float64 arguments go to PyTorch instead.

    Args:
        pairs: name of the function that compares matching pairs and has derivatives.
    """
    if forward_mode():
        raise NotImplementedError(
            f"the similarity of all pairs carries no derivative, in forward mode neither: use {pairs}"
        )
    if dtype == torch.float64 and backend == "triton":
        raise ValueError(
            'backend="triton" compares all pairs in float32, got float64 arguments: convert them with .float(), or '
            'use backend="auto"'
        )
    return use_triton(backend, tensor) and dtype != torch.float64


def check_result_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError unless scores can have the type."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")


def check_k(k: int, columns: int) -> None:
    """Raises ValueError unless each row has k columns to choose from."""
    if not 1 <= k <= columns:
        raise ValueError(f"k must be in 1 .. {columns}, the rows of mu2, got {k}")


def check_histogram(
    ids1: torch.Tensor, n: int, ids2: torch.Tensor, m: int, low: float, high: float, bins: int, distinct: bool
) -> None:
    """Raises ValueError unless the arguments of a histogram of n x m scores are as its public functions document."""
    for name, ids, mu, count in ("ids1", ids1, "mu1", n), ("ids2", ids2, "mu2", m):
        if ids.shape != (count,) or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} must be ({count},) int64, one per row of {mu}, got {tuple(ids.shape)} {ids.dtype}"
            )
    if not 2 <= bins <= MAX_BINS or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two in 2 .. {MAX_BINS}, got {bins}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite and low < high, got {low} and {high}")
    if distinct and n != m:
        raise ValueError(f"distinct means that both sets are the same rows, got {n} and {m}")
