"""Sums and products in two floats: a pair (head, tail) is the unevaluated sum of both, which holds about twice the
digits of one. PyTorch functions in float64 first, then their Triton twins in the type of their arguments.

Launch kernels that use the twins with ``enable_fp_fusion=False``: contracting a product into a sum destroys the errors
that these functions compute.
"""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import INTERPRETED

Pair = tuple[torch.Tensor, torch.Tensor]

# ---- PyTorch, float64

_SPLITTER = 134217729.0  # 2^27 + 1


def two_sum(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Returns a + b and its rounding error (Knuth)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def fast_two_sum(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Returns a + b and its rounding error for |a| >= |b| or a = 0 (Dekker)."""
    total = a + b
    return total, b - (total - a)


def _split(a: torch.Tensor) -> Pair:
    shifted = a * _SPLITTER
    high = shifted - (shifted - a)
    return high, a - high


def two_product(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Returns a b and its rounding error, by Dekker's splitting: PyTorch has no fused multiply-add."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def residual(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Returns c - a b for a product close to c."""
    product, tail = two_product(a, b)
    return (c - product) - tail


def subtract_product(
    head: torch.Tensor, tail: torch.Tensor, factor: tuple[float, float], x: torch.Tensor, x_tail: torch.Tensor
) -> Pair:
    """Returns head + tail - factor (x + x_tail) in two floats."""
    product, product_tail = two_product(x, torch.full_like(x, factor[0]))
    head, rest = two_sum(head, -product)
    return head, tail + (rest - product_tail - factor[0] * x_tail - factor[1] * x)


# ---- Triton, float32 or float64

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def constant_like(VALUE: tl.constexpr, like):
    """Returns VALUE in the shape and type of ``like``: outside plain arithmetic with a tensor, Triton would make a
    number a float32.
    """
    return tl.full(like.shape, VALUE, like.dtype)


@triton.jit
def negative(x):
    """Returns -x as a product, which is free: it becomes a sign of whatever takes it. Triton's own minus is 0 - x, a
    subtraction.
    """
    return x * -1.0


@triton.jit
def reciprocal_kernel(x):
    """Returns 1 / x in one instruction, to a unit in the last place, for normal x below 2^126."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def evaluate_polynomial_kernel(COEFFICIENTS: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr, x):
    """Returns the polynomial of the COUNT >= 2 coefficients from START on, the highest power first."""
    value = tl.fma(x, constant_like(COEFFICIENTS[START], x), constant_like(COEFFICIENTS[START + 1], x))
    for i in tl.static_range(2, COUNT):
        value = tl.fma(value, x, constant_like(COEFFICIENTS[START + i], x))
    return value


@triton.jit
def two_sum_kernel(a, b):
    """``two_sum`` in registers."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


@triton.jit
def fast_two_sum_kernel(a, b):
    """``fast_two_sum`` in registers."""
    total = a + b
    return total, b - (total - a)


@triton.jit
def two_product_kernel(a, b):
    """``two_product`` in registers, by fused multiply-add."""
    product = a * b
    if _INTERPRETED:  # its fma rounds twice
        splitter: tl.constexpr = 4097.0 if a.dtype == tl.float32 else 134217729.0
        a_high = a * splitter - (a * splitter - a)
        b_high = b * splitter - (b * splitter - b)
        a_low = a - a_high
        b_low = b - b_high
        return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    else:
        return product, tl.fma(a, b, negative(product))


@triton.jit
def residual_kernel(a, b, c):
    """``residual`` in registers."""
    if _INTERPRETED:
        product, tail = two_product_kernel(a, b)
        return (c - product) - tail
    else:
        return tl.fma(negative(a), b, c)


@triton.jit
def subtract_product_kernel(head, tail, FACTOR: tl.constexpr, x, x_tail):
    """``subtract_product`` in registers."""
    product, product_tail = two_product_kernel(x, constant_like(FACTOR[0], x))
    head, rest = two_sum_kernel(head, negative(product))
    tail += rest - tl.fma(x_tail, constant_like(FACTOR[0], x), product_tail)
    if FACTOR[1] != 0.0:
        tail -= FACTOR[1] * x
    return head, tail


@triton.jit
def exp_kernel(x):
    """Returns exp(x): in float32 to 1e-7 of the result, for x <= 88, and 0 below the smallest normal number.

    exp(n log 2 + r) = 2^n exp(r), the latter by a polynomial on [-1/2 log 2, 1/2 log 2]: the hardware's exp2 is good to
    two units in the last place only, and the rounding of its argument grows with x.
    """
    if x.dtype == tl.float32:
        POLYNOMIAL: tl.constexpr = (0.001392625083, 0.008363232884, 0.04166655421, 0.1666657667, 0.5, 1.0, 1.0)
        x = tl.where(x < -88.0, -88.0, x)  # n is -127 there, and the power 0
        rounded = tl.fma(x, constant_like(1.4426950408889634, x), constant_like(12582912.0, x))  # + 3/2 2^23
        n = rounded - 12582912.0
        r = residual_kernel(n, constant_like(0.6931471824645996, x), x)
        r = tl.fma(n, constant_like(1.904654299957768e-09, x), r)
        power = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        return evaluate_polynomial_kernel(POLYNOMIAL, 0, len(POLYNOMIAL), r) * power
    else:
        return tl.exp(x)
