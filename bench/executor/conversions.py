"""The instruction ``cvt``."""

from typing import Any

import numpy as np

from bench.executor.arithmetic import F32, F64, U16, U32, Array, bits
from bench.executor.errors import UnknownInstructionError
from bench.executor.floats import bfloat16_bits, from_bfloat16
from bench.executor.integers import Read, pack_halves
from bench.executor.program import FLOAT_TYPES, INTEGER_TYPES, Instruction

_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TYPES: dict[str, Any] = {**FLOAT_TYPES, "f16": np.float16, **INTEGER_TYPES}


def _to_half(values: Array, target: str) -> Array:
    return bfloat16_bits(values) if target.startswith("bf16") else values.astype(np.float16).view(U16)


def convert(instruction: Instruction, read: Read) -> Array:
    """Returns the converted numbers; ``read(operand, type)`` gives the operands."""
    modifiers, sources = instruction.modifiers, instruction.operands[1:]
    target, source = modifiers[-2:]
    if target in ("bf16", "bf16x2", "f16x2"):
        if source != "f32" or "rn" not in modifiers:
            raise UnknownInstructionError(instruction.opcode)
        halves = [_to_half(read(x, F32), target) for x in sources]
        return halves[0] if len(halves) == 1 else pack_halves(halves[1], halves[0])
    if target == "tf32":
        if modifiers[0] != "rna":
            raise UnknownInstructionError(instruction.opcode)
        values = read(sources[0], F32)
        rounded = bits(values) + U32(0x1000) & U32(0xFFFFE000)
        return np.where(np.isfinite(values), rounded, bits(values))
    if source == "bf16":
        if target != "f32":
            raise UnknownInstructionError(instruction.opcode)
        return from_bfloat16(read(sources[0], U16))
    values = read(sources[0], _TYPES[source])
    if source in (*FLOAT_TYPES, "f16") and target in INTEGER_TYPES:
        info = np.iinfo(_TYPES[target])
        rounded = np.nan_to_num(_ROUNDINGS[modifiers[0]](values.astype(F64)), nan=0.0)
        saturated = np.clip(rounded, float(info.min), float(info.max)).astype(_TYPES[target])
        return np.where(rounded >= float(info.max), _TYPES[target](info.max), saturated)
    return values.astype(_TYPES[target])
