"""What the ranks must agree on in every step: whether its loss is finite everywhere, whether to stop, whether a
checkpoint is on all disks.
"""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scf_fast.distributed import Runtime

log = logging.getLogger(__name__)


class Votes(NamedTuple):
    """Whether it is so on any rank."""

    not_finite: bool
    stop: bool
    writing: bool  # a checkpoint's files


class StepGuard:
    """Keeps a step whose loss is not finite, on any rank, from changing anything: weights, optimizer state, BatchNorm
    statistics.

    The optimizer's ``step`` does nothing in such a step; gradients are dropped by the engine as after any other.
    :meth:`decide` asks the device for the answer and :meth:`votes` waits for it, so that a GPU computes the backward
    pass meanwhile.

    Args:
        limit: after so many steps in a row the run is lost.
        report: file that gets a line for each such step with the images of this rank's batch.
    Attributes:
        skipped: how many steps of this run were.
    """

    def __init__(self, engine, runtime: Runtime, limit: int, report: Path):
        self.engine, self.runtime, self.limit, self.report = engine, runtime, limit, report
        self.skipped = 0
        self._in_a_row = 0
        self._skip = False
        self._buffers = [buffer for buffer in engine.module.buffers() if buffer.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._losses: list[torch.Tensor] = []
        step = engine.basic_optimizer.step
        engine.basic_optimizer.step = lambda *args, **kwargs: None if self._skip else step(*args, **kwargs)

    def before_step(self) -> None:
        """Remember the statistics that the forward pass is about to change."""
        self._skip, self._losses = False, []
        _copy(self._kept, self._buffers)

    def see(self, loss: torch.Tensor) -> None:
        """Take note of a micro-batch's loss."""
        self._losses.append(loss.detach())

    def decide(self, stop: bool, writing: bool) -> None:
        """Start the vote; collective, once a step, after its last forward pass."""
        device = self.runtime.device
        losses = torch.stack(self._losses)
        own = (~losses.isfinite()).any().to(torch.int32)
        votes = torch.stack([own, *torch.tensor([stop, writing], dtype=torch.int32).to(device, non_blocking=True)])
        if self.runtime.world_size > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        votes = torch.cat([votes, own[None]])
        if device.type == "cuda":
            host = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
            host.copy_(votes, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            votes = host
        self._votes = votes

    def votes(self) -> Votes:
        """The outcome. After a loss that is not finite the statistics are as before the step, and the optimizer will
        not act.
        """
        if self.runtime.device.type == "cuda":
            self._event.synchronize()
        not_finite, stop, writing, own = map(bool, self._votes.tolist())
        self._own = own
        self._skip = not_finite
        if not_finite:
            _copy(self._buffers, self._kept)
        return Votes(not_finite, stop, writing)

    def count(self, votes: Votes, step: int, images: Callable[[], list[str]]) -> None:
        """Count, report and, after too many in a row, end the run.

        Args:
            images: gives the names of this rank's images of the step.
        Raises:
            FloatingPointError: ``limit`` steps in a row had a loss that is not finite.
        """
        if not votes.not_finite:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._own:
            names = images()
            with (
                contextlib.suppress(OSError),
                open(self.report, "a") as file,
            ):  # on a disk that is full the log line has to do
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "rank": self.runtime.rank,
                            "losses": [str(loss.item()) for loss in self._losses],
                            "images": names,
                        }
                    )
                    + "\n"
                )
            log.error(
                "step %d skipped: the loss is not finite on rank %d; its %d images are in %s: %s%s",
                step,
                self.runtime.rank,
                len(names),
                self.report,
                ", ".join(names[:4]),
                " ..." if len(names) > 4 else "",
                extra={"event": "skipped", "step": step, "images": names},
            )
        if self._in_a_row >= self.limit:
            raise FloatingPointError(
                f"the loss had no finite value in any of the steps {step - self.limit + 1} to {step}; their images "
                "are in "
                f"{self.report.parent}/not_finite_rank*.jsonl; look at these, lower --lr, or --resume from the last "
                "checkpoint"
            )


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
