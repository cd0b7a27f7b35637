"""Time, memory and launches of one call, measured the same way in every benchmark."""

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Buffers = Sequence[tuple]  # tuples of arguments, used in turn
Clock = Callable[[], float]

_ROTATED_BYTES = 256 * 2**20  # exceeds the last-level cache of the devices at hand
_MAX_BUFFERS = 16
_WARMUP_CALLS = 3


def buffer_count(nbytes: int) -> int:
    """Returns how many input sets of ``nbytes`` each to rotate through, so that where possible a call finds its input
    in memory and not in a cache.
    """
    return max(2, min(_MAX_BUFFERS, -(-_ROTATED_BYTES // nbytes)))


def synchronize(device: torch.device | str) -> None:
    """Waits for the device's queued work; on the CPU there is none."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Callable, args: tuple, device: torch.device | str, clock: Clock = time.perf_counter) -> float:
    synchronize(device)
    start = clock()
    call(*args)
    synchronize(device)
    return clock() - start


def interleaved_seconds(
    calls: Mapping[str, Callable],
    buffers: Buffers,
    device: torch.device | str,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Times ``rounds`` calls of each function, the functions taking turns so that a disturbance strikes all of them.

    In every round each function runs once untimed on one buffer and once timed on the next: whatever the function
    before it left behind, such as a heap just returned to the system, is not charged to it. Each round begins with
    another function.

    Returns:
        {name: seconds by ``clock``, one for each round}.
    """
    names, remaining = list(calls), itertools.cycle(buffers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        calls[name](*next(remaining))  # compilation
    for turn in range(rounds):
        before, args = next(remaining), next(remaining)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            calls[name](*before)
            samples[name].append(_seconds(calls[name], args, device, clock))
    return samples


def sampled_seconds(call: Callable, buffers: Buffers, device: torch.device | str, budget: float) -> list[float]:
    """Times one call after another on buffers in turn for about ``budget`` seconds.

    Returns:
        The seconds of 5 to 200 calls; of 3 where a single call takes 2 s or more.
    """
    remaining = itertools.cycle(buffers)
    call(*next(remaining))  # compilation
    once = _seconds(call, next(remaining), device)
    for _ in range(_WARMUP_CALLS if once < budget else 0):
        call(*next(remaining))
    rounds = max(5 if once < 2 else 3, min(200, int(budget / once)))
    return [_seconds(call, next(remaining), device) for _ in range(rounds)]


@contextlib.contextmanager
def _trace_path(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "trace.json"


def footprint(
    call: Callable, args: tuple, device: torch.device | str, trace: Path | None = None
) -> dict[str, float | int | None]:
    """Measures what one call costs besides time; an earlier call must have done all compiling and setting up.

    Args:
        trace: file to keep the profiler's trace in, for chrome://tracing or Perfetto.
    Returns:
        peak_mib: the most that PyTorch's allocators held at once beyond the inputs.
        operators: PyTorch operators dispatched.
        kernels, copies: device kernels launched and transfers made; None on the CPU.
        device_us: device time of both; None on the CPU.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, profile_memory=True) as profiler:
        result = call(*args)
        synchronize(device)
    del result
    with _trace_path(trace) as path:
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    device_type = 1 if on_gpu else 0  # as c10::DeviceType numbers them
    allocations = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device_type
    )
    held = itertools.accumulate((nbytes for _, nbytes in allocations), initial=0)
    on_device = {kind: [event for event in events if event.get("cat") == kind] for kind in ("kernel", "gpu_memcpy")}
    return {
        "peak_mib": max(held) / 2**20,
        "operators": sum(event.get("cat") == "cpu_op" for event in events),
        "kernels": len(on_device["kernel"]) if on_gpu else None,
        "copies": len(on_device["gpu_memcpy"]) if on_gpu else None,
        "device_us": sum(event["dur"] for event in itertools.chain(*on_device.values())) if on_gpu else None,
    }


def time_case(benchmark: "BenchmarkFixture", call: Callable, buffers: Buffers, device: torch.device | str) -> float:
    """Times ``call`` on one buffer after another with pytest-benchmark and returns the median in seconds."""
    remaining = itertools.cycle(buffers)

    def timed(*args: object) -> None:
        call(*args)
        synchronize(device)

    timed(*next(remaining))  # compilation
    seconds = _seconds(call, next(remaining), device)
    # About a second in all, but at least two rounds: the published way takes most of a minute for 2^26 values.
    rounds = max(2, min(200, int(1 / seconds)))
    benchmark.pedantic(
        timed, setup=lambda: (next(remaining), {}), rounds=rounds, warmup_rounds=min(_WARMUP_CALLS, rounds - 2)
    )
    return benchmark.stats.stats.median
