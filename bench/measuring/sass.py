"""Instructions of a compiled kernel, counted by class, each as often as a thread executes it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Opcodes, without their modifiers, by the unit that executes them; the first match counts.
_CLASSES = {
    "matrix": r"[HIDQO]?MMA|[HIQ]GMMA|WARPGROUP|UTC\w*",
    "mufu": r"MUFU|F2I|I2F|F2F|FRND|U?POPC|U?FLO|U?BREV",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "fp32": r"F(ADD|MUL|FMA|SWZADD)|H(ADD|MUL|FMA)2|F(ADD|MUL|FMA)2",
    "memory": r"LD\w*|ST\w*|RED\w*|ATOM\w*|UTMA\w*|UBLKCP|SYNCS|CCTL|MATCH|SHFL",
    "barrier": r"BAR|DEPBAR|MEMBAR|FENCE|ERRBAR|WARPSYNC|ARRIVES|U?CGABAR\w*|CGAERRBAR",
    "control": r"U?BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|NANOSLEEP|YIELD|U?ELECT|ACQBULK|PREEXIT|VOTEU?|BMOV",
}
# All others: integer arithmetic, comparisons, selections, moves, conversions between integers and float32 that the ALU
# does.
_REST = "integer"
CLASSES = (*_CLASSES, _REST)
# Instructions of matrix products, by whether tensor cores compute them; SASS and PTX.
_PRODUCTS = {
    True: (r"[HIDQO]?MMA|[HIQ]GMMA|UTC\w*MMA", r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"),
    False: (r"FFMA2?", r"\bfma\.rn\.f32"),
}
_FEWEST_FFMA = 256  # in a loop that is a product outside of the tensor cores


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    opcode: str  # with its modifiers
    text: str

    @property
    def kind(self) -> str:
        base = self.opcode.partition(".")[0]
        return next((name for name, pattern in _CLASSES.items() if re.fullmatch(pattern, base)), _REST)

    def is_product(self, tensor_cores: bool) -> bool:
        return bool(re.fullmatch(_PRODUCTS[tensor_cores][0], self.opcode.partition(".")[0]))


@dataclass(frozen=True)
class Loop:
    """A loop: the instructions from the target of a backward branch up to the branch."""

    first: int
    last: int
    products: int  # instructions of a matrix product in itself, not in a loop within it
    surrounds_product: bool

    def __contains__(self, address: int) -> bool:
        return self.first <= address <= self.last


def parse(sass: str) -> list[Instruction]:
    """Returns the instructions that cuobjdump lists, without the padding behind the last one."""
    found = []
    for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass, re.MULTILINE):
        words = text.split()
        opcode = words[1] if words[0].startswith("@") else words[0]
        found.append(Instruction(int(address, 16), opcode, text))
    while found and (found[-1].opcode == "NOP" or _target(found[-1]) == found[-1].address):
        found.pop()
    return found


def _target(instruction: Instruction) -> int | None:
    """Returns where a branch goes, None for another instruction."""
    if not instruction.opcode.startswith("BRA"):
        return None
    match = re.search(r"0x([0-9a-f]+)\s*$", instruction.text)
    return int(match[1], 16) if match else None


def find_loops(instructions: Sequence[Instruction], tensor_cores: bool = True) -> list[Loop]:
    """Returns the loops, the outer ones first; ``tensor_cores`` says which instructions make a loop a product."""
    spans: dict[int, int] = {}
    ended = False
    for instruction in instructions:
        ended |= instruction.text.startswith("EXIT")
        target = _target(instruction)
        # Behind the end stand the slow ways of waits, which return by a plain branch to where they were left: no loop.
        returns = ended and not instruction.text.startswith("@")
        if target is not None and target <= instruction.address and not returns:
            spans[target] = max(instruction.address, spans.get(target, 0))
    products = [instruction.address for instruction in instructions if instruction.is_product(tensor_cores)]
    fewest = 1 if tensor_cores else _FEWEST_FFMA
    loops = []
    for first, last in sorted(spans.items(), key=lambda span: span[0] - span[1]):
        inner = [(a, b) for a, b in spans.items() if first <= a and b <= last and (a, b) != (first, last)]
        within = [address for address in products if first <= address <= last]
        own = [address for address in within if not any(a <= address <= b for a, b in inner)]
        has_product = len(own) >= fewest and len(own) > len(within) / 2
        loops.append(Loop(first, last, len(own) if has_product else 0, len(within) >= fewest and not has_product))
    return loops


def _ptx_products(ptx: str, tensor_cores: bool) -> int:
    """Returns the most product instructions that an innermost loop of the PTX holds."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$L__\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        match = re.search(r"\bbra(?:\.uni)?\s+(\$L__\w+)", line)
        if match and labels.get(match[1], i) < i:
            spans.append((labels[match[1]], i))
    innermost = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]
    pattern = re.compile(_PRODUCTS[tensor_cores][1])
    return max((sum(bool(pattern.search(line)) for line in lines[a:b]) for a, b in innermost), default=0)


@dataclass(frozen=True)
class Turns:
    """How often the loops of a kernel's source run in each run of the code around them.

    Attributes:
        product: the loop of its matrix product, if it has one.
        outer: the loop around the product; without a product, its outermost loops.
        inner: without a product, the loops directly within those.
    All other loops count as one run: waits, and loops that end by what the data are.
    """

    product: float = 1.0
    outer: float = 1.0
    inner: float = 1.0


@dataclass(frozen=True)
class Counts:
    """Instructions that a thread executes, by class.

    Attributes:
        total: all of them.
        beside: without those that multiply in a matrix product.
        loop: those of ``beside`` in the loop of the matrix product: copies, addresses, and the splits of floats; None
            where ptxas unrolled it whole, so that they are one with the code around it.
    """

    classes: dict[str, float]
    total: float
    beside: float
    loop: float | None


class _CountedLoop(NamedTuple):
    loop: Loop
    executions: float
    is_product: bool  # the loop of the matrix product, which is not unrolled whole


def count(sass: str, ptx: str, turns: Turns, product: str | None) -> Counts:
    """Counts the instructions of a kernel. Where branches part, both ways count.

    ptxas may have unrolled the loop of the product; the PTX, whose loops are those of the source, tells how often.

    Args:
        product: what computes the matrix product, "tensor cores" or "fma"; None without one.
    """
    instructions = parse(sass)
    tensor_cores = product != "fma"
    in_ptx = _ptx_products(ptx, tensor_cores)
    loops: list[_CountedLoop] = []
    unrolled_whole = False
    for loop in find_loops(instructions, tensor_cores):
        if loop.products:
            unrolled = max(1.0, loop.products / in_ptx) if in_ptx else 1.0
            whole = unrolled >= turns.product
            unrolled_whole |= whole
            loops.append(_CountedLoop(loop, turns.outer if whole else turns.product / unrolled, not whole))
        else:
            depth = sum(loop.first in outer.loop for outer in loops)
            if loop.surrounds_product or (product is None and depth == 0):
                executions = turns.outer
            else:
                executions = turns.inner if product is None and depth == 1 else 1.0
            loops.append(_CountedLoop(loop, executions, False))
    classes: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    in_loop = products = 0.0
    for instruction in instructions:
        around = [counted for counted in loops if instruction.address in counted.loop]
        times = math.prod(counted.executions for counted in around)
        within = any(counted.is_product for counted in around)
        multiplies = instruction.kind == "matrix" or (
            not tensor_cores and (within or unrolled_whole) and instruction.is_product(tensor_cores)
        )
        classes[instruction.kind] += times
        products += times * multiplies
        in_loop += times * (within and not multiplies)
    total = sum(classes.values())
    looped = any(counted.is_product for counted in loops)
    return Counts(classes, total, total - products, in_loop if looped else None)
