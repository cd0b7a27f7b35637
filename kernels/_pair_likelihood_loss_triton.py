"""Triton kernel of the pair likelihood loss, and its launch: ``pair_likelihood_loss`` has the formulas and the
operators. Launched with ``enable_fp_fusion=False`` (see ``_float_pairs``).
"""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._center_rows_triton import compare_rows, inverse_root, scale_for, sum_of_squares
from scf_fast.kernels._common import as_compute, dense_rows, row_tile
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._float_pairs import constant_like, exp_kernel, negative, two_sum_kernel
from scf_fast.kernels._gaussian_center_loss_triton import hold_log_variance_kernel
from scf_fast.kernels._gaussian_common import LOG_TWO_PI
from scf_fast.kernels._pair_likelihood_loss_torch import PairOutputs
from scf_fast.kernels.debye import debye_kernel, half_log_kernel

_WINDOW = tl.constexpr(32)  # labels that are compared at a time
# exp of it is the uniform distribution to all digits; squares of smaller concentrations would leave float32.
_LOG_KAPPA_MIN = tl.constexpr(-40.0)
_TINY = tl.constexpr(1e-30)


@triton.jit
def _group_kernel(sorted_labels_ptr, position, B):
    """Returns the first position of the run of labels that ``position`` is in, and the one after its last."""
    label = tl.load(sorted_labels_ptr + position)
    window = tl.arange(0, _WINDOW)
    start, stop = position, position + 1
    found = _WINDOW
    while found == _WINDOW:
        at = start - 1 - window
        found = tl.sum(((tl.load(sorted_labels_ptr + at, mask=at >= 0, other=0) == label) & (at >= 0)).to(tl.int32))
        start -= found
    found = _WINDOW
    while found == _WINDOW:
        at = stop + window
        found = tl.sum(((tl.load(sorted_labels_ptr + at, mask=at < B, other=0) == label) & (at < B)).to(tl.int32))
        stop += found
    return start, stop


@triton.jit
def _load_row(
    features_ptr,  # (B, D), rows of stride
    row,
    stride,
    D: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns one row as a tile (1, BLOCK_D) whose square is a normal number, the square, 1 / length, and the power of
    two that it was scaled by.
    """
    cols = tl.arange(0, BLOCK_D)[None, :]
    f = as_compute(tl.load(features_ptr + row * stride + cols, mask=cols < D, other=0.0), FP64)
    square = sum_of_squares(f)
    scale = scale_for(square)
    if tl.max((scale != 1.0).to(tl.int32), axis=0) > 0:
        f *= scale[:, None]
        square = sum_of_squares(f)
    return f, square, inverse_root(square), scale


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _add_variances(log_variance1, log_variance2):
    """Returns of v = s1^2 + s2^2: log v, 1 / v, and s1^2 / v."""
    ahead = log_variance1 - log_variance2
    larger = tl.where(ahead > 0, log_variance1, log_variance2)
    smaller_share = exp_kernel(negative(tl.abs(ahead)))  # of the larger variance
    inverse = 1.0 / (1.0 + smaller_share)
    share1 = tl.where(ahead > 0, inverse, smaller_share * inverse)
    return larger + 2.0 * half_log_kernel(1.0 + smaller_share, True), exp_kernel(negative(larger)) * inverse, share1


@triton.jit
def _vmf_pair(kappa1, kappa2, complement1, one_minus_cos, one_plus_cos, PLAN: tl.constexpr):
    """Returns the loss of a pair but for the normalizers of its faces, its slope in log kappa1, and the weight of
    u1 - u2.
    """
    total, product = kappa1 + kappa2, kappa1 * kappa2
    ahead = kappa2 - kappa1
    along = 2.0 * product * one_plus_cos
    length = _root(tl.fma(ahead, ahead, along))
    length = tl.where(length < _TINY, _TINY, length)  # at 0 the direction of the sum has no effect
    phi, phi_tail, ratio, complement, _, _ = debye_kernel(length, PLAN, MINUS_KAPPA=True)
    inverse = 1.0 / (length + total)
    loss = 2.0 * product * inverse * one_minus_cos - (phi + phi_tail)
    # length - kappa1 + kappa2, without cancellation
    excess = tl.where(ahead >= 0, length + ahead, along / (length - tl.where(ahead >= 0, 0.0, ahead)))
    away = kappa2 * inverse * (one_minus_cos * (excess / length))
    slope = kappa1 * (tl.fma(complement, 1.0 - away, away) - complement1)
    return loss, slope, ratio / length * product


@triton.jit
def _pair_likelihood_kernel(
    features_ptr,  # (B, D), rows of features_stride
    parameter_ptr,  # (B,), or with DIAGONAL (B, D), rows of parameter_stride
    sorted_labels_ptr,  # (B,) int32 or int64
    order_ptr,  # (B,) int64: the row of each sorted label
    loss_ptr,  # (B,) out: half of the loss of the row's pairs
    slope_ptr,  # (B,) or (B, D) out: d loss / d parameter
    feature_slope_ptr,  # (B, D) out: d loss / d features
    terms_ptr,  # (2, B) out: mean cosine and confidence
    partners_ptr,  # (B,) int64 out
    features_stride,
    parameter_stride,
    B,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    CONSTANT: tl.constexpr,
    VMF: tl.constexpr,
    DIAGONAL: tl.constexpr,
    FEATURES: tl.constexpr,
    TERMS: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row, which stays in registers while the other rows of its person pass by.

    Longer than 60 lines because everything that is computed of a pair follows from the same registers.
    """
    position = tl.program_id(0).to(tl.int64)
    start, stop = _group_kernel(sorted_labels_ptr, position, B)
    partners = stop - start - 1
    row = tl.load(order_ptr + position)
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = cols < D
    one = tl.arange(0, 1)
    f, f_square, f_inverse, f_scale = _load_row(features_ptr, row, features_stride, D, FP64, BLOCK_D)
    slope = tl.zeros_like(f_square)
    if DIAGONAL:
        parameter = as_compute(tl.load(parameter_ptr + row * parameter_stride + cols, mask=mask, other=0.0), FP64)
        parameter = hold_log_variance_kernel(parameter)
        slope = tl.zeros_like(f)
    else:
        parameter = as_compute(tl.load(parameter_ptr + row + one), FP64)
        if VMF:
            LOG_KAPPA_MAX: tl.constexpr = PLAN.log_kappa_max
            parameter = tl.where(parameter > LOG_KAPPA_MAX, LOG_KAPPA_MAX, parameter)
            parameter = tl.where(parameter < _LOG_KAPPA_MIN, _LOG_KAPPA_MIN, parameter)
            kappa = exp_kernel(parameter)
            own, own_tail, _, complement, _, _ = debye_kernel(kappa, PLAN, MINUS_KAPPA=True)
        else:
            parameter = hold_log_variance_kernel(parameter)
    loss, loss_tail, cosines = tl.zeros_like(f_square), tl.zeros_like(f_square), tl.zeros_like(f_square)
    pull = tl.zeros_like(f)

    at = start
    while at < stop:
        if at != position:
            other_row = tl.load(order_ptr + at)
            c, c_square, c_inverse, _ = _load_row(features_ptr, other_row, features_stride, D, FP64, BLOCK_D)
            ratio, difference, one_minus_cos = compare_rows(f, c, f_square, c_square, f_inverse, c_inverse)
            cosines += 1.0 - one_minus_cos
            if DIAGONAL:
                other = as_compute(
                    tl.load(parameter_ptr + other_row * parameter_stride + cols, mask=mask, other=0.0), FP64
                )
                log_sum, precision, share = _add_variances(parameter, hold_log_variance_kernel(other))
                apart = difference * f_inverse[:, None]
                weighted = precision * apart
                square = weighted * apart
                pair = 0.5 * tl.sum(square + tl.where(mask, log_sum, 0.0), axis=1) + CONSTANT
                slope += share * (0.5 - 0.5 * square)
                if FEATURES:
                    pull += weighted
            else:
                other = as_compute(tl.load(parameter_ptr + other_row + one), FP64)
                if VMF:
                    other = tl.where(other > LOG_KAPPA_MAX, LOG_KAPPA_MAX, other)
                    other = tl.where(other < _LOG_KAPPA_MIN, _LOG_KAPPA_MIN, other)
                    one_plus_cos = 2.0 - one_minus_cos
                    if tl.max((one_minus_cos > 1.5).to(tl.int32), axis=0) > 0:  # opposite, where that cancels
                        total = tl.fma(c, tl.broadcast_to(ratio[:, None], c.shape), f)
                        one_plus_cos = 0.5 * sum_of_squares(total) * f_inverse * f_inverse
                    pair, pair_slope, weight = _vmf_pair(
                        kappa, exp_kernel(other), complement, one_minus_cos, one_plus_cos, PLAN
                    )
                else:
                    HALF_D: tl.constexpr = D / 2
                    log_sum, weight, share = _add_variances(parameter, hold_log_variance_kernel(other))
                    square = one_minus_cos * weight
                    pair = square + tl.fma(log_sum, constant_like(HALF_D, square), constant_like(CONSTANT, square))
                    pair_slope = share * (HALF_D - square)
                slope += pair_slope
                if FEATURES:
                    pull += difference * (weight * f_inverse)[:, None]
            loss, rest = two_sum_kernel(loss, 0.5 * pair)
            loss_tail += rest
        at += 1

    loss += loss_tail
    if VMF:
        loss = tl.where(partners > 0, loss + partners.to(loss.dtype) * (own + own_tail), 0.0)
    tl.store(loss_ptr + row + one, loss)
    tl.store(partners_ptr + row + one, partners + tl.zeros_like(one).to(tl.int64))
    if DIAGONAL:
        tl.store(slope_ptr + row * D + cols, slope, mask=mask)
    else:
        tl.store(slope_ptr + row + one, slope)
    if FEATURES:
        unit = f * f_inverse[:, None]
        pull -= tl.sum(pull * unit, axis=1)[:, None] * unit
        # The scale last: with it, the inverse length may leave float32.
        pull = tl.where(partners > 0, pull * f_inverse[:, None] * f_scale[:, None], 0.0)
        tl.store(feature_slope_ptr + row * D + cols, pull, mask=mask)
    if TERMS:
        tl.store(terms_ptr + row + one, cosines / tl.maximum(partners, 1).to(loss.dtype))
        if VMF:
            confidence = kappa
        elif DIAGONAL:
            confidence = tl.sum(tl.where(mask, exp_kernel(negative(parameter)), 0.0), axis=1) * (1.0 / D)
        else:
            confidence = exp_kernel(negative(parameter))
        tl.store(terms_ptr + B + row + one, confidence)


def launch_pair_likelihood(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, outputs: PairOutputs, plan: DebyePlan | None
) -> None:
    """Fills the outputs; at least one row. ``plan`` is that of psi for the vMF density, None for the Gaussian one."""
    features = dense_rows(features)
    diagonal = parameter.ndim == 2
    parameter = dense_rows(parameter) if diagonal else parameter.contiguous()
    sorted_labels, order = torch.sort(labels, stable=True)
    batch, dim = features.shape
    block_d, _, num_warps = row_tile(dim)
    with torch.cuda.device_of(features):
        _pair_likelihood_kernel[(batch,)](
            features,
            parameter,
            sorted_labels,
            order,
            *outputs,
            features.stride(0),
            parameter.stride(0),
            batch,
            D=dim,
            PLAN=plan,
            CONSTANT=dim / 2 * LOG_TWO_PI,
            VMF=plan is not None,
            DIAGONAL=diagonal,
            FEATURES=outputs.feature_slope.numel() > 0,
            TERMS=outputs.terms.numel() > 0,
            FP64=outputs.loss.dtype == torch.float64,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
