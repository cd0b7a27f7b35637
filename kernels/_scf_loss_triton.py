"""Triton kernels of the SCF loss, and their launches: ``scf_loss`` has the formulas and the operators."""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import as_compute, dense_rows
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._float_pairs import exp_kernel, two_sum_kernel
from scf_fast.kernels.debye import debye_kernel

_TILE_BYTES = 8192  # of a tile of rows; 4 warps hold two of them in 32 registers per thread
# Of one number of each row of a tile, at most: what is computed per row takes registers in every thread.
_ROW_BYTES = 16
_MAX_WARPS = 16  # leaves each thread 128 registers


def tile_shape(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the block width, the rows per program, and the warps."""
    block_d = triton.next_power_of_2(dim)
    tile = _TILE_BYTES // dtype.itemsize
    return (
        block_d,
        min(_ROW_BYTES // dtype.itemsize, max(1, tile // block_d)),
        min(_MAX_WARPS, max(4, 4 * block_d // tile)),
    )


@triton.jit
def _scf_loss_kernel(
    features_ptr,  # (B, D), rows of features_stride
    log_kappa_ptr,  # (B,)
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    labels_ptr,  # (B,) int32 or int64
    loss_ptr,  # (B,) out
    slope_ptr,  # (B,) out: d loss / d log_kappa
    coefficients_ptr,  # (3, B) out: a, b and c of the gradients
    terms_ptr,  # (5, B) out: cos, kappa, l1, l2, l3
    features_stride,
    class_centers_stride,
    B,
    C,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    CONSTANT: tl.constexpr,
    EPSILON: tl.constexpr,
    PUBLISHED: tl.constexpr,
    MEAN: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of rows: each row and its class center are read once and stay in registers.

    Longer than 60 lines because everything that is computed per row follows from the same registers.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < B
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    known = (labels >= 0) & (labels < C)
    labels = tl.where(known, labels, 0)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    log_kappa = as_compute(tl.load(log_kappa_ptr + rows, mask=inside, other=0.0), FP64)
    log_kappa = tl.where(known, log_kappa, float("nan"))

    f_inverse = tl.rsqrt(tl.where(inside, tl.sum(f * f, axis=1), 1.0))
    c_inverse = tl.rsqrt(tl.where(inside, tl.sum(c * c, axis=1), 1.0))
    difference = f * f_inverse[:, None] - c * c_inverse[:, None]
    one_minus_cos = 0.5 * tl.sum(difference * difference, axis=1)
    cos = 1.0 - one_minus_cos

    LOG_KAPPA_MAX: tl.constexpr = PLAN.log_kappa_max
    ORDER: tl.constexpr = PLAN.order[0]
    log_kappa = tl.where(log_kappa > LOG_KAPPA_MAX, LOG_KAPPA_MAX, log_kappa)
    growth = exp_kernel(log_kappa)
    kappa = growth
    if PUBLISHED:
        kappa = growth + EPSILON
    psi, psi_tail, _, complement, _, _ = debye_kernel(kappa, PLAN, WITH_POWER=PUBLISHED)
    phi, rest = two_sum_kernel(psi, -kappa)
    phi += rest + psi_tail
    if PUBLISHED:
        scaled_bessel = tl.exp(phi)
        floored_bessel = scaled_bessel + EPSILON
        floored_kappa = kappa + EPSILON
        log_floored_bessel = tl.log(floored_bessel)
        l2 = -ORDER * tl.log(floored_kappa)
        l3 = log_floored_bessel + kappa
        loss = kappa * one_minus_cos + (l2 + (log_floored_bessel + CONSTANT))
        slope = growth * (
            one_minus_cos - ORDER / floored_kappa + scaled_bessel / floored_bessel * (ORDER / kappa - complement)
        )
    else:
        l2 = -ORDER * log_kappa
        l3 = phi - CONSTANT + kappa - l2
        loss = kappa * one_minus_cos + phi
        slope = kappa * (one_minus_cos - complement)
    tl.store(loss_ptr + rows, loss, mask=inside)
    weight = kappa
    if MEAN:
        slope = slope / B
        weight = kappa / B
    tl.store(slope_ptr + rows, slope, mask=inside)
    if COEFFICIENTS:
        tl.store(coefficients_ptr + rows, weight * cos * f_inverse * f_inverse, mask=inside)
        tl.store(coefficients_ptr + B + rows, -weight * f_inverse * c_inverse, mask=inside)
        tl.store(coefficients_ptr + 2 * B + rows, weight * cos * c_inverse * c_inverse, mask=inside)
    if TERMS:
        tl.store(terms_ptr + rows, cos, mask=inside)
        tl.store(terms_ptr + B + rows, kappa, mask=inside)
        tl.store(terms_ptr + 2 * B + rows, -kappa * cos, mask=inside)
        tl.store(terms_ptr + 3 * B + rows, l2, mask=inside)
        tl.store(terms_ptr + 4 * B + rows, l3, mask=inside)


@triton.jit
def _feature_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (3, B)
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
    """grad (a f + b c); one program per tile of rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < B
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    labels = tl.where((labels >= 0) & (labels < C), labels, 0)  # the coefficients of an unknown class are NaN
    grad = tl.load(grad_ptr + rows * GRAD_STRIDE, mask=inside, other=0.0)
    a = grad * tl.load(coefficients_ptr + rows, mask=inside, other=0.0)
    b = grad * tl.load(coefficients_ptr + B + rows, mask=inside, other=0.0)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    tl.store(result_ptr + rows[:, None] * D + cols[None, :], a[:, None] * f + b[:, None] * c, mask=mask)


@triton.jit
def _class_center_gradient_kernel(
    grad_ptr,  # (B,), or a scalar with GRAD_STRIDE 0
    coefficients_ptr,  # (3, B)
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
    """Sum of grad (b f + c center) over the rows of one class, by the program at the first of them: one order of
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
            along_f = grad * tl.load(coefficients_ptr + B + row)
            along_center = grad * tl.load(coefficients_ptr + 2 * B + row)
            f = as_compute(tl.load(features_ptr + row * features_stride + cols, mask=mask, other=0.0), FP64)
            total += along_f * f + along_center * center
            position += 1
            following = tl.load(sorted_labels_ptr + position, mask=position < B, other=-1).to(tl.int64)
        tl.store(result_ptr + label * D + cols, total, mask=mask)


def launch_scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    *,
    plan: DebyePlan,
    constant: float,
    epsilon: float,
    published: bool,
    mean: bool,
) -> None:
    """Fills loss and slope, and coefficients and terms unless they are empty; at least one row."""
    features, class_centers = dense_rows(features), dense_rows(class_centers)
    batch, dim = features.shape
    block_d, tile_rows, num_warps = tile_shape(dim, loss.dtype)
    with torch.cuda.device_of(features):
        _scf_loss_kernel[(triton.cdiv(batch, tile_rows),)](
            features,
            log_kappa.contiguous(),
            class_centers,
            labels.contiguous(),
            loss,
            slope,
            coefficients,
            terms,
            features.stride(0),
            class_centers.stride(0),
            batch,
            len(class_centers),
            D=dim,
            PLAN=plan,
            CONSTANT=constant,
            EPSILON=epsilon,
            PUBLISHED=published,
            MEAN=mean,
            COEFFICIENTS=coefficients.numel() > 0,
            TERMS=terms.numel() > 0,
            FP64=loss.dtype == torch.float64,
            ROWS=tile_rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


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
    block_d, tile_rows, num_warps = tile_shape(dim, coefficients.dtype)
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
