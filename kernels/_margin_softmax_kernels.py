"""Triton kernels of the margin softmax; ``_margin_softmax_triton`` launches them.

Unit rows, labels and weights are padded to whole tiles, so that the products need no masks.
"""

import triton
import triton.language as tl


@triton.jit
def unit_rows_kernel(
    source_ptr,  # (any, D), rows of source_stride
    rows_ptr,  # (count,) int64 with GATHER
    unit_ptr,  # (count padded to whole tiles, WIDTH) out
    inverse_norm_ptr,  # (count padded to whole tiles,) out
    count,
    source_stride,
    D,
    FLOOR,
    GATHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per row of unit: the source row divided by its norm, zeros in the padding of rows and columns."""
    row = tl.program_id(0).to(tl.int64)
    there = row < count
    if GATHER:
        source_row = tl.load(rows_ptr + row, mask=there, other=0)
    else:
        source_row = row
    source_ptr += source_row * source_stride
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, WIDTH, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)
        x = tl.load(source_ptr + at, mask=there & (at < D), other=0.0).to(tl.float32)
        squares += x * x
    inverse_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares)), FLOOR)
    for k in range(0, WIDTH, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)
        x = tl.load(source_ptr + at, mask=there & (at < D), other=0.0).to(tl.float32)
        tl.store(unit_ptr + row * WIDTH + at, (x * inverse_norm).to(unit_ptr.dtype.element_ty), mask=at < WIDTH)
    tl.store(inverse_norm_ptr + row, inverse_norm)


@triton.jit
def _cosine_tile(
    embeddings_ptr,  # (padded batch, WIDTH)
    centers_ptr,  # (padded count, WIDTH)
    rows,
    classes,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns <unit embedding, unit center> of a tile in float32; the padding makes every load whole."""
    step = tl.arange(0, STEP)
    e_ptr = embeddings_ptr + rows.to(tl.int64)[:, None] * WIDTH + step[None, :]
    w_ptr = centers_ptr + classes.to(tl.int64)[None, :] * WIDTH + step[:, None]
    cos = tl.zeros((ROWS, CLASSES), tl.float32)
    for _ in range(0, WIDTH, STEP):
        cos = tl.dot(tl.load(e_ptr), tl.load(w_ptr), cos, input_precision=PRECISION)
        e_ptr += STEP
        w_ptr += STEP
    return cos


@triton.jit
def _any_of_tile(own, first, CLASSES: tl.constexpr):
    """Returns whether a row has its own class in the tile: most tiles have none, and need no masks."""
    return tl.max(((own >= first) & (own < first + CLASSES)).to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=("first_class", "count"))  # they change from block to block
def statistics_kernel(
    embeddings_ptr,  # (padded_batch, WIDTH)
    centers_ptr,  # (padded count, WIDTH): the block of classes from first_class on
    labels_ptr,  # (padded_batch,) int64
    top_ptr,  # (splits, padded_batch) in and out: largest cosine
    total_ptr,  # (splits, padded_batch) in and out: sum of exponentials, relative to that of the largest cosine
    sum_ptr,  # (splits, padded_batch) in and out, with WITH_SUM: sum of cosines
    padded_batch,
    first_class,
    count,
    scale_log2,
    WITH_SUM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of rows and split of the classes: carries their running sums over one more block."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    at = split.to(tl.int64) * padded_batch + rows
    own = (tl.load(labels_ptr + rows) - first_class).to(tl.int32)
    top = tl.load(top_ptr + at)
    total = tl.load(total_ptr + at)
    if WITH_SUM:
        cosine_sum = tl.load(sum_ptr + at)
    for tile in range(split, tl.cdiv(count, CLASSES), tl.num_programs(1)):
        first = tile * CLASSES
        classes = first + tl.arange(0, CLASSES)
        cos = _cosine_tile(embeddings_ptr, centers_ptr, rows, classes, WIDTH, ROWS, CLASSES, STEP, PRECISION)
        if WITH_SUM:
            cosine_sum += tl.sum(cos, axis=1)  # the padding's cosines are 0
        if _any_of_tile(own, first, CLASSES) | (first + CLASSES > count):
            other = (classes[None, :] < count) & (classes[None, :] != own[:, None])
            cos = tl.where(other, cos, float("-inf"))
        higher = tl.maximum(top, tl.max(cos, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher * scale_log2)
        exponentials = tl.exp2(cos * scale_log2 - shift[:, None])
        total = total * tl.exp2(top * scale_log2 - shift) + tl.sum(exponentials, axis=1)
        top = higher
    tl.store(top_ptr + at, top)
    tl.store(total_ptr + at, total)
    if WITH_SUM:
        tl.store(sum_ptr + at, cosine_sum)


@triton.jit(do_not_specialize=("first_class", "count"))  # they change from block to block
def cosine_gradient_kernel(
    embeddings_ptr,  # (padded batch, WIDTH)
    centers_ptr,  # (padded_count, WIDTH): the block of classes from first_class on
    labels_ptr,  # (padded batch,) int64
    row_grad_ptr,  # (padded batch,)
    target_grad_ptr,  # (padded batch,)
    uniform_grad_ptr,  # (padded batch,) with UNIFORM
    log_sum_exp_ptr,  # (padded batch,), over ln 2
    grad_ptr,  # (padded batch, padded_count) out
    used_ptr,  # (tiles of rows, tiles of classes) int8 out, with SKIP
    padded_count,
    first_class,
    count,
    scale_log2,
    skip_below,
    UNIFORM: tl.constexpr,
    SKIP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of G, recomputed; with SKIP a tile whose entries are all below the threshold is marked
    unused instead of stored.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    cos = _cosine_tile(embeddings_ptr, centers_ptr, rows, classes, WIDTH, ROWS, CLASSES, STEP, PRECISION)
    row_grad, target_grad = tl.load(row_grad_ptr + rows), tl.load(target_grad_ptr + rows)
    log_sum_exp = tl.load(log_sum_exp_ptr + rows)
    grad = row_grad[:, None] * tl.exp2(cos * scale_log2 - log_sum_exp[:, None])
    if UNIFORM:
        grad += tl.load(uniform_grad_ptr + rows)[:, None]
    own = (tl.load(labels_ptr + rows) - first_class).to(tl.int32)
    first = tl.program_id(0) * CLASSES
    if _any_of_tile(own, first, CLASSES) | (first + CLASSES > count):
        grad = tl.where(classes[None, :] == own[:, None], target_grad[:, None], grad)
        grad = tl.where(classes[None, :] < count, grad, 0.0)  # the padding has cosine 0, not gradient 0
    grad_ptr += rows.to(tl.int64)[:, None] * padded_count + classes[None, :]
    if SKIP:
        # A maximum leaves NaN out, and NaN must reach every gradient that it belongs to. One in a cosine is in the sum.
        finite = (tl.abs(row_grad + target_grad) < float("inf")) & (log_sum_exp == log_sum_exp)
        used = (tl.max(tl.abs(grad)) >= skip_below) | (tl.min(finite.to(tl.int32), axis=0) == 0)
        tl.store(used_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), used.to(tl.int8))
        if used:
            tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))


@triton.jit
def product_kernel(
    left_ptr,  # (rows, inner) by its two strides
    right_ptr,  # (inner, WIDTH)
    used_ptr,  # (tiles of rows, tiles of inner) int8 by its two strides, with SKIP
    out_ptr,  # (splits, padded_rows, WIDTH) out, with ADD also in
    left_row_stride,
    left_inner_stride,
    used_row_stride,
    used_inner_stride,
    inner_tiles,
    padded_rows,
    ADD: tl.constexpr,
    SKIP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (+)= left @ right, one program per tile of ROWS x COLUMNS and split of the inner dimension, whose unused
    tiles are skipped.
    """
    tile = tl.program_id(0)
    split = tl.program_id(2)
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out_ptr += (split.to(tl.int64) * padded_rows + rows[:, None]) * WIDTH + columns[None, :]
    left_ptr += rows[:, None] * left_row_stride
    right_ptr += columns[None, :]
    if ADD:
        product = tl.load(out_ptr)
    else:
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
    STEPS: tl.constexpr = INNER // STEP
    # One flat loop, so that its loads overlap its products.
    for turn in range(0, tl.cdiv(inner_tiles - split, tl.num_programs(2)) * STEPS):
        inner_tile = split + turn // STEPS * tl.num_programs(2)
        inner = (inner_tile * INNER + turn % STEPS * STEP + tl.arange(0, STEP)).to(tl.int64)
        if SKIP:
            if tl.load(used_ptr + tile * used_row_stride + inner_tile * used_inner_stride) != 0:
                product = tl.dot(
                    tl.load(left_ptr + inner[None, :] * left_inner_stride),
                    tl.load(right_ptr + inner[:, None] * WIDTH),
                    product,
                    input_precision=PRECISION,
                )
        else:
            product = tl.dot(
                tl.load(left_ptr + inner[None, :] * left_inner_stride),
                tl.load(right_ptr + inner[:, None] * WIDTH),
                product,
                input_precision=PRECISION,
            )
    tl.store(out_ptr, product)


@triton.jit
def through_norm_kernel(
    grad_unit_ptr,  # (splits, padded_rows, WIDTH)
    source_ptr,  # (any, D), rows of source_stride
    rows_ptr,  # (count,) int64 with GATHER
    inverse_norm_ptr,  # (padded_rows,)
    factor_ptr,  # scalar
    out_ptr,  # (count, D) out
    source_stride,
    splits,
    padded_rows,
    D,
    GATHER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row: its gradient from that of its unit row (a sum over splits), times a factor."""
    row = tl.program_id(0).to(tl.int64)
    if GATHER:
        source_row = tl.load(rows_ptr + row)
    else:
        source_row = row
    at = tl.arange(0, BLOCK_D)
    mask = at < D
    grad = tl.zeros((BLOCK_D,), tl.float32)
    grad_unit_ptr += row * WIDTH
    for _ in range(splits):
        grad += tl.load(grad_unit_ptr + at, mask=mask, other=0.0)
        grad_unit_ptr += padded_rows * WIDTH
    inverse_norm = tl.load(inverse_norm_ptr + row)
    unit = tl.load(source_ptr + source_row * source_stride + at, mask=mask, other=0.0).to(tl.float32) * inverse_norm
    grad = (grad - unit * tl.sum(grad * unit)) * (inverse_norm * tl.load(factor_ptr))
    tl.store(out_ptr + row * D + at, grad, mask=mask)
