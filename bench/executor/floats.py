"""Floating-point instructions on arrays, in float32 and float64."""

import numpy as np

from bench.executor.approximation import Approximation
from bench.executor.arithmetic import F32, F64, I64, U32, U64, Array, bits, fma32, fma64, two_product
from bench.executor.errors import UnknownInstructionError
from bench.executor.integers import COMPARISONS
from bench.executor.program import Instruction


def flush_subnormals(values: Array) -> Array:
    """Returns the float32 numbers with zeros, of the same sign, in the place of subnormal ones."""
    return np.where(np.abs(values) < F32(2.0**-126), np.copysign(F32(0), values), values)


def compare_floats(name: str, a: Array, b: Array) -> Array:
    """Returns what ``setp`` with this comparison says of two arrays."""
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return ~unordered if name == "num" else unordered
    if len(name) == 3 and name.endswith("u"):  # true for NaN
        return COMPARISONS[name[:2]](a, b) | unordered
    return COMPARISONS[name](a, b) & ~unordered


def float_instruction(instruction: Instruction, operands: list[Array], approximation: Approximation) -> Array:
    """Returns the result of an arithmetic instruction; operands have its type."""
    base, modifiers = instruction.base, instruction.modifiers
    double = instruction.type == "f64"
    if base == "neg":
        return -operands[0]
    if base == "abs":
        return np.abs(operands[0])
    flush = "ftz" in modifiers and not double
    if flush:
        operands = [flush_subnormals(x) for x in operands]
    result = _arithmetic(instruction, operands, double)
    if result is None:
        if double:
            result = _approximate_float64(instruction, operands[0], approximation)
        else:
            result = approximation.approximate_float32(instruction, operands)
    return flush_subnormals(result) if flush else result


def _arithmetic(instruction: Instruction, x: list[Array], double: bool) -> Array | None:
    """Returns the correctly rounded result of an IEEE operation, None for others."""
    base, modifiers = instruction.base, instruction.modifiers
    if base == "add":
        return x[0] + x[1]
    if base == "sub":
        return x[0] - x[1]
    if base == "mul":
        return x[0] * x[1]
    if base in ("fma", "mad"):
        return (fma64 if double else fma32)(*x)
    if base == "min":
        return (np.minimum if "NaN" in modifiers else np.fmin)(x[0], x[1])
    if base == "max":
        return (np.maximum if "NaN" in modifiers else np.fmax)(x[0], x[1])
    if base == "div" and "rn" in modifiers:
        return x[0] / x[1]
    if base == "sqrt" and "rn" in modifiers:
        return np.sqrt(x[0])
    return None


def _approximate_float64(instruction: Instruction, x: Array, approximation: Approximation) -> Array:
    base = instruction.base
    if base not in ("rcp", "rsqrt"):
        raise UnknownInstructionError(instruction.opcode)
    if "ftz" in instruction.modifiers:  # of the upper half of the operand, and into the upper half of the result
        high = ((bits(x) >> U64(32)) << U64(32)).view(F64)
        y = 1 / high if base == "rcp" else 1 / np.sqrt(high)
        word = (bits(y) >> U64(32)).astype(I64)
        word = word + approximation.steps(y, instruction) * (np.isfinite(y) & (y != 0))
        return np.ascontiguousarray(word.astype(U64) << U64(32)).view(F64)
    if base == "rcp":
        raise UnknownInstructionError(instruction.opcode)
    y = 1 / np.sqrt(x)  # off by two roundings: one step of Newton's method gives the exact result to a rounding
    square, square_tail = two_product(y, y)
    product, tail = two_product(square, x)
    correction = ((1 - product) - tail - square_tail * x) * 0.5 * y
    return approximation.off_by_steps(np.where(np.isfinite(correction), y + correction, y), instruction)


def bfloat16_bits(values: Array) -> Array:
    """Returns float32 numbers rounded to bfloat16, as 16-bit integers."""
    integers = bits(values)
    rounded = integers + U32(0x7FFF) + (integers >> U32(16) & U32(1))
    return (np.where(np.isnan(values), U32(0x7FFF0000), rounded) >> U32(16)).astype(np.uint16)


def from_bfloat16(integers: Array) -> Array:
    """Returns bfloat16 numbers, given as 16-bit integers, in float32."""
    return np.ascontiguousarray(integers.astype(U32) << U32(16)).view(F32)
