"""The registers of all threads that run together: an array over the lanes for each, or one element if all agree."""

from typing import Any

import numpy as np

from bench.executor.arithmetic import U16, U32, Array
from bench.executor.errors import UnwrittenRegisterError
from bench.executor.program import Immediate, Operand, unsigned

Mask = Array | None  # the lanes that take part; None: all


class Registers:
    """Values are kept as unsigned integers, predicates as booleans.

    A register that only some lanes have written holds ones in the others: NaN, as a float.
    """

    def __init__(self, special: dict[str, Array]):
        self.special = special  # registers that cannot be written, such as %tid.x
        self.values: dict[str, Array] = {}

    def read(self, operand: Operand, dtype: Any) -> Array:
        """Returns the operand as numbers of ``dtype``, or ``bool`` for a predicate."""
        if isinstance(operand, Immediate):
            if dtype is bool:
                return np.array([bool(operand.value)])
            size = np.dtype(dtype).itemsize
            return np.array([operand.value & ((1 << 8 * size) - 1)], unsigned(size)).view(dtype)
        values = self.values.get(operand)
        if values is None:
            values = self.special.get(operand)
        if values is None:
            if operand.startswith("%"):
                raise UnwrittenRegisterError(f"{operand} is read before it is written")
            values = np.zeros(1, U32)  # the name of shared memory, which starts at 0
        if dtype is bool or values.dtype == bool:
            return values
        size = np.dtype(dtype).itemsize
        if values.itemsize != size:
            values = values.astype(unsigned(size))
        return values.view(dtype)

    def write(self, register: str, values: Array, mask: Mask) -> None:
        """Writes the lanes in the mask."""
        if register in ("tmp", "_"):
            return
        if values.dtype != bool:
            values = np.ascontiguousarray(values).view(unsigned(values.itemsize))
            if values.itemsize == 1:
                values = values.astype(U16)
        if mask is not None:
            old = self.values.get(register)
            if old is None:
                old = np.zeros(1, bool) if values.dtype == bool else np.full(1, np.iinfo(values.dtype).max)
            values = np.where(mask, values, old.astype(values.dtype))
        self.values[register] = values
