"""A result file as the suite writes it, with made-up timings."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.measuring.samples import Samples

ENVIRONMENT = {
    "date": "2026-01-02",
    "device": "cpu",
    "cpu": "A",
    "threads": 1,
    "torch": "2",
    "commit": "c",
    "command": "python -m bench.suite",
}
FLOORS = {
    "copy_bytes_per_second": 1e10,
    "flops_per_second": {"float32": 1e11, "bfloat16": 2e11},
    "launch_seconds": 1e-6,
}


def _samples(median: float, spread: float, seed: int, count: int = 50) -> list[float]:
    rng = random.Random(seed)
    return [median * rng.gauss(1, spread) for _ in range(count)]


def _write(
    path: Path,
    section: str = "scf_loss",
    ours: float = 1e-3,
    baseline: float = 2e-3,
    spread: float = 0.02,
    seed: int = 0,
    summarized: bool = True,
    **more: object,
) -> str:
    """Writes the timings of one piece of work in two ways, and of a peer that is not installed; ``more`` changes the
    environment. Unless ``summarized``, all samples are in the file, as earlier versions wrote them.
    """
    records: list[dict[str, object]] = []
    for way, median in (("scf_fast", ours), ("published", baseline)):
        seconds = _samples(median, spread, seed)
        records.append(
            {
                "work": "scf_loss, B = 4",
                "way": way,
                "seconds": Samples.summarize(seconds).as_dict() if summarized else seconds,
                "floor_seconds": 1e-4,
                "bound": "memory",
                "per_second": 4 / median,
                "unit": "images",
            }
        )
    records.append({"work": "scf_loss, B = 4", "way": "peer", "not_measured": "not installed"})
    content = {
        "section": section,
        "environment": ENVIRONMENT | more,
        "machine": FLOORS,
        "complete": True,
        "records": records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="session")
def suite_file() -> Callable[..., str]:
    return _write


@pytest.fixture(scope="session")
def measured_on() -> dict[str, object]:
    """The environment that ``suite_file`` writes."""
    return ENVIRONMENT
