"""Batches of P groups of K images of one identity, for losses between images of a person.

In every epoch the images of an identity, in random order, are dealt into groups of K; a last group of one joins the
one before, so that a group has 2 to K + 1 images. An identity with one image has no group. The groups of all
identities are shuffled. Global batch g is the groups [g P, (g + 1) P), and a rank takes a contiguous share of whole
groups: a pure function of (seed, epoch, batch, rank), and ranks of any number see the same global batches.
"""

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import IntArray
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.random_streams import permutation
from scf_fast.pipelines.sampling.sampler import (
    DEAL,
    GROUPS,
    SeededSampler,
    check_share,
    count_batches,
    share_of_batch,
)


class PairSampler(SeededSampler):
    """Deals each identity's images into groups, shuffles the groups, gives each rank its share of them, and resumes at
    any batch.

    Args:
        labels: (N,), the identity of each image.
        groups: P, of a batch over all ranks; a multiple of ``world_size``.
        images: K, of a group; at least 2.
        rank, world_size: this process and how many there are.
        seed: fixes the groups, their order and the flips of every epoch.
        last_batch: what becomes of the groups at the end of an epoch that fill no whole batch. 'drop' leaves them out;
            'partial' makes them a shorter last batch, split as evenly as can be (a rank's share may be empty).
        chosen: (N,) bool, the images of the identities to show; None: all.
    Attributes:
        num_groups: of an epoch, those of a dropped last batch included.
        num_shown: images of all groups.
        left_out: images chosen that are never shown: those of identities with one image.
    Raises:
        InputError: the batch does not fit the ranks or the data, or an image has no label.
    """

    def __init__(
        self,
        labels: IntArray,
        groups: int,
        images: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        last_batch: str = "drop",
        chosen: npt.NDArray[np.bool_] | None = None,
    ):
        super().__init__(seed)
        if images < 2:
            raise ValueError(f"a group must have at least 2 images, got {images}")
        if groups < 1 or groups % world_size:
            raise InputError(
                f"the {groups} groups of a batch must divide over the {world_size} ranks; use "
                f"{max(1, round(groups / world_size)) * world_size}"
            )
        check_share(rank, world_size, last_batch)
        if labels.min(initial=0) < 0:
            raise InputError("pairs of a person need a label for every image; use a data set with labels")
        self._chosen = np.arange(len(labels)) if chosen is None else np.flatnonzero(chosen)
        self._labels = labels[self._chosen]
        counts = np.unique(self._labels, return_counts=True)[1]  # labels may have wide gaps
        self.left_out = int(np.count_nonzero(counts == 1))
        self.num_shown = len(self._chosen) - self.left_out
        self.num_groups = int(_count_groups(counts, images).sum())
        if self.num_groups == 0:
            raise InputError(
                f"pairs of a person need two images of somebody, but the {len(self._labels)} images are of "
                f"{len(counts)} people; use a data set with more images of each"
            )
        if self.num_groups < groups and last_batch == "drop":
            raise InputError(
                f"the images make {self.num_groups} groups of {images} of a person, which fill no batch of {groups}; "
                "use smaller batches or more data"
            )
        self._groups, self._images = groups, images
        self.num_samples, self.global_batch_size = len(labels), groups * (images + 1)
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = count_batches(self.num_groups, groups, last_batch)
        self._epoch: int | None = None
        self._order: IntArray = np.empty(0, dtype=np.int64)
        self._bounds: IntArray = self._order

    @property
    def images_per_batch(self) -> float:
        return self._groups * self.num_shown / self.num_groups

    def indices(self, epoch: int, batch: int) -> IntArray:
        """Returns this rank's images of one batch, (B,), group after group."""
        bounds = self._share(epoch, batch)
        return self._order[bounds[0] : bounds[-1]]

    def group_sizes(self, epoch: int, batch: int) -> IntArray:
        """Returns the number of images of each group of this rank's share, (groups / world_size,)."""
        return np.diff(self._share(epoch, batch))

    def _share(self, epoch: int, batch: int) -> IntArray:
        """Returns where the groups of this rank's share begin in the epoch's order, and where the last one ends."""
        first, last = share_of_batch(
            self.num_groups, self._groups, self.batches_per_epoch, batch, self.rank, self.world_size
        )
        if epoch != self._epoch:  # kept until another epoch is asked for
            self._order, self._bounds = self._deal(epoch)
            self._order.flags.writeable = False
            self._epoch = epoch
        return self._bounds[first : last + 1]

    def _deal(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Returns the images of an epoch, group after group, and the bounds of the groups, (num_groups + 1,)."""
        order = permutation(self.stream(epoch, DEAL), len(self._labels))
        order = order[np.argsort(self._labels[order], kind="stable")]  # identity after identity, each in random order
        begins = np.flatnonzero(np.diff(self._labels[order], prepend=-1))
        counts = np.diff(begins, append=len(order))
        groups = _count_groups(counts, self._images)
        own = np.arange(self.num_groups) - np.repeat(np.cumsum(groups) - groups, groups)  # number within its identity
        starts = np.repeat(begins, groups) + own * self._images
        is_last = own == np.repeat(groups, groups) - 1
        ends = np.where(is_last, np.repeat(begins + counts, groups), starts + self._images)
        turn = permutation(self.stream(epoch, GROUPS), self.num_groups)
        starts, sizes = starts[turn], (ends - starts)[turn]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], sizes)
        return self._chosen[order[places]], bounds


def _count_groups(counts: IntArray, images: int) -> IntArray:
    """Returns the number of groups of identities with so many images: a rest of one makes none."""
    return counts // images + (counts % images > 1)
