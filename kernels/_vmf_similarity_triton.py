"""Launches of the kernels in ``_vmf_similarity_kernels``: all pairs of two sets. ``vmf_similarity_tiles`` has the
operators.
"""

import math
from typing import Any, NamedTuple

import torch
import triton

from scf_fast.kernels._common import dense_rows
from scf_fast.kernels._phi_triton import phi_kernel_plan
from scf_fast.kernels._vmf_common import phi, row_lengths
from scf_fast.kernels._vmf_similarity_kernels import histogram_kernel, matrix_kernel, top_k_kernel

_BLOCK = 128  # rows and columns of a tile of scores
# Elements of a row that are multiplied at a time, and whose sum the tensor cores may cut: where products have 22 bits
# instead of 16, more of them is lost.
_BLOCK_D = {torch.bfloat16: 64, torch.float16: 32}
_GROUP = 8  # tiles of rows that share their columns in the second-level cache
KEPT = 16  # best columns of a row that a program keeps in registers
_KEPT_BLOCK = 64  # rows and columns of a tile that leaves registers for them
_MATRIX_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
_HISTOGRAM_OPTIONS = {**_MATRIX_OPTIONS, "num_stages": 2}  # three spill on sm_86 and sm_89
# Unless told, the assembler spills a few registers to have more of these programs at a time (sm_120).
_TOP_K_OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255, "enable_fp_fusion": False}
_PROGRAMS = 8  # per multiprocessor, into which the columns are split where there are few rows
_MOST_PROGRAMS = 65535  # along the second and third dimension of a launch


class _Faces(NamedTuple):
    """One of the two sets as the kernels take it."""

    mu: torch.Tensor  # (N, D) half precision, dense rows; or (N, 2, D) float16, a float32 row in two parts
    terms: (
        torch.Tensor
    )  # (4, N padded to whole tiles) float32: kappa / |mu|, kappa^2, -phi(kappa) and its rounding error

    @classmethod
    def prepare(cls, mu: torch.Tensor, kappa: torch.Tensor, dtype: torch.dtype, score_of_padding: float) -> "_Faces":
        lengths, kappa = row_lengths(mu, kappa), kappa.double()
        padded = torch.zeros(4, triton.cdiv(len(mu), _BLOCK) * _BLOCK, device=mu.device)
        padded[2, len(mu) :] = score_of_padding
        if dtype == torch.float32:
            mu, lengths = _split_rows(mu.to(dtype), lengths)
        unary = -phi(kappa, mu.shape[-1])
        head = unary.bfloat16().double()
        padded[:, : len(mu)] = torch.stack((kappa / lengths, kappa.square(), head, unary - head))
        return cls(dense_rows(mu.to(dtype)) if mu.ndim == 2 else mu, padded)


def _split_rows(mu: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 rows as sums of two float16 rows, (N, 2, D), and their lengths: scaled by a power of two so that
    no element overflows and both parts keep 11 bits, which leaves 2^-23 of an element or 2^-40 of the row.
    """
    exponent = (15 - torch.frexp(lengths).exponent).clamp(max=126)
    mu = mu * torch.exp2(exponent.float())[:, None]
    upper = mu.half()
    return torch.stack((upper, (mu - upper).half()), dim=1), torch.ldexp(lengths, exponent)


def _prepare(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    *,
    score_of_padding: float = math.nan,
    block: int = _BLOCK,
) -> tuple[_Faces, _Faces, dict[str, Any]]:
    """Returns both sets of faces, and the compile-time settings that the kernels share."""
    dtype = torch.promote_types(mu1.dtype, mu2.dtype)
    dim = mu1.shape[1]
    settings = dict(
        D=dim,
        PLAN=phi_kernel_plan(dim),
        SPLIT=dtype == torch.float32,
        BLOCK=block,
        BLOCK_D=_BLOCK_D[torch.bfloat16 if dtype == torch.bfloat16 else torch.float16],
    )
    first = _Faces.prepare(mu1, kappa1, dtype, score_of_padding)
    return first, _Faces.prepare(mu2, kappa2, dtype, score_of_padding), settings


def _pad_ids(ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, -len(ids) % _BLOCK))


def launch_matrix(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    scores: torch.Tensor,
    constant: float,
) -> None:
    """Fills scores, (N, M); at least one row and one column."""
    n, m = scores.shape
    first, second, settings = _prepare(mu1, kappa1, mu2, kappa2)
    with torch.cuda.device_of(mu1):
        matrix_kernel[(triton.cdiv(n, _BLOCK) * triton.cdiv(m, _BLOCK),)](
            *first,
            *second,
            scores,
            first.mu.stride(0),
            second.mu.stride(0),
            first.terms.shape[1],
            second.terms.shape[1],
            n,
            m,
            constant,
            GROUP=_GROUP,
            **settings,
            **_MATRIX_OPTIONS,
        )


def launch_histogram(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    ids2: torch.Tensor,
    counts: torch.Tensor,
    *,
    low: float,
    high: float,
    distinct: bool,
    constant: float,
) -> None:
    """Adds all pairs to counts, (2, bins); at least one row and one column."""
    n, m, bins = len(mu1), len(mu2), counts.shape[1]
    first, second, settings = _prepare(mu1, kappa1, mu2, kappa2)
    col_blocks = triton.cdiv(m, _BLOCK)
    layers = triton.cdiv(col_blocks, _MOST_PROGRAMS)
    with torch.cuda.device_of(mu1):
        histogram_kernel[(triton.cdiv(n, _BLOCK), triton.cdiv(col_blocks, layers), layers)](
            *first,
            _pad_ids(ids1),
            *second,
            _pad_ids(ids2),
            counts,
            first.mu.stride(0),
            second.mu.stride(0),
            first.terms.shape[1],
            second.terms.shape[1],
            n,
            m,
            constant,
            low,
            bins / (high - low),
            BINS=bins,
            DISTINCT=distinct,
            **settings,
            **_HISTOGRAM_OPTIONS,
        )


def launch_top_k(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N, k) float64 scores at the neutral radius, falling, and (N, k) int64 columns; k <= ``KEPT``, at least
    one row.
    """
    n, m = len(mu1), len(mu2)
    first, second, settings = _prepare(mu1, kappa1, mu2, kappa2, score_of_padding=-math.inf, block=_KEPT_BLOCK)
    row_blocks, col_blocks = triton.cdiv(n, _KEPT_BLOCK), triton.cdiv(m, _KEPT_BLOCK)
    processors = torch.cuda.get_device_properties(mu1.device).multi_processor_count if mu1.is_cuda else 1
    blocks = triton.cdiv(col_blocks, min(col_blocks, triton.cdiv(_PROGRAMS * processors, row_blocks)))
    parts = triton.cdiv(col_blocks, blocks)
    kept = torch.empty(n, parts * KEPT, dtype=torch.int64, device=mu1.device)
    with torch.cuda.device_of(mu1):
        top_k_kernel[(row_blocks, parts)](
            *first,
            *second,
            kept,
            first.mu.stride(0),
            second.mu.stride(0),
            first.terms.shape[1],
            second.terms.shape[1],
            n,
            m,
            blocks,
            KEPT=KEPT,
            **settings,
            **_TOP_K_OPTIONS,
        )
    best = torch.topk(kept, k, dim=1).values
    ordered = best >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32).double(), 0x7FFFFFFF - (best & 0xFFFFFFFF)
