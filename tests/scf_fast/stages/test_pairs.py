"""Batches of genuine pairs, and their division into micro-batches."""

import numpy as np
import pytest
import torch

from scf_fast import distributed
from scf_fast.pipelines.loading.base import Batch
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.stages.pairs import PairLoader, divide

LABELS = np.repeat([3, 5, 9], [7, 6, 2])  # with K = 3: groups of 3 and 4, of 3 and 3, of 2


class Shown(BatchLoader):
    """Batches of a sampler; ``replaced`` are shown in place of others."""

    def __init__(self, sampler, replaced):
        self.sampler, self.replaced, self.closed = sampler, replaced, False

    def batches(self, epoch, start_batch=0):
        for batch in range(start_batch, self.sampler.batches_per_epoch):
            shown = torch.tensor([self.replaced.get(i, i) for i in self.sampler.indices(epoch, batch).tolist()])
            yield Batch(shown[:, None].float(), torch.from_numpy(LABELS[shown.numpy()]), shown)

    def count_broken(self):
        return len(self.replaced)

    def close(self):
        self.closed = True


def pairs_of(labels):
    return {(a, b) for a in range(len(labels)) for b in range(a) if labels[a] == labels[b]}


@pytest.mark.parametrize("replaced", [{}, {0: 14, 8: 9}])
def test_a_pair_is_of_one_group_and_one_person(replaced):
    """Two groups of a person make no pair with each other, and the image that replaces a broken one makes one only if
    it shows the person.
    """
    sampler = PairSampler(LABELS, 5, 3, seed=1)
    images = Shown(sampler, replaced)
    with PairLoader(images, sampler, LABELS) as loader:
        for epoch in range(3):
            (batch,) = loader.batches(epoch)
            groups = np.repeat(np.arange(5), sampler.group_sizes(epoch, 0))
            shown = batch.indices.numpy()
            assert batch.inputs.images[:, 0].tolist() == shown.tolist()
            people = list(zip(groups.tolist(), LABELS[shown].tolist()))
            assert pairs_of(batch.inputs.labels.tolist()) == pairs_of(people)
            assert batch.pairs == len(pairs_of(people)) == (16 if not replaced else batch.pairs)
            assert batch.pairs <= 16
        assert list(loader.batches(0, start_batch=1)) == []
        assert loader.count_broken() == len(replaced) and loader.seconds == {}
    assert images.closed


def test_micro_batches_are_whole_groups():
    sampler = PairSampler(LABELS, 4, 3, seed=1)
    (batch,) = PairLoader(Shown(sampler, {}), sampler, LABELS).batches(0)
    distributed.start()
    try:
        parts = divide(batch, 2)
    finally:
        distributed.finish()
    sizes = sampler.group_sizes(0, 0)
    assert [len(part.inputs.images) for part in parts] == [sizes[:2].sum(), sizes[2:].sum()]
    for name in ("images", "labels", "indices"):
        whole = torch.cat([getattr(part.inputs, name) for part in parts])
        assert torch.equal(whole, getattr(batch.inputs, name))
    for part in parts:
        assert part.share.pairs == batch.pairs
        assert part.share.of_pairs.item() == pytest.approx(2 / batch.pairs)
        assert part.share.of_images.item() == pytest.approx(2 / sizes.sum())


def test_a_batch_without_a_pair_counts_nothing():
    """Every image but one of each group is broken."""
    sampler = PairSampler(np.array([0, 0, 1, 1]), 2, 2)
    labels = np.array([0, 0, 1, 1, 2])
    images = Shown(PairSampler(np.array([0, 0, 1, 1]), 2, 2), {0: 4, 2: 4})
    (batch,) = PairLoader(images, sampler, labels).batches(0)
    distributed.start()
    try:
        (part,) = divide(batch, 1)
    finally:
        distributed.finish()
    assert batch.pairs == part.share.pairs == 0 and part.share.of_pairs.isfinite()
