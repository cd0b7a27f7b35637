"""PTX text as a list of instructions."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.executor.arithmetic import F32, F64, I16, I32, I64, U16, U32, U64
from bench.executor.errors import UnknownInstructionError

FLOAT_TYPES: dict[str, type[Any]] = {"f32": F32, "f64": F64}
INTEGER_TYPES: dict[str, type[Any]] = {
    **{"s16": I16, "u16": U16, "b16": U16},
    **{"s32": I32, "u32": U32, "b32": U32},
    **{"s64": I64, "u64": U64, "b64": U64},
}

_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*?)^\}", re.S | re.M)
_LOCATION = re.compile(r"^\s*\.loc\b[^\n]*?//\s*([^\s;]+)[^\n]*$", re.M)
# Splits a 64-bit register, or is inline assembly; none reads a register of its own before it writes it.
_SCOPED_BLOCK = re.compile(r"\{\s*\.reg\s+\.\w+\s+\w+(?:,\s*\w+)*\s*;\s*(.*?;)\s*\}", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@dataclass(frozen=True, slots=True)
class Immediate:
    value: int  # the bits of a float


@dataclass(frozen=True, slots=True)
class Address:
    base: Any  # a register, an immediate, or the name of a parameter or of shared memory
    offset: int


Operand = Any  # a register's name, an Immediate, an Address, or a tuple of them for a vector


class Parameter(NamedTuple):
    name: str
    dtype: type[Any]


class Instruction(NamedTuple):
    """One instruction; ``site`` is its place in the program."""

    site: int
    base: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    opcode: str
    text: str
    location: str  # file:line:column of the source, or ""

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    def __str__(self) -> str:
        return f"instruction {self.site} of {self.location or 'unknown source'}: {' '.join(self.text.split())}"


def number_type(name: str) -> type[Any]:
    """Returns the NumPy type of a PTX type."""
    dtype = INTEGER_TYPES.get(name) or FLOAT_TYPES.get(name)
    if dtype is None:
        raise UnknownInstructionError(f"numbers of type {name}")
    return dtype


def unsigned(size: int) -> Any:
    """Returns the type of a register, or of a piece of memory, of so many bytes."""
    return {1: np.uint8, 2: U16, 4: U32, 8: U64, 16: np.dtype("V16")}[size]


class Program:
    """The kernel of a PTX module."""

    def __init__(self, ptx: str):
        ptx = re.sub(r"//[^\n]*", "", _LOCATION.sub(r".at \1;", ptx))
        entry = _ENTRY.search(ptx)
        if entry is None:
            raise ValueError("no .entry in this PTX")
        self.name, parameters, header, body = entry.groups()
        types = {"u64": U64, "u32": U32, "f32": F32, "f64": F64, "b64": U64, "b32": U32}
        found = re.finditer(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", parameters)
        self.parameters = [Parameter(match[2], types[match[1]]) for match in found]
        threads = re.search(r"\.reqntid\s+(\d+)", header)
        if threads is None:
            raise ValueError("no .reqntid in this PTX: the number of threads is unknown")
        self.threads = int(threads[1])
        if re.search(r"^\s*\.shared\s+[^;]*?\b\w+\[\d+\]", body, re.M):
            raise UnknownInstructionError("static shared memory")
        self.labels: dict[str, int] = {}
        self.instructions = self._parse(body)

    def _parse(self, body: str) -> list[Instruction]:
        body = re.sub(r"^\s*\.(loc|reg|file|section|pragma|shared)\b[^\n]*", "", body, flags=re.M)
        body = _SCOPED_BLOCK.sub(r"\1", body)
        instructions: list[Instruction] = []
        location = ""
        for statement in map(str.strip, body.split(";")):
            while label := re.match(r"(\$?\w+):\s*(?!:)", statement):
                self.labels[label[1]] = len(instructions)
                statement = statement[label.end() :]
            if statement.startswith(".at "):
                location = statement[4:]
            if not statement or statement.startswith("."):
                continue
            parts = _STATEMENT.fullmatch(statement)
            if parts is None:
                raise UnknownInstructionError(statement)
            negated, predicate, opcode, rest = parts.groups()
            base, *modifiers = opcode.split(".")
            instructions.append(
                Instruction(
                    site=len(instructions),
                    base=base,
                    modifiers=tuple(modifiers),
                    operands=tuple(map(_parse_operand, _OPERAND.findall(rest))),
                    predicate=predicate,
                    negated=bool(negated),
                    opcode=opcode,
                    text=statement,
                    location=location,
                )
            )
        return instructions

    def without(self, *sites: int) -> "Program":
        """Returns the program with these instructions left out; for tests that plant a fault."""
        program = object.__new__(Program)
        program.__dict__.update(self.__dict__)
        skipped = {site: self.instructions[site]._replace(base="nop", operands=(), predicate=None) for site in sites}
        program.instructions = [skipped.get(i.site, i) for i in self.instructions]
        return program

    def sites(self, *opcodes: str) -> list[int]:
        """Returns the places of the instructions whose opcode begins with one of these."""
        return [i.site for i in self.instructions if i.opcode.startswith(opcodes)]


def _parse_operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(_parse_operand(part) for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(_parse_operand(base), int(offset) if offset.strip() else 0)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return text
