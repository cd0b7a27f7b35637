"""The summary of repeated measurements that a result file keeps: count, quartiles and an interval of the median."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

FEWEST_FOR_AN_INTERVAL = 5


def median_interval(median: float, q1: float, q3: float, count: int) -> tuple[float | None, float | None]:
    """Returns the interval that holds the true median with about 95 % probability: median +- 1.57 IQR / sqrt(n).

    Source: McGill, Tukey and Larsen, "Variations of Box Plots", 1978. (None, None) for fewer than 5 samples.
    """
    if count < FEWEST_FOR_AN_INTERVAL:
        return None, None
    half = 1.57 * (q3 - q1) / math.sqrt(count)
    return median - half, median + half


@dataclass(frozen=True)
class Samples:
    """Order statistics of one series of measurements, in its unit.

    Attributes:
        low, high: bounds of :func:`median_interval`.
    """

    count: int
    min: float
    q1: float
    median: float
    q3: float
    max: float
    low: float | None
    high: float | None

    @classmethod
    def summarize(cls, values: Sequence[float]) -> "Samples":
        """Summarizes at least one measurement."""
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        low, high = median_interval(median, q1, q3, len(values))
        return cls(len(values), min(values), q1, median, q3, max(values), low, high)

    @classmethod
    def from_json(cls, found: "list[float] | dict") -> "Samples":
        """Reads either form that result files have: the summary, or all samples, as earlier versions wrote them."""
        return cls(**found) if isinstance(found, dict) else cls.summarize(found)

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)
