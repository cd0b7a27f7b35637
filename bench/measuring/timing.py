"""Time, memory and launches of one call, measured the same way in every benchmark."""

import contextlib
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_ROTATED_BYTES = 256 * 2**20  # more than the last cache of the devices at hand holds
_MAX_BUFFERS = 16
_WARMUP_CALLS = 3


def buffer_count(nbytes):
    """How many input sets of nbytes each to rotate through, so that a call finds its input in memory, not in a cache,
    where possible.
    """
    return max(2, min(_MAX_BUFFERS, -(-_ROTATED_BYTES // nbytes)))


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call, args, device, clock=time.perf_counter):
    synchronize(device)
    start = clock()
    call(*args)
    synchronize(device)
    return clock() - start


def interleaved_seconds(calls, buffers, device, rounds, clock=time.perf_counter):
    """Seconds by clock of ``rounds`` calls of each of calls, a dict from name to function, taken in turns so that a
    disturbance strikes them alike.

    In every round each call runs once untimed on the one buffer, a tuple of arguments, and once timed on the next: what
    the call before it left behind, such as a heap just given back to the system, is not on its account. Rounds begin
    with each call in turn.
    """
    names, remaining = list(calls), itertools.cycle(buffers)
    samples = {name: [] for name in names}
    for name in names:
        calls[name](*next(remaining))  # compilation
    for turn in range(rounds):
        before, args = next(remaining), next(remaining)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            calls[name](*before)
            samples[name].append(_seconds(calls[name], args, device, clock))
    return samples


def sampled_seconds(call, buffers, device, budget):
    """Seconds of one call after another on buffers in turn, for about ``budget`` seconds: 5 to 200, 3 where a call
    takes seconds itself.
    """
    remaining = itertools.cycle(buffers)
    call(*next(remaining))  # compilation
    once = _seconds(call, next(remaining), device)
    for _ in range(_WARMUP_CALLS if once < budget else 0):
        call(*next(remaining))
    rounds = max(5 if once < 2 else 3, min(200, int(budget / once)))
    return [_seconds(call, next(remaining), device) for _ in range(rounds)]


def write_json(path, content):
    """Replace the file whole or not at all, so that whoever reads it, or is interrupted here, finds one of its
    states.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@contextlib.contextmanager
def _trace_path(kept):
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "trace.json"


def footprint(call, args, device, trace=None):
    """What one call costs besides time; it must have run before, so that nothing is compiled or set up in it.

    Args:
        trace: file to keep the profiler's trace in, for chrome://tracing or Perfetto.
    Returns:
        dict: peak_mib, the most it held at once from PyTorch's allocators beyond its inputs; operators, PyTorch
        operators dispatched; kernels and copies, device kernels launched and transfers made, and device_us, the device
        time of both (None on the CPU).
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
        events = json.loads(path.read_text())["traceEvents"]
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


def time_case(benchmark, call, buffers, device):
    """Times call on one buffer after another with pytest-benchmark and returns the median seconds."""
    remaining = itertools.cycle(buffers)

    def timed(*args):
        call(*args)
        synchronize(device)

    timed(*next(remaining))  # compilation
    seconds = _seconds(call, next(remaining), device)
    # About a second in all, but twice at least: the published way takes most of a minute for 2^26 values.
    rounds = max(2, min(200, int(1 / seconds)))
    benchmark.pedantic(
        timed, setup=lambda: (next(remaining), {}), rounds=rounds, warmup_rounds=min(_WARMUP_CALLS, rounds - 2)
    )
    return benchmark.stats.stats.median
