"""Debye's expansion in exact arithmetic: the coefficients of its polynomials, and the plan for evaluating one order in
one precision. No tensors; ``debye`` has the formulas and does the evaluation.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

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
    )
