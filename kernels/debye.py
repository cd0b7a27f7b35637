"""Modified Bessel functions of the first kind in log space: one uniform expansion for every order, which gives the
value and its derivatives together.

    psi_v(kappa) = log I_v(kappa) - v log kappa          psi_v' = A = I_(v+1) / I_v          (both smooth at kappa = 0)

With m = v + N, s = sqrt(m^2 + kappa^2), p = 1 / s and x = (m / s)^2, Debye's expansion (DLMF 10.41.3) in logarithmic
form is

    psi_m = s - m log(m + s) - 1/2 log(2 pi s) + sum_k p^k Q_k(x)
          = s - (m + 1/2) log(m + s) + 1/2 log((1 + m / s) / 2 pi) + sum_k p^k Q_k(x)

where Q_k follows from the U_k of DLMF 10.41.9. The order is shifted up by N until the sum converges to rounding, then
brought down by the stable recurrence (DLMF 10.29.1), with rho_j = I_(j+1) / I_j:

    rho_(j-1) = kappa / E_j          psi_(j-1) = psi_j + log E_j          E_j = 2 j + kappa rho_j

The derivatives are those of the expansion itself, so every term keeps its leading factor: A is exact to rounding as
kappa -> 0, and 1 - A and A' do not cancel as kappa -> inf (coming down N steps costs A', and in PyTorch 1 - A, up to
2 N + 1 roundings a step: two digits at d = 2, none from d = 64). What does cancel is psi: at large orders it crosses
zero between terms of thousands. Those (the square root, the logarithm, their product with v) are carried in two floats;
the rest needs no such care.

``debye_torch`` evaluates this in PyTorch, ``debye_kernel`` in the registers of a Triton kernel. At float32 orders that
need no recurrence (d >= 30 in whole numbers) the kernel takes the shorter form of ``_debye_direct``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._debye_direct import direct_kernel
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._float_pairs import (
    Pair,
    constant_like,
    evaluate_polynomial_kernel,
    fast_two_sum,
    fast_two_sum_kernel,
    negative,
    residual,
    residual_kernel,
    subtract_product,
    subtract_product_kernel,
    two_product,
    two_product_kernel,
    two_sum,
    two_sum_kernel,
)

# Below this, 1 - A comes from its own expansion and A from it; above, the other way round. The recurrence for 1 - A
# magnifies its rounding by up to 2 N + 1, which 1/16 makes harmless; A itself cannot resolve 1 - A any finer than one
# rounding of 1.
_SMALL_COMPLEMENT = 1 / 16
# The logarithm's argument is brought to [2^(-1/4), 2^(1/4)).
_QUARTER_DOWN, _QUARTER_UP = 2.0**-0.25, 2.0**0.25

# ---- PyTorch, float64


class Debye(NamedTuple):
    """One evaluation; float64 tensors of kappa's shape, or a single NaN for what was not asked for."""

    psi: torch.Tensor  # psi + constant
    psi_tail: torch.Tensor  # rounding error of psi
    ratio: torch.Tensor  # A
    complement: torch.Tensor  # 1 - A
    second: torch.Tensor  # A'
    third: torch.Tensor  # A''


_NOT_EVALUATED = torch.tensor(math.nan, dtype=torch.float64)


def _log_pair(x: torch.Tensor, x_tail: torch.Tensor, offset: tuple[float, float], plan: DebyePlan) -> Pair:
    """Returns log(x + x_tail) + offset in two floats: powers of sqrt(2) are taken out, which leaves
    2 atanh((f - 1) / (f + 1)) with f in [2^-1/4, 2^1/4].
    """
    f, exponent = torch.frexp(x)
    below = f < _QUARTER_DOWN
    exponent = exponent - below.to(exponent.dtype)
    f = torch.where(below, 2 * f, f)
    above = f >= _QUARTER_UP
    factor = torch.ones_like(f).masked_fill(above, math.sqrt(0.5))
    above = above.to(f.dtype)
    half_powers = 2 * exponent.to(f.dtype) + above
    f, rest = two_product(f, factor)
    f_tail = torch.ldexp(x_tail, -exponent) * factor + rest
    numerator, denominator = f - 1, f + 1
    denominator_tail = f - (denominator - 1) + f_tail
    w = numerator / denominator
    w_tail = (residual(w, denominator, numerator) - w * denominator_tail + f_tail) / denominator
    square = w * w
    polynomial = _evaluate_polynomial(plan.atanh, square)
    head, rest = fast_two_sum(half_powers * plan.half_ln2[0] + offset[0], 2 * w)
    tail = (
        rest + 2 * w_tail * (1 + square) + (half_powers * plan.half_ln2[1] + offset[1]) - above * plan.sqrt_half_error
    )
    head, rest = fast_two_sum(head, w * square * polynomial)
    return head, tail + rest


def _square_root_pair(kappa: torch.Tensor, plan: DebyePlan) -> Pair:
    """Returns s = sqrt(m^2 + kappa^2) in two floats."""
    square, square_tail = two_product(kappa, kappa)
    total, total_tail = two_sum(square, torch.full_like(square, plan.shifted_squared[0]))
    s = total.sqrt()
    return s, (residual(s, s, total) + total_tail + square_tail + plan.shifted_squared[1]) / (2 * s)


def _phase_pair(kappa: torch.Tensor, s: torch.Tensor, s_tail: torch.Tensor, plan: DebyePlan, with_power: bool) -> Pair:
    """Returns s - (v + 1/2) log(m + s) [+ v log kappa] + constant in two floats."""
    x, x_tail = fast_two_sum(s, torch.full_like(s, plan.shifted[0]))
    x_tail = x_tail + s_tail + plan.shifted[1]
    head, tail = subtract_product(s, s_tail, plan.order_and_half, *_log_pair(x, x_tail, plan.offset, plan))
    if with_power:
        power, power_tail = _log_pair(kappa, torch.zeros_like(kappa), (0.0, 0.0), plan)
        head, tail = subtract_product(head, tail, plan.order, -power, -power_tail)
    return head, tail


def _evaluate_polynomial(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Evaluates a polynomial of at least two coefficients, the highest power first."""
    value = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        value = value * x + c
    return value


def _sum_series(coefficients: Sequence[float], length: int, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns sum_k p^k f_k(x), k = 1, 2, ..; f_1 has ``length`` coefficients, each next polynomial one more."""
    values = []
    start = 0
    while start < len(coefficients):
        values.append(_evaluate_polynomial(coefficients[start : start + length], x))
        start, length = start + length, length + 1
    total = p * values.pop()
    while values:
        total = p * (total + values.pop())
    return total


def debye_torch(
    kappa: torch.Tensor, plan: DebyePlan, lowest: int = 0, highest: int = 1, with_power: bool = False
) -> Debye:
    """Evaluates psi and up to three of its derivatives in PyTorch.

    Longer than 60 lines because the recurrence needs all derivatives of the step before, and the expansions share their
    powers.

    Args:
        kappa: float64, any shape, >= 0; NaN goes through, +inf gives the limits.
        plan: ``debye_plan`` of the order.
        lowest, highest: derivatives of psi to evaluate; A is always evaluated.
        with_power: return log I_v = psi + v log kappa in place of psi (kappa > 0 if the plan is compensated).
    """
    beyond, kappa = kappa, kappa.clamp(max=plan.kappa_max)
    m = plan.shifted[0]
    psi = psi_tail = complement = second = third = s_tail = _NOT_EVALUATED
    if plan.compensated:
        s, s_tail = _square_root_pair(kappa, plan)
    else:
        s = (kappa * kappa + m * m).sqrt()
    x = s + m
    p = 1 / s
    p2 = p * p
    x_inverse = 1 / x
    t2 = p2 * (m * m)
    first = p2 * (0.5 + _sum_series(plan.first, 2, p, t2))
    ratio = kappa * (x_inverse - first)
    if plan.compensated:
        complement = (m + m * m / (s + kappa)) * x_inverse + kappa * first
    if highest >= 2:
        second = m * p * x_inverse + p2 * (0.5 - t2 + _sum_series(plan.second, 3, p, t2))
    if highest >= 3:
        third = -kappa * p2 * (m * x_inverse * (p + x_inverse) + p2 * (1 - 4 * t2 + _sum_series(plan.third, 3, p, t2)))
    product = 1 + m * p
    for lowered, magnified in zip(plan.lowered, plan.magnified):
        excess = kappa * ratio
        inverse = 1 / (lowered + excess)
        if highest >= 2:
            numerator = lowered - kappa * kappa * second
        if highest >= 3:
            slope = ratio + kappa * second
            third = -inverse * inverse * (kappa * (2 * second + kappa * third) + 2 * numerator * slope * inverse)
        if highest >= 2:
            second = numerator * inverse * inverse
        if plan.compensated:
            complement = (lowered - kappa * complement) * inverse
        ratio = kappa * inverse
        if lowest == 0:
            product = product * ((2 * m + excess * magnified) * x_inverse) ** 2
    if lowest == 0:
        psi_tail = 0.5 * product.log() + _sum_series(plan.zeroth, 2, p, t2)
        if plan.compensated:
            psi, phase_tail = _phase_pair(kappa, s, s_tail, plan, with_power)
            psi, psi_tail = psi + (beyond - kappa), phase_tail + psi_tail
        else:
            psi = s - plan.order_and_half[0] * (x.log() + (plan.offset[0] + plan.offset[1]))
            if with_power:
                psi = psi + torch.xlogy(plan.order[0], kappa)
    if plan.compensated:
        fine = complement < _SMALL_COMPLEMENT
        ratio, complement = torch.where(fine, 1 - complement, ratio), torch.where(fine, complement, 1 - ratio)
    else:
        complement = 1 - ratio
    if highest >= 2:
        overflow = beyond > plan.kappa_max
        second = second.masked_fill(overflow, 0.0)
        third = third.masked_fill(overflow, 0.0) if highest >= 3 else third
    return Debye(psi, psi_tail, ratio, complement, second, third)


# ---- Triton, float32 or float64 by the type of kappa; launch with enable_fp_fusion=False (see _float_pairs)

# Below it 1 - A comes from its own recurrence, in float32 to 6e-7 at d = 2 and 3e-7 at d >= 3; 1 - A of a rounded A
# would have 2.5e-6 where it is 1/16.
_SMALL = tl.constexpr(3 / 8)
_UP = tl.constexpr(_QUARTER_UP)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _reciprocal_kernel(x):
    """Returns 1 / x for positive normal x, to a rounding; in float32 with far fewer instructions than a division."""
    if x.dtype == tl.float32:
        y = tl.rsqrt(x)
        y *= y
        return tl.fma(y, tl.fma(negative(x), y, constant_like(1.0, x)), y)
    else:
        return 1.0 / x


@triton.jit
def _log_pair_kernel(x, x_tail, OFFSET: tl.constexpr, PLAN: tl.constexpr):
    """``_log_pair`` in registers, for normal x."""
    ATANH: tl.constexpr = PLAN.atanh
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F5744FD) >> 23  # the bits of 2^(-1/4): f lies in [2^(-1/4), 2^(3/4))
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FEAE89F995AD3AD) >> 52
        f = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
        scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    above = f >= _UP
    factor = tl.where(above, constant_like(_SQRT_HALF, f), constant_like(1.0, f))
    half_powers = (2 * exponent + above.to(exponent.dtype)).to(f.dtype)
    f, rest = two_product_kernel(f, factor)
    f_tail = tl.fma(x_tail * scale, factor, rest)
    numerator = f - 1.0
    denominator = f + 1.0
    denominator_tail = f - (denominator - 1.0) + f_tail
    inverse = _reciprocal_kernel(denominator)
    w = numerator * inverse
    square = w * w
    w_tail = (tl.fma(negative(w), denominator_tail, residual_kernel(w, denominator, numerator)) + f_tail) * inverse
    w_tail = tl.fma(w_tail, square, w_tail)
    head, rest = fast_two_sum_kernel(half_powers * PLAN.half_ln2[0] + OFFSET[0], 2.0 * w)
    tail = tl.fma(half_powers, constant_like(PLAN.half_ln2[1], f), constant_like(OFFSET[1], f))
    tail += rest + 2.0 * w_tail - tl.where(above, constant_like(PLAN.sqrt_half_error, f), 0.0)
    head, rest = fast_two_sum_kernel(head, w * square * evaluate_polynomial_kernel(ATANH, 0, len(ATANH), square))
    return head, tail + rest


@triton.jit
def half_log_kernel(x, UP_TO_TWO: tl.constexpr):
    """Returns log(x) / 2 in one float. In float32 on [1, 2], log(3/2) / 2 + atanh((x - 3/2) / (x + 3/2)) costs a third
    of the library's logarithm.
    """
    if UP_TO_TWO and x.dtype == tl.float32:
        w = (x - 1.5) * _reciprocal_kernel(x + 1.5)
        ATANH: tl.constexpr = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
        return tl.fma(w, evaluate_polynomial_kernel(ATANH, 0, 5, w * w), constant_like(0.2027325540540822, x))
    else:
        return 0.5 * tl.log(x)


@triton.jit
def _square_root_pair_kernel(kappa, PLAN: tl.constexpr):
    """Returns 1 / s, and s = sqrt(m^2 + kappa^2) in two floats."""
    square, square_tail = two_product_kernel(kappa, kappa)
    total, total_tail = two_sum_kernel(square, constant_like(PLAN.shifted_squared[0], kappa))
    p = tl.rsqrt(total)
    s = total * p
    return p, s, (residual_kernel(s, s, total) + (total_tail + square_tail + PLAN.shifted_squared[1])) * (0.5 * p)


@triton.jit
def _phase_pair_kernel(s, s_tail, x, x_tail, PLAN: tl.constexpr):
    """Returns s - (v + 1/2) log x + constant in two floats."""
    ORDER_AND_HALF: tl.constexpr = PLAN.order_and_half  # a tuple needs a name before a function takes it as a constant
    OFFSET: tl.constexpr = PLAN.offset
    logarithm, logarithm_tail = _log_pair_kernel(x, x_tail, OFFSET, PLAN)
    return subtract_product_kernel(s, s_tail, ORDER_AND_HALF, logarithm, logarithm_tail)


@triton.jit
def _add_power_kernel(head, tail, kappa, PLAN: tl.constexpr):
    """Returns head + tail + v log kappa in two floats."""
    ORDER: tl.constexpr = PLAN.order
    ZERO: tl.constexpr = (0.0, 0.0)
    tiny = kappa < 2.0**-100  # scaled up, so that a subnormal has its exponent in the exponent bits
    power, power_tail = _log_pair_kernel(tl.where(tiny, kappa * 2.0**64, kappa), tl.zeros_like(kappa), ZERO, PLAN)
    power -= tl.where(tiny, constant_like(128 * PLAN.half_ln2[0] + 128 * PLAN.half_ln2[1], kappa), 0.0)
    return subtract_product_kernel(head, tail, ORDER, negative(power), negative(power_tail))


@triton.jit
def _sum_series_kernel(SERIES: tl.constexpr, TERMS: tl.constexpr, LENGTH: tl.constexpr, p, x):
    """``_sum_series`` in registers: sum_k p^(k+1) f_k(x), k = 0 .. TERMS - 1. The polynomials lie end to end, the first
    with LENGTH coefficients, each next one with one more.
    """
    total = tl.zeros_like(x)
    for k in tl.static_range(TERMS - 1, -1, -1):
        total = p * (total + evaluate_polynomial_kernel(SERIES, k * LENGTH + k * (k - 1) // 2, LENGTH + k, x))
    return total


@triton.jit
def _higher_derivatives_kernel(kappa, p, x_inverse, PLAN: tl.constexpr, HIGHEST: tl.constexpr):
    """Returns A' and A'' of the expansion at the shifted order; what was not asked for is 0."""
    SECOND: tl.constexpr = PLAN.second
    THIRD: tl.constexpr = PLAN.third
    TERMS: tl.constexpr = PLAN.terms
    m: tl.constexpr = PLAN.shifted[0]
    second, third = tl.zeros_like(p), tl.zeros_like(p)
    if HIGHEST >= 2:
        if kappa.dtype == tl.float32:  # a Newton step on the approximate root: p2 would have twice its error
            s = tl.fma(kappa, kappa, constant_like(m * m, kappa)) * p
            p = tl.fma(p, 0.5 * residual_kernel(s, p, constant_like(1.0, p)), p)
        p2 = p * p
        t2 = p2 * (m * m)
        second = m * p * x_inverse + p2 * (0.5 - t2 + _sum_series_kernel(SECOND, TERMS, 3, p, t2))
        if HIGHEST >= 3:
            third = m * x_inverse * (p + x_inverse) + p2 * (1.0 - 4.0 * t2 + _sum_series_kernel(THIRD, TERMS, 3, p, t2))
            third = negative(kappa) * p2 * third
    return second, third


@triton.jit
def _shifted_kernel(kappa, PLAN: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """``debye_kernel`` up to ``kappa_max`` in the general form: expansion at a shifted order, then recurrence.

    The derivatives stay together because each step of the recurrence needs those of the step before.
    """
    ZEROTH: tl.constexpr = PLAN.zeroth
    FIRST: tl.constexpr = PLAN.first
    STEPS: tl.constexpr = PLAN.steps
    TERMS: tl.constexpr = PLAN.terms
    m: tl.constexpr = PLAN.shifted[0]
    p, s, s_tail = _square_root_pair_kernel(kappa, PLAN)
    x, x_tail = fast_two_sum_kernel(s, constant_like(m, s))
    x_tail += s_tail + PLAN.shifted[1]
    p2 = p * p
    x_inverse = _reciprocal_kernel(x)
    t2 = p2 * (m * m)
    series = _sum_series_kernel(FIRST, TERMS, 2, p, t2)
    first = p2 * (0.5 + series)
    ratio = kappa * (x_inverse - first)
    gap = m * m * _reciprocal_kernel(s + kappa)  # s - kappa
    if STEPS > 0:
        # kappa (1 - rho_m) - (m + 1/2), small where A is close to 1: its recurrence passes an error on, while that of
        # 1 - rho_m would magnify it by up to 2 N + 1.
        excess_gap = gap - (m + gap) * (m + gap) * x_inverse - 0.5 * t2 + (1.0 - t2) * series
    else:
        complement = (m + gap) * x_inverse + kappa * first
    product = 1.0 + m * p
    psi, psi_tail = tl.zeros_like(p), tl.zeros_like(p)
    second, third = _higher_derivatives_kernel(kappa, p, x_inverse, PLAN, HIGHEST)
    for i in tl.static_range(STEPS):
        excess = kappa * ratio
        inverse = _reciprocal_kernel(PLAN.lowered[i] + excess)
        if HIGHEST >= 2:
            numerator = PLAN.lowered[i] - kappa * kappa * second
        if HIGHEST >= 3:
            slope = ratio + kappa * second
            third = kappa * (2.0 * second + kappa * third) + 2.0 * numerator * slope * inverse
            third = negative(inverse) * inverse * third
        if HIGHEST >= 2:
            second = numerator * inverse * inverse
        below = 0.5 * PLAN.lowered[i] - 0.5
        excess_gap = negative(tl.fma(excess_gap, kappa - below, constant_like(below * below, kappa))) * inverse
        ratio = kappa * inverse
        if LOWEST == 0:
            factor = (2.0 * m + excess * PLAN.magnified[i]) * x_inverse
            product *= factor * factor
    if LOWEST == 0:
        psi, psi_tail = _phase_pair_kernel(s, s_tail, x, x_tail, PLAN)
        if STEPS > 0:  # the rounding of 1 / (m + s) is the same in every factor
            psi_tail += STEPS * (residual_kernel(x, x_inverse, constant_like(1.0, x)) - x_tail * x_inverse)
        psi_tail += half_log_kernel(product, STEPS == 0) + _sum_series_kernel(ZEROTH, TERMS, 2, p, t2)
    fine = ratio > 1.0 - _SMALL
    if STEPS > 0:
        complement = tl.where(fine, (excess_gap + PLAN.order_and_half[0]) * _reciprocal_kernel(kappa), 1.0 - ratio)
    return psi, psi_tail, tl.where(fine, 1.0 - complement, ratio), complement, second, third


@triton.jit
def debye_kernel(
    kappa,
    PLAN: tl.constexpr,
    LOWEST: tl.constexpr = 0,
    HIGHEST: tl.constexpr = 1,
    WITH_POWER: tl.constexpr = False,
    MINUS_KAPPA: tl.constexpr = False,
):
    """Evaluates psi and its derivatives in registers.

    Args:
        kappa: float32 or float64 tensor, >= 0; anything else gives NaN.
        PLAN: ``debye_plan`` of the order and the same dtype.
        LOWEST, HIGHEST: derivatives of psi to evaluate, 0 to 3; A is always evaluated.
        WITH_POWER: return log I_v = psi + v log kappa in place of psi (kappa > 0).
        MINUS_KAPPA: subtract kappa (at most ``kappa_max``) from psi, before it is rounded.
    Returns:
        psi and its tail (their sum is psi + constant, to more digits than one float holds), A, 1 - A, A', A'', as in
        ``Debye``; what was not asked for is 0.
    """
    # log I crosses zero elsewhere than psi, where the direct form has larger terms in the tail.
    DIRECT: tl.constexpr = None if WITH_POWER else PLAN.direct
    beyond = kappa
    overflow = kappa > PLAN.kappa_max
    kappa = tl.where(overflow, constant_like(PLAN.kappa_max, kappa), tl.where(kappa >= 0, kappa, float("nan")))
    if DIRECT is not None:
        x, phase, psi_tail, ratio, complement, p, x_inverse = direct_kernel(kappa, DIRECT)
        if MINUS_KAPPA:
            psi = phase + (x - kappa)
        else:
            psi, rest = fast_two_sum_kernel(x, phase)  # loses up to a rounding of psi where |phase| > x
            psi_tail += rest
        second, third = _higher_derivatives_kernel(kappa, p, x_inverse, PLAN, HIGHEST)
    else:
        psi, psi_tail, ratio, complement, second, third = _shifted_kernel(kappa, PLAN, LOWEST, HIGHEST)
        if MINUS_KAPPA:
            psi, rest = two_sum_kernel(psi, negative(kappa))
            psi_tail += rest
    if LOWEST == 0 and WITH_POWER:
        psi, psi_tail = _add_power_kernel(psi, psi_tail, kappa, PLAN)
    if LOWEST == 0 and not MINUS_KAPPA:
        psi = tl.where(overflow, beyond, psi)
    if HIGHEST >= 2:
        second = tl.where(overflow, 0.0, second)
        third = tl.where(overflow, 0.0, third)
    return psi, psi_tail, ratio, complement, second, third
