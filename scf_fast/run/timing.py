"""Time of a run: its parts, and a profile of a few steps with their share of communication."""

import logging
import time
from pathlib import Path

import torch

from scf_fast.distributed import Runtime

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 5  # compilation, autotuning and caches are over by then
_TRACED_STEPS = 5
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel")


class StepProfile:
    """Profiles one step for the share of communication, where there is any; with ``trace`` five, whose trace is kept.

    Attributes:
        communication: share of the profiled steps' time in which a collective ran, waiting for other ranks included;
            None where nothing was measured. Where they overlap with computation it is time in which both went on.
    """

    def __init__(self, runtime: Runtime, first_step: int, last_step: int, trace: Path | None):
        steps = _TRACED_STEPS if trace else int(runtime.world_size > 1)
        begin = first_step + _WARM_UP_STEPS
        self._steps = range(begin + 1, min(begin + steps, last_step) + 1)
        self._runtime, self._trace = runtime, trace
        self._profiler: torch.profiler.profile | None = None
        self.communication: float | None = None

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
                self._runtime.device.type == "cuda"
            )
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._began = time.perf_counter()

    def after(self, step: int) -> None:
        if self._profiler is None or step != self._steps[-1]:
            return
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        profiler = self._profiler
        self.close()
        on_device = self._runtime.device.type == "cuda"
        # A collective has one event where it is called and one where it runs: on a GPU its kernel.
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.name.startswith(_COLLECTIVES)
            and (event.device_type == torch.autograd.DeviceType.CUDA) == on_device
        ]
        self.communication = min(1.0, _covered(spans) / 1e6 / seconds)
        if self._trace:
            path = self._trace / f"steps{self._steps[0]}-{step}_rank{self._runtime.rank}.json"
            try:
                self._trace.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(path))
                log.info("trace of steps %d to %d: %s", self._steps[0], step, path)
            except (OSError, RuntimeError) as error:
                log.error("%s could not be written: %s", path, error)

    def close(self) -> None:
        """Ends the profiling, if it is going on."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def rate_text(images_per_second: float) -> str:
    """Returns a rate with as many digits as say something: a large net on a CPU makes less than one image a second."""
    return f"{images_per_second:.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"


class Breakdown:
    """Time of a run by its parts: each :meth:`mark` gives the time since the last one to a part.

    On CUDA the time is the stream's, taken by events that are read when :meth:`collect` is called, after a
    synchronization that is due anyway.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = self._now()

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        now = self._now()
        if self._cuda:
            self._events.append((part, now))
        else:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now

    def collect(self) -> None:
        """Reads the events that have passed."""
        for part, event in self._events:
            event.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + self._last.elapsed_time(event) / 1000
            self._last = event
        self._events = []

    def split(self, part: str, pieces: dict[str, float]) -> None:
        """Replaces a part by the pieces it consists of, in proportion."""
        total = sum(pieces.values())
        if total > 0:
            whole = self.seconds.pop(part, 0.0)
            self.seconds = {**{name: whole * seconds / total for name, seconds in pieces.items()}, **self.seconds}

    def __str__(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        return ", ".join(f"{part} {100 * seconds / total:.0f} %" for part, seconds in self.seconds.items())
