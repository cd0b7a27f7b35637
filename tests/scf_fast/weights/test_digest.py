"""The digest of weights. Caches store it, so its values are part of the file format."""

import torch

from scf_fast.weights.digest import digest_weights

STATE = {"b": torch.arange(3.0), "a": torch.tensor(7), "c": torch.ones(2, 2, dtype=torch.float16).T}

PLAIN = "09ad5efff23fde1395505abe3703a78946bf2a0a1abfd9bbaa18decd24de9c5b"
WITH_CONTEXT = "ed9a0c36c1ce74f5f2ef4be941133f7125595bcb5e11f098a50956a2993b936a"


def test_the_values_that_caches_hold():
    assert digest_weights(STATE) == PLAIN
    assert digest_weights(STATE, "insightface auto cpu False") == WITH_CONTEXT


def test_any_order_and_every_bit():
    assert digest_weights(dict(reversed(STATE.items()))) == digest_weights(STATE)
    assert digest_weights({**STATE, "b": torch.tensor([0.0, 1.0, 2.0000002])}) != digest_weights(STATE)
