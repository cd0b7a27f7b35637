"""Mutual likelihood of Gaussian faces in the registers of a Triton kernel: the scores of a tile of products for scalar
variances, and for a variance in each dimension the sums that take the place of the product.

Nothing in sum_l (a - b)^2 / (u + v) + log(u + v) is a product of one face's number with the other's, so every
(row, column, dimension) costs instructions outside of the tensor cores. The fractions of several dimensions are brought
to one denominator, n / p + m / q = (n q + m p) / p q, which serves them as the argument of one logarithm too:

    2 additions             a - b,  u + v
    1 product               (a - b)^2
    4 of multiply, fma      n q + m p in two and p q in one for each merge, the square times a neighbor's variance
    1 reciprocal, 1 logarithm, 2 fma for every K dimensions

With n = (a - b)^2, K dimensions have 2 K additions, K squares, 3 (K - 1) for merges and 4 at the end: 6 + 1 / K each.
K = 1, which must add its logarithm, needs 7; 6 is the floor of this form. For K = 4 that is 6.25 issue slots, of which
0.5 go to the unit for reciprocals and logarithms: at a sixteenth of a slot's lanes a clock, 4 of the 6.25. The
compiler adds what brings the operands from shared memory.

Variances of a dimension are relative to a reference that all faces share, so that the product of K sums neither
overflows nor vanishes and the logarithms of a score stay small; the host adds the reference's logarithm in float64.
"""

import triton
import triton.language as tl

from scf_fast.kernels._common import INTERPRETED
from scf_fast.kernels._float_pairs import constant_like, negative, reciprocal_kernel

FACTORS = 4  # dimensions in one reciprocal and one logarithm
SHORT_SUM = 64  # dimensions whose terms are added up before they are added to the others
_FACTORS, _SHORT_SUM = tl.constexpr(FACTORS), tl.constexpr(SHORT_SUM)
_STAGES = tl.constexpr(3)  # turns of the loop whose operands are under way or there
_LOG_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _log2_kernel(x):
    """Returns the binary logarithm of a normal x in one instruction, to 2^-22 within an octave of 1, elsewhere to
    2^-22 of itself.
    """
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def scalar_variance_scores(product, terms1, terms2, D: tl.constexpr):
    """Returns the scores of a strip of products for scalar variances; the terms of a face are 1 / (|mu| sqrt(c)),
    variance / c, an addend, and 1 / c, where c is the reference.
    """
    weight1, variance1, addend1, scale = terms1
    weight2, variance2, addend2, _ = terms2
    gap = tl.fma(product * negative(weight1)[:, None], weight2[None, :], scale[:, None])  # (1 - cos) / c
    variance = variance1[:, None] + variance2[None, :]
    score = tl.fma(negative(gap), reciprocal_kernel(variance), addend1[:, None] + addend2[None, :])
    return tl.fma(_log2_kernel(variance), constant_like(-0.5 * D * _LOG_2, score), score)


@triton.jit
def diagonal_variance_scores(sums, terms1, terms2):
    """Returns the scores of a strip of ``diagonal_sums``; only the addends of the terms count."""
    return tl.fma(sums, constant_like(-0.5, sums), terms1[2][:, None] + terms2[2][None, :])


@triton.jit
def _load_factors(rows_ptr, start, AXIS: tl.constexpr):
    """Returns the numbers of ``FACTORS`` dimensions from ``start`` on, in one load; each has BLOCK, and 1 in AXIS."""
    numbers = tl.load(rows_ptr[:, None] + (start + tl.arange(0, _FACTORS))[None, :])
    even, odd = tl.split(tl.reshape(numbers, (numbers.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (
        tl.expand_dims(first, AXIS),
        tl.expand_dims(second, AXIS),
        tl.expand_dims(third, AXIS),
        tl.expand_dims(fourth, AXIS),
    )


@triton.jit
def _add_fractions(numerator1, denominator1, numerator2, denominator2):
    """Returns numerator and denominator of the sum of two fractions."""
    return tl.fma(numerator1, denominator2, numerator2 * denominator1), denominator1 * denominator2


@triton.jit
def _two_fractions(mu1, variance1, mu2, variance2, AT: tl.constexpr):
    """Returns the sum of (a - b)^2 / (u + v) over the dimensions AT and AT + 1, as numerator and denominator."""
    difference1, difference2 = mu1[AT] - mu2[AT], mu1[AT + 1] - mu2[AT + 1]
    total1, total2 = variance1[AT] + variance2[AT], variance1[AT + 1] + variance2[AT + 1]
    return _add_fractions(difference1 * difference1, total1, difference2 * difference2, total2)


# The statements of ``_add_factors`` for one score: $1 .. $4 a, $5 .. $8 u, $9 .. $12 b, $13 .. $16 v, $17 the sum.
_FACTORS_ASSEMBLY = tl.constexpr(
    """{ .reg .f32 a, b, u, v, n, p, m, q;
    sub.rn.f32 a, $1, $9;  add.rn.f32 u, $5, $13;  mul.rn.f32 a, a, a;
    sub.rn.f32 b, $2, $10; add.rn.f32 v, $6, $14;  mul.rn.f32 b, b, b;
    mul.rn.f32 n, b, u;    fma.rn.f32 n, a, v, n;  mul.rn.f32 p, u, v;
    sub.rn.f32 a, $3, $11; add.rn.f32 u, $7, $15;  mul.rn.f32 a, a, a;
    sub.rn.f32 b, $4, $12; add.rn.f32 v, $8, $16;  mul.rn.f32 b, b, b;
    mul.rn.f32 m, b, u;    fma.rn.f32 m, a, v, m;  mul.rn.f32 q, u, v;
    mul.rn.f32 m, m, p;    fma.rn.f32 n, n, q, m;  mul.rn.f32 p, p, q;
    rcp.approx.ftz.f32 q, p;
    lg2.approx.ftz.f32 p, p;
    fma.rn.f32 n, n, q, $17;
    fma.rn.f32 $0, p, 0f3F317218, n;
    }"""
)


@triton.jit
def _add_factors(mu1, variance1, mu2, variance2, sums):
    """Returns sums plus the terms of ``FACTORS`` dimensions.

    Compiled, it is one block of assembly, so that a score follows the other: Triton has each operation of all scores of
    a thread before the next, and ptxas does not find back from the registers that this takes (255 and spills).
    """
    if _INTERPRETED:
        left, left_product = _two_fractions(mu1, variance1, mu2, variance2, 0)
        right, right_product = _two_fractions(mu1, variance1, mu2, variance2, 2)
        numerator, denominator = _add_fractions(left, left_product, right, right_product)
        return sums + numerator / denominator + tl.log2(denominator) * _LOG_2
    else:
        return tl.inline_asm_elementwise(
            _FACTORS_ASSEMBLY,
            "=f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
            mu1 + variance1 + mu2 + variance2 + (sums,),
            tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def diagonal_sums(
    rows1_ptr,  # (BLOCK,) pointers to the rows of the tile: D directions / sqrt(c), then D variances / c
    rows2_ptr,  # (BLOCK,) to its columns
    D: tl.constexpr,
):
    """Returns sum_l (a - b)^2 / (u + v) + log(u + v) of a tile; D is a multiple of ``FACTORS``."""
    total = tl.zeros((rows1_ptr.shape[0], rows2_ptr.shape[0]), tl.float32)
    # Short sums round off less, and most of the error would be theirs.
    for first in range(0, D, _SHORT_SUM):
        sums = tl.zeros_like(total)
        for start in tl.range(first, min(first + _SHORT_SUM, D), _FACTORS, num_stages=_STAGES):
            mu1, variance1 = _load_factors(rows1_ptr, start, 1), _load_factors(rows1_ptr + D, start, 1)
            mu2, variance2 = _load_factors(rows2_ptr, start, 0), _load_factors(rows2_ptr + D, start, 0)
            sums = _add_factors(mu1, variance1, mu2, variance2, sums)
        total += sums
    return total
