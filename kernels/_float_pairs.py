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
        return product, tl.fma(a, b, -product)


@triton.jit
def residual_kernel(a, b, c):
    """``residual`` in registers."""
    if _INTERPRETED:
        product, tail = two_product_kernel(a, b)
        return (c - product) - tail
    else:
        return tl.fma(-a, b, c)


@triton.jit
def subtract_product_kernel(head, tail, FACTOR: tl.constexpr, x, x_tail):
    """``subtract_product`` in registers."""
    product, product_tail = two_product_kernel(x, constant_like(FACTOR[0], x))
    head, rest = two_sum_kernel(head, -product)
    tail += rest - tl.fma(x_tail, constant_like(FACTOR[0], x), product_tail)
    if FACTOR[1] != 0.0:
        tail -= FACTOR[1] * x
    return head, tail


@triton.jit
def exp_kernel(x):
    """exp(x) to a rounding of the result: the product with log2(e), whose error grows with x, is carried as a pair."""
    if x.dtype == tl.float32:
        power, rest = two_product_kernel(x, constant_like(1.4426950216293335, x))
        rest = tl.fma(x, constant_like(1.925962991126617e-08, x), rest)
        y = tl.exp2(power)
        return tl.fma(y, rest * 0.6931471805599453, y)
    else:
        return tl.exp(x)
