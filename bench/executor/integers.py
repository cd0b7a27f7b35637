"""Integer and bit instructions on arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.executor.arithmetic import I32, I64, U16, U32, U64, Array
from bench.executor.errors import UnknownInstructionError
from bench.executor.program import Instruction, Operand, number_type

Read = Callable[[Operand, Any], Array]

_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "not": np.invert,
}
COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_WIDER = {"s32": I64, "u32": U64, "s16": I32, "u16": U32}


def compare_integers(name: str, a: Array, b: Array) -> Array:
    """Returns what ``setp`` with this comparison says of two arrays."""
    return COMPARISONS[name](a, b)


def integer_instruction(instruction: Instruction, read: Read) -> Array:
    """Returns the result; ``read(operand, type)`` gives the operands, whose types are the instruction's."""
    base, modifiers = instruction.base, instruction.modifiers
    sources = instruction.operands[1:]
    dtype = number_type(instruction.type)
    if base in ("shl", "shr"):
        return _shift(base, read(sources[0], dtype), read(sources[1], U32))
    if base == "bfe":
        return _extract_bits(*(read(sources[0], dtype), read(sources[1], U32), read(sources[2], U32)))
    if "wide" in modifiers:
        wide = _WIDER[instruction.type]
        product = read(sources[0], dtype).astype(wide) * read(sources[1], dtype).astype(wide)
        return product + read(sources[2], wide) if base == "mad" else product
    x = [read(source, dtype) for source in sources]
    if base in _ELEMENTWISE:
        return _ELEMENTWISE[base](*x)
    if base == "mul" and "lo" in modifiers:
        return x[0] * x[1]
    if base == "mad" and "lo" in modifiers:
        return x[0] * x[1] + x[2]
    if base == "mul" and "hi" in modifiers and np.dtype(dtype).itemsize == 4:
        wide = _WIDER[instruction.type]
        return ((x[0].astype(wide) * x[1].astype(wide)) >> wide(32)).astype(dtype)
    if base in ("div", "rem"):
        return _divide(base, x[0], x[1])
    if base == "popc":
        return np.bitwise_count(x[0]).astype(U32)
    if base == "lop3":
        return _logic_of_three(x[0], x[1], x[2], int(x[3][0]))
    if base == "prmt":
        return _permute_bytes(x[0], x[1], x[2])
    raise UnknownInstructionError(instruction.opcode)


def _shift(base: str, value: Array, count: Array) -> Array:
    """Shifts; a count beyond the register shifts everything out."""
    size, signed = value.itemsize * 8, value.dtype.kind == "i"
    over = count >= size
    arithmetic = base == "shr" and signed
    safe = np.where(over, size - 1 if arithmetic else 0, count).astype(value.dtype)
    result = value << safe if base == "shl" else value >> safe
    return result if arithmetic else np.where(over, value.dtype.type(0), result)


def _extract_bits(value: Array, start: Array, length: Array) -> Array:
    start, length = start & U32(255), length & U32(255)
    if (start + length > 8 * value.itemsize).any() or (length == 0).any():
        raise UnknownInstructionError("bfe beyond the register, or of no bits")
    size = U32(8 * value.itemsize)
    left = (size - start - length).astype(value.dtype)
    return (value << left) >> (size - length).astype(value.dtype)  # signed types repeat the highest bit


def _divide(base: str, a: Array, b: Array) -> Array:
    quotient = np.trunc(a / b).astype(a.dtype) if a.itemsize <= 4 else a // b
    if a.dtype.kind == "i" and a.itemsize == 8:  # toward zero, where NumPy rounds down
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0)))
    return quotient if base == "div" else a - quotient * b


def _logic_of_three(a: Array, b: Array, c: Array, table: int) -> Array:
    result = np.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.stack([x >> U32(8 * i) & U32(255) for x in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> U32(4 * i) & U32(15)
        byte = np.take_along_axis(source, (nibble & U32(7)).astype(I64)[None], 0)[0]
        sign = np.where(byte & U32(128), U32(255), U32(0))
        result = result | np.where(nibble & U32(8), sign, byte) << U32(8 * i)
    return result


def pack_halves(low: Array, high: Array) -> Array:
    """Returns 32-bit registers of two 16-bit ones."""
    return low.astype(U32) | high.astype(U32) << U32(16)


def unpack_halves(values: Array) -> tuple[Array, Array]:
    """Returns the lower and the upper 16 bits of 32-bit registers."""
    return (values & U32(0xFFFF)).astype(U16), (values >> U32(16)).astype(U16)
