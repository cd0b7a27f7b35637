from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sampling.selection import Mixture, Only, PerIdentity, hold_out_people

LABELS = np.repeat([0, 2, 3, 7], [1, 5, 2, 30])[np.random.default_rng(0).permutation(38)]


def epoch_of(selection, epoch, batch=1, **options):
    sampler = EpochSampler(selection.num_samples, batch, selection=selection, last_batch="partial", **options)
    return np.concatenate([sampler.indices(epoch, b) for b in range(sampler.batches_per_epoch)])


@given(st.integers(1, 40), st.integers(0, 5))
def test_limit(count, epoch):
    selection = PerIdentity(LABELS, count)
    seen = epoch_of(selection, epoch, 7)
    assert len(seen) == len(set(seen.tolist())) == selection.size
    assert Counter(LABELS[seen].tolist()) == {k: min(n, count) for k, n in Counter(LABELS.tolist()).items()}


@given(st.integers(1, 40), st.integers(0, 5))
def test_balanced(count, epoch):
    seen = epoch_of(PerIdentity(LABELS, count, exactly=True), epoch, 7)
    assert Counter(LABELS[seen].tolist()) == dict.fromkeys((0, 2, 3, 7), count)
    times = Counter(seen.tolist())
    for identity, size in Counter(LABELS.tolist()).items():  # as equally often as can be
        each = [times[i] for i in np.flatnonzero(LABELS == identity).tolist()]
        assert set(each) <= {count // size, -(-count // size)}


def test_every_image_gets_its_turn():
    selection = PerIdentity(LABELS, 2)
    seen = Counter(np.concatenate([epoch_of(selection, epoch) for epoch in range(150)]).tolist())
    of_largest = [seen[i] for i in np.flatnonzero(LABELS == 7).tolist()]
    assert len(of_largest) == 30 and sum(of_largest) == 300 and min(of_largest) > 0 and max(of_largest) < 30
    assert not np.array_equal(np.sort(epoch_of(selection, 0)), np.sort(epoch_of(selection, 1)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_mixture_has_its_shares(sizes, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    mixture, size = Mixture(sizes, weights), sum(sizes)
    exact = size * np.array(weights) / sum(weights)
    assert mixture.draws.sum() == size and (abs(mixture.draws - exact) < 1).all()
    starts = np.cumsum([0, *sizes])
    for epoch in range(2):
        counts = np.histogram(epoch_of(mixture, epoch), bins=starts)[0]
        np.testing.assert_array_equal(counts, mixture.draws)


def test_mixture_goes_through_each_set_before_it_starts_again():
    """3 : 1 over sets of 5 and 40: 33.75 and 11.25 of 45 an epoch, that is 34 and 11."""
    mixture = Mixture([5, 40], [3, 1])
    assert mixture.size == 45 and mixture.draws.tolist() == [34, 11]
    sampler = EpochSampler(45, 1, selection=mixture, shuffle=False)
    drawn = [np.array([sampler.indices(epoch, b)[0] for b in range(45)]) for epoch in range(8)]
    small = np.concatenate([d[d < 5] for d in drawn])
    large = np.concatenate([d[d >= 5] for d in drawn])
    assert len(large) == 88
    for passes, size in ((small, 5), (large, 40)):
        whole = passes[: len(passes) // size * size].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(whole, axis=1), np.broadcast_to(np.unique(passes), whole.shape))
    assert len({tuple(p) for p in small.reshape(-1)[:270].reshape(-1, 5).tolist()}) > 30  # another order each time


def test_ranks_agree():
    mixture = Mixture([7, 20], [1, 1])
    one = epoch_of(mixture, 3, 6)
    shares = [
        EpochSampler(27, 6, selection=mixture, rank=rank, world_size=3, last_batch="partial") for rank in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate([s.indices(3, b) for b in range(5) for s in shares]), one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerIdentity(LABELS, 0), "images per identity must be at least 1, got 0"),
        (lambda: PerIdentity(np.array([0, -1]), 1), "needs a label for every image"),
        (lambda: Mixture([3, 4], [1]), r"one positive weight for each of the 2 data sets, got \[1\.0\]"),
        (lambda: Mixture([3, 4], [1, 0]), "one positive weight"),
        (lambda: Mixture([3, 4], [1, float("nan")]), "one positive weight"),
        (
            lambda: EpochSampler(9, 1, selection=Mixture([3, 4], [1, 1])),
            "the selection must be of the 9 images of the data set, it is of 7",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_people_are_held_out_whole():
    labels = np.repeat(np.arange(50) * 7, 3)[np.random.default_rng(0).permutation(150)]
    held_out = hold_out_people(labels, 0.1, 5)
    assert held_out.sum() == 15 and len(np.unique(labels[held_out])) == 5
    assert not np.isin(labels[~held_out], labels[held_out]).any()
    assert (held_out == hold_out_people(labels, 0.1, 5)).all() and (held_out != hold_out_people(labels, 0.1, 6)).any()
    sampler = EpochSampler(150, 30, selection=Only(~held_out))
    shown = np.concatenate([sampler.indices(3, batch) for batch in range(sampler.batches_per_epoch)])
    assert len(np.unique(shown)) == 120 and not held_out[shown].any()


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_at_least_two_people_are_held_out_and_two_are_left(share):
    with pytest.raises(ValueError, match="at least 2 must be held out and at least 2 be left"):
        hold_out_people(np.arange(10), share, 0)
