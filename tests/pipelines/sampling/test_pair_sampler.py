from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sampling.pair_sampler import PairSampler

# Identity -> images, in no order on the disk; the numbers have a gap.
COUNTS = {0: 1, 1: 2, 2: 3, 4: 4, 5: 5, 6: 6, 9: 7, 10: 1, 11: 13}
LABELS = np.repeat(list(COUNTS), list(COUNTS.values()))[np.random.default_rng(1).permutation(42)]


def groups_of(samplers, epoch, batch):
    """The groups of a global batch, in the order of the ranks."""
    found = []
    for sampler in samplers:
        indices, sizes = sampler.indices(epoch, batch), sampler.group_sizes(epoch, batch)
        assert sizes.sum() == len(indices) <= sampler.global_batch_size // sampler.world_size
        found += [tuple(group.tolist()) for group in np.split(indices, np.cumsum(sizes)[:-1])] if len(sizes) else []
    return found


def dealt(images, k):
    """The rule in plain words: hands of k, and a last hand of one joins the one before."""
    hands = [images[start : start + k] for start in range(0, len(images), k)]
    if len(hands) > 1 and len(hands[-1]) == 1:
        hands[-2:] = [hands[-2] + hands[-1]]
    return [hand for hand in hands if len(hand) > 1]


@given(
    st.integers(2, 6), st.sampled_from([6, 12]), st.integers(-5, 2**70), st.integers(0, 9),
    st.sampled_from(["drop", "partial"]),
)  # fmt: skip
def test_any_number_of_ranks_sees_the_same_groups_each_image_once(k, p, seed, epoch, last_batch):
    expected = Counter({label: Counter(map(len, dealt(list(range(n)), k))) for label, n in COUNTS.items()})
    number = sum(sum(sizes.values()) for sizes in expected.values())
    if number < p:
        last_batch = "partial"
    options = {"seed": seed, "last_batch": last_batch}
    one = PairSampler(LABELS, p, k, **options)
    batches = [groups_of([one], epoch, batch) for batch in range(one.batches_per_epoch)]
    for world_size in (2, 3):
        samplers = [PairSampler(LABELS, p, k, rank=r, world_size=world_size, **options) for r in range(world_size)]
        assert {sampler.batches_per_epoch for sampler in samplers} == {one.batches_per_epoch}
        # Any batch can be asked for first: resuming, on another number of ranks too, is starting there.
        for batch in reversed(range(one.batches_per_epoch)):
            assert groups_of(samplers, epoch, batch) == batches[batch]
            shares = [len(sampler.group_sizes(epoch, batch)) for sampler in samplers]
            assert max(shares) - min(shares) <= 1 and max(shares) <= p // world_size
    seen = [group for batch in batches for group in batch]
    assert all(len(batch) == p for batch in batches[: number // p]) and len(batches[-1]) <= p
    assert len(seen) == (number if last_batch == "partial" else number // p * p) and one.num_groups == number
    images = [i for group in seen for i in group]
    assert len(set(images)) == len(images)
    assert all(len({LABELS[i] for i in group}) == 1 for group in seen)
    if last_batch == "partial":
        sizes = {label: Counter() for label in COUNTS}
        for group in seen:
            sizes[LABELS[group[0]]][len(group)] += 1
        assert sizes == dict(expected)
        assert len(images) == 40 and one.left_out == 2
        assert one.images_per_batch == pytest.approx(p * 40 / number)


def test_groups_and_their_order_change_every_epoch():
    sampler = PairSampler(LABELS, 1, 4, seed=3)
    epochs = [[groups_of([sampler], epoch, batch)[0] for batch in range(sampler.batches_per_epoch)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert {frozenset(group) for group in epochs[0]} != {frozenset(group) for group in epochs[1]}
    assert [LABELS[group[0]] for group in epochs[0]] != [LABELS[group[0]] for group in epochs[1]]
    again = PairSampler(LABELS, 1, 4, seed=3)
    assert [groups_of([again], 1, batch)[0] for batch in range(again.batches_per_epoch)] == epochs[1]
    assert groups_of([PairSampler(LABELS, 1, 4, seed=4)], 0, 0) != epochs[0][:1]


def test_every_pairing_of_a_person_is_equally_likely():
    """Four images in two groups of two: three ways."""
    sampler, trials = PairSampler(np.zeros(4, dtype=np.int64), 2, 2, seed=1), 3000
    partner = Counter()
    for epoch in range(trials):
        pairs = dict(groups_of([sampler], epoch, 0))
        partner[{**pairs, **{b: a for a, b in pairs.items()}}[0]] += 1
    chi_square = sum((partner[i] - trials / 3) ** 2 / (trials / 3) for i in (1, 2, 3))
    assert chi_square < 13.8  # 99.9 % quantile, 2 degrees of freedom


def test_flips_and_random_numbers_are_there():
    one, other = PairSampler(LABELS, 2, 4, seed=3), PairSampler(LABELS, 2, 3, rank=1, world_size=2, seed=3)
    images = np.arange(42)
    np.testing.assert_array_equal(one.flips(1, images), other.flips(1, images))
    np.testing.assert_array_equal(one.uniforms(1, images, 2), other.uniforms(1, images, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LABELS, 5, 4, {"world_size": 2}), "the 5 groups of a batch must divide over the 2 ranks; use 4"),
        ((np.arange(9), 2, 4, {}), "need two images of somebody, but the 9 images are of 9 people"),
        ((LABELS, 12, 4, {}), "make 11 groups of 4 of a person, which fill no batch of 12"),
        ((np.array([0, 0, -1]), 1, 2, {}), "need a label for every image"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    *positional, options = arguments
    with pytest.raises(InputError, match=message):
        PairSampler(*positional, **options)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        PairSampler(LABELS, 2, 1)
    with pytest.raises(ValueError, match=r"batch must lie in 0\.\.4, got 5"):
        PairSampler(LABELS, 2, 4).indices(0, 5)
