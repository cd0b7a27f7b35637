"""phi of a square, in the registers of a Triton kernel: the epilogue of the all-pairs kernels, one per score.

With m = v = d/2 - 1, s = sqrt(m^2 + kappa^2), u = s - m, x = u + 2 m and t = m / s, Debye's expansion (``debye`` has
it) is

    phi(kappa) = u - (m + 1/2) log(x / 2 m) + G(t)        G(t) = 1/2 log((1 + t) / 2) + sum_k p^k (Q_k(t^2) - Q_k(1))

No two terms of thousands meet here: the logarithm is at most half of u, so one float holds each to a few roundings of
phi, and all of them vanish at kappa = 0. u comes from an approximate square root; x u = kappa^2 says what it lacks. G
is one polynomial. Orders that need the recurrence go through ``debye_kernel``.
"""

import functools
import math
import struct
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from scf_fast.kernels._debye_series import DebyePlan, fit_polynomial
from scf_fast.kernels._float_pairs import (
    constant_like,
    evaluate_polynomial_kernel,
    negative,
    reciprocal_kernel,
    residual_kernel,
)
from scf_fast.kernels._vmf_common import fold_series, phi_plan
from scf_fast.kernels.debye import debye_kernel

_PHASE_ERROR = 2e-7  # of G, in nats
_LOGARITHM_ERROR = 2e-9  # of log((1 + w) / (1 - w)) / w, which is at least 2


class PhiPlan(NamedTuple):
    """Constants of one order, for an order that needs no recurrence."""

    steps: int  # 0: none; a ``DebyePlan`` stands for the other orders
    order: float  # m
    low_bits: int  # of the float32 2 m / sqrt(2): x 2^-e is brought to 2 m [2^-1/2, 2^1/2)
    octave: float  # (m + 1/2) log 2 / 2^23
    logarithm: tuple[float, ...]  # (m + 1/2) log((1 + w) / (1 - w)) / w, a polynomial of w^2, highest power first
    phase: tuple[float, ...]  # (G - G(0)) / t, highest power first
    phase_constant: float  # G(0)


@functools.lru_cache(maxsize=64)
def phi_kernel_plan(dim: int) -> PhiPlan | DebyePlan:
    """Returns the plan that ``add_phi_kernel`` takes for one dimension."""
    debye = phi_plan(dim, torch.float32)
    if debye.steps:
        return debye
    m = dim / 2 - 1
    series = np.polynomial.Polynomial(fold_series(debye)[::-1])

    def phase(t: np.ndarray) -> np.ndarray:
        return 0.5 * np.log((1 + t) / 2) + series(t) - series(1.0)

    def logarithm(square: np.ndarray) -> np.ndarray:
        return sum((2 / (2 * j + 1) * square**j for j in range(12)), np.zeros_like(square))

    *phase_coefficients, phase_constant = fit_polynomial(phase, 1.0, _PHASE_ERROR)
    largest = (math.sqrt(2.0) - 1) / (math.sqrt(2.0) + 1)  # w at the ends of an octave
    return PhiPlan(
        steps=0,
        order=m,
        low_bits=struct.unpack("<i", struct.pack("<f", m * math.sqrt(2.0)))[0],
        octave=(m + 0.5) * math.log(2.0) / 2**23,
        logarithm=tuple((m + 0.5) * c for c in fit_polynomial(logarithm, largest**2, _LOGARITHM_ERROR)),
        phase=tuple(phase_coefficients),
        phase_constant=phase_constant,
    )


@triton.jit
def add_phi_kernel(square, first, first_tail, second, second_tail, PLAN: tl.constexpr):
    """Returns phi(kappa) plus two addends in two floats each, for float32 kappa^2 >= 0 up to 1e36; NaN goes through.

    The addends cancel most of phi in a score, so they enter before its smaller terms are rounded into the sum.
    """
    if PLAN.steps > 0:
        phi, tail, _, _, _, _ = debye_kernel(tl.sqrt_rn(square), PLAN)
        return phi + first + second + (tail + (first_tail + second_tail))
    else:
        m: tl.constexpr = PLAN.order
        LOGARITHM: tl.constexpr = PLAN.logarithm
        PHASE: tl.constexpr = PLAN.phase
        p = tl.rsqrt(square + m * m)
        u = tl.fma(square + m * m, p, constant_like(-m, p))
        x = u + 2.0 * m
        t = p * m
        # d phi / d kappa^2 = 1 / 2 x = p / 2 (1 + t) to 1 / m; with (1 + t)^-1 to 5 %, of a correction of 2e-7.
        slope = p * tl.fma(t, constant_like(-0.25, t), constant_like(0.485, t))

        bits = x.to(tl.int32, bitcast=True)
        octave_bits = (bits - PLAN.low_bits) & -8388608
        scale = (0x3F800000 - octave_bits).to(tl.float32, bitcast=True)
        # x scale - 2 m, without the rounding of x: in the first octave this is u.
        numerator = tl.fma(u, scale, tl.fma(scale, constant_like(2.0 * m, u), constant_like(-2.0 * m, u)))
        w = numerator * reciprocal_kernel(numerator + 4.0 * m)
        total = u + first + second
        total = tl.fma(octave_bits.to(tl.float32), constant_like(-PLAN.octave, u), total)
        total = tl.fma(negative(w), evaluate_polynomial_kernel(LOGARITHM, 0, len(LOGARITHM), w * w), total)
        tail = tl.fma(residual_kernel(u, x, square), slope, second_tail)
        return total + (
            tl.fma(evaluate_polynomial_kernel(PHASE, 0, len(PHASE), t), t, first_tail + PLAN.phase_constant) + tail
        )
