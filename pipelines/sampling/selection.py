"""Selections: which images an epoch has where that is not each image once. A number of images of each identity, a
mixture of data sets by weight, or some images alone.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import IntArray
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.random_streams import permutation, stream_key

_HELD_OUT = 1 << 32  # a stream that no epoch has

StreamKey = Callable[[int, int], int]  # (number, stream) -> the key of a random stream


class Selection(Protocol):
    """Chooses the images of each epoch."""

    num_samples: int  # images in the data set
    size: int  # images in an epoch

    def indices(self, epoch: int, key: StreamKey) -> IntArray:
        """Returns the images of an epoch, (size,), before they are shuffled; takes random streams by ``key``."""


class PerIdentity(Selection):
    """Takes at most, or exactly, ``count`` images of each identity in every epoch; another choice of them each time.

    Args:
        labels: (N,), the class of each image.
        count: images of each identity.
        exactly: False takes all images of an identity that has fewer (a limit); True repeats them until there are
            ``count``, as equally often as can be (class-balanced sampling).
    Raises:
        InputError: an image has no label.
    """

    def __init__(self, labels: IntArray, count: int, exactly: bool = False):
        if count < 1:
            raise ValueError(f"images per identity must be at least 1, got {count}")
        if labels.min(initial=0) < 0:
            raise InputError("sampling by identity needs a label for every image; use a data set with labels")
        self._labels, self._count, self._exactly = labels, count, exactly
        sizes = np.unique(labels, return_counts=True)[1]  # labels may have wide gaps
        self.size = len(sizes) * count if exactly else int(np.minimum(sizes, count).sum())
        self.num_samples = len(labels)

    def indices(self, epoch: int, key: StreamKey) -> IntArray:
        order = permutation(key(epoch, 0), len(self._labels))
        order = order[np.argsort(self._labels[order], kind="stable")]  # identity after identity, each in random order
        first = np.flatnonzero(np.diff(self._labels[order], prepend=-1))
        sizes = np.diff(first, append=len(order))
        taken = np.full(len(sizes), self._count) if self._exactly else np.minimum(sizes, self._count)
        turn = np.arange(self.size) - np.repeat(np.cumsum(taken) - taken, taken)
        return np.sort(order[np.repeat(first, taken) + turn % np.repeat(sizes, taken)])


class Mixture(Selection):
    """Mixes several data sets by weight.

    An epoch has as many images as all sets together, and each set's share of them is its weight's. A set's draws
    continue through one random order of it after the other, from epoch to epoch: an image comes again only when all
    others of its set have come, however large the weight.

    Args:
        sizes: images in each data set, as in ``ImageSource.sizes``.
        weights: positive numbers, one for each set.
    Attributes:
        draws: (sets,), images of each set in an epoch.
    Raises:
        InputError: weights are missing, not positive or not finite.
    """

    def __init__(self, sizes: Sequence[int], weights: npt.ArrayLike):
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(sizes),) or not (np.isfinite(weights) & (weights > 0)).all():
            raise InputError(
                f"there must be one positive weight for each of the {len(sizes)} data sets, got {weights.tolist()}"
            )
        self._sizes = [int(size) for size in sizes]
        self.num_samples = self.size = sum(self._sizes)
        exact = self.size * weights / weights.sum()
        self.draws: IntArray = np.floor(exact).astype(np.int64)
        self.draws[np.argsort(self.draws - exact, kind="stable")[: self.size - self.draws.sum()]] += 1

    def indices(self, epoch: int, key: StreamKey) -> IntArray:
        drawn, start = [], 0
        for number, (size, draws) in enumerate(zip(self._sizes, self.draws.tolist())):
            first, last = epoch * draws, (epoch + 1) * draws
            passes = [permutation(key(turn, 1 + number), size) for turn in range(first // size, -(-last // size))]
            drawn.append(
                start + np.concatenate([np.empty(0, dtype=np.int64), *passes])[first % size : first % size + draws]
            )
            start += size
        return np.concatenate(drawn)


class Only(Selection):
    """Takes the same images in every epoch, each once.

    Args:
        chosen: (N,) bool, of all images of the data set.
    """

    def __init__(self, chosen: npt.NDArray[np.bool_]):
        self._chosen = np.flatnonzero(chosen)
        self.num_samples, self.size = len(chosen), len(self._chosen)

    def indices(self, epoch: int, key: StreamKey) -> IntArray:
        return self._chosen


def hold_out_people(labels: IntArray, share: float, seed: int, least_people: int = 2) -> npt.NDArray[np.bool_]:
    """Chooses people, not images, whose images training leaves out; a function of its arguments alone.

    Args:
        labels: (N,), the class of each image.
        share: of the people, in (0, 1).
    Returns:
        (N,) bool, true for the images of the people held out.
    Raises:
        InputError: an image has no label, or fewer than ``least_people`` people would be held out or be left.
    """
    if labels.min(initial=0) < 0:
        raise InputError("people can be held out only where every image has a label; use a data set with labels")
    people = np.unique(labels)
    count = round(share * len(people))
    if count < least_people or len(people) - count < least_people:
        raise InputError(
            f"a share of {share:g} holds out {count} of {len(people)} people; at least {least_people} must be held out "
            f"and at least {least_people} be left"
        )
    chosen = people[permutation(stream_key(seed, 0, _HELD_OUT), len(people))[:count]]
    return np.isin(labels, chosen)
