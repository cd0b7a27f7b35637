"""Triton kernels that compare all pairs of two sets; ``_all_pairs_triton`` launches them.

A program computes a tile of products (for Gaussians with a variance in each dimension, of sums that are none), then
turns it into scores, strip by strip:
``_dot_rows``, ``_products``: the tile. Half precision directions are multiplied as they are, float32 ones as sums of
    two float16 numbers, in three products.
``_scores``: the epilogue, by ``_phi_triton`` or ``_gaussian_triton``.
``matrix_kernel``, ``histogram_kernel``, ``top_k_kernel``: what becomes of the scores.
"""

import enum

import triton
import triton.language as tl

from scf_fast.kernels._gaussian_triton import diagonal_sums, diagonal_variance_scores, scalar_variance_scores
from scf_fast.kernels._phi_triton import add_phi_kernel


class Score(enum.IntEnum):
    """What the kernels compute of a pair."""

    VMF = 0  # Eqn (13) of SCF
    SCALAR_VARIANCE = 1  # Eqn (3) of PFE, one variance in all dimensions
    DIAGONAL_VARIANCE = 2  # the same, one for each


_SCALAR_VARIANCE = tl.constexpr(Score.SCALAR_VARIANCE.value)
_DIAGONAL_VARIANCE = tl.constexpr(Score.DIAGONAL_VARIANCE.value)


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
    mu1_ptr,  # (N, D) half precision, or with SPLIT (N, 2, D), the upper and lower half of each number; for diagonal
    # variances (N, 2, D) float32, directions and variances
    mu2_ptr,  # (M, D), as mu1
    mu1_stride,
    mu2_stride,
    N,
    M,
    row_block,
    col_block,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns one tile of mu1 mu2^T, or of ``diagonal_sums``, in float32. Rows beyond the last repeat it, so that no
    load needs a mask.
    """
    rows = tl.minimum(row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), N - 1)
    cols = tl.minimum(col_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), M - 1)
    rows1_ptr = mu1_ptr + rows * mu1_stride
    rows2_ptr = mu2_ptr + cols * mu2_stride
    if SCORE == _DIAGONAL_VARIANCE:
        return diagonal_sums(rows1_ptr, rows2_ptr, D)
    else:
        rows1_ptr, rows2_ptr = rows1_ptr[:, None], rows2_ptr[None, :]
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
    terms_ptr,  # (4, padded) float32
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
def _scores(product, terms1, terms2, D: tl.constexpr, SCORE: tl.constexpr, PLAN: tl.constexpr):
    """Returns the scores of a strip, but for their constant."""
    if SCORE == _DIAGONAL_VARIANCE:
        return diagonal_variance_scores(product, terms1, terms2)
    elif SCORE == _SCALAR_VARIANCE:
        return scalar_variance_scores(product, terms1, terms2, D)
    else:
        return _vmf_scores(product, terms1, terms2, PLAN)


@triton.jit
def _vmf_scores(product, terms1, terms2, PLAN: tl.constexpr):
    """Returns the scores of a strip from kt^2 = kappa1^2 + kappa2^2 + 2 kappa1 kappa2 cos; the terms of a face are
    kappa / |mu|, kappa^2, -phi(kappa) in two floats.
    """
    weight1, square1, unary1, tail1 = terms1
    weight2, square2, unary2, tail2 = terms2
    square = tl.fma(product * (2.0 * weight1)[:, None], weight2[None, :], square1[:, None] + square2[None, :])
    # Rounding could make the square of opposite directions negative.
    square = tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return add_phi_kernel(square, unary1[:, None], tail1[:, None], unary2[None, :], tail2[None, :], PLAN)


@triton.jit
def matrix_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32, what ``_scores`` needs of a face
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
    SCORE: tl.constexpr,
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
    product = _products(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SCORE, SPLIT, BLOCK, BLOCK_D
    )
    strips = _eighths(product)
    WIDTH: tl.constexpr = strips[0].shape[1]
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    terms1 = _load_terms(terms1_ptr, padded1, rows)
    rows_ptr = scores_ptr + rows.to(tl.int64)[:, None] * M
    for strip in tl.static_range(8):
        cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
        terms2 = _load_terms(terms2_ptr, padded2, cols)
        scores = _scores(strips[strip], terms1, terms2, D, SCORE, PLAN) + constant
        tl.store(rows_ptr + cols[None, :], scores, mask=(rows < N)[:, None] & (cols < M)[None, :])
        tl.debug_barrier()  # keeps the compiler from working on two strips at a time, for which there are no registers


@triton.jit
def histogram_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32, what ``_scores`` needs of a face
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
    SCORE: tl.constexpr,
    PLAN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of scores: counts impostors in the first BINS, genuine pairs in the next. Genuine pairs are
    rare, and go into memory one by one. Longer than 60 lines for its 21 parameters.
    """
    row_block, col_block = tl.program_id(0), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if DISTINCT:
        if col_block < row_block:
            return
    product = _products(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SCORE, SPLIT, BLOCK, BLOCK_D
    )
    strips = _eighths(product)
    WIDTH: tl.constexpr = strips[0].shape[1]
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    terms1 = _load_terms(terms1_ptr, padded1, rows)
    ids1 = tl.load(ids1_ptr + rows)
    counts = tl.zeros((BINS,), tl.int32)
    for strip in tl.static_range(8):
        cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
        terms2 = _load_terms(terms2_ptr, padded2, cols)
        scores = _scores(strips[strip], terms1, terms2, D, SCORE, PLAN) + constant
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
def top_k_kernel(
    mu1_ptr,  # (N, D) or (N, 2, D), rows of mu1_stride
    terms1_ptr,  # (4, padded1) float32, what ``_scores`` needs of a face
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
    SCORE: tl.constexpr,
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
            mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, SCORE, SPLIT, BLOCK, BLOCK_D
        )
        strips = _quarters(product)
        WIDTH: tl.constexpr = strips[0].shape[1]
        for strip in tl.static_range(4):
            cols = col_block * BLOCK + strip * WIDTH + tl.arange(0, WIDTH)
            scores = _scores(strips[strip], terms1, _load_terms(terms2_ptr, padded2, cols), D, SCORE, PLAN)
            # Not by rows first: Triton 3.7 fails to compile that for sm_100 with four warps. False for NaN.
            below = scores < floor[:, None]
            if tl.min(below.to(tl.int32)) == 0:
                numbers = tl.where(scores == scores, scores, float("nan"))  # one NaN, above all numbers
                keys = (_order(numbers.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - cols)[None, :]
                keys = tl.where((cols < M)[None, :], keys, LOWEST)  # the padding's scores are NaN
                better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
                while tl.max((better > worst).to(tl.int32), axis=0) > 0:
                    best = tl.where((best == worst[:, None]) & (better > worst)[:, None], better[:, None], best)
                    keys = tl.where(keys == better[:, None], LOWEST, keys)
                    better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
                number = _order((worst >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
                floor = tl.where(worst < LOWEST + KEPT, float("-inf"), number)
    places = (rows.to(tl.int64) * tl.num_programs(1) + part)[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(best_ptr + places, best, mask=(rows < N)[:, None])
