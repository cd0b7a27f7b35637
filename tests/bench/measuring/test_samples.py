"""The summary holds what comparisons need of the samples."""

import statistics

import pytest

from bench.measuring.samples import Samples


def test_summary_by_hand():
    summary = Samples.summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.count, summary.min, summary.q1, summary.median, summary.q3, summary.max) == (5, 1, 2, 3, 4, 5)
    half = 1.57 * 2 / 5**0.5
    assert (summary.low, summary.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert Samples.from_json(summary.as_dict()) == summary == Samples.from_json([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("values", [[0.3], [0.1, 0.7], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2, 0.4]])
def test_few_samples_have_a_median_but_no_interval(values):
    summary = Samples.summarize(values)
    assert summary.median == statistics.median(values) and summary.low is summary.high is None
    assert min(values) == summary.min <= summary.q1 <= summary.median <= summary.q3 <= summary.max == max(values)
