"""Per-step consensus across ranks: finite loss, stop signal, checkpoint written."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.distributed import Runtime

log = logging.getLogger(__name__)


class Votes(NamedTuple):
    """Outcome of a step's vote: true where it is so on any rank."""

    not_finite: bool
    stop: bool
    writing: bool  # a checkpoint's files


class StepGuard:
    """Finds steps whose loss is not finite on any rank, and undoes what their forward pass has done to BatchNorm.

    Whoever makes the step leaves the optimizer out then (``Engine.step(skip=True)``). :meth:`start_vote` asks the
    device for the answer and :meth:`votes` waits for it, so that a GPU computes the backward pass meanwhile.

    Args:
        module: its floating-point buffers are the statistics that a forward pass changes.
        limit: the run is lost after this many such steps in a row.
        report: file that gets a line for each such step with the images of this rank's batch.
    Attributes:
        skipped: such steps of this run.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, limit: int, report: Path):
        self.runtime, self.limit, self.report = runtime, limit, report
        self.skipped = 0
        self._in_a_row = 0
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._losses: list[torch.Tensor] = []
        self._votes: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._own = False

    def before_step(self) -> None:
        """Keeps a copy of the statistics that the forward pass is about to change."""
        self._losses = []
        _copy(self._kept, self._buffers)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Takes note of a micro-batch's loss."""
        self._losses.append(loss.detach())

    def start_vote(self, stop: bool, writing: bool) -> None:
        """Starts the vote; collective, once a step, after its last forward pass.

        Args:
            stop: whether a signal has reached this rank.
            writing: whether this rank still writes a checkpoint.
        """
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
        """Waits for the outcome of the vote. After a loss that is not finite the statistics are as before the step."""
        assert self._votes is not None, "start_vote comes first"
        if self._event is not None:
            self._event.synchronize()
        not_finite, stop, writing, self._own = map(bool, self._votes.tolist())
        if not_finite:
            _copy(self._buffers, self._kept)
        return Votes(not_finite, stop, writing)

    def count(self, votes: Votes, step: int, images: Callable[[], list[str]]) -> None:
        """Counts and reports a skipped step and, after too many in a row, ends the run.

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
            record = {
                "step": step,
                "rank": self.runtime.rank,
                "losses": [str(loss.item()) for loss in self._losses],
                "images": names,
            }
            with contextlib.suppress(OSError), open(self.report, "a") as file:  # on a full disk the log line has to do
                file.write(json.dumps(record) + "\n")
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
                f"the loss had no finite value in any of the steps {step - self.limit + 1} to {step}; their images are "
                f"in {self.report.parent}/not_finite_rank*.jsonl; look at these, lower --lr, or --resume from the last "
                "checkpoint"
            )


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
