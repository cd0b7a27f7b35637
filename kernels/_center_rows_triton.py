"""Rows against their own class centers in Triton: lengths, 1 - cos, and the gradients of losses w (1 - cos) with a
weight w for each row. The losses against class centers share them.
"""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import as_compute, dense_rows, row_tile
from scf_fast.kernels._float_pairs import constant_like, negative, residual_kernel

# Sums of squares outside are recomputed from scaled rows.
_SQUARE_MIN, _SQUARE_MAX = tl.constexpr(2.0**-80), tl.constexpr(2.0**80)


@triton.jit
def rows_of_program(B, ROWS: tl.constexpr):
    """Returns this program's rows, (ROWS,) int64, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if ROWS == 1:  # a program a row: no mask is left in the compiled code
        inside = tl.full((ROWS,), True, tl.int1)
    else:
        inside = rows < B
    return rows, inside


@triton.jit
def sum_of_squares(x):
    """Returns the sum of x^2 along the rows. Groups of four that one thread holds, and pairs at d = 2, are summed by
    fused multiply-adds, which launches without contraction have to be given.
    """
    if x.shape[1] >= 4 and x.dtype == tl.float32:
        left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
        a, b = tl.split(left)
        c, d = tl.split(right)
        return tl.sum(tl.fma(a, a, tl.fma(b, b, tl.fma(c, c, d * d))), axis=1)
    elif x.shape[1] == 2 and x.dtype == tl.float32:
        a, b = tl.split(x)
        return tl.fma(a, a, b * b)
    else:
        return tl.sum(x * x, axis=1)


@triton.jit
def inverse_root(x):
    """Returns 1 / sqrt(x), to a rounding in float32."""
    y = tl.rsqrt(x)
    if x.dtype == tl.float32:
        y = tl.fma(y, 0.5 * residual_kernel(x * y, y, constant_like(1.0, x)), y)
    return y


@triton.jit
def scale_for(square):
    """Returns the power of two for rows whose sum of squares may have lost digits to underflow, or overflowed."""
    return tl.where(square < _SQUARE_MIN, 2.0**70, tl.where(square > _SQUARE_MAX, 2.0**-70, 1.0)).to(square.dtype)


@triton.jit
def one_minus_cosine(f, c, inside):
    """Returns two tiles of rows, scaled so that their squares are normal numbers, 1 / |f| and 1 / |c| of these, their
    scales (powers of two), r = |f| / |c|, and 1 - cos.
    """
    f_square, c_square = sum_of_squares(f), sum_of_squares(c)
    f_scale, c_scale = scale_for(f_square), scale_for(c_square)
    if tl.max((inside & (f_scale * c_scale != 1.0)).to(tl.int32), axis=0) > 0:
        f *= f_scale[:, None]
        c *= c_scale[:, None]
        f_square, c_square = sum_of_squares(f), sum_of_squares(c)
    f_inverse = inverse_root(tl.where(inside, f_square, 1.0))
    c_inverse = inverse_root(tl.where(inside, c_square, 1.0))
    # |f - r c|^2 / (|f|^2 + r^2 |c|^2) is 1 - cos for r = |f| / |c|; an error e of r counts as cos e^2 / 2.
    ratio = f_square * f_inverse * c_inverse
    difference = tl.fma(c, tl.broadcast_to(negative(ratio)[:, None], c.shape), f)
    squares = tl.fma(ratio * c_square, ratio, f_square)
    squares_inverse = 0.5 * f_inverse * f_inverse
    squares_inverse = tl.fma(
        squares_inverse, residual_kernel(squares, squares_inverse, constant_like(1.0, squares)), squares_inverse
    )
    one_minus_cos = sum_of_squares(difference) * squares_inverse
    return f, c, f_inverse, c_inverse, f_scale, c_scale, ratio, one_minus_cos


@triton.jit
def _feature_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (4, B), as above
    features_ptr,  # (B, D), rows of features_stride
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    labels_ptr,  # (B,) int32 or int64
    result_ptr,  # (B, D) out
    features_stride,
    class_centers_stride,
    B,
    C,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad kappa / |f| (cos f / |f| - c / |c|); one program per tile of rows."""
    rows, inside = rows_of_program(B, ROWS)
    cols = tl.arange(0, BLOCK_D)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0)
    labels = tl.where((labels >= 0) & (labels < C), labels, 0).to(tl.int32).to(tl.int64)  # kappa of an unknown is NaN
    grad = tl.load(grad_ptr + rows * GRAD_STRIDE, mask=inside, other=0.0)
    f_inverse = tl.load(coefficients_ptr + rows, mask=inside, other=0.0)
    c_inverse = tl.load(coefficients_ptr + B + rows, mask=inside, other=0.0)
    kappa = grad * tl.load(coefficients_ptr + 2 * B + rows, mask=inside, other=0.0)
    kappa_cos = grad * tl.load(coefficients_ptr + 3 * B + rows, mask=inside, other=0.0)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    # One factor 1 / |f| last: its square overflows where |f| < 1e-19.
    along = f * (kappa_cos * f_inverse)[:, None] - c * (kappa * c_inverse)[:, None]
    tl.store(result_ptr + rows[:, None] * D + cols[None, :], along * f_inverse[:, None], mask=mask)


@triton.jit
def _class_center_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (4, B), as above
    features_ptr,  # (B, D), rows of features_stride
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    sorted_labels_ptr,  # (B,) int32 or int64
    order_ptr,  # (B,) int64: the row of each sorted label
    result_ptr,  # (C, D) out, zero before
    features_stride,
    class_centers_stride,
    B,
    C,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of grad kappa / |c| (cos c / |c| - f / |f|) over the rows of one class, by the program at the first of them:
    one order of summation, no atomics.
    """
    position = tl.program_id(0)
    label = tl.load(sorted_labels_ptr + position).to(tl.int64)
    previous = tl.load(sorted_labels_ptr + position - 1, mask=position > 0, other=-1).to(tl.int64)
    if (label != previous) & (label >= 0) & (label < C):
        cols = tl.arange(0, BLOCK_D)
        mask = cols < D
        center = as_compute(
            tl.load(class_centers_ptr + label * class_centers_stride + cols, mask=mask, other=0.0), FP64
        )
        total = center * 0.0
        following = label
        while following == label:
            row = tl.load(order_ptr + position).to(tl.int64)
            grad = tl.load(grad_ptr + row * GRAD_STRIDE)
            c_inverse = tl.load(coefficients_ptr + B + row)
            along_f = grad * tl.load(coefficients_ptr + 2 * B + row) * tl.load(coefficients_ptr + row)
            along_center = grad * tl.load(coefficients_ptr + 3 * B + row) * c_inverse
            f = as_compute(tl.load(features_ptr + row * features_stride + cols, mask=mask, other=0.0), FP64)
            total += (along_center * center - along_f * f) * c_inverse
            position += 1
            following = tl.load(sorted_labels_ptr + position, mask=position < B, other=-1).to(tl.int64)
        tl.store(result_ptr + label * D + cols, total, mask=mask)


def launch_gradients(
    grad: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    grad_features: torch.Tensor,
    grad_class_centers: torch.Tensor,
) -> None:
    """Fills whichever of the two gradients is not empty; at least one row."""
    features, class_centers = dense_rows(features), dense_rows(class_centers)
    labels, grad = labels.contiguous(), grad.contiguous()
    batch, dim = features.shape
    block_d, tile_rows, num_warps = row_tile(dim)
    sizes = features.stride(0), class_centers.stride(0), batch, len(class_centers)
    settings = dict(
        GRAD_STRIDE=grad.ndim, D=dim, FP64=coefficients.dtype == torch.float64, BLOCK_D=block_d, num_warps=num_warps
    )
    with torch.cuda.device_of(features):
        if grad_features.numel():
            _feature_gradient_kernel[(triton.cdiv(batch, tile_rows),)](
                grad,
                coefficients,
                features,
                class_centers,
                labels,
                grad_features,
                *sizes,
                ROWS=tile_rows,
                **settings,
            )
        if grad_class_centers.numel():
            sorted_labels, order = torch.sort(labels, stable=True)
            _class_center_gradient_kernel[(batch,)](
                grad,
                coefficients,
                features,
                class_centers,
                sorted_labels,
                order,
                grad_class_centers,
                *sizes,
                **settings,
            )
