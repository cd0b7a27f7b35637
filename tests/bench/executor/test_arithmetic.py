import ctypes
import ctypes.util
from fractions import Fraction

import numpy as np
import pytest

from bench.executor.arithmetic import fma32, fma64, two_product, two_sum


@pytest.fixture
def numbers():
    """Three arrays of float64 with few or many bits, of all sizes, whose sums and products often lie between two
    floats.
    """
    random = np.random.default_rng(0)
    significand = random.integers(1, 1 << random.integers(1, 53, (3, 4000)), dtype=np.int64).astype(np.float64)
    sign = random.choice([-1.0, 1.0], (3, 4000))
    return sign * np.ldexp(significand, random.integers(-60, 10, (3, 4000)))


def fused(function, dtype, *arrays):
    """What the C library's fma, or fmaf, computes."""
    kind = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    call = getattr(ctypes.CDLL(ctypes.util.find_library("m")), function)
    call.restype, call.argtypes = kind, [kind] * 3
    return np.array([call(*map(float, row)) for row in zip(*arrays)], dtype)


@pytest.mark.parametrize(("function", "ours", "dtype"), [("fmaf", fma32, np.float32), ("fma", fma64, np.float64)])
@pytest.mark.parametrize("scale", [1.0, "canceling", "subnormal", "overflowing"])
def test_fma_is_that_of_the_c_library(numbers, function, ours, dtype, scale):
    a, b, c = numbers.astype(dtype)
    with np.errstate(all="ignore"):
        if scale == "canceling":
            c = (-a * b).astype(dtype)
            c[::3] = np.nextafter(c[::3], dtype(0))
        elif scale == "subnormal":
            smallest = np.finfo(dtype).smallest_normal
            # fma64 states that it is not exact for results of more than 50 bits there.
            a, b = (
                np.float32(a).astype(dtype) * smallest,
                np.sign(b) * np.ldexp(dtype(1), np.arange(len(b)) % 30 - 24),
            )
            c = (np.float32(c).astype(dtype) * smallest).astype(dtype) if dtype == np.float32 else np.zeros_like(a)
        elif scale == "overflowing":
            a, c = a * dtype(np.sqrt(np.finfo(dtype).max)), c * np.finfo(dtype).max
            b = b * dtype(np.sqrt(np.finfo(dtype).max))
        got, expected = ours(a, b, c), fused(function, dtype, a, b, c)
        assert (got != (a * b + c).astype(dtype)).any() or scale != 1.0, "these numbers need no fma"
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("ours", [fma32, fma64])
def test_fma_of_special_values(ours):
    dtype = np.float32 if ours is fma32 else np.float64
    values = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan], dtype)
    a, b, c = (x.ravel() for x in np.meshgrid(values, values, values))
    with np.errstate(all="ignore"):
        got, expected = ours(a, b, c), fused("fmaf" if dtype == np.float32 else "fma", dtype, a, b, c)
    np.testing.assert_array_equal(got, expected)
    ordinary = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[ordinary]), np.signbit(expected[ordinary]))


def test_sums_and_products_are_exact(numbers):
    a, b, _ = numbers[:, :500]
    for operation, function in (("__add__", two_sum), ("__mul__", two_product)):
        for x, y, head, tail in zip(a, b, *function(a, b)):
            assert Fraction(head) + Fraction(tail) == getattr(Fraction(x), operation)(Fraction(y))
