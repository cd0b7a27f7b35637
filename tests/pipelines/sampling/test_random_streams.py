import itertools

import numpy as np

from scf_fast.pipelines.sampling.random_streams import permutation, splitmix64, stream_key


def test_hash_is_splitmix64():
    """Steele, Lea and Flood's generator, one step at a time in Python integers."""
    state, mask = 1234567, 2**64 - 1
    for step in range(1, 6):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        assert int(splitmix64(1234567, np.array([step]))[0]) == z ^ z >> 31
    assert (
        int(splitmix64(1234567, np.array([1]))[0]) == 6457827717110365317
    )  # the first output of the published test vector for this seed


def test_keys_differ_with_every_word_and_their_order():
    words = list(itertools.product((0, 1, 2, -1, 2**63), repeat=3))
    assert len({stream_key(*triple) for triple in words}) == len(words)


def test_permutation_across_blocks(monkeypatch):
    whole = permutation(5, 1000)
    np.testing.assert_array_equal(np.sort(whole), np.arange(1000))
    monkeypatch.setattr("scf_fast.pipelines.sampling.random_streams._BLOCK", 7)
    np.testing.assert_array_equal(permutation(5, 1000), whole)
