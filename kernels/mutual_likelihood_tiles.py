"""Mutual likelihood of all pairs of two sets of Gaussian faces: as a matrix, as the best columns of each row, or as a
histogram.

``mutual_likelihood`` has the formula. With scalar variances the squares are a matrix product, -(1 - cos) / v, and the
rest is an epilogue. With one variance for each dimension no term of sum_l (a_l - b_l)^2 / (u_l + v_l) + log(u_l + v_l)
is a product of one face's number with the other's: ``_gaussian_triton`` says what such a score costs at least. PyTorch
goes through the dimensions one by one, over chunks of scores that stay in cache, in float64; both take one logarithm
for the product of a few variances.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from scf_fast.kernels._all_pairs_triton import (
    KEPT,
    gaussian_pairs,
    launch_histogram,
    launch_matrix,
    launch_top_k,
)
from scf_fast.kernels._common import promoted_dtype
from scf_fast.kernels._gaussian_common import check_gaussian_faces, gaussian_constant, unit
from scf_fast.kernels._score_bands import (
    Band,
    add_to_histogram,
    check_histogram,
    check_k,
    check_result_dtype,
    chunks,
    row_bands,
    top_k_of_bands,
    use_tiles,
)

_PAIRS = "mutual_likelihood"
_FACTORS = 4  # variances in one logarithm
LARGEST_LOG_VARIANCE = 170.0  # the product of _FACTORS sums of two variances of e^+-170 is a normal float64

# ---- PyTorch


class _Faces(NamedTuple):
    """One of the two sets in float64."""

    mu: torch.Tensor  # scalar variance: (N, D) unit rows; diagonal: (D, N), their columns
    variance: torch.Tensor  # (N,) or (D, N); NaN outside of the range

    @classmethod
    def prepare(cls, mu: torch.Tensor, log_variance: torch.Tensor) -> "_Faces":
        log_variance = log_variance.double()
        variance = torch.where(log_variance.abs() <= LARGEST_LOG_VARIANCE, log_variance.exp(), torch.nan)
        if log_variance.ndim == 1:
            return cls(unit(mu), variance)
        return cls(unit(mu).t().contiguous(), variance.t().contiguous())

    def select(self, rows: slice) -> "_Faces":
        if self.variance.ndim == 1:
            return _Faces(self.mu[rows], self.variance[rows])
        return _Faces(self.mu[:, rows], self.variance[:, rows])


def _scalar_torch(first: _Faces, second: _Faces) -> torch.Tensor:
    """Returns the scores of all pairs with scalar variances, (N, M) float64; the CPU path."""
    dim = first.mu.shape[1]
    scores = first.mu @ second.mu.T
    for rows, cols in chunks(scores):
        v = first.variance[rows, None] + second.variance[cols]
        quadratic = scores[rows, cols].sub(1).div_(v)
        scores[rows, cols] = v.log_().mul_(-dim / 2).add_(quadratic).add_(gaussian_constant(dim))
    return scores


def _diagonal_torch(first: _Faces, second: _Faces) -> torch.Tensor:
    """Returns the scores of all pairs with a variance for each dimension, (N, M) float64; the CPU path."""
    (dim, n), m = first.mu.shape, second.mu.shape[1]
    scores = torch.empty(n, m, dtype=torch.float64, device=first.mu.device)
    for rows, cols in chunks(scores):
        a, b = first.mu[:, rows, None], second.mu[:, None, cols]
        u, v = first.variance[:, rows, None], second.variance[:, None, cols]
        total = torch.zeros_like(scores[rows, cols])
        product = torch.ones_like(total)
        for i in range(dim):
            variance = u[i] + v[i]
            product.mul_(variance)
            total.add_((a[i] - b[i]).square_().div_(variance))
            if (i + 1) % _FACTORS == 0 or i + 1 == dim:
                total.add_(product.log_())
                product.fill_(1.0)
        scores[rows, cols] = total.mul_(-0.5).add_(gaussian_constant(dim))
    return scores


def _score_bands(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    triton_kernel: bool,
) -> Iterator[Band]:
    """Yields bands of rows with their scores against every column: float32 from Triton, float64 from PyTorch."""
    if triton_kernel:
        for rows in row_bands(mu1, len(mu2)):
            part = mu1[rows], log_variance1[rows]
            yield rows, _mutual_likelihood_matrix(*part, mu2, log_variance2, torch.float32, True)
    else:
        first, second = _Faces.prepare(mu1, log_variance1), _Faces.prepare(mu2, log_variance2)
        score = _scalar_torch if log_variance1.ndim == 1 else _diagonal_torch
        for rows in row_bands(mu1, len(mu2)):
            yield rows, score(first.select(rows), second)


# ---- operators


@torch.library.custom_op("scf::mutual_likelihood_matrix", mutates_args=())
def _mutual_likelihood_matrix(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    dtype: torch.dtype,
    triton_kernel: bool,
) -> torch.Tensor:
    scores = torch.empty(len(mu1), len(mu2), dtype=dtype, device=mu1.device)
    if not triton_kernel:
        for rows, band in _score_bands(mu1, log_variance1, mu2, log_variance2, triton_kernel):
            scores[rows] = band
    elif scores.numel():
        pairs, constant = gaussian_pairs(mu1, log_variance1, mu2, log_variance2)
        pairs.add(constant)
        launch_matrix(pairs, scores, 0.0)
    return scores


@_mutual_likelihood_matrix.register_fake
def _(mu1, log_variance1, mu2, log_variance2, dtype, triton_kernel):
    return torch.empty(mu1.shape[0], mu2.shape[0], dtype=dtype, device=mu1.device)


@torch.library.custom_op("scf::mutual_likelihood_top_k", mutates_args=())
def _mutual_likelihood_top_k(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    k: int,
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = promoted_dtype(mu1, log_variance1, mu2, log_variance2)
    if triton_kernel and len(mu1) and k <= KEPT:
        pairs, constant = gaussian_pairs(mu1, log_variance1, mu2, log_variance2)
        scores, indices = launch_top_k(pairs, k)
        return scores.add_(constant).to(dtype), indices
    bands = _score_bands(mu1, log_variance1, mu2, log_variance2, triton_kernel)
    return top_k_of_bands(bands, len(mu1), k, 0.0, dtype, mu1.device)


@_mutual_likelihood_top_k.register_fake
def _(mu1, log_variance1, mu2, log_variance2, k, triton_kernel):
    dtype = promoted_dtype(mu1, log_variance1, mu2, log_variance2)
    return mu1.new_empty(mu1.shape[0], k, dtype=dtype), mu1.new_empty(mu1.shape[0], k, dtype=torch.int64)


@torch.library.custom_op("scf::mutual_likelihood_histogram", mutates_args=())
def _mutual_likelihood_histogram(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int,
    distinct: bool,
    triton_kernel: bool,
) -> torch.Tensor:
    counts = torch.zeros(2, bins, dtype=torch.int64, device=mu1.device)
    if not triton_kernel:
        bands = _score_bands(mu1, log_variance1, mu2, log_variance2, triton_kernel)
        add_to_histogram(counts, bands, ids1, ids2, low, high, distinct)
    elif len(mu1) and len(mu2):
        pairs, constant = gaussian_pairs(mu1, log_variance1, mu2, log_variance2)
        pairs.add(constant)
        launch_histogram(pairs, ids1, ids2, counts, low=low, high=high, distinct=distinct, constant=0.0)
    return counts


@_mutual_likelihood_histogram.register_fake
def _(mu1, log_variance1, ids1, mu2, log_variance2, ids2, low, high, bins, distinct, triton_kernel):
    return torch.empty(2, bins, dtype=torch.int64, device=mu1.device)


# ---- public functions


@torch.no_grad()
def mutual_likelihood_matrix(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mutual likelihood score of every row of mu1 with every row of mu2; entry (i, j) is ``mutual_likelihood`` of that
    pair.

    Source: Eqn (3), Shi and Jain, ICCV 2019. PyTorch, which serves the CPU and float64 arguments, works in float64 and
    on bands of rows, so that beyond the scores and a float64 copy of the arguments it needs about 10 MiB on the CPU.

    Args:
        mu1: (N, D) floating point directions, D in 2 .. 8192, of any positive length.
        mu2: (M, D), likewise.
        log_variance1, log_variance2: floating point log sigma^2, (N,) and (M,), or (N, D) and (M, D). In PyTorch, in
            -170 .. 170. In Triton, within 80 of the mean of both sets, or in each dimension within 18 of the mean in
            it; in a mean, those beyond -25 .. 25 count as these.
        dtype: type of the scores; by default the arguments' promoted dtype, at least float32.
        backend: "auto" runs Triton for CUDA tensors that are not float64 and PyTorch for others; "triton" or "torch"
            insists.
    Returns:
        (N, M) log likelihood (nats). NaN where an input is, a log variance is outside its range, or a direction is
        zero. From Triton, float32 arithmetic: within 6e-7 of the largest of the score, D and 1 / v (its mean over the
        dimensions), whose part is the error of the cosine or of the squares (``python -m bench.accuracy``), and the
        rounding of a constant that all scores share. Carries no gradient. Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    arithmetic = check_gaussian_faces(mu1, log_variance1, mu2, log_variance2)
    check_result_dtype(dtype)
    return _mutual_likelihood_matrix(
        mu1, log_variance1, mu2, log_variance2, dtype or arithmetic, use_tiles(backend, arithmetic, mu1, _PAIRS)
    )


@torch.no_grad()
def mutual_likelihood_top_k(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    k: int,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of mu2 with the highest mutual likelihood with each row of mu1, without the matrix: a search of probes
    (N) in a gallery (M).

    Source: Eqn (3), Shi and Jain, ICCV 2019. On CUDA up to 16 rows are kept in registers while the tiles go by; for
    more, and in PyTorch, the scores exist for a few rows at a time, 2^26 of them (CPU: 2^20).

    Args:
        k: in 1 .. M.
        others: as in ``mutual_likelihood_matrix``.
    Returns:
        (N, k) scores, falling, and (N, k) int64 rows of mu2. Equal scores are in any order; NaN comes before all
        numbers.
    Raises:
        ValueError: k is not as above, or as in ``mutual_likelihood_matrix``.
    """
    arithmetic = check_gaussian_faces(mu1, log_variance1, mu2, log_variance2)
    check_k(k, len(mu2))
    triton_kernel = use_tiles(backend, arithmetic, mu1, _PAIRS)
    return _mutual_likelihood_top_k(mu1, log_variance1, mu2, log_variance2, k, triton_kernel)


@torch.no_grad()
def mutual_likelihood_histogram(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int = 512,
    *,
    distinct: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Histograms of the mutual likelihood scores of all impostor pairs and all genuine pairs, without the matrix.

    Args:
        ids1, ids2: (N,) and (M,) int64 identities; a pair with equal identities is genuine.
        low, high: scores (nats) at the ends of the range; scores beyond them count in the first and last bin.
        bins: a power of two, 2 .. 1024.
        distinct: both sets are the same rows in the same order: count each pair of two different rows once.
        others: as in ``mutual_likelihood_matrix``.
    Returns:
        (2, bins) int64 counts, impostors first. NaN scores are left out. A score within rounding of a bin's edge may be
        counted on either side. On CUDA genuine pairs are taken to be rare: each is one addition in memory.
    Raises:
        ValueError: an argument is not as above, or as in ``mutual_likelihood_matrix``.
    """
    arithmetic = check_gaussian_faces(mu1, log_variance1, mu2, log_variance2)
    check_histogram(ids1, len(mu1), ids2, len(mu2), low, high, bins, distinct)
    triton_kernel = use_tiles(backend, arithmetic, mu1, _PAIRS)
    return _mutual_likelihood_histogram(
        mu1, log_variance1, ids1, mu2, log_variance2, ids2, float(low), float(high), bins, distinct, triton_kernel
    )
