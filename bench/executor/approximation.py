"""Where in its documented bound an approximate instruction lands.

PTX ISA 9.1, section 9.7.3:

    rsqrt.approx.f32    relative 2^-22.9          ex2.approx.f32     2 ulp from the correctly rounded result
    rcp.approx.f32      1 ulp                     lg2.approx.f32     2^-22, absolute in (0.5, 2), relative elsewhere
    sqrt.approx.f32     relative 2^-23            div.full.f32, div.approx.f32     2 ulp
    rcp.approx.ftz.f64  20 bits                   rsqrt.approx.f64   none given; 1 ulp (CUDA C++ guide, rsqrt())
    mma.sync            none given, nor an order of its sums: "at least single precision"

How tensor cores add was measured by Khattak and Mikaitis (arXiv 2512.07004): the terms of a block of products, and the
sum so far, are cut at the 24 + extra bits of the largest one, added, and the sum is cut to 24 bits.
"""

import enum
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.executor.arithmetic import F32, F64, I64, U64, Array, float32_spacing
from bench.executor.errors import UnknownInstructionError
from bench.executor.program import Instruction

_PRODUCT_BOUND = 2.0**-23  # of the largest term, for every block of products; assumed


class Mode(enum.Enum):
    EXACT = "exact"  # correctly rounded
    PLUS = "plus"  # as far above the exact result as the bound allows
    MINUS = "minus"
    RANDOM = "random"  # anywhere within; for each kind of instruction a function of the exact result, as on a GPU


class _Cut(enum.Enum):
    """How tensor cores cut: bits beyond 24 that a term keeps, and blocks of 8 products (tf32: 4) added at once."""

    A100 = (1, 1)
    H100 = (2, 2)


class TensorCores(enum.Enum):
    EXACT = "exact"  # the exact sum, rounded once
    BOUNDED = "bounded"  # within a bound, where the mode says
    A100 = "a100"
    H100 = "h100"


@dataclass(frozen=True)
class Approximation:
    """How the inexact instructions of a launch behave.

    Attributes:
        signs: the mode of single instructions, by their place in the program, in the place of ``mode``.
    """

    mode: Mode = Mode.EXACT
    tensor_cores: TensorCores = TensorCores.EXACT
    seed: int = 0
    signs: Mapping[int, Mode] = field(default_factory=dict)

    def _mode_at(self, instruction: Instruction) -> Mode:
        return self.signs.get(instruction.site, self.mode)

    def _uniform(self, exact: Array, instruction: Instruction) -> Array:
        """Returns a number in -1 .. 1 for each exact result (the mixing function of SplitMix64)."""
        x = np.ascontiguousarray(exact).view(U64)
        kind = zlib.crc32(instruction.base.encode())
        x = x ^ U64((kind * 0x9E3779B97F4A7C15 + self.seed * 0xD1342543DE82EF95) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ x >> U64(shift)) * U64(factor)
        return x.astype(F64) * 2.0**-63 - 1

    def within(self, exact: Array, bound: Array, instruction: Instruction) -> Array:
        """Returns float32 numbers no further than ``bound`` from the exact float64 results."""
        nearest = exact.astype(F32)
        mode = self._mode_at(instruction)
        if mode is Mode.EXACT:
            return nearest
        if mode is Mode.RANDOM:
            target = exact + bound * self._uniform(exact, instruction)
        else:
            target = exact + bound * (1 if mode is Mode.PLUS else -1)
        value = target.astype(F32)
        outside = np.abs(value.astype(F64) - exact) > bound
        value = np.where(outside, np.nextafter(value, nearest), value)
        approximate = np.isfinite(exact) & (exact != 0) & (bound > 0) & np.isfinite(value)
        return np.where(approximate, value, nearest).astype(F32)

    def steps(self, exact: Array, instruction: Instruction) -> Array:
        """Returns -1, 0 or 1 for each result: units in the last place that a float64 instruction is off."""
        mode = self._mode_at(instruction)
        if mode is Mode.RANDOM:
            return np.rint(1.5 * self._uniform(exact, instruction)).astype(I64).clip(-1, 1)
        return np.full(exact.shape, {Mode.EXACT: 0, Mode.PLUS: 1, Mode.MINUS: -1}[mode], I64)

    # ---- instructions

    def approximate_float32(self, instruction: Instruction, operands: list[Array]) -> Array:
        """Returns ``rsqrt``, ``sqrt``, ``rcp``, ``div``, ``ex2`` or ``lg2`` of float32 numbers."""
        name = instruction.base
        x = operands[0].astype(F64)
        if name == "rsqrt":
            exact = 1 / np.sqrt(x)
            bound = np.abs(exact) * 2.0**-22.9
        elif name == "sqrt":
            exact = np.sqrt(x)
            bound = exact * 2.0**-23
        elif name == "rcp":
            exact = 1 / x
            bound = float32_spacing(exact)
        elif name == "div":
            divisor = operands[1].astype(F64)
            exact = x / divisor
            bound = 2 * float32_spacing(exact)
            if "approx" in instruction.modifiers:  # documented to give 0, or NaN for inf / y, for |y| in (2^126, 2^128)
                huge = (np.abs(divisor) > 2.0**126) & np.isfinite(divisor)
                exact = np.where(huge, np.where(np.isinf(x), np.nan, exact * 0), exact)
        elif name == "ex2":
            exact = np.exp2(x)
            exact = np.where(np.isfinite(exact), exact.astype(F32).astype(F64), exact)
            bound = np.where(x == 0, 0.0, 2 * float32_spacing(exact))  # ex2(0) = 1 is documented
        elif name == "lg2":
            exact = np.log2(x)
            bound = 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact))
        else:
            raise UnknownInstructionError(instruction.opcode)
        return self.within(exact, np.where(np.isfinite(exact), bound, 0.0), instruction)

    def off_by_steps(self, exact: Array, instruction: Instruction) -> Array:
        """Returns the float64 numbers, or one of their neighbors."""
        step = self.steps(exact, instruction)
        return np.where(step > 0, np.nextafter(exact, np.inf), np.where(step < 0, np.nextafter(exact, -np.inf), exact))

    def product(self, left: Array, right: Array, addend: Array, block: int, instruction: Instruction) -> Array:
        """Returns left @ right + addend over the last two dimensions.

        Args:
            left, right: float64, the exact factors.
            addend: float32.
            block: products that an A100 adds at once.
        """
        if self.tensor_cores in (TensorCores.A100, TensorCores.H100):
            extra_bits, blocks = _Cut[self.tensor_cores.name].value
            return _cut_product(left, right, addend, min(left.shape[-1], block * blocks), extra_bits)
        exact = left @ right + addend
        if self.tensor_cores is TensorCores.EXACT:
            return exact.astype(F32)
        sizes = np.abs(left), np.abs(right)
        largest = sizes[0].max(axis=-1)[..., :, None] * sizes[1].max(axis=-2)[..., None, :]
        largest = np.maximum(largest, np.maximum(np.abs(addend), np.abs(exact)))
        inexact = np.isfinite(exact) & (sizes[0] @ sizes[1] > 0)  # addend + 0 is the addend
        bound = np.where(inexact, largest * (_PRODUCT_BOUND * max(1, left.shape[-1] // block)), 0.0)
        return self.within(np.where(exact == 0, 0.0, exact), bound, instruction)


def _cut_product(left: Array, right: Array, addend: Array, block: int, extra_bits: int) -> Array:
    """Returns left @ right + addend as tensor cores that cut add it up, a block of products after the other."""
    total = addend.astype(F64)
    # One product of all elements after another: NumPy reduces a short axis slowly, and the arrays stay in cache.
    rows, columns = np.moveaxis(left, -1, 0)[..., :, None], np.moveaxis(right, -2, 0)[..., None, :]
    for start in range(0, left.shape[-1], block):
        terms = [total, *(rows[k] * columns[k] for k in range(start, start + block))]
        largest = np.abs(total)
        for term in terms[1:]:
            np.maximum(largest, np.abs(term), out=largest)
        unit = _last_place(largest, 24 + extra_bits)
        cut = sum(np.trunc(term * (1 / unit)) for term in terms) * unit
        total = np.where(np.isfinite(largest), cut, sum(terms))
        unit = _last_place(total, 24)
        total = np.where(np.isfinite(total), np.trunc(total / unit) * unit, total)
    return total.astype(F32)


def _last_place(values: Array, mantissa_bits: int) -> Array:
    """Returns the unit in the last place of numbers with so many bits."""
    ordinary = np.isfinite(values) & (values != 0)
    return np.ldexp(1.0, np.frexp(np.where(ordinary, values, 1.0))[1] - mantissa_bits)
