"""One way of doing one piece of work, described once and timed by pytest-benchmark or by the suite."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.measuring.environment import environment
from bench.measuring.roofline import Work
from bench.measuring.timing import footprint, sampled_seconds, time_case

# Why a case has no time: it cannot run here; its values or gradients are not right; it raised something.
LEFT_OUT = ("not_measured", "wrong", "failed")


class NotMeasured(Exception):
    """This case cannot run here, for the reason given."""


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        work: what is done and at which size; cases of the same work are compared with each other.
        way: who does it, "scf_fast..." for ours.
        prepare: called on the device's turn, gives (call, buffers): call(*buffer) is timed on one buffer after another.
            It checks values and gradients first and raises AssertionError where they are wrong, NotMeasured where the
            case cannot run here.
        least: what any way must do.
        items: (how many, of what) a call gets through, for a rate; None where that has no meaning.
        facts: shapes, types and settings, to be written beside the time.
    """

    work: str
    way: str
    prepare: Callable[[], tuple[Callable, list[tuple]]]
    least: Work
    items: tuple[int, str] | None = None
    facts: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.work}, {self.way}".replace(" ", "-")


def fresh(seed=0):
    """The same random numbers in every run; nothing compiled before, so that no case runs into the limit of
    recompilations; memory given back.
    """
    torch.manual_seed(seed)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _derived(case, median, machine):
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


def measure(case, device, machine, budget, trace=None):
    """The case as a record for a JSON file: samples, median, floor, memory; or why there are none, under one of
    LEFT_OUT.

    Whatever a case raises is its own affair: on a device seen for the first time the others are still worth having.

    Args:
        budget: about how many seconds to sample for.
        trace: file for a profiler trace of one call, or None.
    """
    record = {"work": case.work, "way": case.way, **case.facts}
    fresh()
    try:
        call, buffers = case.prepare()
        seconds = sampled_seconds(call, buffers, device, budget)
        record |= {
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            **_derived(case, statistics.median(seconds), machine),
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


def benchmark_case(benchmark, case, device, machine):
    """The same under pytest-benchmark, which keeps its own statistics."""
    benchmark.group = case.work
    call, buffers = case.prepare()
    seconds = time_case(benchmark, call, buffers, device)
    benchmark.extra_info.update(
        environment(device),
        work=case.work,
        way=case.way,
        **case.facts,
        **_derived(case, seconds, machine),
        **footprint(call, buffers[0], device),
    )
