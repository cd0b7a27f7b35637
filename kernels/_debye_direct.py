"""float32 psi, A and 1 - A in a Triton kernel at orders that need no recurrence: half the instructions of the general
form of ``debye``, and smaller errors.

With x = m + s, s = sqrt(m^2 + kappa^2), p = 1 / s and t = m / s, Debye's expansion at an unshifted order v = m reads

    psi + constant = x - (v + 1/2) log x + G(t)          A = kappa (1 / x - p^2 H(t))

where G and H are smooth on [0, 1] and become one polynomial each. x is the variable throughout:

* x (x - 2 m) = kappa^2, so the residual of one product gives what the approximate square root lacks.
* 1 - A = (x - kappa) / x + kappa p^2 H(t), and x - kappa is an exact difference where 1 - A is small.
* log x = octaves log(2) + log(f0) + 2 atanh(w), w = (f - f0) / (f + f0), where f0 is the mantissa of the x at which psi
  crosses zero: w vanishes where the other terms cancel. Octaves, constant and the leading part of (2 v + 1) w lie on a
  grid on which their sum is exact.

Launch with ``enable_fp_fusion=False`` (see ``_float_pairs``).
"""

import triton
import triton.language as tl

from scf_fast.kernels._float_pairs import (
    constant_like,
    evaluate_polynomial_kernel,
    negative,
    residual_kernel,
)

# From here on, x - 2 m may need rounding, and s - kappa = m^2 p / 2 to a rounding of m.
_LARGE = tl.constexpr(2.0**23)


@triton.jit
def inverse_square_kernel(x):
    """Returns 1 / x for positive normal x as the square of an approximate root: to 3e-7, for one multiplication."""
    y = tl.rsqrt(x)
    return y * y


@triton.jit
def root_kernel(kappa, PLAN: tl.constexpr):
    """Returns p = 1 / s to 1.3e-7, x = v + s rounded, the tail of x, and x + tail - kappa."""
    total = tl.fma(kappa, kappa, constant_like(PLAN.order_squared, kappa))
    p = tl.rsqrt(total)
    x = tl.fma(total, p, constant_like(PLAN.order, kappa))
    below = x - 2.0 * PLAN.order
    product = x * below
    tail = (residual_kernel(x, below, product) - residual_kernel(kappa, kappa, product)) * (0.5 * p)
    difference = x - kappa
    large_gap = tl.fma(p, constant_like(PLAN.half_order_squared, p), constant_like(PLAN.order, p))
    tail = tl.where(kappa > _LARGE, large_gap - difference, tail)
    return p, x, tail, difference + tail


@triton.jit
def phase_kernel(x, x_tail, x_inverse, t, PLAN: tl.constexpr):
    """Returns x_tail - (v + 1/2) log(x + x_tail) + G(t) + constant in two floats, for normal x below 2^61: the first is
    a grid number, the second a few units of the grid at most.

    ``x_inverse`` may be as far from 1 / x as 1e-3: it multiplies x_tail alone.
    """
    ATANH: tl.constexpr = PLAN.atanh
    PHASE: tl.constexpr = PLAN.phase
    bits = x.to(tl.int32, bitcast=True)
    octave_bits = (bits - PLAN.mantissa_bits) & -8388608
    f = (bits - octave_bits).to(tl.float32, bitcast=True)
    octaves = octave_bits.to(tl.float32)  # times 2^23
    numerator = f - PLAN.center
    inverse = inverse_square_kernel(f + PLAN.center)
    w = numerator * inverse
    # numerator - w (f + center), where f + center = numerator + 2 center
    w_tail = (
        tl.fma(negative(w), numerator, residual_kernel(w, constant_like(2.0 * PLAN.center, w), numerator)) * inverse
    )
    square = w * w
    slope = constant_like(PLAN.atanh_slope, w)
    on_grid = tl.fma(w, slope, constant_like(PLAN.to_grid, w)) - PLAN.to_grid
    coarse = tl.fma(octaves, constant_like(PLAN.octave[0], w), constant_like(PLAN.constant, w)) - on_grid
    tail = evaluate_polynomial_kernel(PHASE, 0, len(PHASE), t)
    tail = tl.fma(octaves, constant_like(PLAN.octave[1], w), tail) + residual_kernel(w, slope, on_grid)
    tail = tl.fma(w_tail, constant_like(-PLAN.atanh_slope, w), tail)
    tail = tl.fma(negative(w * square), evaluate_polynomial_kernel(ATANH, 0, len(ATANH), square), tail)
    # d psi / d x along the tail of x
    tail = tl.fma(x_tail, tl.fma(x_inverse, constant_like(-PLAN.order_and_half, x), constant_like(1.0, x)), tail)
    return coarse, tail


@triton.jit
def direct_kernel(kappa, PLAN: tl.constexpr):
    """Evaluates one order in registers.

    Args:
        kappa: float32 tensor in 0 .. 2^60, or NaN.
        PLAN: the ``direct`` part of a ``debye_plan``.
    Returns:
        x = v + s and psi + constant - x in two floats, a grid number and the rest; A, 1 - A; 1 / s to 1.3e-7 and 1 / x,
        of which further derivatives are made.
    """
    FIRST: tl.constexpr = PLAN.first
    p, x, x_tail, gap = root_kernel(kappa, PLAN)
    y = inverse_square_kernel(x)
    x_inverse = tl.fma(y, tl.fma(negative(x_tail), y, residual_kernel(x, y, constant_like(1.0, x))), y)
    t = p * PLAN.order
    first = kappa * (p * p * evaluate_polynomial_kernel(FIRST, 0, len(FIRST), t))
    ratio = tl.fma(kappa, x_inverse, negative(first))
    ratio = tl.minimum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)
    complement = tl.fma(gap, x_inverse, first)
    phase, phase_tail = phase_kernel(x, x_tail, x_inverse, t, PLAN)
    return x, phase, phase_tail, ratio, complement, p, x_inverse
