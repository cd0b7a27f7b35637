"""The loader's protocol: everything that a training loop needs to know about where its batches come from.

Loaders of images (:mod:`scf_fast.pipelines.loading.base`) implement it, and so does whatever makes other batches from
theirs.
"""

import abc
from collections.abc import Generator
from types import TracebackType
from typing import Generic, TypeVar

BatchT = TypeVar("BatchT")
_Self = TypeVar("_Self", bound="BatchLoader")


class BatchLoader(abc.ABC, Generic[BatchT]):
    """Runs through epochs. Close it, or use it as a context manager: it holds threads, processes or files."""

    @abc.abstractmethod
    def batches(self, epoch: int, start_batch: int = 0) -> Generator[BatchT, None, None]:
        """Iterates over the batches of one epoch, from ``start_batch`` on; closing the iterator ends the work."""

    @abc.abstractmethod
    def count_broken(self) -> int:
        """Returns how many images are known that cannot be read or decoded."""

    @property
    def seconds(self) -> dict[str, float]:
        """How the seconds spent on batches so far divide among named parts; empty if there is only one part."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Gives threads, processes, files and memory back."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
