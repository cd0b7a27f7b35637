"""Triton kernel of the SCF loss, and its launch: ``scf_loss`` has the formulas and the operators."""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._center_rows_triton import one_minus_cosine, rows_of_program
from scf_fast.kernels._common import as_compute, dense_rows, row_tile
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._float_pairs import constant_like, exp_kernel, negative
from scf_fast.kernels.debye import debye_kernel


@triton.jit
def _scf_loss_kernel(
    features_ptr,  # (B, D), rows of features_stride
    log_kappa_ptr,  # (B,)
    class_centers_ptr,  # (C, D), rows of class_centers_stride
    labels_ptr,  # (B,) int32 or int64
    loss_ptr,  # (B,) out
    slope_ptr,  # (B,) out: d loss / d log_kappa
    coefficients_ptr,  # (4, B) out: 1 / |feature|, 1 / |center|, kappa and kappa cos
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
    log_kappa = as_compute(tl.load(log_kappa_ptr + rows, mask=inside, other=0.0), FP64)
    log_kappa = tl.where(known, log_kappa, float("nan"))

    f, c, f_inverse, c_inverse, f_scale, c_scale, _, one_minus_cos = one_minus_cosine(f, c, inside)
    cos = 1.0 - one_minus_cos

    LOG_KAPPA_MAX: tl.constexpr = PLAN.log_kappa_max
    ORDER: tl.constexpr = PLAN.order[0]
    log_kappa = tl.where(log_kappa > LOG_KAPPA_MAX, LOG_KAPPA_MAX, log_kappa)
    growth = exp_kernel(log_kappa)
    kappa = growth
    if PUBLISHED:
        kappa = growth + EPSILON
    phi, phi_tail, _, complement, _, _ = debye_kernel(kappa, PLAN, WITH_POWER=PUBLISHED, MINUS_KAPPA=True)
    phi += phi_tail
    if PUBLISHED:
        scaled_bessel = tl.exp(phi)
        floored_bessel = scaled_bessel + EPSILON
        floored_kappa = kappa + EPSILON
        log_floored_bessel = tl.log(floored_bessel)
        l2 = tl.log(floored_kappa) * -ORDER
        l3 = log_floored_bessel + kappa
        loss = kappa * one_minus_cos + (l2 + (log_floored_bessel + CONSTANT))
        slope = growth * (
            one_minus_cos - ORDER / floored_kappa + scaled_bessel / floored_bessel * (ORDER / kappa - complement)
        )
    else:
        l2 = log_kappa * -ORDER
        l3 = phi - CONSTANT + kappa - l2
        loss = kappa * one_minus_cos + phi
        slope = kappa * (one_minus_cos - complement)
    tl.store(loss_ptr + rows, loss, mask=inside)
    weight = kappa
    if MEAN:
        share = constant_like(1.0, kappa) / B  # a B of 1 is a constant
        slope *= share
        weight *= share
    tl.store(slope_ptr + rows, slope, mask=inside)
    if COEFFICIENTS:
        tl.store(coefficients_ptr + rows, f_inverse * f_scale, mask=inside)
        tl.store(coefficients_ptr + B + rows, c_inverse * c_scale, mask=inside)
        tl.store(coefficients_ptr + 2 * B + rows, weight, mask=inside)
        tl.store(coefficients_ptr + 3 * B + rows, weight * cos, mask=inside)
    if TERMS:
        tl.store(terms_ptr + rows, cos, mask=inside)
        tl.store(terms_ptr + B + rows, kappa, mask=inside)
        tl.store(terms_ptr + 2 * B + rows, negative(kappa) * cos, mask=inside)
        tl.store(terms_ptr + 3 * B + rows, l2, mask=inside)
        tl.store(terms_ptr + 4 * B + rows, l3, mask=inside)


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
    block_d, tile_rows, num_warps = row_tile(dim)
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
