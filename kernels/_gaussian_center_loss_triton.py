"""Triton kernels of the Gaussian center loss, and their launches: ``gaussian_center_loss`` has the formulas and the
operators. With one variance for all dimensions the gradients are those of ``_center_rows_triton``.
"""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._center_rows_triton import one_minus_cosine, rows_of_program
from scf_fast.kernels._common import as_compute, dense_rows, row_tile
from scf_fast.kernels._float_pairs import constant_like, exp_kernel, negative
from scf_fast.kernels._gaussian_common import LOG_TWO_PI, LOG_VARIANCE_LIMIT

_LIMIT = tl.constexpr(LOG_VARIANCE_LIMIT)


@triton.jit
def hold_log_variance_kernel(log_variance):
    """Returns log variances, those beyond the limit at the limit; NaN stays."""
    log_variance = tl.where(log_variance > _LIMIT, _LIMIT, log_variance)
    return tl.where(log_variance < -_LIMIT, -_LIMIT, log_variance)


@triton.jit
def _gaussian_center_loss_kernel(
    features_ptr,  # (B, D), rows of features_stride
    log_variance_ptr,  # (B,), or with DIAGONAL (B, D), rows of log_variance_stride
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    labels_ptr,  # (B,) int32 or int64
    loss_ptr,  # (B,) out
    slope_ptr,  # (B,) or (B, D) out: d loss / d log_variance
    coefficients_ptr,  # (4, B) out: 1 / |feature|, 1 / |center|; q and q cos, or g . mu and -g . w
    terms_ptr,  # (2, B) out: cos and mean precision
    features_stride,
    log_variance_stride,
    class_centers_stride,
    B,
    C,
    D: tl.constexpr,
    CONSTANT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    MEAN: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of rows: each row, its class center and its log variances are read once and stay in
    registers.

    Longer than 60 lines because everything that is computed per row follows from the same registers.
    """
    rows, inside = rows_of_program(B, ROWS)
    cols = tl.arange(0, BLOCK_D)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0)
    known = (labels >= 0) & (labels < C)
    labels = tl.where(known, labels, 0).to(tl.int32).to(tl.int64)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    f, c, f_inverse, c_inverse, f_scale, c_scale, ratio, one_minus_cos = one_minus_cosine(f, c, inside)
    share = constant_like(1.0, one_minus_cos)
    if MEAN:
        share = share / B
    if DIAGONAL:
        log_variance = as_compute(
            tl.load(log_variance_ptr + rows[:, None] * log_variance_stride + cols[None, :], mask=mask, other=0.0), FP64
        )
        log_variance = hold_log_variance_kernel(tl.where(known[:, None], log_variance, float("nan")))
        log_variance = tl.where(mask, log_variance, 0.0)
        precision = exp_kernel(negative(log_variance))
        # mu - w, rounded once before it is scaled
        difference = tl.fma(c, tl.broadcast_to(negative(ratio)[:, None], c.shape), f) * f_inverse[:, None]
        pull = precision * difference
        square = pull * difference
        loss = 0.5 * tl.sum(square, axis=1) + (0.5 * tl.sum(log_variance, axis=1) + CONSTANT)
        slope = (0.5 - 0.5 * square) * share[:, None]
        tl.store(slope_ptr + rows[:, None] * D + cols[None, :], slope, mask=mask)
        third = tl.sum(pull * f, axis=1) * f_inverse
        fourth = negative(tl.sum(pull * c, axis=1)) * c_inverse
        mean_precision = tl.sum(tl.where(mask, precision, 0.0), axis=1) * (1.0 / D)
    else:
        log_variance = as_compute(tl.load(log_variance_ptr + rows, mask=inside, other=0.0), FP64)
        log_variance = hold_log_variance_kernel(tl.where(known, log_variance, float("nan")))
        precision = exp_kernel(negative(log_variance))
        pull = precision * one_minus_cos
        HALF_D: tl.constexpr = D / 2
        loss = pull + tl.fma(log_variance, constant_like(HALF_D, pull), constant_like(CONSTANT, pull))
        tl.store(slope_ptr + rows, (HALF_D - pull) * share, mask=inside)
        third = precision
        fourth = precision * (1.0 - one_minus_cos)
        mean_precision = precision
    tl.store(loss_ptr + rows, loss, mask=inside)
    if COEFFICIENTS:
        tl.store(coefficients_ptr + rows, f_inverse * f_scale, mask=inside)
        tl.store(coefficients_ptr + B + rows, c_inverse * c_scale, mask=inside)
        tl.store(coefficients_ptr + 2 * B + rows, third * share, mask=inside)
        tl.store(coefficients_ptr + 3 * B + rows, fourth * share, mask=inside)
    if TERMS:
        tl.store(terms_ptr + rows, 1.0 - one_minus_cos, mask=inside)
        tl.store(terms_ptr + B + rows, mean_precision, mask=inside)


@triton.jit
def _diagonal_feature_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (4, B), as above
    features_ptr,  # (B, D), rows of features_stride
    log_variance_ptr,  # (B, D), rows of log_variance_stride
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    labels_ptr,  # (B,) int32 or int64
    result_ptr,  # (B, D) out
    features_stride,
    log_variance_stride,
    class_centers_stride,
    B,
    C,
    MEAN: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad (g - (g . mu) mu) / |f|; one program per tile of rows."""
    rows, inside = rows_of_program(B, ROWS)
    cols = tl.arange(0, BLOCK_D)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0)
    labels = tl.where((labels >= 0) & (labels < C), labels, 0).to(tl.int32).to(tl.int64)  # g . mu of an unknown is NaN
    grad = tl.load(grad_ptr + rows * GRAD_STRIDE, mask=inside, other=0.0)
    f_inverse = tl.load(coefficients_ptr + rows, mask=inside, other=0.0)
    c_inverse = tl.load(coefficients_ptr + B + rows, mask=inside, other=0.0)
    along = tl.load(coefficients_ptr + 2 * B + rows, mask=inside, other=0.0)
    share = constant_like(1.0, f_inverse)
    if MEAN:
        share = share / B
    mask = inside[:, None] & (cols < D)[None, :]
    at = rows[:, None]
    f = as_compute(tl.load(features_ptr + at * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    log_variance = as_compute(
        tl.load(log_variance_ptr + at * log_variance_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    precision = exp_kernel(negative(hold_log_variance_kernel(log_variance))) * share[:, None]
    mu = f * f_inverse[:, None]
    gradient = precision * (mu - c * c_inverse[:, None]) - along[:, None] * mu
    tl.store(result_ptr + at * D + cols[None, :], gradient * (grad * f_inverse)[:, None], mask=mask)


@triton.jit
def _diagonal_class_center_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (4, B), as above
    features_ptr,  # (B, D), rows of features_stride
    log_variance_ptr,  # (B, D), rows of log_variance_stride
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    sorted_labels_ptr,  # (B,) int32 or int64
    order_ptr,  # (B,) int64: the row of each sorted label
    result_ptr,  # (C, D) out, zero before
    features_stride,
    log_variance_stride,
    class_centers_stride,
    B,
    C,
    MEAN: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of grad (-g + (g . w) w) / |c| over the rows of one class, by the program at the first of them: one order of
    summation, no atomics.
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
            f_inverse = tl.load(coefficients_ptr + row)
            c_inverse = tl.load(coefficients_ptr + B + row)
            along = tl.load(coefficients_ptr + 3 * B + row)
            share = grad * c_inverse
            f = as_compute(tl.load(features_ptr + row * features_stride + cols, mask=mask, other=0.0), FP64)
            log_variance = as_compute(
                tl.load(log_variance_ptr + row * log_variance_stride + cols, mask=mask, other=0.0), FP64
            )
            pull = exp_kernel(negative(hold_log_variance_kernel(log_variance))) * (f * f_inverse - center * c_inverse)
            if MEAN:
                pull = pull / B
            total -= (pull + along * (center * c_inverse)) * share
            position += 1
            following = tl.load(sorted_labels_ptr + position, mask=position < B, other=-1).to(tl.int64)
        tl.store(result_ptr + label * D + cols, total, mask=mask)


def _row_stride(log_variance: torch.Tensor) -> int:
    return log_variance.stride(0) if log_variance.ndim == 2 else 1


def launch_gaussian_center_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    *,
    mean: bool,
) -> None:
    """Fills loss and slope, and coefficients and terms unless they are empty; at least one row."""
    features, class_centers = dense_rows(features), dense_rows(class_centers)
    log_variance = dense_rows(log_variance) if log_variance.ndim == 2 else log_variance.contiguous()
    batch, dim = features.shape
    block_d, tile_rows, num_warps = row_tile(dim)
    with torch.cuda.device_of(features):
        _gaussian_center_loss_kernel[(triton.cdiv(batch, tile_rows),)](
            features,
            log_variance,
            class_centers,
            labels.contiguous(),
            loss,
            slope,
            coefficients,
            terms,
            features.stride(0),
            _row_stride(log_variance),
            class_centers.stride(0),
            batch,
            len(class_centers),
            D=dim,
            CONSTANT=dim / 2 * LOG_TWO_PI,
            DIAGONAL=log_variance.ndim == 2,
            MEAN=mean,
            COEFFICIENTS=coefficients.numel() > 0,
            TERMS=terms.numel() > 0,
            FP64=loss.dtype == torch.float64,
            ROWS=tile_rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


def launch_diagonal_gradients(
    grad: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    grad_features: torch.Tensor,
    grad_class_centers: torch.Tensor,
    *,
    mean: bool,
) -> None:
    """Fills whichever of the two gradients is not empty; at least one row."""
    features, class_centers, log_variance = dense_rows(features), dense_rows(class_centers), dense_rows(log_variance)
    labels, grad = labels.contiguous(), grad.contiguous()
    batch, dim = features.shape
    block_d, tile_rows, num_warps = row_tile(dim)
    sizes = features.stride(0), log_variance.stride(0), class_centers.stride(0), batch, len(class_centers)
    settings = dict(
        MEAN=mean,
        GRAD_STRIDE=grad.ndim,
        D=dim,
        FP64=coefficients.dtype == torch.float64,
        BLOCK_D=block_d,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    with torch.cuda.device_of(features):
        if grad_features.numel():
            _diagonal_feature_gradient_kernel[(triton.cdiv(batch, tile_rows),)](
                grad,
                coefficients,
                features,
                log_variance,
                class_centers,
                labels,
                grad_features,
                *sizes,
                ROWS=tile_rows,
                **settings,
            )
        if grad_class_centers.numel():
            sorted_labels, order = torch.sort(labels, stable=True)
            _diagonal_class_center_gradient_kernel[(batch,)](
                grad,
                coefficients,
                features,
                log_variance,
                class_centers,
                sorted_labels,
                order,
                grad_class_centers,
                *sizes,
                **settings,
            )
