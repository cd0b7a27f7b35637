"""Modified Bessel functions of the first kind in log space: one uniform expansion for every order, value and
derivatives together.

    psi_v(kappa) = log I_v(kappa) - v log kappa          psi_v' = A = I_(v+1) / I_v          (both smooth at kappa = 0)

With m = v + N, s = sqrt(m^2 + kappa^2), p = 1 / s and x = (m / s)^2, Debye's expansion (DLMF 10.41.3) in logarithmic
form is

    psi_m = s - m log(m + s) - 1/2 log(2 pi s) + sum_k p^k Q_k(x)           (= .. - (m + 1/2) log(m + s) + 1/2 log((1 + m / s) / 2 pi) ..)

where Q_k follows from the U_k of DLMF 10.41.9. The order is shifted up by N until the sum converges to rounding, then
brought down by the stable recurrence (DLMF 10.29.1), with rho_j = I_(j+1) / I_j:

    rho_(j-1) = kappa / E_j          psi_(j-1) = psi_j + log E_j          E_j = 2 j + kappa rho_j

Derivatives are those of the expansion itself, so every term keeps its leading factor: A is exact to rounding as kappa
-> 0, and 1 - A and A' do not cancel as kappa -> inf (coming down N steps costs those two up to 2 N + 1 roundings a
step: two digits at d = 2, none from d = 64). What does cancel is psi: at large orders it crosses zero between terms of
thousands. Those terms (the square root, the logarithm, their product with v) are carried as an unevaluated sum of two
floats; the rest needs no such care.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import INTERPRETED

_MAX_TERMS = 13
# Below this, 1 - A comes from its own expansion and A from it; above, the other way round. The recurrence for 1 - A
# magnifies its rounding by up to 2 N + 1, which 1/16 makes harmless; A itself cannot resolve 1 - A any finer than one
# rounding of 1.
_SMALL_COMPLEMENT = 1 / 16
# Truncation error allowed, relative in A and absolute in psi: below half a rounding of 1.
_TRUNCATION = {torch.float32: 2e-8, torch.float64: 1e-16}
_MANTISSA_BITS = {torch.float32: 24, torch.float64: 53}
# Beyond this, psi - kappa is taken for its value there, A for 1 and A' for 0, each to rounding; up to it, kappa^2 is
# finite.
_KAPPA_MAX = {torch.float32: 2.0**60, torch.float64: 2.0**500}
# The logarithm's argument is brought to [2^(-1/4), 2^(1/4)).
_QUARTER_DOWN, _QUARTER_UP = 2.0**-0.25, 2.0**0.25


def _scaled(polynomial: list[Fraction], power: int) -> list[Fraction]:
    """The operator theta: d/dkappa [p^n f(x)] = -kappa p^(n+2) (theta_n f)(x), coefficient by coefficient."""
    return [(power + 2 * j) * c for j, c in enumerate(polynomial)]


def _times(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, a_i in enumerate(a):
        for j, b_j in enumerate(b):
            product[i + j] += a_i * b_j
    return product


def _minus(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    width = max(len(a), len(b))
    return [x - y for x, y in zip(a + [Fraction(0)] * (width - len(a)), b + [Fraction(0)] * (width - len(b)))]


class _Series(NamedTuple):
    """Coefficient polynomials in x of the k-th term, k = 1 .. _MAX_TERMS + 1, exact."""

    zeroth: list[list[Fraction]]  # psi:  + p^k Q_k
    first: list[list[Fraction]]  # A:    - kappa p^(k+2) R_k,  R_k = theta_k Q_k
    second: list[
        list[Fraction]
    ]  # A':  + p^(k+2) T_k,        T_k = (1 - x) theta_(k+2) R_k - R_k, since kappa^2 p^2 = 1 - x
    third: list[list[Fraction]]  # A'':  - kappa p^(k+4) W_k,  W_k = theta_(k+2) T_k


def _debye_series(terms: int) -> _Series:
    # DLMF 10.41.9 for U_k(t) = t^k P_k(t^2): U_(k+1) = 1/2 t^2 (1 - t^2) U_k' + 1/8 int_0^t (1 - 5 u^2) U_k(u) du,
    # power by power.
    u = [[Fraction(1)]]
    for k in range(terms):
        following = [Fraction(0)] * (k + 2)
        for j, c in enumerate(u[k]):
            power = k + 2 * j
            following[j] += c * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            following[j + 1] -= c * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        u.append(following)
    # log(1 + sum_k u_k z^k) = sum_k q_k z^k with n q_n = n u_n - sum_(j<n) j q_j u_(n-j).
    q = [[Fraction(0)]]
    for n in range(1, terms + 1):
        q_n = u[n]
        for j in range(1, n):
            q_n = _minus(q_n, [Fraction(j, n) * c for c in _times(q[j], u[n - j])])
        q.append(q_n)
    first = [_scaled(q_k, k) for k, q_k in enumerate(q[1:], 1)]
    one_minus_x = [Fraction(1), Fraction(-1)]
    second = [_minus(_times(one_minus_x, _scaled(r_k, k + 2)), r_k) for k, r_k in enumerate(first, 1)]
    third = [_scaled(t_k, k + 2) for k, t_k in enumerate(second, 1)]
    return _Series(q[1:], first, second, third)


_SERIES = _debye_series(_MAX_TERMS + 1)


def _largest(polynomial: list[Fraction], power: int) -> float:
    """max over t in [0, 1] of |t^power f(t^2)|, on a grid."""
    coefficients = [float(c) for c in polynomial]
    grid = (i / 400 for i in range(401))
    return max(abs(t**power * math.fsum(c * t ** (2 * j) for j, c in enumerate(coefficients))) for t in grid)


# At order m with K terms, psi is off by at most _NEXT_ZEROTH[K] / m^(K+1) and A, relatively, by _NEXT_FIRST[K] /
# m^(K+2).
_NEXT_ZEROTH = [_largest(q_k, k) for k, q_k in enumerate(_SERIES.zeroth, 1)]
_NEXT_FIRST = [2 * _largest(r_k, k + 1) for k, r_k in enumerate(_SERIES.first, 1)]


class DebyePlan(NamedTuple):
    """Everything the evaluation needs to know of one order, in one precision: plain numbers, so that a kernel takes it
    as a constant.

    A pair is an unevaluated sum of two floats of the precision. The first of a grid pair is a multiple of so coarse a
    power of two that the kernels' sums of them are exact.
    """

    compensated: bool  # psi in two floats, and 1 - A beside A: the arithmetic is no wider than the result
    kappa_max: float  # larger kappa is taken for this in psi - kappa, and for +inf in the derivatives
    log_kappa_max: float  # what the SCF loss holds log kappa below
    steps: int  # N
    terms: int  # K
    order: tuple[float, float]  # v
    order_and_half: tuple[float, float]  # v + 1/2
    shifted: tuple[float, float]  # m = v + N
    shifted_squared: tuple[float, float]
    lowered: tuple[float, ...]  # 2 j for the steps j = m, m - 1, .. v + 1
    magnified: tuple[float, ...]  # m / j; E_j m / j / (m + s) is 1 at kappa = 0 and never overflows
    offset: tuple[float, float]  # grid pair; constant = -(v + 1/2) offset, so that it comes free with log(m + s)
    zeroth: tuple[float, ...]  # Q_k, k = 1 .. K end to end, each with the highest power of x first
    first: tuple[float, ...]  # R_k
    second: tuple[float, ...]  # T_k
    third: tuple[float, ...]  # W_k
    half_ln2: tuple[float, float]  # grid pair
    sqrt_half_error: float  # log of the float next to sqrt(1/2), plus log(2) / 2
    atanh: tuple[float, ...]  # of log((1 + w) / (1 - w)) = 2 w + w^3 sum_j atanh_j w^(2 j), highest power first


def _round(number: Fraction, bits: int) -> float:
    """Nearest float of that many mantissa bits, as a Python float."""
    if number == 0:
        return 0.0
    exponent = math.frexp(float(number))[1]
    return math.ldexp(round(number / Fraction(2) ** (exponent - bits)), exponent - bits)


def _pair(number: Fraction, bits: int) -> tuple[float, float]:
    head = _round(number, bits)
    return head, _round(number - Fraction(head), bits)


def _grid_pair(number: Fraction, bits: int) -> tuple[float, float]:
    # Eight bits before the point hold the largest exponents and offsets there are in float32, eleven in float64.
    grid = Fraction(1, 2 ** (bits - (8 if bits == 24 else 11)))
    head = round(number / grid) * grid
    return float(head), _round(number - head, bits)


def _log(number: Fraction) -> Fraction:
    """log of a number in (1/2, 2], to more than 100 bits: 2 atanh((f - 1) / (f + 1))."""
    w = (number - 1) / (number + 1)
    return 2 * sum((w ** (2 * j + 1) / (2 * j + 1) for j in range(40)), Fraction(0))


@functools.lru_cache(maxsize=512)
def debye_plan(order: float, dtype: torch.dtype, constant: float = 0.0, compensated: bool = True) -> DebyePlan:
    """The cheapest shift N and number of terms K that keep the truncation error below rounding.

    Args:
        order: v, any real number >= 0.
        dtype: torch.float32 or torch.float64, the precision asked of the result.
        constant: added to psi before its two parts are rounded into one float.
        compensated: whether psi, and 1 - A beside A, have to be carried; without, the arithmetic must be wider than
            `dtype`.
    """
    bits = _MANTISSA_BITS[dtype]
    exact_order = Fraction(order)

    def steps_needed(terms: int) -> int:
        least_order = max(
            (_NEXT_ZEROTH[terms] / _TRUNCATION[dtype]) ** (1 / (terms + 1)),
            (_NEXT_FIRST[terms] / _TRUNCATION[dtype]) ** (1 / (terms + 2)),
        )
        return max(0, math.ceil(least_order - order))

    # A step down costs a division and a few operations, about 10; the k-th term two polynomials of degree k.
    steps, terms = min(
        ((steps_needed(terms), terms) for terms in range(1, _MAX_TERMS + 1)),
        key=lambda n: 10 * n[0] + n[1] * (n[1] + 3),
    )
    shifted = exact_order + steps
    growth = tuple(shifted / (shifted - i) for i in range(steps))
    constant -= math.fsum((0.5 * math.log(2 * math.pi), *map(math.log, growth)))

    def descending(series: list[list[Fraction]]) -> tuple[float, ...]:
        return tuple(float(c) for polynomial in series[:terms] for c in reversed(polynomial))

    # |w| <= (2^(1/4) - 1) / (2^(1/4) + 1) < 0.0865, and the last term is wanted below a thousandth of a rounding of 1.
    atanh_terms = next(n for n in range(2, 40) if 0.0865 ** (2 * n + 3) < 2.0 ** -(bits + 10))
    sqrt_half = Fraction(_round(Fraction(math.sqrt(0.5)), bits))
    return DebyePlan(
        compensated=compensated,
        kappa_max=_KAPPA_MAX[dtype if compensated else torch.float64],
        log_kappa_max=math.log(_KAPPA_MAX[dtype]),
        steps=steps,
        terms=terms,
        order=_pair(exact_order, bits),
        order_and_half=_pair(exact_order + Fraction(1, 2), bits),
        shifted=_pair(shifted, bits),
        shifted_squared=_pair(shifted * shifted, bits),
        lowered=tuple(float(2 * (shifted - i)) for i in range(steps)),
        magnified=tuple(map(float, growth)),
        offset=_grid_pair(-Fraction(constant) / (exact_order + Fraction(1, 2)), bits),
        zeroth=descending(_SERIES.zeroth),
        first=descending(_SERIES.first),
        second=descending(_SERIES.second),
        third=descending(_SERIES.third),
        half_ln2=_grid_pair(_log(Fraction(2)) / 2, bits),
        sqrt_half_error=float(_log(sqrt_half) + _log(Fraction(2)) / 2),
        atanh=tuple(2.0 / (2 * j + 3) for j in reversed(range(atanh_terms))),
    )


# ---- PyTorch, float64
# -------------------------------------------------------------------------------------------------------------------


class Debye(NamedTuple):
    """One evaluation; all float64, of kappa's shape. What was not asked for is None."""

    psi: torch.Tensor | None  # psi + constant
    psi_tail: torch.Tensor | None  # what rounding took from it
    ratio: torch.Tensor  # A
    complement: torch.Tensor  # 1 - A
    second: torch.Tensor | None  # A'
    third: torch.Tensor | None  # A''


def _two_sum(a, b):
    """a + b and its rounding error (Knuth)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def _fast_two_sum(a, b):
    """The same, for |a| >= |b| or a = 0 (Dekker)."""
    total = a + b
    return total, b - (total - a)


def _split(a):
    shifted = a * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - a)
    return high, a - high


def _two_product(a, b):
    """a b and its rounding error (Dekker's splitting: PyTorch has no fused multiply-add)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _residual(a, b, c):
    """c - a b for a product close to c."""
    product, tail = _two_product(a, b)
    return (c - product) - tail


def _log_pair(x, x_tail, offset, plan):
    """log(x + x_tail) + offset in two floats: 2 atanh((f - 1) / (f + 1)) with f in [2^-1/4, 2^1/4], what half powers of
    two leave.
    """
    f, exponent = torch.frexp(x)
    below = f < _QUARTER_DOWN
    exponent = exponent - below.to(exponent.dtype)
    f = torch.where(below, 2 * f, f)
    above = f >= _QUARTER_UP
    factor = torch.ones_like(f).masked_fill(above, math.sqrt(0.5))
    above = above.to(f.dtype)
    half_powers = 2 * exponent.to(f.dtype) + above
    f, rest = _two_product(f, factor)
    f_tail = torch.ldexp(x_tail, -exponent) * factor + rest
    numerator, denominator = f - 1, f + 1
    denominator_tail = f - (denominator - 1) + f_tail
    w = numerator / denominator
    w_tail = (_residual(w, denominator, numerator) - w * denominator_tail + f_tail) / denominator
    square = w * w
    polynomial = plan.atanh[0]
    for c in plan.atanh[1:]:
        polynomial = polynomial * square + c
    head, rest = _fast_two_sum(half_powers * plan.half_ln2[0] + offset[0], 2 * w)
    tail = (
        rest + 2 * w_tail * (1 + square) + (half_powers * plan.half_ln2[1] + offset[1]) - above * plan.sqrt_half_error
    )
    head, rest = _fast_two_sum(head, w * square * polynomial)
    return head, tail + rest


def _subtract_product(head, tail, factor, x, x_tail):
    """head + tail - factor (x + x_tail)."""
    product, product_tail = _two_product(x, torch.full_like(x, factor[0]))
    head, rest = _two_sum(head, -product)
    return head, tail + (rest - product_tail - factor[0] * x_tail - factor[1] * x)


def _square_root_pair(kappa, plan):
    """s = sqrt(m^2 + kappa^2) in two floats."""
    square, square_tail = _two_product(kappa, kappa)
    total, total_tail = _two_sum(square, torch.full_like(square, plan.shifted_squared[0]))
    s = total.sqrt()
    return s, (_residual(s, s, total) + total_tail + square_tail + plan.shifted_squared[1]) / (2 * s)


def _phase_pair(kappa, s, s_tail, plan, with_power):
    """s - (v + 1/2) log(m + s) [+ v log kappa] + constant in two floats."""
    x, x_tail = _fast_two_sum(s, torch.full_like(s, plan.shifted[0]))
    x_tail = x_tail + s_tail + plan.shifted[1]
    head, tail = _subtract_product(s, s_tail, plan.order_and_half, *_log_pair(x, x_tail, plan.offset, plan))
    if with_power:
        power, power_tail = _log_pair(kappa, torch.zeros_like(kappa), (0.0, 0.0), plan)
        head, tail = _subtract_product(head, tail, plan.order, -power, -power_tail)
    return head, tail


def _series_sum(coefficients, length, p, x):
    """sum_k p^k f_k(x), k = 1, 2, ..; f_1 has `length` coefficients, each of the next one more."""
    values = []
    start = 0
    while start < len(coefficients):
        value = coefficients[start]
        for c in coefficients[start + 1 : start + length]:
            value = x * value + c
        values.append(value)
        start, length = start + length, length + 1
    total = p * values.pop()
    while values:
        total = p * (total + values.pop())
    return total


def debye_reference(
    kappa: torch.Tensor, plan: DebyePlan, lowest: int = 0, highest: int = 1, with_power: bool = False
) -> Debye:
    """psi and up to three derivatives of it, in plain PyTorch.

    Args:
        kappa: float64, any shape, >= 0; NaN goes through, +inf gives the limits.
        plan: of the order, from `debye_plan`.
        lowest, highest: derivatives of psi to evaluate; A comes always.
        with_power: return log I_v = psi + v log kappa in the place of psi (kappa > 0 when compensated).
    """
    beyond, kappa = kappa, kappa.clamp(max=plan.kappa_max)
    m = plan.shifted[0]
    if plan.compensated:
        s, s_tail = _square_root_pair(kappa, plan)
    else:
        s = (kappa * kappa + m * m).sqrt()
    x = s + m
    p = 1 / s
    p2 = p * p
    x_inverse = 1 / x
    t2 = p2 * (m * m)
    first = p2 * (0.5 + _series_sum(plan.first, 2, p, t2))
    ratio = kappa * (x_inverse - first)
    psi = psi_tail = second = third = None
    if plan.compensated:
        complement = (m + m * m / (s + kappa)) * x_inverse + kappa * first
    if highest >= 2:
        second = m * p * x_inverse + p2 * (0.5 - t2 + _series_sum(plan.second, 3, p, t2))
    if highest >= 3:
        third = -kappa * p2 * (m * x_inverse * (p + x_inverse) + p2 * (1 - 4 * t2 + _series_sum(plan.third, 3, p, t2)))
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
        if plan.compensated:
            psi, psi_tail = _phase_pair(kappa, s, s_tail, plan, with_power)
            psi = psi + (beyond - kappa)
        else:
            psi, psi_tail = s - plan.order_and_half[0] * (x.log() + (plan.offset[0] + plan.offset[1])), 0.0
            if with_power:
                psi = psi + torch.xlogy(plan.order[0], kappa)
        psi_tail = psi_tail + (0.5 * product.log() + _series_sum(plan.zeroth, 2, p, t2))
    if plan.compensated:
        fine = complement < _SMALL_COMPLEMENT
        ratio, complement = torch.where(fine, 1 - complement, ratio), torch.where(fine, complement, 1 - ratio)
    else:
        complement = 1 - ratio
    if highest >= 2:
        overflow = beyond > plan.kappa_max
        second, third = (None if f is None else f.masked_fill(overflow, 0.0) for f in (second, third))
    return Debye(psi, psi_tail, ratio, complement, second, third)


# ---- Triton, float32 or float64 by the type of kappa; launch with enable_fp_fusion=False, or a product contracted into
# a sum spoils it ----

_INTERPRETED = tl.constexpr(INTERPRETED)
_SMALL = tl.constexpr(_SMALL_COMPLEMENT)
_UP = tl.constexpr(_QUARTER_UP)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _constant(VALUE: tl.constexpr, like):
    """A constant of the type of `like`: outside plain arithmetic with a tensor, Triton would make it a float32."""
    return tl.full(like.shape, VALUE, like.dtype)


@triton.jit
def two_sum_kernel(a, b):
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


@triton.jit
def _fast_two_sum_kernel(a, b):
    total = a + b
    return total, b - (total - a)


@triton.jit
def _two_product_kernel(a, b):
    product = a * b
    if _INTERPRETED:  # its fma rounds twice
        splitter: tl.constexpr = 4097.0 if a.dtype == tl.float32 else 134217729.0
        a_high = a * splitter - (a * splitter - a)
        b_high = b * splitter - (b * splitter - b)
        a_low = a - a_high
        b_low = b - b_high
        return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    else:
        return product, tl.fma(a, b, -product)


@triton.jit
def _residual_kernel(a, b, c):
    if _INTERPRETED:
        product, tail = _two_product_kernel(a, b)
        return (c - product) - tail
    else:
        return tl.fma(-a, b, c)


@triton.jit
def _reciprocal(x):
    """1 / x for positive normal x, to a rounding; in float32 far fewer instructions than a division."""
    if x.dtype == tl.float32:
        y = tl.rsqrt(x)
        y *= y
        return tl.fma(y, tl.fma(-x, y, _constant(1.0, x)), y)
    else:
        return 1.0 / x


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr, x):
    """The polynomial of COUNT >= 2 coefficients from START on."""
    value = tl.fma(x, _constant(COEFFICIENTS[START], x), _constant(COEFFICIENTS[START + 1], x))
    for i in tl.static_range(2, COUNT):
        value = tl.fma(value, x, _constant(COEFFICIENTS[START + i], x))
    return value


@triton.jit
def _log_pair_kernel(x, x_tail, OFFSET: tl.constexpr, PLAN: tl.constexpr):
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
    factor = tl.where(above, _constant(_SQRT_HALF, f), _constant(1.0, f))
    half_powers = (2 * exponent + above.to(exponent.dtype)).to(f.dtype)
    f, rest = _two_product_kernel(f, factor)
    f_tail = tl.fma(x_tail * scale, factor, rest)
    numerator = f - 1.0
    denominator = f + 1.0
    denominator_tail = f - (denominator - 1.0) + f_tail
    inverse = _reciprocal(denominator)
    w = numerator * inverse
    square = w * w
    w_tail = (tl.fma(-w, denominator_tail, _residual_kernel(w, denominator, numerator)) + f_tail) * inverse
    w_tail = tl.fma(w_tail, square, w_tail)
    head, rest = _fast_two_sum_kernel(half_powers * PLAN.half_ln2[0] + OFFSET[0], 2.0 * w)
    tail = tl.fma(half_powers, _constant(PLAN.half_ln2[1], f), _constant(OFFSET[1], f))
    tail += rest + 2.0 * w_tail - tl.where(above, _constant(PLAN.sqrt_half_error, f), 0.0)
    head, rest = _fast_two_sum_kernel(head, w * square * _horner(ATANH, 0, len(ATANH), square))
    return head, tail + rest


@triton.jit
def exp_kernel(x):
    """exp(x) to a rounding of the result: the product with log2(e), which grows with x, keeps its error."""
    if x.dtype == tl.float32:
        power, rest = _two_product_kernel(x, _constant(1.4426950216293335, x))
        rest = tl.fma(x, _constant(1.925962991126617e-08, x), rest)
        y = tl.exp2(power)
        return tl.fma(y, rest * 0.6931471805599453, y)
    else:
        return tl.exp(x)


@triton.jit
def _half_log_kernel(x, UP_TO_TWO: tl.constexpr):
    """log(x) / 2, plainly. In float32 on [1, 2], log(3/2) / 2 + atanh((x - 3/2) / (x + 3/2)) costs a third of the
    library's logarithm.
    """
    if UP_TO_TWO and x.dtype == tl.float32:
        w = (x - 1.5) * _reciprocal(x + 1.5)
        ATANH: tl.constexpr = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
        return tl.fma(w, _horner(ATANH, 0, 5, w * w), _constant(0.2027325540540822, x))
    else:
        return 0.5 * tl.log(x)


@triton.jit
def _subtract_product_kernel(head, tail, FACTOR: tl.constexpr, x, x_tail):
    product, product_tail = _two_product_kernel(x, _constant(FACTOR[0], x))
    head, rest = two_sum_kernel(head, -product)
    tail += rest - tl.fma(x_tail, _constant(FACTOR[0], x), product_tail)
    if FACTOR[1] != 0.0:
        tail -= FACTOR[1] * x
    return head, tail


@triton.jit
def _square_root_kernel(kappa, PLAN: tl.constexpr):
    """1 / s, and s = sqrt(m^2 + kappa^2) in two floats."""
    square, square_tail = _two_product_kernel(kappa, kappa)
    total, total_tail = two_sum_kernel(square, _constant(PLAN.shifted_squared[0], kappa))
    p = tl.rsqrt(total)
    s = total * p
    return p, s, (_residual_kernel(s, s, total) + (total_tail + square_tail + PLAN.shifted_squared[1])) * (0.5 * p)


@triton.jit
def _phase_kernel(kappa, s, s_tail, x, x_tail, PLAN: tl.constexpr, WITH_POWER: tl.constexpr):
    """s - (v + 1/2) log x [+ v log kappa] + constant in two floats."""
    ORDER: tl.constexpr = PLAN.order  # a tuple has to be bound to a name before a function takes it as a constant
    ORDER_AND_HALF: tl.constexpr = PLAN.order_and_half
    OFFSET: tl.constexpr = PLAN.offset
    ZERO: tl.constexpr = (0.0, 0.0)
    logarithm, logarithm_tail = _log_pair_kernel(x, x_tail, OFFSET, PLAN)
    head, tail = _subtract_product_kernel(s, s_tail, ORDER_AND_HALF, logarithm, logarithm_tail)
    if WITH_POWER:
        tiny = kappa < 2.0**-100  # scaled, so that a subnormal has its exponent in the exponent bits
        power, power_tail = _log_pair_kernel(tl.where(tiny, kappa * 2.0**64, kappa), tl.zeros_like(kappa), ZERO, PLAN)
        power -= tl.where(tiny, _constant(128 * PLAN.half_ln2[0] + 128 * PLAN.half_ln2[1], kappa), 0.0)
        head, tail = _subtract_product_kernel(head, tail, ORDER, -power, -power_tail)
    return head, tail


@triton.jit
def _series_kernel(SERIES: tl.constexpr, TERMS: tl.constexpr, LENGTH: tl.constexpr, p, x):
    """sum_k p^(k+1) f_k(x), k = 0 .. TERMS - 1; the polynomials lie end to end, the first with LENGTH coefficients,
    each longer by one.
    """
    total = tl.zeros_like(x)
    for k in tl.static_range(TERMS - 1, -1, -1):
        total = p * (total + _horner(SERIES, k * LENGTH + k * (k - 1) // 2, LENGTH + k, x))
    return total


@triton.jit
def debye(
    kappa, PLAN: tl.constexpr, LOWEST: tl.constexpr = 0, HIGHEST: tl.constexpr = 1, WITH_POWER: tl.constexpr = False
):
    """psi and its derivatives in registers.

    Args:
        kappa: float32 or float64 tensor, >= 0; anything else gives NaN.
        PLAN: `debye_plan` of the order and the same dtype.
        LOWEST, HIGHEST: derivatives of psi to evaluate, 0 to 3; A comes always.
        WITH_POWER: log I_v = psi + v log kappa in the place of psi (kappa > 0).
    Returns:
        psi and its tail (their sum is psi + constant, to more digits than one float holds), A, 1 - A, A', A'', as in
        `Debye`; what was not asked for is 0.
    """
    ZEROTH: tl.constexpr = PLAN.zeroth
    FIRST: tl.constexpr = PLAN.first
    SECOND: tl.constexpr = PLAN.second
    THIRD: tl.constexpr = PLAN.third
    STEPS: tl.constexpr = PLAN.steps
    TERMS: tl.constexpr = PLAN.terms
    m: tl.constexpr = PLAN.shifted[0]
    beyond = kappa
    overflow = kappa > PLAN.kappa_max
    kappa = tl.where(overflow, _constant(PLAN.kappa_max, kappa), tl.where(kappa >= 0, kappa, float("nan")))
    p, s, s_tail = _square_root_kernel(kappa, PLAN)
    x, x_tail = _fast_two_sum_kernel(s, _constant(m, s))
    x_tail += s_tail + PLAN.shifted[1]
    p2 = p * p
    x_inverse = _reciprocal(x)
    t2 = p2 * (m * m)
    first = p2 * (0.5 + _series_kernel(FIRST, TERMS, 2, p, t2))
    ratio = kappa * (x_inverse - first)
    complement = (m + m * m * _reciprocal(s + kappa)) * x_inverse + kappa * first
    product = 1.0 + m * p
    psi, psi_tail, second, third = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
    if HIGHEST >= 2:
        second = m * p * x_inverse + p2 * (0.5 - t2 + _series_kernel(SECOND, TERMS, 3, p, t2))
    if HIGHEST >= 3:
        third = (
            -kappa
            * p2
            * (m * x_inverse * (p + x_inverse) + p2 * (1.0 - 4.0 * t2 + _series_kernel(THIRD, TERMS, 3, p, t2)))
        )
    for i in tl.static_range(STEPS):
        excess = kappa * ratio
        inverse = _reciprocal(PLAN.lowered[i] + excess)
        if HIGHEST >= 2:
            numerator = PLAN.lowered[i] - kappa * kappa * second
        if HIGHEST >= 3:
            slope = ratio + kappa * second
            third = -inverse * inverse * (kappa * (2.0 * second + kappa * third) + 2.0 * numerator * slope * inverse)
        if HIGHEST >= 2:
            second = numerator * inverse * inverse
        complement = (PLAN.lowered[i] - kappa * complement) * inverse
        ratio = kappa * inverse
        if LOWEST == 0:
            factor = (2.0 * m + excess * PLAN.magnified[i]) * x_inverse
            product *= factor * factor
    if LOWEST == 0:
        psi, psi_tail = _phase_kernel(kappa, s, s_tail, x, x_tail, PLAN, WITH_POWER)
        psi += beyond - kappa
        if STEPS > 0:  # the rounding of 1 / (m + s) enters every factor alike
            psi_tail += STEPS * (_residual_kernel(x, x_inverse, _constant(1.0, x)) - x_tail * x_inverse)
        psi_tail += _half_log_kernel(product, STEPS == 0) + _series_kernel(ZEROTH, TERMS, 2, p, t2)
    if HIGHEST >= 2:
        second = tl.where(overflow, 0.0, second)
        third = tl.where(overflow, 0.0, third)
    fine = complement < _SMALL
    return (
        psi,
        psi_tail,
        tl.where(fine, 1.0 - complement, ratio),
        tl.where(fine, complement, 1.0 - ratio),
        second,
        third,
    )
