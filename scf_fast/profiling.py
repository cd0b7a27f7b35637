"""A look into a few steps of a run: how much of them is communication, and on request a trace for chrome://tracing or perfetto."""
import logging
import time
from pathlib import Path

import torch

from scf_fast.launch import Runtime

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 5  # compilation, autotuning and caches are over by then
_TRACED_STEPS = 5
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel")


class StepProfile:
    """Profiles one step for the share of communication, where there is any; with ``trace`` five, whose trace is kept.

    Attributes:
        communication: share of the profiled steps' time in which a collective ran, waiting for other ranks included; None where nothing was
            measured. Where they overlap with computation it is time in which both went on.
    """

    def __init__(self, runtime: Runtime, first_step: int, last_step: int, trace: Path | None):
        steps = _TRACED_STEPS if trace else int(runtime.world_size > 1)
        begin = first_step + _WARM_UP_STEPS
        self._steps = range(begin + 1, min(begin + steps, last_step) + 1)
        self._runtime, self._trace, self._profiler = runtime, trace, None
        self.communication: float | None = None

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (self._runtime.device.type == "cuda")
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
        spans = [(event.time_range.start, event.time_range.end) for event in profiler.events() if event.name.startswith(_COLLECTIVES)
                 and (event.device_type == torch.autograd.DeviceType.CUDA) == on_device]
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
        """End the profiling, if it is going on."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
