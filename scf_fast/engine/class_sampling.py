"""Which of a rank's classes take part in a batch: all of them, or a sample and the batch's own."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from scf_fast.engine.host_copy import HostCopy

_Integers = TypeVar("_Integers", int, torch.Tensor)


def _mix(values: _Integers) -> _Integers:
    """A hash of int64 values onto [0, 2^31), the same on every device: two rounds of xor-shift and multiply."""
    for factor in (0x45D9F3B, 0x119DE1F3):
        values = ((values ^ (values >> 16)) * factor) & 0x7FFFFFFF
    return values ^ (values >> 15)


def sampled_classes(start: int, stop: int, rate: float, seed: int, draw: int, device: torch.device) -> torch.Tensor:
    """Returns (stop - start,) bool, the classes that this draw takes: each with probability ``rate``, by a hash of
    seed, draw and class alone.
    """
    key = _mix(_mix(seed & 0x7FFFFFFF) ^ (draw & 0x7FFFFFFF))
    return _mix(_mix(torch.arange(start, stop, device=device)) ^ key) < int(rate * 2**31)


@dataclass(frozen=True)
class ClassSelection:
    """The classes of one rank that take part in a batch, [start, stop) or some of them.

    Attributes:
        labels: (B,) int64, of all ranks' images.
        position: (B,) int64, of each label among the classes that take part; -1 where it is not among them.
    """

    labels: torch.Tensor
    position: torch.Tensor
    _order: torch.Tensor | None = None  # (C_local,) int64: how many of the classes up to each take part, less one
    _count: HostCopy | None = None  # of those that take part

    @classmethod
    def of_all(cls, labels: torch.Tensor, start: int, stop: int) -> "ClassSelection":
        """All classes take part."""
        here = (labels >= start) & (labels < stop)
        return cls(labels, torch.where(here, labels - start, -1))

    @classmethod
    def of_sample(
        cls, labels: torch.Tensor, start: int, stop: int, rate: float, seed: int, draw: int
    ) -> "ClassSelection":
        """The classes of a draw take part, and those of the labels."""
        size = stop - start
        here = (labels >= start) & (labels < stop)
        local = torch.where(here, labels - start, size)
        active = sampled_classes(start, stop + 1, rate, seed, draw, labels.device)  # the last stands for no class
        active.index_fill_(0, local, True)  # indexing with a mask would wait for the device
        order = torch.cumsum(active, dim=0) - 1
        count = HostCopy(active[:size].sum())
        return cls(labels, torch.where(here, order[local], -1), order[:size], count)

    def rows(self) -> torch.Tensor | None:
        """Returns (N,) int64, the classes that take part, counted from ``start`` and in order; None where all do.

        Their number decides the shape, so the host waits for it: for the work before the selection, none of that since.
        """
        if self._order is None or self._count is None:
            return None
        return torch.searchsorted(self._order, torch.arange(self._count.tolist(), device=self._order.device))
