"""A case, one way of doing one piece of work: described once, timed by pytest-benchmark or by the suite."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.measuring.environment import environment
from bench.measuring.roofline import Machine, Work
from bench.measuring.samples import Samples
from bench.measuring.timing import Buffers, footprint, sampled_seconds, time_case

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# Why a case has no time: it cannot run here, its values or gradients are wrong, or it raised an exception.
LEFT_OUT = ("not_measured", "wrong", "failed")


class NotMeasured(Exception):
    """This case cannot run here, for the reason given."""


@dataclass(frozen=True)
class Case:
    """One way of doing one piece of work.

    Attributes:
        work: the task and its size; cases of the same work are compared with each other.
        way: who does it; "scf_fast..." is ours.
        prepare: builds (call, buffers) on the device: ``call(*buffer)`` is timed on one buffer after another. It checks
            values and gradients first and raises AssertionError where they are wrong, NotMeasured where the case cannot
            run here. A call that has ``close`` is closed after the case.
        least: the least that any way must do.
        items: (count, unit) that one call gets through, for a rate; None where a rate has no meaning.
        facts: shapes, types and settings, written beside the time.
    """

    work: str
    way: str
    prepare: Callable[[], tuple[Callable, Buffers]]
    least: Work
    items: tuple[int, str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.work}, {self.way}".replace(" ", "-")


def _close(call: Callable | None) -> None:
    close = getattr(call, "close", None)
    if close is not None:
        close()


def reset_state(seed: int = 0) -> None:
    """Gives every case the same random numbers, an empty compiler cache (so that none runs into the limit of
    recompilations) and free memory.
    """
    torch.manual_seed(seed)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _derived(case: Case, median: float, machine: Machine) -> dict[str, Any]:
    """Sets a median in seconds against the floor."""
    floor, bound = case.least.floor(machine)
    found = {
        "floor_seconds": floor,
        "bound": bound,
        "times_floor": median / floor,
        "least_bytes": case.least.nbytes,
        "least_flop": case.least.flop,
    }
    if case.items:
        count, unit = case.items
        found |= {"per_second": count / median, "unit": unit}
    return found


def measure(
    case: Case, device: torch.device | str, machine: Machine, budget: float, trace: Path | None = None
) -> dict[str, Any]:
    """Runs the case and returns its record for a JSON file: the summary of its samples, floor and memory, or under one
    of LEFT_OUT the reason why there are none.

    No exception of a case ends the others: on a device seen for the first time they are still worth having.

    Args:
        budget: seconds to sample for, about.
        trace: file for a profiler trace of one call, or None.
    """
    record: dict[str, Any] = {"work": case.work, "way": case.way, **case.facts}
    reset_state()
    call = None
    try:
        call, buffers = case.prepare()
        seconds = sampled_seconds(call, buffers, device, budget)
        median = statistics.median(seconds)
        record |= {
            "seconds": Samples.summarize(seconds).as_dict(),
            "median_seconds": median,
            **_derived(case, median, machine),
        }
        return record | footprint(call, buffers[0], device, trace)
    except NotMeasured as reason:
        return record | {"not_measured": str(reason)}
    except torch.OutOfMemoryError as error:
        return record | {"not_measured": str(error).splitlines()[0]}
    except AssertionError as error:
        return record | {"wrong": str(error)}
    except Exception as error:
        return record | {"failed": f"{type(error).__name__}: {error}"}
    finally:
        _close(call)


def benchmark_case(benchmark: "BenchmarkFixture", case: Case, device: torch.device | str, machine: Machine) -> None:
    """Measures the case under pytest-benchmark, which keeps its own statistics."""
    benchmark.group = case.work
    call, buffers = case.prepare()
    try:
        seconds = time_case(benchmark, call, buffers, device)
        benchmark.extra_info.update(
            environment(device),
            work=case.work,
            way=case.way,
            **case.facts,
            **_derived(case, seconds, machine),
            **footprint(call, buffers[0], device),
        )
    finally:
        _close(call)
