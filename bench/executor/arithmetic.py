"""Exact building blocks in float32 and float64: fused multiply-add, sums and products with their rounding errors."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

F32, F64 = np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I16, I32, I64 = np.int16, np.int32, np.int64

_BELOW_FLOAT32 = U64((1 << 29) - 1)  # bits of a float64's fraction that float32 does not have
_HALF_OF_FLOAT32 = U64(1 << 28)
_SMALLEST_NORMAL_FLOAT32 = 2.0**-126


def bits(values: Array) -> Array:
    """Returns the numbers as unsigned integers of their size."""
    values = np.ascontiguousarray(values)
    return values.view({2: U16, 4: U32, 8: U64}[values.itemsize])


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a + b and its rounding error (Knuth)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a b and its rounding error (Dekker), for float64 that neither overflows nor underflows."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Array) -> tuple[Array, Array]:
    shifted = a * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - a)
    return high, a - high


def round_to_odd(rounded: Array, error: Array) -> Array:
    """Returns x rounded to odd, so that rounding once more to fewer bits rounds x itself; x = rounded + error exactly,
    and rounded is the float64 nearest to x.
    """
    integers = np.ascontiguousarray(rounded).view(I64)
    inexact = (error != 0) & np.isfinite(rounded) & np.isfinite(error) & ((integers & 1) == 0)
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    return np.where(inexact, integers + step, integers).view(F64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Returns a b + c in float32, rounded once."""
    product = a.astype(F64) * b.astype(F64)  # exact
    addend = c.astype(F64)
    total = product + addend
    # Rounding the float64 sum once more is right unless it lies exactly between two float32 numbers, or float32 holds
    # fewer bits there.
    twice = (bits(total) & _BELOW_FLOAT32) == _HALF_OF_FLOAT32
    twice |= (np.abs(total) < _SMALLEST_NORMAL_FLOAT32) & (total != 0)
    if twice.any():
        product, addend = (np.broadcast_to(x, total.shape)[twice] for x in (product, addend))
        total[twice] = round_to_odd(*two_sum(product, addend))
    return total.astype(F32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Returns a b + c in float64, rounded once (Boldo and Melquiond, on operands scaled into the middle of the range).

    Not exact for subnormal results of more than 50 bits, between 2^-1025 and 2^-1022.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    plain = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)) | (a == 0) | (b == 0)
    a_fraction, a_exponent = np.frexp(np.where(plain, 1.0, a))
    b_fraction, b_exponent = np.frexp(np.where(plain, 1.0, b))
    exponent = a_exponent + b_exponent
    addend = np.ldexp(np.where(plain, 0.0, c), np.clip(-exponent, -2000, 2000))
    product, product_tail = two_product(a_fraction, b_fraction)
    tail, rest = two_sum(addend, product_tail)
    head, head_tail = two_sum(product, tail)
    result, error = two_sum(head, round_to_odd(*two_sum(head_tail, rest)))
    scaled = np.ldexp(result, exponent)
    # A result that becomes subnormal is rounded there once: from the value rounded to odd.
    subnormal = (np.abs(scaled) < 2.0**-1022) & (result != 0)
    scaled = np.where(subnormal, np.ldexp(round_to_odd(result, error), exponent), scaled)
    addend_alone = (np.abs(addend) == np.inf) | (np.isinf(c) & np.isfinite(a) & np.isfinite(b))
    return np.where(addend_alone, c, np.where(plain, a * b + c, scaled))


def float32_spacing(values: Array) -> Array:
    """Returns the distance between adjacent float32 numbers at each float64 value."""
    exponent = np.frexp(np.where(np.isfinite(values) & (values != 0), np.abs(values), 1.0))[1]
    return np.ldexp(1.0, np.maximum(exponent - 24, -149))
