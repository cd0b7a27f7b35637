"""One launch of a program, cooperative thread arrays (CTAs) side by side.

The lanes of the CTAs that run together take every instruction at the same time; where they diverge, those at the lowest
place in the program go first. ``Launch`` runs the CTAs in batches, ``_Batch`` has one function for each kind of
instruction.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bench.executor.approximation import Approximation
from bench.executor.arithmetic import F32, F64, I32, I64, U16, U32, U64, Array
from bench.executor.conversions import convert
from bench.executor.errors import ConvergenceError, ExecutionError, RaceError, UnknownInstructionError
from bench.executor.floats import compare_floats, float_instruction, from_bfloat16
from bench.executor.integers import compare_integers, integer_instruction, pack_halves, unpack_halves
from bench.executor.memory import GLOBAL_BASE, GlobalMemory, SharedMemory
from bench.executor.products import matrix_pieces, multiply_matrices
from bench.executor.program import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    Address,
    Instruction,
    Program,
    number_type,
    unsigned,
)
from bench.executor.registers import Mask, Registers

_LANES_AT_ONCE = 4096  # NumPy's time per instruction is then mostly arithmetic, and the arrays stay in cache
_PREDICATE_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
_WARP_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "max": np.max,
    "min": np.min,
    "add": np.sum,
    "or": np.bitwise_or.reduce,
    "and": np.bitwise_and.reduce,
}


class Launch:
    """A program, its grid and its arguments.

    Args:
        arguments: numbers and addresses in ``memory``; parameters that Triton adds behind them are zero.
        shared_bytes: shared memory of a CTA.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        arguments: Sequence[float],
        memory: GlobalMemory,
        shared_bytes: int = 0,
        approximation: Approximation | None = None,
    ):
        self.program, self.memory, self.shared_bytes = program, memory, shared_bytes
        self.grid = (*grid, 1, 1)[:3]
        self.approximation = approximation or Approximation()
        values = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
        self.arguments = {p.name: np.array([value]).astype(p.dtype) for p, value in zip(program.parameters, values)}

    def run(self) -> None:
        count = int(np.prod(self.grid))
        at_once = max(1, _LANES_AT_ONCE // self.program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, count, at_once):
                _Batch(self, np.arange(first, min(first + at_once, count))).run()


class _Batch:
    """CTAs of a launch that run together."""

    def __init__(self, launch: Launch, ctas: Array):
        threads = launch.program.threads
        self.program, self.arguments = launch.program, launch.arguments
        self.memory, self.approximation = launch.memory, launch.approximation
        self.ctas, self.lanes = len(ctas), len(ctas) * threads
        lane = np.arange(self.lanes, dtype=U32)
        self.lane_in_warp = (lane % 32).astype(I64)
        self.cta = np.repeat(ctas.astype(np.int32), threads)
        self.all = np.ones(self.lanes, bool)
        self.shared = SharedMemory(len(ctas), launch.shared_bytes, (lane // 32).astype(I64))
        self.shared_start = (lane // U32(threads)).astype(I64) * self.shared.size
        special = {"%tid.x": lane % U32(threads), "%laneid": lane % U32(32)}
        special |= {"%tid.y": np.zeros(1, U32), "%tid.z": np.zeros(1, U32)}
        width, height, _ = launch.grid
        places = ctas % width, ctas // width % height, ctas // (width * height)
        for axis, place, size in zip("xyz", places, launch.grid):
            special["%ctaid." + axis] = np.repeat(place.astype(U32), threads)
            special["%nctaid." + axis] = np.full(1, size, U32)
        self.registers = Registers(special)
        self.read, self.write = self.registers.read, self.registers.write

    # ---- flow of control

    def run(self) -> None:
        """Runs the lanes to the end of the program."""
        instructions, end = self.program.instructions, len(self.program.instructions)
        at = 0
        places: Array | None = None  # of each lane, where lanes diverge
        while True:
            mask: Mask = None
            if places is not None:
                at = int(places.min())
                mask = places == at
                if mask.all():
                    places = mask = None
            if at >= end:
                if self.shared.copies:
                    raise RaceError("the kernel ends with copies that were not waited for")
                return
            instruction = instructions[at]
            try:
                guard = self._guard(instruction, mask)
                if instruction.base in ("bra", "ret"):
                    target = end if instruction.base == "ret" else self.program.labels[instruction.operands[0]]
                    taken = self._lanes(guard)
                    if mask is None and (taken.all() or not taken.any()):
                        at = target if taken.all() else at + 1
                    else:
                        places = np.full(self.lanes, at) if places is None else places
                        places = np.where(taken, target, np.where(places == at, at + 1, places))
                    continue
                _HANDLERS.get(instruction.base, _Batch._arithmetic)(self, instruction, guard)
            except (ExecutionError, UnknownInstructionError) as error:
                raise type(error)(f"{error}: {self.program.name}, {instruction}") from None
            if places is None:
                at += 1
            else:
                places = np.where(places == at, at + 1, places)

    def _guard(self, instruction: Instruction, mask: Mask) -> Mask:
        """Returns the lanes that execute the instruction, of those in the mask."""
        if instruction.predicate is None:
            return mask
        predicate = self.read(instruction.predicate, bool)
        predicate = np.broadcast_to(~predicate if instruction.negated else predicate, self.lanes)
        return predicate if mask is None else predicate & mask

    def _lanes(self, mask: Mask) -> Array:
        return self.all if mask is None else np.broadcast_to(mask, self.lanes)

    def _spread(self, values: Array) -> Array:
        """Returns one value for each lane."""
        return np.broadcast_to(values, self.lanes)

    def _check_whole_warps(self, mask: Mask) -> None:
        if mask is not None:
            there = self._lanes(mask).reshape(-1, 32)
            if (there.any(axis=1) != there.all(axis=1)).any():
                raise ConvergenceError("not every lane of a warp reaches this instruction together")

    def _barrier(self, instruction: Instruction, mask: Mask) -> None:
        if mask is None:
            self.shared.barrier()
            return
        there = self._lanes(mask).reshape(self.ctas, -1)
        whole = np.asarray(there.all(axis=1))
        if (there.any(axis=1) != whole).any():
            raise ConvergenceError("not every lane of a CTA reaches this barrier together")
        self.shared.barrier(whole)

    def _nothing(self, instruction: Instruction, mask: Mask) -> None:
        pass

    # ---- moves, comparisons, arithmetic

    def _move(self, instruction: Instruction, mask: Mask) -> None:
        target, source = instruction.operands
        kind = instruction.type
        if isinstance(target, tuple):
            if kind == "b32":
                parts = unpack_halves(self.read(source, U32))
            else:
                value = self.read(source, U64)
                parts = (value & U64(0xFFFFFFFF)).astype(U32), (value >> U64(32)).astype(U32)
            for register, part in zip(target, parts):
                self.write(register, part, mask)
        elif isinstance(source, tuple):
            if kind == "b32":
                value = pack_halves(*(self.read(x, U16) for x in source))
            else:
                low, high = (self.read(x, U32).astype(U64) for x in source)
                value = low | high << U64(32)
            self.write(target, value, mask)
        else:
            self.write(target, self.read(source, bool if kind == "pred" else number_type(kind)), mask)

    def _compare(self, instruction: Instruction, mask: Mask) -> None:
        target, *sources = instruction.operands
        name, kind = instruction.modifiers[0], instruction.type
        if kind in ("f16", "bf16"):
            halves = (self.read(x, U16) for x in sources)
            a, b = (x.view(np.float16) if kind == "f16" else from_bfloat16(x) for x in halves)
        else:
            a, b = (self.read(x, number_type(kind)) for x in sources)
        self.write(target, (compare_integers if kind in INTEGER_TYPES else compare_floats)(name, a, b), mask)

    def _select(self, instruction: Instruction, mask: Mask) -> None:
        target, a, b, predicate = instruction.operands
        dtype = number_type(instruction.type)
        self.write(target, np.where(self.read(predicate, bool), self.read(a, dtype), self.read(b, dtype)), mask)

    def _convert(self, instruction: Instruction, mask: Mask) -> None:
        self.write(instruction.operands[0], convert(instruction, self.read), mask)

    def _arithmetic(self, instruction: Instruction, mask: Mask) -> None:
        target, *sources = instruction.operands
        kind = instruction.type
        if kind == "pred":
            result = _PREDICATE_LOGIC[instruction.base](*(self.read(x, bool) for x in sources))
        elif kind in FLOAT_TYPES:
            operands = [self.read(x, FLOAT_TYPES[kind]) for x in sources]
            result = float_instruction(instruction, operands, self.approximation)
        elif kind in INTEGER_TYPES:
            result = integer_instruction(instruction, self.read)
        else:
            raise UnknownInstructionError(instruction.opcode)
        self.write(target, result, mask)

    # ---- between the lanes of a warp

    def _vote(self, instruction: Instruction, mask: Mask) -> None:
        if instruction.modifiers[1] != "ballot":
            raise UnknownInstructionError(instruction.opcode)
        votes = self._spread(self.read(instruction.operands[1], bool)) & self._lanes(mask)
        ballots = (votes.reshape(-1, 32) << np.arange(32, dtype=U32)).sum(axis=1, dtype=U32)
        self.write(instruction.operands[0], np.repeat(ballots, 32), mask)

    def _reduce(self, instruction: Instruction, mask: Mask) -> None:
        self._check_whole_warps(mask)
        values = self._spread(self.read(instruction.operands[1], INTEGER_TYPES[instruction.type])).reshape(-1, 32)
        result = _WARP_REDUCTIONS[instruction.modifiers[1]](values, axis=1).astype(values.dtype)
        self.write(instruction.operands[0], np.repeat(result, 32), mask)

    def _shuffle(self, instruction: Instruction, mask: Mask) -> None:
        self._check_whole_warps(mask)
        target, value, distance, clamp, *_ = instruction.operands
        if not np.isin(self.read(clamp, U32), (0, 31)).all():
            raise UnknownInstructionError("shfl within parts of a warp")
        values, lane = self._spread(self.read(value, U32)), self.lane_in_warp
        by = self._spread(self.read(distance, U32)).astype(I64)
        source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[instruction.modifiers[1]]
        source = np.where((source < 0) | (source > 31), lane, source)
        self.write(target.split("|")[0], values[np.arange(self.lanes) - lane + source], mask)

    def _multiply(self, instruction: Instruction, mask: Mask) -> None:
        self._check_whole_warps(mask)
        for register, values in multiply_matrices(instruction, self.read, self.lanes, self.approximation):
            self.write(register, values, mask)

    # ---- memory

    def _locate(self, operand: Address, space: str, size: int, active: Array) -> Array:
        """Returns where the lanes access memory, as ``memory`` counts; active ones are checked for bounds."""
        if space == "shared":
            at = self._spread(self.read(operand.base, U32).astype(I64) + operand.offset)
            self.shared.check(at[active], size)
            return np.where(active, at + self.shared_start, 0)
        at = self._spread(self.read(operand.base, U64).astype(I64) + operand.offset - GLOBAL_BASE)
        self.memory.check(at[active], size)
        return np.where(active, at, 0)

    def _load(self, at: Array, space: str, size: int, active: Array) -> Array:
        if space == "shared":
            return self.shared.load(at, size, active)
        return self.memory.load(at, size, active, self.cta)

    def _store(self, at: Array, values: Array, space: str, size: int, active: Array) -> None:
        values = self._spread(values)
        if space == "shared":
            self.shared.store(at, values, size, active)
        else:
            self.memory.store(at, values, size, active, self.cta)

    def _load_or_store(self, instruction: Instruction, mask: Mask) -> None:
        if "param" in instruction.modifiers:
            self._load_parameter(instruction, mask)
            return
        space, active = _space(instruction), self._lanes(mask)
        size = int(instruction.type[1:]) // 8
        loads = instruction.base == "ld"
        address, registers = reversed(instruction.operands) if loads else instruction.operands
        registers = registers if isinstance(registers, tuple) else (registers,)
        at = self._locate(address, space, size * len(registers), active)
        for i, register in enumerate(registers):
            if loads:
                self.write(register, self._load(at + i * size, space, size, active), mask)
            else:
                self._store(at + i * size, self.read(register, unsigned(max(size, 2))), space, size, active)

    def _load_parameter(self, instruction: Instruction, mask: Mask) -> None:
        target, address = instruction.operands
        value = self.arguments[address.base]
        if value.dtype in (F32, F64):
            value = value.view(unsigned(value.itemsize))
        elif instruction.type.startswith("s"):
            value = value.view({4: I32, 8: I64}[value.itemsize]).astype(I64 if target.startswith("%rd") else I32)
        else:
            value = value.astype(INTEGER_TYPES[instruction.type])
        self.write(target, value, mask)

    def _load_or_store_matrix(self, instruction: Instruction, mask: Mask) -> None:
        self._check_whole_warps(mask)
        loads = instruction.base == "ldmatrix"
        address, registers = reversed(instruction.operands) if loads else instruction.operands
        registers = registers if isinstance(registers, tuple) else (registers,)
        active = self._lanes(mask)
        rows = self._locate(address, "shared", 16, active & (self.lane_in_warp < 8 * len(registers)))
        for i, register in enumerate(registers):
            addresses, size = matrix_pieces(rows, i, "trans" in instruction.modifiers)
            if loads:
                pieces = [self.shared.load(at, size, active) for at in addresses]
                self.write(register, pieces[0] if len(pieces) == 1 else pack_halves(*pieces), mask)
            else:
                value = self._spread(self.read(register, U32))
                pieces = [value] if len(addresses) == 1 else list(unpack_halves(value))
                for at, piece in zip(addresses, pieces):
                    self.shared.store(at, piece, size, active)

    def _atomic(self, instruction: Instruction, mask: Mask) -> None:
        operation, kind = instruction.modifiers[-2:]
        if operation != "add" or kind not in ("u32", "s32", "u64"):
            raise UnknownInstructionError(instruction.opcode)
        target, address, operand = ("_", *instruction.operands)[-3:]
        space, active = _space(instruction), self._lanes(mask)
        dtype = unsigned(np.dtype(INTEGER_TYPES[kind]).itemsize)
        at = self._locate(address, space, np.dtype(dtype).itemsize, active)
        memory = self.shared if space == "shared" else self.memory
        self.write(target, memory.add(at, self._spread(self.read(operand, dtype)), active), mask)

    def _copy(self, instruction: Instruction, mask: Mask) -> None:
        """``cp.async`` and what belongs to it."""
        if instruction.modifiers[0] != "async" or "bulk" in instruction.modifiers:
            raise UnknownInstructionError(instruction.opcode)
        active, operands = self._lanes(mask), instruction.operands
        if "commit_group" in instruction.modifiers:
            self.shared.commit(active)
        elif "wait_group" in instruction.modifiers:
            self.shared.wait(operands[0].value, active, self.memory)
        elif "wait_all" in instruction.modifiers:
            self.shared.commit(active)
            self.shared.wait(0, active, self.memory)
        else:
            target, source, size, *given = operands
            size = size.value
            bytes_given = self._spread(self.read(given[0], U32)).astype(I64) if given else np.full(self.lanes, size)
            at = self._locate(target, "shared", size, active)
            reads = self._locate(source, "global", size, active & (bytes_given > 0))
            self.shared.start_copy(at, reads, size, bytes_given, active)


def _space(instruction: Instruction) -> str:
    return "shared" if any(x.startswith("shared") for x in instruction.modifiers) else "global"


_HANDLERS: dict[str, Callable[[_Batch, Instruction, Mask], None]] = {
    **dict.fromkeys(("bar", "barrier"), _Batch._barrier),
    "nop": _Batch._nothing,
    "mov": _Batch._move,
    "setp": _Batch._compare,
    "selp": _Batch._select,
    "cvt": _Batch._convert,
    "vote": _Batch._vote,
    "redux": _Batch._reduce,
    "shfl": _Batch._shuffle,
    "mma": _Batch._multiply,
    **dict.fromkeys(("ld", "st"), _Batch._load_or_store),
    **dict.fromkeys(("ldmatrix", "stmatrix"), _Batch._load_or_store_matrix),
    **dict.fromkeys(("atom", "red"), _Batch._atomic),
    "cp": _Batch._copy,
}
