"""Global and shared memory of a launch, with checks of bounds, alignment, races and asynchronous copies.

All addresses here are offsets, one per lane, into the arrays of this module; ``active`` says which lanes take part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.executor.arithmetic import I64, U8, Array
from bench.executor.errors import MemoryAccessError, RaceError, UnknownInstructionError
from bench.executor.program import unsigned

GLOBAL_BASE = 0x7000_0000_0000  # address of the first byte of global memory
_ALIGNMENT = 256  # of an allocation, as CUDA's
_RED_ZONE = 256  # bytes behind each allocation that nothing may touch

_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3  # who accessed a word of shared memory, if not one warp


def _words(data: Array, size: int) -> Array:
    """Returns memory as an array of words of ``size`` bytes."""
    return data[: len(data) // size * size].view(unsigned(size))


def _check_alignment(space: str, at: Array, size: int) -> None:
    if (at % size).any():
        raise MemoryAccessError(f"misaligned access of {size} bytes to {space} memory")


class GlobalMemory:
    """Allocations in one arena. One cooperative thread array (CTA) may not touch what another one stores."""

    def __init__(self, contents: Sequence[Array]):
        """Allocates and fills one area for each array of bytes."""
        self.starts, end = [], 0
        for content in contents:
            self.starts.append(end)
            end += -(-(len(content) + _RED_ZONE) // _ALIGNMENT) * _ALIGNMENT
        self.data, self.allocated = np.zeros(end, U8), np.zeros(end, bool)
        for start, content in zip(self.starts, contents):
            self.data[start : start + len(content)] = content
            self.allocated[start : start + len(content)] = True
        self.owner = np.full(end, -1, np.int32)  # the CTA that stored to this address in this launch

    def address(self, index: int) -> int:
        """Returns the address of an allocation, by its place among the contents."""
        return GLOBAL_BASE + self.starts[index]

    def check(self, at: Array, size: int) -> None:
        """Raises unless every access of ``size`` bytes is aligned and within an allocation."""
        _check_alignment("global", at, size)
        if ((at < 0) | (at + size > len(self.data))).any() or not self.allocated[at].all():
            raise MemoryAccessError("access to global memory outside of all allocations")
        if not self.allocated[at + size - 1].all():
            raise MemoryAccessError("access to global memory across the end of an allocation")

    def load(self, at: Array, size: int, active: Array, cta: Array) -> Array:
        owner = self.owner[at[active]]
        if ((owner != _NOBODY) & (owner != cta[active])).any():
            raise RaceError("global memory is read by one CTA and stored by another")
        return _words(self.data, size)[at // size]

    def store(self, at: Array, values: Array, size: int, active: Array, cta: Array) -> None:
        at, values, cta = at[active], values[active].astype(unsigned(size)), cta[active]
        owner = self.owner[at]
        if ((owner != _NOBODY) & (owner != cta)).any():
            raise RaceError("two CTAs store to one place in global memory")
        self.owner[at] = cta
        _store_at_once(_words(self.data, size), at // size, values)

    def add(self, at: Array, values: Array, active: Array) -> Array:
        """Adds atomically; see ``_add_in_turn``."""
        return _add_in_turn(_words(self.data, values.itemsize), at // values.itemsize, values, active)


class _Copies(NamedTuple):
    """Asynchronous copies of one instruction, an element for each lane that started one."""

    group: Array
    lanes: Array
    target: Array
    source: Array
    given: Array  # bytes to copy; the rest of ``size`` becomes zero
    size: int

    def pick(self, chosen: Array) -> "_Copies":
        group, lanes, target, source, given = (x[chosen] for x in self[:5])
        return _Copies(group, lanes, target, source, given, self.size)


class SharedMemory:
    """Shared memory of the CTAs that run together, one behind the other.

    Two warps may not access a word of four bytes without a barrier between them unless both read; that no two warps
    share the bytes of one word is true of all that Triton emits for our kernels. A copy is written when it is waited
    for: until then its target holds ones (NaN), and whoever reads or writes there is reported.
    """

    def __init__(self, ctas: int, size: int, warp: Array):
        """Takes the size for one CTA and the warp of each lane."""
        self.size = -(-max(size, 16) // 16) * 16
        self.data = np.full(ctas * self.size, 255, U8)
        words = len(self.data) // 4
        self.writer = np.full(words, _NOBODY, I64)  # since the last barrier
        self.reader = np.full(words, _NOBODY, I64)
        self.in_flight = np.zeros(words, bool)  # a copy into it has been started and not been waited for
        self.warp, self.ctas = warp, ctas
        self.group = np.zeros(len(warp), I64)  # of copies, that a lane adds to
        self.copies: list[_Copies] = []

    def check(self, at: Array, size: int) -> None:
        """Raises unless every access, relative to the memory of its CTA, is aligned and within it."""
        _check_alignment("shared", at, size)
        if ((at < 0) | (at + size > self.size)).any():
            raise MemoryAccessError("access to shared memory out of bounds")

    def barrier(self, whole: Array | None = None) -> None:
        """Orders everything before it, of all CTAs or of those in ``whole``."""
        for accesses in (self.writer, self.reader):
            accesses.reshape(self.ctas, -1)[slice(None) if whole is None else whole] = _NOBODY

    def _check_race(self, at: Array, warp: Array, size: int, kind: str) -> None:
        """Records accesses of active lanes: "read", "write", "atomic", or "copy", which writes at any time from now."""
        for k in range(max(1, size // 4)):
            word = at // 4 + k
            if self.in_flight[word].any():
                raise RaceError("access to shared memory that a copy which was not waited for goes into")
            writer = self.writer[word]
            if ((writer != _NOBODY) & (writer != (_ATOMIC if kind == "atomic" else warp))).any():
                raise RaceError("two warps access a word of shared memory without a barrier between, one writing")
            reader = self.reader[word]
            if kind == "read":
                self.reader[word] = np.where((reader == _NOBODY) | (reader == warp), warp, _SEVERAL)
                several = self.reader[word] != warp  # lanes of one instruction
                self.reader[word[several]] = _SEVERAL
                continue
            if ((reader != _NOBODY) & (reader != warp)).any():
                raise RaceError("a word of shared memory is written while another warp may still read it")
            if kind == "copy":
                self.in_flight[word] = True
            else:
                self.writer[word] = _ATOMIC if kind == "atomic" else warp

    def load(self, at: Array, size: int, active: Array) -> Array:
        self._check_race(at[active], self.warp[active], size, "read")
        return _words(self.data, size)[at // size]

    def store(self, at: Array, values: Array, size: int, active: Array) -> None:
        at, values = at[active], values[active].astype(unsigned(size))
        self._check_race(at, self.warp[active], size, "write")
        _store_at_once(_words(self.data, size), at // size, values)

    def add(self, at: Array, values: Array, active: Array) -> Array:
        """Adds atomically; see ``_add_in_turn``."""
        self._check_race(at[active], self.warp[active], values.itemsize, "atomic")
        return _add_in_turn(_words(self.data, values.itemsize), at // values.itemsize, values, active)

    # ---- asynchronous copies

    def start_copy(self, target: Array, source: Array, size: int, given: Array, active: Array) -> None:
        """Starts a copy of the lane's ``given`` bytes from global memory, and of zeros up to ``size``."""
        lanes = np.flatnonzero(active)
        if ((given[lanes] != 0) & (given[lanes] != size)).any():
            raise UnknownInstructionError("cp.async of a part")
        if len(lanes):
            self._check_race(target[lanes], self.warp[lanes], size, "copy")
            _words(self.data, size)[target[lanes] // size] = np.full(size, 255, U8).view(unsigned(size))
            self.copies.append(_Copies(self.group[lanes], lanes, target[lanes], source[lanes], given[lanes], size))

    def commit(self, active: Array) -> None:
        """Closes the group of copies of each lane."""
        self.group += active

    def wait(self, pending: int, active: Array, memory: GlobalMemory) -> None:
        """Completes the copies of each lane, except those in its last ``pending`` groups."""
        kept = []
        for copies in self.copies:
            done = active[copies.lanes] & (copies.group < self.group[copies.lanes] - pending)
            self._complete(copies.pick(done), memory)
            if not done.all():
                kept.append(copies.pick(~done))
        self.copies = kept

    def _complete(self, copies: _Copies, memory: GlobalMemory) -> None:
        if not len(copies.lanes):
            return
        size = copies.size
        for k in range(size // 4):
            word = copies.target // 4 + k
            self.in_flight[word] = False
            self.writer[word] = self.warp[copies.lanes]
        source = _words(memory.data, size)[copies.source // size].view(U8).reshape(-1, size)
        values = np.where((copies.given > 0)[:, None], source, U8(0))
        _words(self.data, size)[copies.target // size] = values.view(unsigned(size)).ravel()


def _store_at_once(words: Array, at: Array, values: Array) -> None:
    """Stores the values of the lanes of one instruction."""
    words[at] = values
    if (words[at] != values).any():
        raise RaceError("lanes store different values to one place at once")


def _add_in_turn(words: Array, at: Array, values: Array, active: Array) -> Array:
    """Adds integers, whose sum has no order, and returns the old values, those of lanes that come one after another."""
    old = np.zeros(len(active), values.dtype)
    at, values = at[active], values[active]
    order = np.argsort(at, kind="stable")
    before: Any = np.cumsum(values[order], dtype=values.dtype) - values[order]
    first = np.flatnonzero(np.diff(at[order], prepend=-1))
    before -= np.repeat(before[first], np.diff(first, append=len(order)))
    found = np.empty_like(values)
    found[order] = words[at[order]] + before
    old[active] = found
    np.add.at(words, at, values)
    return old
