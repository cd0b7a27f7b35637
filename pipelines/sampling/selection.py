"""What an epoch holds where that is not each image once: so many images of each identity, or a mixture of data sets by
weight.
"""

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.random_streams import permutation


class PerIdentity:
    """At most, or exactly, so many images of each identity in every epoch; another choice of them each time.

    Args:
        labels: (N,) int64, the class of each image.
        count: int >= 1, images of each identity.
        exactly: False takes all images of an identity that has fewer (a limit); True takes them again until there are
            `count`, as equally often as can be (class-balanced sampling).
    Attributes:
        size: int, images in an epoch.
    Raises:
        ValueError: count is less than 1, or an image has no label.
    """

    def __init__(self, labels, count, exactly=False):
        if count < 1:
            raise InputError(f"images per identity must be at least 1, got {count}")
        if labels.min(initial=0) < 0:
            raise InputError("sampling by identity needs a label for every image; use a data set with labels")
        self._labels, self._count, self._exactly = labels, count, exactly
        sizes = np.unique(labels, return_counts=True)[1]  # labels may have wide gaps
        self.size = len(sizes) * count if exactly else int(np.minimum(sizes, count).sum())
        self.num_samples = len(labels)

    def indices(self, epoch, key):
        """The images of an epoch, ascending.

        Args:
            epoch: int.
            key: key(number, stream) gives the key of a random stream.
        Returns:
            (size,) int64.
        """
        order = permutation(key(epoch, 0), len(self._labels))
        order = order[np.argsort(self._labels[order], kind="stable")]  # identity after identity, each in random order
        first = np.flatnonzero(np.diff(self._labels[order], prepend=-1))
        sizes = np.diff(first, append=len(order))
        taken = np.full(len(sizes), self._count) if self._exactly else np.minimum(sizes, self._count)
        turn = np.arange(self.size) - np.repeat(np.cumsum(taken) - taken, taken)
        return np.sort(order[np.repeat(first, taken) + turn % np.repeat(sizes, taken)])


class Mixture:
    """Several data sets mixed by weight.

    An epoch has `size` images, by default as many as all sets together, and each set's share of them is its weight's. A
    set's draws run on through one random order of it after the other, from epoch to epoch: an image comes again only
    when all others of its set have come, however large the weight.

    Args:
        sizes: images in each data set, as in ConcatenatedSources.sizes.
        weights: positive numbers, one for each set.
        size: int, images in an epoch; None for sum(sizes).
    Raises:
        ValueError: weights are missing, not positive or not finite.
    """

    def __init__(self, sizes, weights, size=None):
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(sizes),) or not (np.isfinite(weights) & (weights > 0)).all():
            raise InputError(
                f"there must be one positive weight for each of the {len(sizes)} data sets, got {weights.tolist()}"
            )
        self._sizes, self.num_samples = [int(n) for n in sizes], int(sum(sizes))
        self.size = self.num_samples if size is None else size
        exact = self.size * weights / weights.sum()
        self.draws = np.floor(exact).astype(np.int64)  # (sets,) of each set in an epoch
        self.draws[np.argsort(self.draws - exact, kind="stable")[: self.size - self.draws.sum()]] += 1

    def indices(self, epoch, key):
        """The images of an epoch, set after set; see PerIdentity.indices."""
        drawn, start = [], 0
        for number, (size, draws) in enumerate(zip(self._sizes, self.draws.tolist())):
            first, last = epoch * draws, (epoch + 1) * draws
            passes = [permutation(key(turn, 1 + number), size) for turn in range(first // size, -(-last // size))]
            drawn.append(
                start + np.concatenate([np.empty(0, dtype=np.int64), *passes])[first % size : first % size + draws]
            )
            start += size
        return np.concatenate(drawn)
