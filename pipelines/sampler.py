"""Which images a rank sees in which batch, as a pure function of (seed, epoch, batch, rank).

Every epoch is one permutation of the whole data set. Global batch g is its slice [g G, (g + 1) G), and a rank takes a contiguous
share of that, so ranks of any number see the same global batches, and a run resumes at batch k by starting there.

Both the permutation (by sorting hashes) and the flips come from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of the
image index. NumPy promises no stable stream for Generator.permutation; this one is the same for every version and platform.
"""
import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so index -> index * _GOLDEN + key -> mix is one-to-one on 64 bits: sort keys never tie
_MASK = (1 << 64) - 1
_ORDER, _FLIP = 0, 1  # independent streams of one (seed, epoch)
_BLOCK = 1 << 15  # indices hashed together: 256 KB, so the passes of the hash stay in cache


def _hash(key, values):
    """SplitMix64's output `values` steps after state `key`: (N,) uint64 for (N,) integers."""
    z = values.astype(np.uint64)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


class EpochSampler:
    """Global shuffle, shard by rank, resume at any batch.

    Args:
        num_samples: int, size of the data set.
        global_batch_size: int, images a step over all ranks; a multiple of world_size.
        rank, world_size: this process and how many there are.
        seed: int; fixes the order and the flips of every epoch.
        shuffle: False keeps the order of the data set, for evaluation.
        last_batch: 'drop' leaves out the images that fill no whole global batch; 'partial' makes them a shorter last batch, split
            as evenly as can be (a rank's share may be empty).
    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, num_samples, global_batch_size, *, rank=0, world_size=1, seed=0, shuffle=True, last_batch="drop"):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(f"the global batch size must be a positive multiple of the {world_size} ranks, got {global_batch_size}; "
                             f"use {max(1, round(global_batch_size / world_size)) * world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if last_batch not in ("drop", "partial"):
            raise ValueError(f"last_batch must be 'drop' or 'partial', got {last_batch!r}")
        if num_samples < (global_batch_size if last_batch == "drop" else 1):
            raise ValueError(f"{num_samples} images fill no batch of {global_batch_size}; use a smaller batch or more data")
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.rank, self.world_size = rank, world_size
        self._seed, self._shuffle = seed, shuffle
        self.batches_per_epoch = num_samples // global_batch_size if last_batch == "drop" else -(-num_samples // global_batch_size)
        self._order_epoch, self._order = None, None

    def indices(self, epoch, batch):
        """This rank's images of one batch.

        Args:
            epoch: int >= 0.
            batch: int in [0, batches_per_epoch).
        Returns:
            (global_batch_size / world_size,) int64; fewer, even none, in a partial last batch.
        """
        if not 0 <= batch < self.batches_per_epoch:
            raise ValueError(f"batch must lie in 0..{self.batches_per_epoch - 1}, got {batch}")
        start = batch * self.global_batch_size
        count = min(self.global_batch_size, self.num_samples - start)
        first, last = (start + r * count // self.world_size for r in (self.rank, self.rank + 1))
        return self._epoch_order(epoch)[first:last] if self._shuffle else np.arange(first, last)

    def flips(self, epoch, indices):
        """Whether to mirror each image: a fair coin for each (seed, epoch, image), whatever rank or batch it is in.

        Args:
            epoch: int >= 0.
            indices: (B,) int64.
        Returns:
            (B,) bool.
        """
        return _hash(self._key(epoch, _FLIP), indices) >> np.uint64(63) == 1

    def _key(self, epoch, stream):
        key = 0
        for word in (self._seed, epoch, stream):
            key = int(_hash(key, np.array([word & _MASK], dtype=np.uint64))[0])
        return key

    def _epoch_order(self, epoch):
        """(num_samples,) int64, a permutation; read-only and kept until another epoch is asked for."""
        if epoch != self._order_epoch:
            key = self._key(epoch, _ORDER)
            hashes = np.empty(self.num_samples, dtype=np.uint64)
            for start in range(0, self.num_samples, _BLOCK):
                stop = min(start + _BLOCK, self.num_samples)
                hashes[start:stop] = _hash(key, np.arange(start, stop))
            self._order_epoch, self._order = epoch, np.argsort(hashes)
            self._order.flags.writeable = False
        return self._order
