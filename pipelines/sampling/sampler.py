"""Samplers: which images a rank sees in which batch, as a pure function of (seed, epoch, batch, rank).

Every epoch of an EpochSampler is one order of its images: a permutation of the whole data set, unless a selection says
otherwise. Global batch g is its slice [g G, (g + 1) G), and a rank takes a contiguous share of that, so ranks of any
number see the same global batches. A run resumes by starting at a batch of that order, with any number of ranks.
"""

from typing import Protocol

import numpy as np

from scf_fast.pipelines.aliases import BoolArray, FloatArray, IntArray
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.random_streams import permutation, splitmix64, stream_key
from scf_fast.pipelines.sampling.selection import Selection

# Kinds of independent streams of one (seed, epoch).
_ORDER, _FLIP, _WINDOW, _SELECTION, _UNIFORM = range(5)
DEAL, GROUPS = 5, 6  # of scf_fast.pipelines.sampling.pair_sampler
_KINDS = 8  # room for more
_BLOCKS_MIXED = 64  # blocks shuffled together: neighbors on the disk are often one identity, a batch must not be


class Sampler(Protocol):
    """Decides which images of a data set a rank sees, in which batch and orientation.

    By default no image is mirrored and there are no random numbers for augmentation.
    """

    num_samples: int  # images in the data set
    global_batch_size: int  # the most images of a batch over all ranks
    world_size: int  # ranks
    batches_per_epoch: int  # the same on every rank

    @property
    def images_per_batch(self) -> float:
        """Mean number of images of a whole batch over all ranks."""
        return self.global_batch_size

    def indices(self, epoch: int, batch: int) -> IntArray:
        """Returns this rank's images of one batch, (B,) positions in the data set; B can be 0."""

    def flips(self, epoch: int, indices: IntArray) -> BoolArray:
        """Returns whether to mirror each image, (B,)."""
        return np.zeros(len(indices), dtype=bool)

    def uniforms(self, epoch: int, indices: IntArray, count: int) -> FloatArray:
        """Returns ``count`` random numbers in [0, 1) for each image, (B, count)."""
        raise ValueError(f"{type(self).__name__} has no random numbers, which augmentation needs; use EpochSampler")


class SeededSampler(Sampler):
    """A sampler with random numbers: a hash of (seed, epoch, image), whatever rank or batch the image is in."""

    def __init__(self, seed: int):
        self._seed = seed

    def flips(self, epoch: int, indices: IntArray) -> BoolArray:
        """Returns whether to mirror each image, (B,): a fair coin for each (seed, epoch, image)."""
        return splitmix64(self.stream(epoch, _FLIP), indices) >> np.uint64(63) == 1

    def uniforms(self, epoch: int, indices: IntArray, count: int) -> FloatArray:
        """Returns ``count`` numbers in [0, 1) for each (seed, epoch, image), (B, count)."""
        columns = [
            splitmix64(self.stream(epoch, _UNIFORM, column), indices) >> np.uint64(11) for column in range(count)
        ]
        return np.stack(columns, axis=1) * 2.0**-53

    def stream(self, epoch: int, kind: int, number: int = 0) -> int:
        """Returns the key of one of the independent streams of an epoch."""
        return stream_key(self._seed, epoch, number * _KINDS + kind)


def check_share(rank: int, world_size: int, last_batch: str) -> None:
    """
    Raises:
        ValueError: there is no such rank, or no such rule for the last batch.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
    if last_batch not in ("drop", "partial"):
        raise ValueError(f"last_batch must be 'drop' or 'partial', got {last_batch!r}")


def count_batches(size: int, batch_size: int, last_batch: str) -> int:
    """Returns how many batches an epoch of ``size`` has."""
    whole, rest = divmod(size, batch_size)
    return whole + (rest > 0 and last_batch == "partial")


def share_of_batch(size: int, batch_size: int, batches: int, batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns a rank's part [first, last) of global batch ``batch`` of an epoch of ``size``; fewer in a partial last
    batch, split as evenly as can be.

    Raises:
        ValueError: there is no such batch.
    """
    if not 0 <= batch < batches:
        raise ValueError(f"batch must lie in 0..{batches - 1}, got {batch}")
    start = batch * batch_size
    count = min(batch_size, size - start)
    return start + rank * count // world_size, start + (rank + 1) * count // world_size


class EpochSampler(SeededSampler):
    """Shuffles globally, gives each rank its share, and resumes at any batch.

    Args:
        num_samples: size of the data set.
        global_batch_size: images a step over all ranks; a multiple of ``world_size``.
        rank, world_size: this process and how many there are.
        seed: fixes the order and the flips of every epoch.
        shuffle: False keeps the order of the data set, for evaluation.
        last_batch: what becomes of the images at the end of an epoch that fill no whole global batch. 'drop' leaves
            them out; 'partial' makes them a shorter last batch, split as evenly as can be (a rank's share may be
            empty).
        selection: which images an epoch has; None for all, each once.
        block_size: 0 shuffles globally. Otherwise the order is cut into blocks of that many images, neighbors in the
            data set; the blocks are shuffled, and the images of each 64 successive blocks are shuffled together: a
            disk that is slow at seeking reads a block in one go. Independent of the batch size and the number of ranks.
    Raises:
        InputError: the batch size does not fit the ranks or the data.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        last_batch: str = "drop",
        selection: Selection | None = None,
        block_size: int = 0,
    ):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise InputError(
                f"the global batch size must be a positive multiple of the {world_size} ranks, got "
                f"{global_batch_size}; use {max(1, round(global_batch_size / world_size)) * world_size}"
            )
        check_share(rank, world_size, last_batch)
        if block_size < 0:
            raise ValueError(f"block_size must be at least 0, got {block_size}")
        if selection is not None and selection.num_samples != num_samples:
            raise ValueError(
                f"the selection must be of the {num_samples} images of the data set, it is of {selection.num_samples}"
            )
        self._epoch_size = num_samples if selection is None else selection.size
        if self._epoch_size < (global_batch_size if last_batch == "drop" else 1):
            raise InputError(
                f"{self._epoch_size} images fill no batch of {global_batch_size}; use a smaller batch or more data"
            )
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.rank, self.world_size = rank, world_size
        super().__init__(seed)
        self._shuffle, self._selection, self._block_size = shuffle, selection, block_size
        self.batches_per_epoch = count_batches(self._epoch_size, global_batch_size, last_batch)
        self._order_epoch: int | None = None
        self._order: IntArray = np.empty(0, dtype=np.int64)

    def indices(self, epoch: int, batch: int) -> IntArray:
        """Returns this rank's images of one batch, (global_batch_size / world_size,); fewer in a partial last batch."""
        first, last = share_of_batch(
            self._epoch_size, self.global_batch_size, self.batches_per_epoch, batch, self.rank, self.world_size
        )
        return self._epoch_order(epoch)[first:last]

    def _epoch_order(self, epoch: int) -> IntArray:
        """Returns the images of an epoch in order; read-only and kept until another epoch is asked for."""
        if epoch != self._order_epoch:
            order = self._positions(epoch)
            if self._selection is not None:
                chosen = self._selection.indices(epoch, lambda turn, stream: self.stream(turn, _SELECTION, stream))
                order = chosen[order]
            self._order_epoch, self._order = epoch, order
            self._order.flags.writeable = False
        return self._order

    def _positions(self, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(self._epoch_size)
        if not self._block_size:
            return permutation(self.stream(epoch, _ORDER), self._epoch_size)
        blocks = permutation(self.stream(epoch, _ORDER), -(-self._epoch_size // self._block_size))
        windows = []
        for first in range(0, len(blocks), _BLOCKS_MIXED):
            starts = blocks[first : first + _BLOCKS_MIXED, None] * self._block_size
            inside = starts + np.arange(self._block_size)
            inside = inside[inside < self._epoch_size]
            windows.append(inside[permutation(self.stream(epoch, _WINDOW, first), len(inside))])
        return np.concatenate(windows)
