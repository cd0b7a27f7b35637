"""Triton kernels that compare all pairs of two sets, and their launches: ``vmf_similarity_tiles`` has the operators.

A program computes a tile of products, then turns it into scores, strip by strip:
``_dot_rows``, ``_products``: the tile. Half precision directions are multiplied as they are, float32 ones as sums of
    two float16 numbers, in three products.
``_scores``: the epilogue, by ``_phi_triton``.
``_matrix_kernel``, ``_histogram_kernel``, ``_top_k_kernel``: what becomes of the scores.
``_Faces``, ``launch_*``: the sets as the kernels take them, and the launches.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import dense_rows
from scf_fast.kernels._phi_triton import add_phi_kernel, phi_kernel_plan
from scf_fast.kernels._vmf_common import phi, row_lengths

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


@triton.jit
def _dot_rows(
    rows1_ptr,  # pointers to the first element of each row of the tile, (BLOCK, 1)
    rows2_ptr,  # of each column, (1, BLOCK)
    product,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Returns product + mu1 mu2^T of a tile. Tensor cores cut the sum of each step instead of rounding it; with ROUNDED
    a sum runs over BLOCK_D elements only, and is rounded when it is added to the others.
    """
    inner = tl.arange(0, BLOCK_D)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(rows1_ptr + (start + inner)[None, :])
            b = tl.load(rows2_ptr + (start + inner)[:, None])
        else:
            a = tl.load(rows1_ptr + (start + inner)[None, :], mask=(start + inner < D)[None, :], other=0.0)
            b = tl.load(rows2_ptr + (start + inner)[:, None], mask=(start + inner < D)[:, None], other=0.0)
        if ROUNDED:
            # As a fused multiply-add, lest the compiler hand the sum back to the tensor cores.
            product = tl.fma(tl.dot(a, b), 1.0, product)
        else:
            product = tl.dot(a, b, product)
    return product


@triton.jit
def _products(
    mu1_ptr,  # (N, D) half precision, or with SPLIT (N, 2, D), the upper and lower half of each number
    mu2_ptr,  # (M, D), as mu1
    mu1_stride,
    mu2_stride,
    N,
    M,
    row_block,
    col_block,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns one tile of mu1 mu2^T in float32. Rows beyond the last repeat it, so that no load needs a mask."""
    rows = tl.minimum(row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), N - 1)
    cols = tl.minimum(col_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), M - 1)
    rows1_ptr = mu1_ptr + rows[:, None] * mu1_stride
    rows2_ptr = mu2_ptr + cols[None, :] * mu2_stride
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SPLIT:  # without the product of the lower halves, 2^-22 of a term
        product = _dot_rows(rows1_ptr, rows2_ptr + D, product, D, BLOCK_D, False)
        product = _dot_rows(rows1_ptr + D, rows2_ptr, product, D, BLOCK_D, False)
    return _dot_rows(rows1_ptr, rows2_ptr, product, D, BLOCK_D, D > BLOCK_D)


@triton.jit
def _halves(tile):
    """Returns the left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile):
    """Returns four strips of columns, which go through the epilogue one after another."""
    left, right = _halves(tile)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _eighths(tile):
    """Returns eight strips of columns: the epilogue of one of them fits beside the others in registers, that of the
    whole tile would not.
    """
    a, b, c, d = _quarters(tile)
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    c1, c2 = _halves(c)
    d1, d2 = _halves(d)
    return a1, a2, b1, b2, c1, c2, d1, d2


@triton.jit
def _join_halves(left, right):
    """Returns the tile of which ``_halves`` makes these."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _load_terms(
    terms_ptr,  # (4, padded) float32: kappa / |mu|, kappa^2, -phi(kappa) in two floats
    padded,
    at,
):
    """Returns the four terms of some faces; the padding makes every load whole."""
    terms_ptr += at
    return (
        tl.load(terms_ptr),
        tl.load(terms_ptr + padded),
        tl.load(terms_ptr + 2 * padded),
        tl.load(terms_ptr + 3 * padded),
    )


@triton.jit
def _scores(product, terms1, terms2, PLAN: tl.constexpr):
    """Returns the scores of a strip, but for their constant: kt^2 = kappa1^2 + kappa2^2 + 2 kappa1 kappa2 cos."""
    weight1, square1, unary1, tail1 = terms1
    weight2, square2, unary2, tail2 = terms2
    square = tl.fma(product * (2.0 * weight1)[:, None], weight2[None, :], square1[:, None] + square2[None, :])
    # Rounding could make the square of opposite directions negative.
    square = tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return add_phi_kernel(square, unary1[:, None], tail1[:, None], unary2[None, :], tail2[None, :], PLAN)


@triton.jit
def _matrix_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32: kappa / |mu|, kappa^2, -phi(kappa) in two floats
    mu2_ptr,  # (M, D) or (M, 2, D), rows of mu2_stride
    terms2_ptr,  # (4, padded2) float32, as terms1
    scores_ptr,  # (N, M) out
    mu1_stride,
    mu2_stride,
    padded1,
    padded2,
    N,
    M,
    constant,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    SPLIT: tl.constexpr,
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
    product = _products(mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SPLIT, BLOCK, BLOCK_D)
    strips = _eighths(product)
    WIDTH: tl.constexpr = strips[0].shape[1]
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    terms1 = _load_terms(terms1_ptr, padded1, rows)
    rows_ptr = scores_ptr + rows.to(tl.int64)[:, None] * M
    for strip in tl.static_range(8):
        cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
        terms2 = _load_terms(terms2_ptr, padded2, cols)
        scores = _scores(strips[strip], terms1, terms2, PLAN) + constant
        tl.store(rows_ptr + cols[None, :], scores, mask=(rows < N)[:, None] & (cols < M)[None, :])
        tl.debug_barrier()  # keeps the compiler from working on two strips at a time, for which there are no registers


@triton.jit
def _histogram_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32: kappa / |mu|, kappa^2, -phi(kappa) in two floats
    ids1_ptr,  # (padded1,) int64
    mu2_ptr,  # (M, D) or (M, 2, D), rows of mu2_stride
    terms2_ptr,  # (4, padded2) float32, as terms1
    ids2_ptr,  # (padded2,) int64
    counts_ptr,  # (2, BINS) int64, added to
    mu1_stride,
    mu2_stride,
    padded1,
    padded2,
    N,
    M,
    constant,
    low,
    bins_per_nat,
    BINS: tl.constexpr,
    DISTINCT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of scores: counts impostors in the first BINS, genuine pairs in the next. Genuine pairs are
    rare, and go into memory one by one.
    """
    row_block, col_block = tl.program_id(0), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if DISTINCT:
        if col_block < row_block:
            return
    product = _products(mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SPLIT, BLOCK, BLOCK_D)
    strips = _eighths(product)
    WIDTH: tl.constexpr = strips[0].shape[1]
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    terms1 = _load_terms(terms1_ptr, padded1, rows)
    ids1 = tl.load(ids1_ptr + rows)
    counts = tl.zeros((BINS,), tl.int32)
    for strip in tl.static_range(8):
        cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
        terms2 = _load_terms(terms2_ptr, padded2, cols)
        scores = _scores(strips[strip], terms1, terms2, PLAN) + constant
        position = tl.minimum(tl.maximum((scores - low) * bins_per_nat, 0.0), BINS - 1.0).to(tl.int32)
        counted = scores == scores  # the padding's are not
        if DISTINCT:
            counted &= rows[:, None] < cols[None, :]
        genuine = ids1[:, None] == tl.load(ids2_ptr + cols)[None, :]
        one = tl.full(position.shape, 1, tl.int64)
        tl.atomic_add(counts_ptr + BINS + position, one, mask=counted & genuine, sem="relaxed")
        impostors = tl.where(counted & (genuine == 0), position, -1)
        # Four strips at a time: a histogram has a price of its own, and positions of all eight spill on sm_80.
        if strip % 2 == 0:
            left = impostors
        else:
            pair = _join_halves(left, impostors)
            if strip % 4 == 1:
                left_pair = pair
            else:
                joined = tl.ravel(_join_halves(left_pair, pair))
                counts += tl.histogram(joined, BINS, mask=joined >= 0)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _order(bits):
    """Converts the bits of a float into an integer that is ordered as floats are, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _top_k_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32: kappa / |mu|, kappa^2, -phi(kappa) in two floats
    mu2_ptr,  # (M, D) or (M, 2, D), rows of mu2_stride
    terms2_ptr,  # (4, padded2) float32, as terms1
    best_ptr,  # (N, parts, KEPT) int64 out
    mu1_stride,
    mu2_stride,
    padded1,
    padded2,
    N,
    M,
    blocks,
    KEPT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per block of rows and part of the columns, ``blocks`` tiles: keeps the KEPT best of each row, in any
    order, each as one integer that sorts by score, then by column.

    A score of a strip that beats the worst one kept in its row replaces that one, the best first. After the first tiles
    that is rare, and a comparison of floats finds out. Scores are those of the neutral radius: the constant of another
    would cost them digits.
    """
    LOWEST: tl.constexpr = -(2**63)
    row_block, part = tl.program_id(0), tl.program_id(1)
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    terms1 = _load_terms(terms1_ptr, padded1, rows)
    # No two equal, and all below any score.
    best = tl.zeros((BLOCK, KEPT), tl.int64) + (tl.arange(0, KEPT).to(tl.int64) + LOWEST)[None, :]
    floor = tl.full((BLOCK,), float("-inf"), tl.float32)  # the worst score kept of each row
    for step in range(tl.minimum(blocks, tl.cdiv(M, BLOCK) - part * blocks)):
        col_block = part * blocks + step
        product = _products(
            mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SPLIT, BLOCK, BLOCK_D
        )
        strips = _quarters(product)
        WIDTH: tl.constexpr = strips[0].shape[1]
        for strip in tl.static_range(4):
            cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
            scores = _scores(strips[strip], terms1, _load_terms(terms2_ptr, padded2, cols), PLAN)
            # Not by rows first: Triton 3.7 fails to compile that for sm_100 with four warps. False for NaN.
            below = scores < floor[:, None]
            if tl.min(below.to(tl.int32)) == 0:
                numbers = tl.where(scores == scores, scores, float("nan"))  # one NaN, above all numbers
                keys = (_order(numbers.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - cols)[None, :]
                better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
                while tl.max((better > worst).to(tl.int32), axis=0) > 0:
                    best = tl.where((best == worst[:, None]) & (better > worst)[:, None], better[:, None], best)
                    keys = tl.where(keys == better[:, None], LOWEST, keys)
                    better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
                number = _order((worst >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
                floor = tl.where(worst < LOWEST + KEPT, float("-inf"), number)
    places = (rows.to(tl.int64) * tl.num_programs(1) + part)[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(best_ptr + places, best, mask=(rows < N)[:, None])


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
        _matrix_kernel[(triton.cdiv(n, _BLOCK) * triton.cdiv(m, _BLOCK),)](
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
        _histogram_kernel[(triton.cdiv(n, _BLOCK), triton.cdiv(col_blocks, layers), layers)](
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
        _top_k_kernel[(row_blocks, parts)](
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
