"""Matrix instructions of a warp: ``mma.sync``, and the layout of ``ldmatrix`` and ``stmatrix``."""

import re
from typing import NamedTuple

import numpy as np

from bench.executor.approximation import Approximation
from bench.executor.arithmetic import F32, F64, U16, U32, Array
from bench.executor.errors import UnknownInstructionError
from bench.executor.floats import from_bfloat16
from bench.executor.integers import Read
from bench.executor.program import Instruction

_SUPPORTED = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("bf16", "f16", "tf32"), "m16n8k4": ("tf32",)}
_TF32_BITS = U32(0xFFFFE000)  # the low 13 bits of an operand do not count
_ADDED_AT_ONCE = {"bf16": 8, "f16": 8, "tf32": 4}  # products, on an A100


def multiply_matrices(
    instruction: Instruction, read: Read, lanes: int, approximation: Approximation
) -> list[tuple[str, Array]]:
    """Returns the registers of D = A B + C and their values. A is row-major, B column-major; a lane is (row of A or
    column of B, position) = divmod(lane, 4).
    """
    modifiers = instruction.modifiers
    kind = modifiers[-2]
    shape = next(x for x in modifiers if re.fullmatch(r"m\d+n\d+k\d+", x))
    if modifiers[-4:] != ("f32", kind, kind, "f32") or kind not in _SUPPORTED.get(shape, ()):
        raise UnknownInstructionError(instruction.opcode)
    target, *sources = instruction.operands
    warps = lanes // 32

    def registers(operand: tuple[str, ...]) -> Array:
        return np.stack([np.broadcast_to(read(x, U32), lanes) for x in operand])

    # (column half, row half) of registers, warp, row, position, element of the register
    a = _factors(registers(sources[0]), kind).reshape(len(sources[0]) // 2, 2, warps, 8, 4, -1)
    a = a.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
    b = _factors(registers(sources[1]), kind).reshape(len(sources[1]), warps, 8, 4, -1)
    b = b.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
    c = registers(sources[2]).view(F32).reshape(2, 2, warps, 8, 4)
    c = c.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    d = approximation.product(a, b, c, _ADDED_AT_ONCE[kind], instruction)
    return list(zip(target, d.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, lanes)))


def _factors(registers: Array, kind: str) -> Array:
    """Returns the elements of registers in float64; two adjacent ones in each register unless they are tf32."""
    if kind == "tf32":
        return (registers & _TF32_BITS).view(F32).astype(F64)
    halves = registers.view(U16)
    return (halves.view(np.float16) if kind == "f16" else from_bfloat16(halves)).astype(F64)


class MatrixRow(NamedTuple):
    """What one 32-bit register of ``ldmatrix`` or ``stmatrix`` consists of: addresses and sizes in shared memory."""

    addresses: tuple[Array, ...]  # of the whole register, or of its lower and upper half
    size: int  # bytes at each


def matrix_pieces(rows: Array, matrix: int, transposed: bool) -> MatrixRow:
    """Returns where the register of each lane lies that holds its part of 8 x 8 matrix ``matrix``.

    Args:
        rows: address that each lane gave; lane 8 i + r has row r of matrix i.
    """
    lane = np.arange(len(rows)) % 32
    first = np.arange(len(rows)) - lane + 8 * matrix
    if transposed:
        return MatrixRow(tuple(rows[first + lane % 4 * 2 + k] + lane // 4 * 2 for k in range(2)), 2)
    return MatrixRow((rows[first + lane // 4] + lane % 4 * 4,), 4)
