"""The measuring itself: calls take turns, memory is counted, samples have a number that suits the call."""

import pytest
import torch

from bench.measuring import timing


def test_interleaved_seconds_takes_turns(monkeypatch):
    called, timed = [], []
    ticks = iter([1.0, 10.0, 20.0, 2.0, 9.0, 30.0])  # rounds a b, b a, a b

    def fake_seconds(call, args, device, clock):
        timed.append(call(*args))
        return next(ticks)

    monkeypatch.setattr(timing, "_seconds", fake_seconds)
    calls = {name: lambda x, name=name: called.append(name + x) or name + x for name in "ab"}
    samples = timing.interleaved_seconds(calls, [("0",), ("1",), ("2",)], "cpu", rounds=3)
    assert timed == ["a0", "b0", "b2", "a2", "a1", "b1"]
    assert called[2:] == "a2 a0 b2 b0 b1 b2 a1 a2 a0 a1 b0 b1".split()  # each after one of its own, untimed
    assert samples == {"a": [1.0, 2.0, 9.0], "b": [10.0, 20.0, 30.0]}


def test_footprint_counts_memory_held_at_once():
    """Two temporaries of a MiB at once, then the result: 2 MiB, not the 3 MiB allocated in all."""
    x = torch.rand(2**18)
    found = timing.footprint(lambda x: x.exp().log().exp(), (x,), "cpu")
    assert found["peak_mib"] == pytest.approx(2.0, abs=0.01)
    assert found["operators"] == 3
    assert found["kernels"] is found["copies"] is found["device_us"] is None


def test_buffer_count_covers_the_cache_within_bounds():
    assert timing.buffer_count(4096) == 16
    assert timing.buffer_count(64 * 2**20) == 4
    assert timing.buffer_count(2**34) == 2


def test_samples_are_many_where_calls_are_short_and_few_where_they_are_long(monkeypatch):
    for seconds, count in ((1e-4, 200), (0.1, 10), (0.5, 5), (3.0, 3)):
        monkeypatch.setattr(timing, "_seconds", lambda *_, seconds=seconds: seconds)
        assert timing.sampled_seconds(lambda: None, [()], "cpu", budget=1.0) == [seconds] * count
