"""SCF similarity of all pairs of two sets: as a matrix, as the best columns of each row, or as a histogram.

All pairs are a matrix product with an epilogue (``vmf_similarity`` has the formulas). On CUDA both are float32, the
epilogue in terms of phi, which starts at 0 and never exceeds kappa; what remains is the rounding of kt, about 1e-7
kappa nats, and what tensor cores cut off a product: they sum up to 64 elements, the sums are added in float32. On the
CPU both are float64: a float32 product alone would cost 1e-7 kappa nats there too (1.5e-4 at kappa 1000) to save a
quarter of the time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from scf_fast.kernels._all_pairs_triton import KEPT, launch_histogram, launch_matrix, launch_top_k, vmf_pairs
from scf_fast.kernels._common import DEFAULT_RADIUS, promoted_dtype
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
from scf_fast.kernels._vmf_common import check_faces, phi, phi_of_square, score_constant, unit_rows
from scf_fast.kernels.vmf_similarity import neutral_radius

_PAIRS = "vmf_similarity"

# ---- PyTorch


class _Faces(NamedTuple):
    """One of the two sets in float64, with the parts that all scores of a face share."""

    weighted: torch.Tensor  # (N, D) kappa mu, mu a unit vector
    kappa: torch.Tensor  # (N,)
    phi: torch.Tensor  # (N,)

    @classmethod
    def prepare(cls, mu: torch.Tensor, kappa: torch.Tensor) -> "_Faces":
        mu, kappa = mu.double(), kappa.double()
        return cls(kappa[:, None] * unit_rows(mu, kappa), kappa, phi(kappa, mu.shape[1]))

    def select(self, rows: slice) -> "_Faces":
        return _Faces(*(tensor[rows] for tensor in self))


def _vmf_similarity_matrix_torch(first: _Faces, second: _Faces, radius: float) -> torch.Tensor:
    """Returns the scores of all pairs, (N, M) float64; the CPU path."""
    dim = first.weighted.shape[1]
    scores = first.weighted @ second.weighted.T
    for rows, cols in chunks(scores):
        square = (first.kappa[rows, None].square() + second.kappa[cols].square()).add_(scores[rows, cols], alpha=2)
        # Clamped because rounding could make the square of opposite directions negative where kappa1 = kappa2.
        scored = phi_of_square(square.clamp_(min=0), dim).sub_(first.phi[rows, None] - score_constant(dim, radius))
        torch.sub(scored, second.phi[cols], out=scores[rows, cols])
    return scores


# ---- operators


@torch.library.custom_op("scf::vmf_similarity_matrix", mutates_args=())
def _vmf_similarity_matrix(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float,
    dtype: torch.dtype,
    triton_kernel: bool,
) -> torch.Tensor:
    n, m = len(mu1), len(mu2)
    scores = torch.empty(n, m, dtype=dtype, device=mu1.device)
    if not triton_kernel:
        for rows, band in _score_bands(mu1, kappa1, mu2, kappa2, radius, triton_kernel):
            scores[rows] = band
    elif n and m:
        launch_matrix(vmf_pairs(mu1, kappa1, mu2, kappa2), scores, score_constant(mu1.shape[1], radius))
    return scores


@_vmf_similarity_matrix.register_fake
def _(mu1, kappa1, mu2, kappa2, radius, dtype, triton_kernel):
    return torch.empty(mu1.shape[0], mu2.shape[0], dtype=dtype, device=mu1.device)


@torch.library.custom_op("scf::vmf_similarity_histogram", mutates_args=())
def _vmf_similarity_histogram(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int,
    distinct: bool,
    radius: float,
    triton_kernel: bool,
) -> torch.Tensor:
    counts = torch.zeros(2, bins, dtype=torch.int64, device=mu1.device)
    if not triton_kernel:
        bands = _score_bands(mu1, kappa1, mu2, kappa2, radius, triton_kernel)
        add_to_histogram(counts, bands, ids1, ids2, low, high, distinct)
    elif len(mu1) and len(mu2):
        constant = score_constant(mu1.shape[1], radius)
        launch_histogram(
            vmf_pairs(mu1, kappa1, mu2, kappa2),
            ids1,
            ids2,
            counts,
            low=low,
            high=high,
            distinct=distinct,
            constant=constant,
        )
    return counts


@_vmf_similarity_histogram.register_fake
def _(mu1, kappa1, ids1, mu2, kappa2, ids2, low, high, bins, distinct, radius, triton_kernel):
    return torch.empty(2, bins, dtype=torch.int64, device=mu1.device)


@torch.library.custom_op("scf::vmf_similarity_top_k", mutates_args=())
def _vmf_similarity_top_k(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    k: int,
    radius: float,
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, dim), dtype = mu1.shape, promoted_dtype(mu1, kappa1, mu2, kappa2)
    if triton_kernel and n and k <= KEPT:
        scores, indices = launch_top_k(vmf_pairs(mu1, kappa1, mu2, kappa2), k)
        return scores.add_(score_constant(dim, radius)).to(dtype), indices
    # Ranked at the neutral radius: the constant of another would cost digits.
    bands = _score_bands(mu1, kappa1, mu2, kappa2, neutral_radius(dim), triton_kernel)
    return top_k_of_bands(bands, n, k, score_constant(dim, radius), dtype, mu1.device)


def _score_bands(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float,
    triton_kernel: bool,
) -> Iterator[Band]:
    """Yields bands of rows with their scores against every column: float32 from Triton, float64 from PyTorch."""
    if triton_kernel:
        for rows in row_bands(mu1, len(mu2)):
            yield rows, _vmf_similarity_matrix(mu1[rows], kappa1[rows], mu2, kappa2, radius, torch.float32, True)
    else:
        first, second = _Faces.prepare(mu1, kappa1), _Faces.prepare(mu2, kappa2)
        for rows in row_bands(mu1, len(mu2)):
            yield rows, _vmf_similarity_matrix_torch(first.select(rows), second, radius)


@_vmf_similarity_top_k.register_fake
def _(mu1, kappa1, mu2, kappa2, k, radius, triton_kernel):
    dtype = promoted_dtype(mu1, kappa1, mu2, kappa2)
    return mu1.new_empty(mu1.shape[0], k, dtype=dtype), mu1.new_empty(mu1.shape[0], k, dtype=torch.int64)


# ---- public functions


@torch.no_grad()
def vmf_similarity_matrix(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float = DEFAULT_RADIUS,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Similarity of every row of mu1 with every row of mu2; entry (i, j) is ``vmf_similarity`` of that pair.

    Source: Eqn (13), Li et al., CVPR 2021. One pass: the matrix product, kt and the normalizers in the same tile.
    PyTorch, which serves the CPU and float64 arguments, works on bands of rows, so that beyond the scores it needs
    about 100 MiB on the CPU.

    Args:
        mu1, kappa1: (N, D) and (N,), as in ``vmf_similarity``. Half precision directions are multiplied as they are.
        mu2, kappa2: (M, D) and (M,).
        radius: r > 0 of the sphere; for half precision scores use ``neutral_radius(D)``: others make them thousands.
        dtype: type of the scores; by default the arguments' promoted dtype, at least float32.
        backend: "auto" runs Triton for CUDA tensors that are not float64 and PyTorch for others; "triton" or "torch"
            insists.
    Returns:
        (N, M) log likelihood (nats). From Triton, float32 arithmetic: within 3e-7 of the larger kappa, or of
        max(2, D / 64) where that is larger (``python -m bench.accuracy``), and the rounding of a constant that radius
        adds, unless directions oppose each other: then the error of the cosine, 4e-7, counts with the
        factor kappa1 kappa2 / max(kt, D). Kappa up to 1e18. Carries no gradient. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above, or the backend cannot run.
    """
    arithmetic = check_faces(mu1, kappa1, mu2, kappa2, radius)
    check_result_dtype(dtype)
    return _vmf_similarity_matrix(
        mu1, kappa1, mu2, kappa2, float(radius), dtype or arithmetic, use_tiles(backend, arithmetic, mu1, _PAIRS)
    )


@torch.no_grad()
def vmf_similarity_top_k(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    k: int,
    radius: float = DEFAULT_RADIUS,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of mu2 most similar to each row of mu1, without the matrix: a search of probes (N) in a gallery (M).

    Source: Eqn (13), Li et al., CVPR 2021. On CUDA up to 16 rows are kept in registers while the tiles go by; for more,
    and in PyTorch, the scores exist for a few rows at a time, 2^26 of them (CPU: 2^20).

    Args:
        k: in 1 .. M.
        others: as in ``vmf_similarity_matrix``.
    Returns:
        (N, k) scores, falling, and (N, k) int64 rows of mu2. They are ranked before the radius enters and the score is
        rounded. Equal scores are in any order; NaN comes before all numbers.
    Raises:
        ValueError: k is not as above, or as in ``vmf_similarity_matrix``.
    """
    arithmetic = check_faces(mu1, kappa1, mu2, kappa2, radius)
    check_k(k, len(mu2))
    return _vmf_similarity_top_k(
        mu1, kappa1, mu2, kappa2, k, float(radius), use_tiles(backend, arithmetic, mu1, _PAIRS)
    )


@torch.no_grad()
def vmf_similarity_histogram(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int = 512,
    radius: float = DEFAULT_RADIUS,
    *,
    distinct: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Histograms of the scores of all impostor pairs and all genuine pairs, without the matrix.

    Args:
        ids1, ids2: (N,) and (M,) int64 identities; a pair with equal identities is genuine.
        low, high: scores (nats) at the ends of the range; scores beyond them count in the first and last bin.
        bins: a power of two, 2 .. 1024.
        distinct: both sets are the same rows in the same order: count each pair of two different rows once.
        others: as in ``vmf_similarity_matrix``.
    Returns:
        (2, bins) int64 counts, impostors first. NaN scores are left out. A score within rounding of a bin's edge may be
        counted on either side. On CUDA genuine pairs are taken to be rare: each is one addition in memory.
    Raises:
        ValueError: an argument is not as above, or as in ``vmf_similarity_matrix``.
    """
    arithmetic = check_faces(mu1, kappa1, mu2, kappa2, radius)
    check_histogram(ids1, len(mu1), ids2, len(mu2), low, high, bins, distinct)
    return _vmf_similarity_histogram(
        mu1,
        kappa1,
        ids1,
        mu2,
        kappa2,
        ids2,
        float(low),
        float(high),
        bins,
        distinct,
        float(radius),
        use_tiles(backend, arithmetic, mu1, _PAIRS),
    )
