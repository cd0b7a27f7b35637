"""Launches of the kernels in ``_all_pairs_kernels``: all pairs of two sets. ``vmf_similarity_tiles`` and
``mutual_likelihood_tiles`` have the operators.
"""

import math
from typing import Any, NamedTuple

import torch
import triton

from scf_fast.kernels._all_pairs_kernels import Score, histogram_kernel, matrix_kernel, top_k_kernel
from scf_fast.kernels._common import dense_rows, slices
from scf_fast.kernels._gaussian_common import gaussian_constant, unit
from scf_fast.kernels._gaussian_triton import FACTORS
from scf_fast.kernels._phi_triton import phi_kernel_plan
from scf_fast.kernels._vmf_common import phi, row_lengths

_BLOCK = 128  # rows and columns of a tile of scores
# Elements of a row that are multiplied at a time, and whose sum the tensor cores may cut: where products have 22 bits
# instead of 16, more of them is lost.
_BLOCK_D = {torch.bfloat16: 64, torch.float16: 32}
_GROUP = 8  # tiles of rows that share their columns in the second-level cache
KEPT = 16  # best columns of a row that a program keeps in registers
_KEPT_BLOCK = 64  # rows and columns of a tile that leaves registers for them
_DIAGONAL_BLOCK = 64  # rows and columns of a tile of ``diagonal_sums``, which leaves room for many programs
_MATRIX_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
_HISTOGRAM_OPTIONS = {**_MATRIX_OPTIONS, "num_stages": 2}  # three spill on sm_86 and sm_89
# Unless told, the assembler spills a few registers to have more of these programs at a time (sm_120).
_TOP_K_OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255, "enable_fp_fusion": False}
# How far, in nats, log variances may lie from their mean: 4 sums of two variances, and their product with a square of
# at most 4 e^25, are then normal float32 numbers, as a single variance is.
DIAGONAL_SPREAD, SCALAR_SPREAD = 18.0, 80.0
_LARGEST_REFERENCE = 25.0  # nats
_PREPARED_ELEMENTS = 1 << 22  # of which float64 copies exist at a time
_PROGRAMS = 8  # per multiprocessor, into which the columns are split where there are few rows
_MOST_PROGRAMS = 65535  # along the second and third dimension of a launch


class Faces(NamedTuple):
    """One of two sets as the kernels take it."""

    mu: torch.Tensor  # (N, D) half precision, dense rows; or (N, 2, D), see ``_products``
    terms: torch.Tensor  # (4, N padded to whole tiles) float32, see ``_scores``; NaN for the padding


class Pairs(NamedTuple):
    """All pairs of two sets, and the score that is wanted of each."""

    first: Faces
    second: Faces
    score: Score
    dim: int  # of the rows as the kernels take them
    bfloat16: bool  # directions are multiplied in this type, else in float16

    @property
    def settings(self) -> dict[str, Any]:
        """Compile-time settings that the kernels share."""
        return {
            "D": self.dim,
            "SCORE": self.score.value,
            "PLAN": phi_kernel_plan(self.dim) if self.score == Score.VMF else None,
            "SPLIT": self.first.mu.ndim == 3,
            "BLOCK_D": _BLOCK_D[torch.bfloat16 if self.bfloat16 else torch.float16],
        }

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The sizes that the kernels share."""
        (first, second), n, m = (self.first, self.second), len(self.first.mu), len(self.second.mu)
        return first.mu.stride(0), second.mu.stride(0), first.terms.shape[1], second.terms.shape[1], n, m

    def add(self, constant: torch.Tensor) -> None:
        """Adds a 0-dimensional constant to all scores of Gaussians, as float32."""
        self.first.terms[2] += constant

    def tile(self, block: int, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Returns rows and columns of a tile and the options of the compilation, from those that suit products."""
        if self.score == Score.DIAGONAL_VARIANCE:
            return _DIAGONAL_BLOCK, {**options, "num_warps": 4}
        return block, options


def _pad_terms(*terms: torch.Tensor) -> torch.Tensor:
    """Returns up to four terms of each face, (N,) or one for all, as the kernels take them."""
    count = max(term.numel() for term in terms)
    padded = torch.full((4, triton.cdiv(count, _BLOCK) * _BLOCK), torch.nan, device=terms[0].device)
    for row, term in zip(padded, terms):
        row[:count] = term
    return padded


def _multiplied_rows(mu: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns directions as tensor cores multiply them, and their float64 lengths."""
    if dtype == torch.float32:
        return _split_rows(mu.to(dtype), lengths)
    return dense_rows(mu.to(dtype)), lengths


def vmf_pairs(mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor) -> Pairs:
    """Returns the pairs of two sets of von Mises-Fisher distributions."""
    dim, dtype = mu1.shape[1], torch.promote_types(mu1.dtype, mu2.dtype)

    def prepare(mu: torch.Tensor, kappa: torch.Tensor) -> Faces:
        rows, lengths = _multiplied_rows(mu, row_lengths(mu, kappa), dtype)
        kappa = kappa.double()
        unary = -phi(kappa, dim)
        head = unary.bfloat16().double()
        return Faces(rows, _pad_terms(kappa / lengths, kappa.square(), head, unary - head))

    return Pairs(prepare(mu1, kappa1), prepare(mu2, kappa2), Score.VMF, dim, dtype == torch.bfloat16)


def gaussian_pairs(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor
) -> tuple[Pairs, torch.Tensor]:
    """Returns the pairs of two sets of Gaussians, and the constant of their scores, a 0-dimensional float64 tensor.

    Variances are relative to c = 4^n close to their geometric mean, in each dimension or in all.
    """
    sets = (mu1, log_variance1), (mu2, log_variance2)
    dim, count = mu1.shape[1], len(mu1) + len(mu2)
    # A few that are no numbers, or far off, must not spoil those of all others.
    sums = [
        x.clamp(-_LARGEST_REFERENCE, _LARGEST_REFERENCE).nan_to_num().sum(dim=0, dtype=torch.float64) for _, x in sets
    ]
    root = ((sums[0] + sums[1]) / (count * math.log(4))).round().exp2()  # of c
    if log_variance1.ndim == 1:
        dtype = torch.promote_types(mu1.dtype, mu2.dtype)
        first, second = (_scalar_variance_faces(mu, x, root, dtype) for mu, x in sets)
        pairs = Pairs(first, second, Score.SCALAR_VARIANCE, dim, dtype == torch.bfloat16)
        log_roots = dim * root.log()
    else:
        first, second = (_diagonal_variance_faces(mu, x, root) for mu, x in sets)
        pairs = Pairs(first, second, Score.DIAGONAL_VARIANCE, first.mu.shape[2], False)
        log_roots = root.log().sum()
    return pairs, gaussian_constant(dim) - log_roots


def _relative_variance(log_variance: torch.Tensor, root: torch.Tensor, spread: float) -> torch.Tensor:
    """Returns float64 variances over root^2, NaN where they are too far from it."""
    relative = log_variance.double() - 2 * root.log()
    return torch.where(relative.abs() <= spread, relative.exp(), torch.nan)


def _scalar_variance_faces(
    mu: torch.Tensor, log_variance: torch.Tensor, root: torch.Tensor, dtype: torch.dtype
) -> Faces:
    rows, lengths = _multiplied_rows(mu, torch.linalg.vector_norm(mu, dim=1, dtype=torch.float64), dtype)
    variance = _relative_variance(log_variance, root, SCALAR_SPREAD)
    return Faces(rows, _pad_terms(1 / (root * lengths), variance, torch.zeros_like(lengths), root**-2))


def _diagonal_variance_faces(mu: torch.Tensor, log_variance: torch.Tensor, root: torch.Tensor) -> Faces:
    """Rows are rounded once, from float64, a part of them at a time."""
    n, dim = mu.shape
    rows = torch.zeros(n, 2, triton.cdiv(dim, FACTORS) * FACTORS, device=mu.device)
    rows[:, 1, dim:] = 0.5  # the sum of two is 1, whose logarithm is 0
    for part in slices(n, max(1, _PREPARED_ELEMENTS // dim)):
        rows[part, 0, :dim] = unit(mu[part]) / root
        rows[part, 1, :dim] = _relative_variance(log_variance[part], root, DIAGONAL_SPREAD)
    return Faces(rows, _pad_terms(*torch.zeros(4, n, device=mu.device)))


def _split_rows(mu: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 rows as sums of two float16 rows, (N, 2, D), and their lengths: scaled by a power of two so that
    no element overflows and both parts keep 11 bits, which leaves 2^-23 of an element or 2^-40 of the row.
    """
    exponent = (15 - torch.frexp(lengths).exponent).clamp(max=126)
    mu = mu * torch.exp2(exponent.float())[:, None]
    upper = mu.half()
    return torch.stack((upper, (mu - upper).half()), dim=1), torch.ldexp(lengths, exponent)


def _pad_ids(ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, -len(ids) % _BLOCK))


def launch_matrix(pairs: Pairs, scores: torch.Tensor, constant: float) -> None:
    """Fills scores, (N, M); at least one row and one column."""
    n, m = scores.shape
    block, options = pairs.tile(_BLOCK, _MATRIX_OPTIONS)
    with torch.cuda.device_of(scores):
        matrix_kernel[(triton.cdiv(n, block) * triton.cdiv(m, block),)](
            *pairs.first,
            *pairs.second,
            scores,
            *pairs.arguments,
            constant,
            BLOCK=block,
            GROUP=_GROUP,
            **pairs.settings,
            **options,
        )


def launch_histogram(
    pairs: Pairs,
    ids1: torch.Tensor,
    ids2: torch.Tensor,
    counts: torch.Tensor,
    *,
    low: float,
    high: float,
    distinct: bool,
    constant: float,
) -> None:
    """Adds all pairs to counts, (2, bins); at least one row and one column."""
    n, m, bins = len(ids1), len(ids2), counts.shape[1]
    block, options = pairs.tile(_BLOCK, _HISTOGRAM_OPTIONS)
    col_blocks = triton.cdiv(m, block)
    layers = triton.cdiv(col_blocks, _MOST_PROGRAMS)
    with torch.cuda.device_of(counts):
        histogram_kernel[(triton.cdiv(n, block), triton.cdiv(col_blocks, layers), layers)](
            *pairs.first,
            _pad_ids(ids1),
            *pairs.second,
            _pad_ids(ids2),
            counts,
            *pairs.arguments,
            constant,
            low,
            bins / (high - low),
            BINS=bins,
            DISTINCT=distinct,
            BLOCK=block,
            **pairs.settings,
            **options,
        )


def launch_top_k(pairs: Pairs, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N, k) float64 scores without their constant, falling, and (N, k) int64 columns; k <= ``KEPT``, at least
    one row.
    """
    mu1, mu2 = pairs.first.mu, pairs.second.mu
    n = len(mu1)
    block, options = pairs.tile(_KEPT_BLOCK, _TOP_K_OPTIONS)
    row_blocks, col_blocks = triton.cdiv(n, block), triton.cdiv(len(mu2), block)
    processors = torch.cuda.get_device_properties(mu1.device).multi_processor_count if mu1.is_cuda else 1
    blocks = triton.cdiv(col_blocks, min(col_blocks, triton.cdiv(_PROGRAMS * processors, row_blocks)))
    parts = triton.cdiv(col_blocks, blocks)
    kept = torch.empty(n, parts * KEPT, dtype=torch.int64, device=mu1.device)
    with torch.cuda.device_of(mu1):
        top_k_kernel[(row_blocks, parts)](
            *pairs.first,
            *pairs.second,
            kept,
            *pairs.arguments,
            blocks,
            KEPT=KEPT,
            BLOCK=block,
            **pairs.settings,
            **options,
        )
    best = torch.topk(kept, k, dim=1).values
    ordered = best >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32).double(), 0x7FFFFFFF - (best & 0xFFFFFFFF)
