import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler

SIZES = {
    "num_samples": st.integers(36, 300),
    "per_rank": st.integers(1, 6),
    "seed": st.integers(-5, 2**70),
    "epoch": st.integers(0, 9),
}


def ranks(world_size, num_samples, batch_size, **options):
    return [
        EpochSampler(num_samples, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


def global_batch(samplers, epoch, batch):
    return np.concatenate([sampler.indices(epoch, batch) for sampler in samplers])


@given(**SIZES, last_batch=st.sampled_from(["drop", "partial"]), shuffle=st.booleans())
def test_any_number_of_ranks_sees_the_same_epoch_each_image_once(
    num_samples, per_rank, seed, epoch, last_batch, shuffle
):
    batch_size = 6 * per_rank
    options = {"seed": seed, "last_batch": last_batch, "shuffle": shuffle}
    one = EpochSampler(num_samples, batch_size, **options)
    batches = [one.indices(epoch, batch) for batch in range(one.batches_per_epoch)]
    for world_size in (2, 3):
        samplers = ranks(world_size, num_samples, batch_size, **options)
        assert {sampler.batches_per_epoch for sampler in samplers} == {one.batches_per_epoch}
        # Any batch can be asked for first: resuming, on another number of ranks too, is starting there.
        for batch in reversed(range(one.batches_per_epoch)):
            np.testing.assert_array_equal(global_batch(samplers, epoch, batch), batches[batch])
            sizes = [len(sampler.indices(epoch, batch)) for sampler in samplers]
            assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size // world_size
    seen = np.concatenate(batches)
    assert (
        len(np.unique(seen))
        == len(seen)
        == (num_samples if last_batch == "partial" else num_samples // batch_size * batch_size)
    )
    assert seen.min() >= 0 and seen.max() < num_samples and seen.dtype == np.int64
    if not shuffle:
        np.testing.assert_array_equal(seen, np.arange(len(seen)))


@given(**SIZES)
def test_flips_belong_to_the_image_and_the_epoch(num_samples, per_rank, seed, epoch):
    one, other = (
        EpochSampler(num_samples, 6, seed=seed),
        EpochSampler(num_samples, 6 * per_rank, rank=2, world_size=3, seed=seed),
    )
    indices = one.indices(epoch, 0)
    np.testing.assert_array_equal(one.flips(epoch, indices), other.flips(epoch, indices[::-1])[::-1])


def test_every_order_is_equally_likely():
    sampler, trials = EpochSampler(4, 4, seed=7), 4800
    counts = Counter(tuple(sampler.indices(epoch, 0)) for epoch in range(trials))
    expected = trials / math.factorial(4)
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in counts)
    assert len(counts) == 24 and chi_square < 49.7  # 99.9 % quantile, 23 degrees of freedom


def test_flips_are_fair_and_independent_of_epoch_seed_and_place():
    n = 100_000
    sampler, other = EpochSampler(n, 1000, seed=0), EpochSampler(n, 1000, seed=1)
    a, b, c = sampler.flips(0, np.arange(n)), sampler.flips(1, np.arange(n)), other.flips(0, np.arange(n))
    order = np.concatenate([sampler.indices(0, batch) for batch in range(100)])
    for coins in (a, a ^ b, a ^ c, a[1:] ^ a[:-1], a ^ (order % 2 == 0), a[order] ^ (np.arange(n) % 2 == 0)):
        assert abs(coins.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(coins))


def test_seed_and_epoch_change_the_order():
    orders = [EpochSampler(100, 100, seed=seed).indices(epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_computed_once_an_epoch(monkeypatch):
    sampler, calls = EpochSampler(10, 2), []
    monkeypatch.setattr(np, "argsort", lambda values, sort=np.argsort: calls.append(1) or sort(values))
    for epoch in (0, 0, 1):
        for batch in range(5):
            sampler.indices(epoch, batch)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 10, "world_size": 3}, "positive multiple of the 3 ranks, got 10; use 9"),
        ({"global_batch_size": 0}, "positive multiple"),
        ({"global_batch_size": 4, "rank": 2, "world_size": 2}, "rank must lie in 0..1, got 2"),
        ({"global_batch_size": 4, "last_batch": "keep"}, "'drop' or 'partial', got 'keep'"),
        ({"global_batch_size": 21}, "20 images fill no batch of 21"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(20, **arguments)


def test_batch_out_of_range():
    with pytest.raises(ValueError, match=r"batch must lie in 0\.\.4, got 5"):
        EpochSampler(20, 4).indices(0, 5)


@given(**SIZES, last_batch=st.sampled_from(["drop", "partial"]), block_size=st.sampled_from([0, 1, 7, 500]))
def test_order_does_not_depend_on_the_batches(num_samples, per_rank, seed, epoch, last_batch, block_size):
    options = {"seed": seed, "last_batch": last_batch, "block_size": block_size}
    samplers = ranks(3, num_samples, 3 * per_rank, **options)
    seen = np.concatenate([global_batch(samplers, epoch, batch) for batch in range(samplers[0].batches_per_epoch)])
    whole = EpochSampler(num_samples, 1, **options)
    order = np.concatenate([whole.indices(epoch, i) for i in range(num_samples)])
    np.testing.assert_array_equal(seen, order[: len(seen)])
    assert num_samples - len(seen) < (3 * per_rank if last_batch == "drop" else 1)


def test_blocks_are_whole_and_mixed():
    sampler = EpochSampler(64 * 10 * 3, 1, block_size=10, seed=3)
    order = np.concatenate([sampler.indices(2, i) for i in range(sampler.batches_per_epoch)])
    np.testing.assert_array_equal(np.sort(order), np.arange(1920))
    windows = [set((order[start : start + 640] // 10).tolist()) for start in (0, 640, 1280)]
    assert [len(blocks) for blocks in windows] == [64] * 3 and not windows[0] & windows[1]
    assert np.mean(np.diff(order[:640]) == 1) < 0.05  # neighbors are apart
    other = np.concatenate([sampler.indices(3, i) for i in range(100)])
    assert not np.array_equal(other, order[:100])


def test_uniforms():
    sampler, other = EpochSampler(50_000, 100, seed=4), EpochSampler(50_000, 10, rank=1, world_size=2, seed=4)
    values = sampler.uniforms(1, np.arange(50_000), 3)
    np.testing.assert_array_equal(other.uniforms(1, np.array([7, 3]), 3), values[[7, 3]])
    assert values.shape == (50_000, 3) and values.min() >= 0 and values.max() < 1
    assert abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.02 and abs(values.mean(0) - 0.5).max() < 0.01
    assert not np.array_equal(values[:9], sampler.uniforms(2, np.arange(9), 3))


def test_least_of_a_sampler():
    class Fixed(Sampler):
        num_samples, global_batch_size, world_size, batches_per_epoch = 4, 2, 1, 1

        def indices(self, epoch, batch):
            return np.array([3, 1])

    assert Fixed().flips(0, np.array([3, 1])).tolist() == [False, False]
    with pytest.raises(ValueError, match="Fixed has no random numbers, which augmentation needs"):
        Fixed().uniforms(0, np.array([3, 1]), 2)


def test_negative_block_size_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 0, got -1"):
        EpochSampler(20, 4, block_size=-1)
