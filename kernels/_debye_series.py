"""Debye's expansion in exact arithmetic: the coefficients of its polynomials, and the plans for evaluating one order in
one precision. No tensors; ``debye`` and ``_debye_direct`` have the formulas and do the evaluation.
"""

import functools
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

_MAX_TERMS = 13
# Truncation error allowed, relative in A and absolute in psi: below half a rounding of 1.
_TRUNCATION = {torch.float32: 2e-8, torch.float64: 1e-16}
_MANTISSA_BITS = {torch.float32: 24, torch.float64: 53}
# Beyond this, psi - kappa keeps its value there, A counts as 1 and A' as 0, each right to rounding; up to it, kappa^2
# is finite.
_KAPPA_MAX = {torch.float32: 2.0**60, torch.float64: 2.0**500}

Polynomial = list[Fraction]  # coefficients, the constant first


def _apply_theta(polynomial: Polynomial, power: int) -> Polynomial:
    """Applies the operator theta, defined by d/dkappa [p^n f(x)] = -kappa p^(n+2) (theta_n f)(x)."""
    return [(power + 2 * j) * c for j, c in enumerate(polynomial)]


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, a_i in enumerate(a):
        for j, b_j in enumerate(b):
            product[i + j] += a_i * b_j
    return product


def _subtract(a: Polynomial, b: Polynomial) -> Polynomial:
    width = max(len(a), len(b))
    return [x - y for x, y in zip(a + [Fraction(0)] * (width - len(a)), b + [Fraction(0)] * (width - len(b)))]


class DebyeSeries(NamedTuple):
    """Coefficient polynomials in x of the k-th term, k = 1 .. _MAX_TERMS + 1, exact."""

    zeroth: list[Polynomial]  # psi:  + p^k Q_k
    first: list[Polynomial]  # A:    - kappa p^(k+2) R_k,  R_k = theta_k Q_k
    # A':  + p^(k+2) T_k,  T_k = (1 - x) theta_(k+2) R_k - R_k, since kappa^2 p^2 = 1 - x
    second: list[Polynomial]
    third: list[Polynomial]  # A'':  - kappa p^(k+4) W_k,  W_k = theta_(k+2) T_k


def _expand(terms: int) -> DebyeSeries:
    """Derives the first terms of the series from those of DLMF 10.41.9."""
    # U_k(t) = t^k P_k(t^2) follow from U_(k+1) = 1/2 t^2 (1 - t^2) U_k' + 1/8 int_0^t (1 - 5 u^2) U_k(u) du, power by
    # power.
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
            q_n = _subtract(q_n, [Fraction(j, n) * c for c in _multiply(q[j], u[n - j])])
        q.append(q_n)
    first = [_apply_theta(q_k, k) for k, q_k in enumerate(q[1:], 1)]
    one_minus_x = [Fraction(1), Fraction(-1)]
    second = [_subtract(_multiply(one_minus_x, _apply_theta(r_k, k + 2)), r_k) for k, r_k in enumerate(first, 1)]
    third = [_apply_theta(t_k, k + 2) for k, t_k in enumerate(second, 1)]
    return DebyeSeries(q[1:], first, second, third)


SERIES = _expand(_MAX_TERMS + 1)


def _largest(polynomial: Polynomial, power: int) -> float:
    """Returns the maximum over t in [0, 1] of |t^power f(t^2)|, on a grid."""
    coefficients = [float(c) for c in polynomial]
    grid = (i / 400 for i in range(401))
    return max(abs(t**power * math.fsum(c * t ** (2 * j) for j, c in enumerate(coefficients))) for t in grid)


# At order m with K terms, psi is off by at most _NEXT_ZEROTH[K] / m^(K+1) and A, relatively, by _NEXT_FIRST[K] /
# m^(K+2).
_NEXT_ZEROTH = [_largest(q_k, k) for k, q_k in enumerate(SERIES.zeroth, 1)]
_NEXT_FIRST = [2 * _largest(r_k, k + 1) for k, r_k in enumerate(SERIES.first, 1)]


class DirectPlan(NamedTuple):
    """Constants of ``_debye_direct`` for one order v in float32; hashable, as those of ``DebyePlan``.

    A grid number is a multiple of a power of two coarse enough that the kernel's sums of such numbers are exact.
    """

    order: float
    order_squared: float
    half_order_squared: float  # v^2 / 2
    mantissa_bits: int  # of the float center / sqrt(2): mantissas from there to sqrt(2) center share an octave
    center: float  # f0
    atanh_slope: float  # 2 v + 1
    octave: tuple[float, float]  # -(v + 1/2) log(2) / 2^23: a grid number times 2^-23, and the rest
    constant: float  # grid number; the rest of it is in the last coefficient of phase
    to_grid: float  # adding and subtracting it rounds to the grid
    atanh: tuple[float, ...]  # (v + 1/2) ((log((1 + w) / (1 - w)) - 2 w) / w^3 as a polynomial of w^2)
    order_and_half: float
    phase: tuple[float, ...]  # G(t), the highest power first
    first: tuple[float, ...]  # H(t)


class DebyePlan(NamedTuple):
    """Constants of one order in one precision; hashable numbers, so that a kernel takes them as compile-time constants.

    A pair is an unevaluated sum of two floats of the precision. The first float of a grid pair is a multiple of a power
    of two coarse enough that the kernels' sums of such floats are exact.
    """

    compensated: bool  # psi in two floats, and 1 - A beside A: the arithmetic is no wider than the result
    kappa_max: float  # larger kappa count as this in psi - kappa, and as +inf in the derivatives
    log_kappa_max: float  # bound that the SCF loss puts on log kappa
    steps: int  # N
    terms: int  # K
    order: tuple[float, float]  # v
    order_and_half: tuple[float, float]  # v + 1/2
    shifted: tuple[float, float]  # m = v + N
    shifted_squared: tuple[float, float]
    lowered: tuple[float, ...]  # 2 j for the steps j = m, m - 1, .. v + 1
    magnified: tuple[float, ...]  # m / j; E_j m / j / (m + s) is 1 at kappa = 0 and never overflows
    offset: tuple[float, float]  # grid pair; constant = -(v + 1/2) offset, so that adding it to log(m + s) is free
    zeroth: tuple[float, ...]  # Q_k, k = 1 .. K end to end, each with the highest power of x first
    first: tuple[float, ...]  # R_k
    second: tuple[float, ...]  # T_k
    third: tuple[float, ...]  # W_k
    half_ln2: tuple[float, float]  # grid pair
    sqrt_half_error: float  # log of the float next to sqrt(1/2), plus log(2) / 2
    atanh: tuple[float, ...]  # of log((1 + w) / (1 - w)) = 2 w + w^3 sum_j atanh_j w^(2 j), highest power first
    direct: DirectPlan | None  # where ``_debye_direct`` evaluates psi, A and 1 - A in a kernel


def _round(number: Fraction, bits: int) -> float:
    """Returns the nearest float of ``bits`` mantissa bits, as a Python float."""
    if number == 0:
        return 0.0
    exponent = math.frexp(float(number))[1]
    return math.ldexp(round(number / Fraction(2) ** (exponent - bits)), exponent - bits)


def _round_to_pair(number: Fraction, bits: int) -> tuple[float, float]:
    head = _round(number, bits)
    return head, _round(number - Fraction(head), bits)


def _round_to_grid_pair(number: Fraction, bits: int) -> tuple[float, float]:
    # Eight bits before the point hold the largest exponents and offsets there are in float32, eleven in float64.
    grid = Fraction(1, 2 ** (bits - (8 if bits == 24 else 11)))
    head = round(number / grid) * grid
    return float(head), _round(number - head, bits)


def _log(number: Fraction) -> Fraction:
    """Returns the logarithm of a number in (1/2, 2] to more than 100 bits: 2 atanh((f - 1) / (f + 1))."""
    w = (number - 1) / (number + 1)
    return 2 * sum((w ** (2 * j + 1) / (2 * j + 1) for j in range(40)), Fraction(0))


def _choose_steps_and_terms(order: float, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the cheapest shift N and number of terms K that keep the truncation error below rounding."""

    def steps_needed(terms: int) -> int:
        least_order = max(
            (_NEXT_ZEROTH[terms] / _TRUNCATION[dtype]) ** (1 / (terms + 1)),
            (_NEXT_FIRST[terms] / _TRUNCATION[dtype]) ** (1 / (terms + 2)),
        )
        return max(0, math.ceil(least_order - order))

    # A step down costs a division and a few operations, about 10; the k-th term two polynomials of degree k.
    return min(
        ((steps_needed(terms), terms) for terms in range(1, _MAX_TERMS + 1)),
        key=lambda choice: 10 * choice[0] + choice[1] * (choice[1] + 3),
    )


@functools.lru_cache(maxsize=512)
def debye_plan(order: float, dtype: torch.dtype, constant: float = 0.0, compensated: bool = True) -> DebyePlan:
    """Plans the evaluation of one order: its shift, its number of terms, and every constant that follows from them.

    Args:
        order: v, any real number >= 0.
        dtype: torch.float32 or torch.float64, the precision asked of the result.
        constant: added to psi before its two parts are rounded into one float.
        compensated: carry psi in two floats, and 1 - A beside A; may be False only if the arithmetic is wider than
            ``dtype``.
    """
    bits = _MANTISSA_BITS[dtype]
    exact_order = Fraction(order)
    steps, terms = _choose_steps_and_terms(order, dtype)
    shifted = exact_order + steps
    growth = tuple(shifted / (shifted - i) for i in range(steps))
    constant -= math.fsum((0.5 * math.log(2 * math.pi), *map(math.log, growth)))

    def descending(polynomials: list[Polynomial]) -> tuple[float, ...]:
        return tuple(float(c) for polynomial in polynomials[:terms] for c in reversed(polynomial))

    # |w| <= (2^(1/4) - 1) / (2^(1/4) + 1) < 0.0865, and the last term is wanted below a thousandth of a rounding of 1.
    atanh_terms = next(n for n in range(2, 40) if 0.0865 ** (2 * n + 3) < 2.0 ** -(bits + 10))
    sqrt_half = Fraction(_round(Fraction(math.sqrt(0.5)), bits))
    return DebyePlan(
        compensated=compensated,
        kappa_max=_KAPPA_MAX[dtype if compensated else torch.float64],
        log_kappa_max=math.log(_KAPPA_MAX[dtype]),
        steps=steps,
        terms=terms,
        order=_round_to_pair(exact_order, bits),
        order_and_half=_round_to_pair(exact_order + Fraction(1, 2), bits),
        shifted=_round_to_pair(shifted, bits),
        shifted_squared=_round_to_pair(shifted * shifted, bits),
        lowered=tuple(float(2 * (shifted - i)) for i in range(steps)),
        magnified=tuple(map(float, growth)),
        offset=_round_to_grid_pair(-Fraction(constant) / (exact_order + Fraction(1, 2)), bits),
        zeroth=descending(SERIES.zeroth),
        first=descending(SERIES.first),
        second=descending(SERIES.second),
        third=descending(SERIES.third),
        half_ln2=_round_to_grid_pair(_log(Fraction(2)) / 2, bits),
        sqrt_half_error=float(_log(sqrt_half) + _log(Fraction(2)) / 2),
        atanh=tuple(2.0 / (2 * j + 3) for j in reversed(range(atanh_terms))),
        direct=_direct_plan(order, terms, constant)
        if dtype == torch.float32 and compensated and steps == 0 and (2 * order).is_integer()
        else None,
    )


# ---- the direct form

# Errors of the polynomials, a fraction of float32's rounding: absolute in G, a term of psi, which counts relative to
# max(1, |psi|); of H and that of atanh relative to A and to the logarithm.
_PHASE_ERROR = 3e-8
_FIT_ERROR = 1e-8


def fit_polynomial(function: Callable[[np.ndarray], np.ndarray], high: float, tolerance: float) -> tuple[float, ...]:
    """Returns the polynomial on [0, high] of the least degree that is within the tolerance, the highest power first."""
    grid = np.linspace(0, high, 401)
    exact = function(grid)
    for degree in range(1, 16):
        fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[0, high])
        polynomial = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1])
        if np.abs(polynomial(grid) - exact).max() < tolerance:
            return tuple(map(float, polynomial.coef[::-1]))
    raise ArithmeticError(f"no polynomial of degree up to 15 is within {tolerance:g}")


def _sum_series_of(polynomials: Sequence[Polynomial], order: float, t: np.ndarray) -> np.ndarray:
    """Returns sum_k (t / v)^k f_k(t^2), k = 1, 2, .."""
    terms = ((t / order) ** k * np.polyval([float(c) for c in f[::-1]], t * t) for k, f in enumerate(polynomials, 1))
    return sum(terms, np.zeros_like(t))


def _atanh_rest(square: np.ndarray) -> np.ndarray:
    """Returns (log((1 + w) / (1 - w)) - 2 w) / w^3 for w^2 < 0.03."""
    return sum((2 / (2 * j + 3) * square**j for j in range(12)), np.zeros_like(square))


def _direct_plan(order: float, terms: int, constant: float) -> DirectPlan:
    """Plans the direct form of an order v >= 15 whose double is an integer; ``constant`` is added to psi, and contains
    -1/2 log(2 pi).
    """
    power = order + 0.5

    def phase(t: np.ndarray) -> np.ndarray:
        return 0.5 * np.log1p(t) + _sum_series_of(SERIES.zeroth[:terms], order, t)

    def first(t: np.ndarray) -> np.ndarray:
        return 0.5 + _sum_series_of(SERIES.first[:terms], order, t)

    def psi(x: float) -> float:
        return x - order - power * math.log(x) + phase(np.array(order / (x - order))).item() + constant

    # psi rises with x from 2 v on; where it is positive throughout, nothing cancels and any center will do.
    low, high = 2 * order, 2.0**40
    while psi(low) < 0 and high - low > 1e-9 * low:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if psi(middle) < 0 else (low, middle)
    center = _round(Fraction(math.frexp(low)[0]), 24)
    octave = -power * math.log(2)
    rest = constant - order - power * math.log(center)
    # x below 2^61 counts; w within (sqrt(2) - 1) / (sqrt(2) + 1) < 0.172 either way.
    largest = 64 * abs(octave) + abs(rest) + 2 * power * 0.172
    grid = 2.0 ** (math.ceil(math.log2(largest)) - 24)
    octave_head, constant_head = (round(number / grid) * grid for number in (octave, rest))
    *phases, last = fit_polynomial(phase, 1.0, _PHASE_ERROR)
    square_of_w = ((math.sqrt(2) - 1) / (math.sqrt(2) + 1)) ** 2
    return DirectPlan(
        order=order,
        order_squared=_round(Fraction(order) ** 2, 24),
        half_order_squared=0.5 * order**2,
        mantissa_bits=struct.unpack("<i", struct.pack("<f", center * math.sqrt(0.5)))[0],
        center=center,
        atanh_slope=2 * power,
        octave=(octave_head / 2**23, (octave - octave_head) / 2**23),
        constant=constant_head,
        to_grid=1.5 * 2**23 * grid,
        atanh=tuple(power * c for c in fit_polynomial(_atanh_rest, square_of_w, 2 * _FIT_ERROR / square_of_w)),
        order_and_half=power,
        phase=(*phases, last + (rest - constant_head)),
        first=fit_polynomial(first, 1.0, _FIT_ERROR * order),
    )
