"""Batches of genuine pairs: images of one group that show one person."""

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch

from scf_fast.distributed import average_over_ranks
from scf_fast.features.stream import FeatureBatch
from scf_fast.pipelines.aliases import IntArray
from scf_fast.pipelines.loading.base import Batch
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.stages.criteria import PairShare


class PairBatch(NamedTuple):
    """One rank's share of a global batch.

    A pair lies within one group, so that the pairs do not depend on how ranks and micro-batches divide the groups: two
    groups of a batch can be of one person.
    """

    inputs: Batch | FeatureBatch  # labels: the same number for images that make a pair
    sizes: IntArray  # (groups,), images of each group, in order
    pairs: int

    @property
    def indices(self) -> torch.Tensor:
        """(B,) int64 on the CPU, positions in the data of what is shown."""
        return self.inputs.indices


class PairMicroBatch(NamedTuple):
    """Whole groups of a :class:`PairBatch`."""

    inputs: Batch | FeatureBatch
    share: PairShare


class PairLoader(BatchLoader[PairBatch]):
    """Batches of a loader, with their pairs.

    Args:
        loader: of images or of features, of the sampler's images; closed with this one.
        labels: (N,) of all images. The image that replaces a broken one is of another person, and makes no pair.
    """

    def __init__(self, loader: BatchLoader[Any], sampler: PairSampler, labels: IntArray):
        self._loader, self._sampler, self._labels = loader, sampler, labels

    def batches(self, epoch: int, start_batch: int = 0) -> Generator[PairBatch, None, None]:
        """Iterates over the batches of one epoch, from ``start_batch`` on."""
        with contextlib.closing(self._loader.batches(epoch, start_batch)) as batches:
            for number, batch in enumerate(batches, start_batch):
                yield self._find_pairs(batch, self._sampler.group_sizes(epoch, number))

    def _find_pairs(self, batch: Batch | FeatureBatch, sizes: IntArray) -> PairBatch:
        groups = np.repeat(np.arange(len(sizes)), sizes)
        shown = self._labels[batch.indices.numpy()].astype(np.int64)
        keys = groups * (shown.max(initial=0) + 1) + shown
        _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
        labels = torch.from_numpy(numbers).to(batch.labels.device, non_blocking=True)
        return PairBatch(batch._replace(labels=labels), sizes, int((counts * (counts - 1) // 2).sum()))

    def count_broken(self) -> int:
        """Returns how many images are known that cannot be read or decoded."""
        return self._loader.count_broken()

    @property
    def seconds(self) -> dict[str, float]:
        """Where the loader's time went so far."""
        return self._loader.seconds

    def close(self) -> None:
        """Closes the loader."""
        self._loader.close()


def share_of_sums(batch: PairBatch) -> PairShare:
    """Returns the share with which a loss is the sum over one rank's pairs."""
    one = torch.ones((), device=batch.inputs.labels.device)
    return PairShare(one, one / max(len(batch.inputs.labels), 1), batch.pairs * one)


def divide(batch: PairBatch, count: int) -> list[PairMicroBatch]:
    """Divides a batch into micro-batches of as many groups each; collective.

    Args:
        count: divides the groups.
    """
    device, groups = batch.inputs.labels.device, len(batch.sizes) // count
    counts = torch.tensor([batch.pairs, batch.sizes.sum()], dtype=torch.float32).to(device, non_blocking=True)
    means, ranks = average_over_ranks(counts), torch.distributed.get_world_size()
    of_pairs, of_images = (count / means.clamp(min=1 / ranks)).unbind()  # without a pair the sum is zero
    share = PairShare(of_pairs, of_images, means[0] * ranks)
    rows = batch.sizes.reshape(count, groups).sum(axis=1).tolist()
    parts = zip(*(tensor.split(rows) for tensor in batch.inputs))
    return [PairMicroBatch(type(batch.inputs)(*part), share) for part in parts]
