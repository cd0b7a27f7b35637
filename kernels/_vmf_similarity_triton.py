"""Triton kernels that compare all pairs of two sets, and their launches: ``vmf_similarity_tiles`` has the operators.

A program computes a tile of cosines as a matrix product, then turns it into scores, strip by strip.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import dense_rows
from scf_fast.kernels._vmf_common import phi, phi_plan, row_lengths
from scf_fast.kernels.debye import debye_kernel

_BLOCK = 128  # rows and columns of a tile of scores
_GROUP = 8  # tiles of rows that share their columns in the second-level cache
_NUM_WARPS, _NUM_STAGES = 8, 3
KEPT = 16  # best columns of a row that a program keeps in registers
_KEPT_BLOCK = 64  # rows and columns of a tile that leaves registers for them
_PROGRAMS = 8  # per multiprocessor, into which the columns are split where there are few rows
_MOST_PROGRAMS = 65535  # along the second and third dimension of a launch


@triton.jit
def _cosines(
    mu1_ptr,  # (N, D), rows of mu1_stride
    mu2_ptr,  # (M, D), rows of mu2_stride
    mu1_stride,
    mu2_stride,
    N,
    M,
    row_block,
    col_block,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns one tile of mu1 mu2^T in float32 as eight strips of columns: the epilogue of one of them fits beside the
    others in registers, that of the whole tile would not.
    """
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = col_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at1, at2 = rows[:, None] * mu1_stride, cols[None, :] * mu2_stride
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        a = tl.load(mu1_ptr + at1 + inner[None, :], mask=(rows < N)[:, None] & (inner < D)[None, :], other=0.0)
        b = tl.load(mu2_ptr + at2 + inner[:, None], mask=(cols < M)[None, :] & (inner < D)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    left, right = _halves(product)
    a, b = _halves(left)
    c, d = _halves(right)
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    c1, c2 = _halves(c)
    d1, d2 = _halves(d)
    return a1, a2, b1, b2, c1, c2, d1, d2


@triton.jit
def _halves(tile):
    """Returns the left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _scores(
    product,
    face1_ptr,  # (3, N) float32: 1 / |mu|, kappa, -phi(kappa)
    face2_ptr,  # (3, M) float32, as face1
    N,
    M,
    constant,
    row_block,
    col_block,
    STRIP: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Returns rows, columns and scores of one strip of a tile."""
    BLOCK: tl.constexpr = product.shape[0]
    WIDTH: tl.constexpr = product.shape[1]
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = col_block.to(tl.int64) * BLOCK + STRIP * WIDTH + tl.arange(0, WIDTH)
    row_inside, col_inside = rows < N, cols < M
    scale1 = tl.load(face1_ptr + rows, mask=row_inside, other=0.0)
    scale2 = tl.load(face2_ptr + cols, mask=col_inside, other=0.0)
    kappa1 = tl.load(face1_ptr + N + rows, mask=row_inside, other=0.0)
    kappa2 = tl.load(face2_ptr + M + cols, mask=col_inside, other=0.0)
    unary1 = tl.load(face1_ptr + 2 * N + rows, mask=row_inside, other=0.0)
    unary2 = tl.load(face2_ptr + 2 * M + cols, mask=col_inside, other=0.0)
    cos = product * scale1[:, None] * scale2[None, :]
    difference = kappa1[:, None] - kappa2[None, :]
    square = difference * difference + 2.0 * kappa1[:, None] * kappa2[None, :] * (1.0 + cos)
    phi, tail, _, _, _, _ = debye_kernel(tl.sqrt(tl.where(square < 0.0, 0.0, square)), PLAN)
    return rows, cols, phi + unary1[:, None] + unary2[None, :] + tail + constant


@triton.jit
def _matrix_kernel(
    mu1_ptr,  # (N, D), rows of mu1_stride
    face1_ptr,  # (3, N) float32: 1 / |mu|, kappa, -phi(kappa)
    mu2_ptr,  # (M, D), rows of mu2_stride
    face2_ptr,  # (3, M) float32, as face1
    scores_ptr,  # (N, M) out
    mu1_stride,
    mu2_stride,
    N,
    M,
    constant,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per tile of the matrix; programs next to each other work down GROUP tiles of rows before they go on
    to other columns.
    """
    program = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(N, BLOCK), tl.cdiv(M, BLOCK)
    first = program // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * col_blocks)
    row_block, col_block = first + within % height, within // height
    strips = _cosines(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
    )
    for strip in tl.static_range(8):
        rows, cols, scores = _scores(
            strips[strip], face1_ptr, face2_ptr, N, M, constant, row_block, col_block, strip, PLAN
        )
        tl.store(scores_ptr + rows[:, None] * M + cols[None, :], scores, mask=(rows < N)[:, None] & (cols < M)[None, :])
        tl.debug_barrier()  # keeps the compiler from working on two strips at a time, for which there are no registers


@triton.jit
def _histogram_kernel(
    mu1_ptr,  # (N, D), rows of mu1_stride
    face1_ptr,  # (3, N) float32: 1 / |mu|, kappa, -phi(kappa)
    ids1_ptr,  # (N,) int64
    mu2_ptr,  # (M, D), rows of mu2_stride
    face2_ptr,  # (3, M) float32, as face1
    ids2_ptr,  # (M,) int64
    counts_ptr,  # (2, BINS) int64, added to
    mu1_stride,
    mu2_stride,
    N,
    M,
    constant,
    low,
    bins_per_nat,
    BINS: tl.constexpr,
    DISTINCT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of scores: counts impostors in the first BINS, genuine pairs in the next."""
    row_block, col_block = tl.program_id(0), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if DISTINCT:
        if col_block < row_block:
            return
    strips = _cosines(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
    )
    counts = tl.zeros((2 * BINS,), tl.int32)
    for strip in tl.static_range(8):
        rows, cols, scores = _scores(
            strips[strip], face1_ptr, face2_ptr, N, M, constant, row_block, col_block, strip, PLAN
        )
        ids1 = tl.load(ids1_ptr + rows, mask=rows < N, other=0)
        ids2 = tl.load(ids2_ptr + cols, mask=cols < M, other=0)
        position = tl.minimum(tl.maximum((scores - low) * bins_per_nat, 0.0), BINS - 1.0).to(tl.int32)
        position += tl.where(ids1[:, None] == ids2[None, :], BINS, 0)
        counted = (rows < N)[:, None] & (cols < M)[None, :] & (scores == scores)
        if DISTINCT:
            counted &= rows[:, None] < cols[None, :]
        counts += tl.histogram(tl.ravel(position), 2 * BINS, mask=tl.ravel(counted))
    tl.atomic_add(counts_ptr + tl.arange(0, 2 * BINS), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _top_k_kernel(
    mu1_ptr,  # (N, D), rows of mu1_stride
    face1_ptr,  # (3, N) float32: 1 / |mu|, kappa, -phi(kappa)
    mu2_ptr,  # (M, D), rows of mu2_stride
    face2_ptr,  # (3, M) float32, as face1
    best_ptr,  # (N, parts, KEPT) int64 out
    mu1_stride,
    mu2_stride,
    N,
    M,
    blocks,
    KEPT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per block of rows and part of the columns, ``blocks`` tiles: keeps the KEPT best of each row, in any
    order, each as one integer that sorts by score, then by column.

    A score of a strip that beats the worst one kept in its row replaces that one, the best first. After the first tiles
    that is rare. Scores are those of the neutral radius: the constant of another would cost them digits.
    """
    LOWEST: tl.constexpr = -(2**63)
    row_block, part = tl.program_id(0), tl.program_id(1)
    # No two equal, and all below any score.
    best = tl.zeros((BLOCK, KEPT), tl.int64) + (tl.arange(0, KEPT).to(tl.int64) + LOWEST)[None, :]
    for step in range(tl.minimum(blocks, tl.cdiv(M, BLOCK) - part * blocks)):
        col_block = part * blocks + step
        strips = _cosines(
            mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
        )
        for strip in tl.static_range(8):
            rows, cols, scores = _scores(
                strips[strip], face1_ptr, face2_ptr, N, M, 0.0, row_block, col_block, strip, PLAN
            )
            numbers = tl.where(scores == scores, scores, float("nan"))  # one NaN, above all numbers
            bits = numbers.to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - cols)[None, :]
            keys = tl.where((cols < M)[None, :], keys, LOWEST)
            better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
            while tl.max((better > worst).to(tl.int32), axis=0) > 0:
                best = tl.where((best == worst[:, None]) & (better > worst)[:, None], better[:, None], best)
                keys = tl.where(keys == better[:, None], LOWEST, keys)
                better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
            tl.debug_barrier()
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    places = (rows * tl.num_programs(1) + part)[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(best_ptr + places, best, mask=(rows < N)[:, None])


class _Faces(NamedTuple):
    """One of the two sets as the kernels take it."""

    mu: torch.Tensor  # (N, D), dense rows, in the type that is multiplied
    terms: torch.Tensor  # (3, N) float32: 1 / |mu|, kappa, -phi(kappa), each rounded once

    @classmethod
    def prepare(cls, mu: torch.Tensor, kappa: torch.Tensor, dtype: torch.dtype) -> "_Faces":
        mu = dense_rows(mu.to(dtype))
        terms = torch.stack((1 / row_lengths(mu, kappa), kappa.double(), -phi(kappa, mu.shape[1])))
        return cls(mu, terms.float())


def _prepare(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, block: int = _BLOCK
) -> tuple[_Faces, _Faces, dict[str, Any]]:
    """Returns both sets of faces, and the compile-time settings that the kernels share."""
    dtype = torch.promote_types(mu1.dtype, mu2.dtype)
    dim = mu1.shape[1]
    # Three products of TF32 parts give a float32 product to a few roundings, at a third of the tensor cores' speed.
    single = dtype == torch.float32
    settings = dict(
        D=dim,
        PLAN=phi_plan(dim, torch.float32),
        PRECISION="tf32x3" if single else "ieee",
        BLOCK=block,
        BLOCK_D=16 if single else 64,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        enable_fp_fusion=False,
    )
    return _Faces.prepare(mu1, kappa1, dtype), _Faces.prepare(mu2, kappa2, dtype), settings


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
        _matrix_kernel[(triton.cdiv(n, _BLOCK) * triton.cdiv(m, _BLOCK),)](
            *first,
            *second,
            scores,
            first.mu.stride(0),
            second.mu.stride(0),
            n,
            m,
            constant,
            GROUP=_GROUP,
            **settings,
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
        _histogram_kernel[(triton.cdiv(n, _BLOCK), triton.cdiv(col_blocks, layers), layers)](
            *first,
            ids1.contiguous(),
            *second,
            ids2.contiguous(),
            counts,
            first.mu.stride(0),
            second.mu.stride(0),
            n,
            m,
            constant,
            low,
            bins / (high - low),
            BINS=bins,
            DISTINCT=distinct,
            **settings,
        )


def launch_top_k(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N, k) float64 scores at the neutral radius, falling, and (N, k) int64 columns; k <= ``KEPT``, at least
    one row.
    """
    n, m = len(mu1), len(mu2)
    first, second, settings = _prepare(mu1, kappa1, mu2, kappa2, _KEPT_BLOCK)
    row_blocks, col_blocks = triton.cdiv(n, _KEPT_BLOCK), triton.cdiv(m, _KEPT_BLOCK)
    processors = torch.cuda.get_device_properties(mu1.device).multi_processor_count if mu1.is_cuda else 1
    blocks = triton.cdiv(col_blocks, min(col_blocks, triton.cdiv(_PROGRAMS * processors, row_blocks)))
    parts = triton.cdiv(col_blocks, blocks)
    kept = torch.empty(n, parts * KEPT, dtype=torch.int64, device=mu1.device)
    with torch.cuda.device_of(mu1):
        _top_k_kernel[(row_blocks, parts)](
            *first,
            *second,
            kept,
            first.mu.stride(0),
            second.mu.stride(0),
            n,
            m,
            blocks,
            KEPT=KEPT,
            **settings,
        )
    best = torch.topk(kept, k, dim=1).values
    ordered = best >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32).double(), 0x7FFFFFFF - (best & 0xFFFFFFFF)
