"""Which images a rank sees in which batch, as a pure function of (seed, epoch, position, rank).

Every epoch is one order of its images: a permutation of the whole data set, unless a selection says otherwise. Global
batch g is its slice [g G, (g + 1) G), and a rank takes a contiguous share of that, so ranks of any number see the same
global batches. A run resumes by starting at a position of that order, with any number of ranks and any batch size from
there on.
"""

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.random_streams import permutation, splitmix64, stream_key

_ORDER, _FLIP, _WINDOW, _SELECTION, _UNIFORM = range(5)  # kinds of independent streams of one (seed, epoch)
_KINDS = 8  # room for more
_BLOCKS_MIXED = 64  # blocks shuffled together: neighbors on the disk are often one identity, a batch must not be


class EpochSampler:
    """Global shuffle, shard by rank, resume at any position.

    Args:
        num_samples: int, size of the data set.
        global_batch_size: int, images a step over all ranks; a multiple of world_size.
        rank, world_size: this process and how many there are.
        seed: int; fixes the order and the flips of every epoch.
        shuffle: False keeps the order of the data set, for evaluation.
        last_batch: what becomes of the images at the end of an epoch that fill no whole global batch. 'drop' leaves
            them out; 'partial' makes them a shorter last batch, split as evenly as can be (a rank's share may be
            empty); 'pad' fills that batch up with the first images of the epoch's order.
        selection: PerIdentity or Mixture, which images an epoch has; None for all, each once.
        block_size: 0 shuffles globally. Otherwise the order is cut into blocks of so many images that are neighbors in
            the data set, the blocks are shuffled, and the images of each 64 successive blocks are shuffled together: a
            disk that is slow at seeking reads a block in one go. Independent of the batch size and the number of ranks.
    Attributes:
        epoch_size: int, images in an epoch before `last_batch` has its say.
        batches_per_epoch: int.
    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self,
        num_samples,
        global_batch_size,
        *,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        last_batch="drop",
        selection=None,
        block_size=0,
    ):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise InputError(
                f"the global batch size must be a positive multiple of the {world_size} ranks, got "
                f"{global_batch_size}; "
                f"use {max(1, round(global_batch_size / world_size)) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if last_batch not in ("drop", "partial", "pad"):
            raise InputError(f"last_batch must be 'drop', 'partial' or 'pad', got {last_batch!r}")
        if block_size < 0:
            raise InputError(f"block_size must be at least 0, got {block_size}")
        if selection is not None and selection.num_samples != num_samples:
            raise InputError(
                f"the selection must be of the {num_samples} images of the data set, it is of {selection.num_samples}"
            )
        self.epoch_size = num_samples if selection is None else selection.size
        if self.epoch_size < (global_batch_size if last_batch == "drop" else 1):
            raise InputError(
                f"{self.epoch_size} images fill no batch of {global_batch_size}; use a smaller batch or more data"
            )
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.rank, self.world_size = rank, world_size
        self._seed, self._shuffle, self._last_batch = seed, shuffle, last_batch
        self._selection, self._block_size = selection, block_size
        self.batches_per_epoch = self.batches_from(0)
        self._order_epoch, self._order = None, None

    def batches_from(self, start_sample):
        """How many batches an epoch has from a position on.

        Args:
            start_sample: int in [0, epoch_size], images of the epoch that were seen before.
        """
        if not 0 <= start_sample <= self.epoch_size:
            raise InputError(f"start_sample must lie in 0..{self.epoch_size}, got {start_sample}")
        left = self.epoch_size - start_sample
        return left // self.global_batch_size if self._last_batch == "drop" else -(-left // self.global_batch_size)

    def indices(self, epoch, batch, start_sample=0):
        """This rank's images of one batch.

        Args:
            epoch: int >= 0.
            batch: int in [0, batches_from(start_sample)).
            start_sample: int in [0, epoch_size], the position in the epoch that batch 0 starts at.
        Returns:
            (global_batch_size / world_size,) int64; fewer, even none, in a partial last batch.
        """
        batches = self.batches_per_epoch if not start_sample else self.batches_from(start_sample)
        if not 0 <= batch < batches:
            raise InputError(f"batch must lie in 0..{batches - 1}, got {batch}")
        start = start_sample + batch * self.global_batch_size
        count = (
            self.global_batch_size
            if self._last_batch == "pad"
            else min(self.global_batch_size, self.epoch_size - start)
        )
        first, last = (start + r * count // self.world_size for r in (self.rank, self.rank + 1))
        order = self._epoch_order(epoch)
        return order[first:last] if last <= self.epoch_size else order[np.arange(first, last) % self.epoch_size]

    def flips(self, epoch, indices):
        """Whether to mirror each image: a fair coin for each (seed, epoch, image), whatever rank or batch it is in.

        Args:
            epoch: int >= 0.
            indices: (B,) int64.
        Returns:
            (B,) bool.
        """
        return splitmix64(self._key(epoch, _FLIP), indices) >> np.uint64(63) == 1

    def uniforms(self, epoch, indices, count):
        """Random numbers for each (seed, epoch, image), whatever rank or batch it is in.

        Args:
            epoch: int >= 0.
            indices: (B,) int64.
            count: int, numbers an image.
        Returns:
            (B, count) float64 in [0, 1).
        """
        columns = [splitmix64(self._key(epoch, _UNIFORM, column), indices) >> np.uint64(11) for column in range(count)]
        return np.stack(columns, axis=1) * 2.0**-53

    def _key(self, epoch, kind, number=0):
        return stream_key(self._seed, epoch, number * _KINDS + kind)

    def _epoch_order(self, epoch):
        """(epoch_size,) int64, the images of an epoch in order; read-only and kept until another epoch is asked for."""
        if epoch != self._order_epoch:
            chosen = (
                None
                if self._selection is None
                else self._selection.indices(epoch, lambda turn, stream: self._key(turn, _SELECTION, stream))
            )
            positions = self._positions(epoch)
            self._order_epoch, self._order = epoch, positions if chosen is None else chosen[positions]
            self._order.flags.writeable = False
        return self._order

    def _positions(self, epoch):
        if not self._shuffle:
            return np.arange(self.epoch_size)
        if not self._block_size:
            return permutation(self._key(epoch, _ORDER), self.epoch_size)
        blocks = permutation(self._key(epoch, _ORDER), -(-self.epoch_size // self._block_size))
        windows = []
        for first in range(0, len(blocks), _BLOCKS_MIXED):
            starts = blocks[first : first + _BLOCKS_MIXED, None] * self._block_size
            inside = (starts + np.arange(self._block_size)).ravel()
            inside = inside[inside < self.epoch_size]
            windows.append(inside[permutation(self._key(epoch, _WINDOW, first), len(inside))])
        return np.concatenate(windows)
