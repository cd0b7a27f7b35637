"""Per-step consensus across ranks: finite loss, stop signal, checkpoint written; counts steps without an update."""

import collections
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.distributed import Runtime
from scf_fast.engine.dropped import Dropped
from scf_fast.run.line_files import StepLines

log = logging.getLogger(__name__)


class Votes(NamedTuple):
    """Outcome of a step's vote: true where it is so on any rank."""

    not_finite: bool
    stop: bool
    writing: bool  # a checkpoint's files


class StepGuard:
    """Finds steps whose loss is not finite on any rank, and undoes what their forward pass has done to BatchNorm;
    counts every step that changes no weight, by its reason.

    Whoever makes the step leaves the optimizer out then (``Engine.step(skip=True)``). :meth:`start_vote` asks the
    device for the answer and :meth:`votes` waits for it, so that a GPU computes the backward pass meanwhile.

    Args:
        module: its floating-point buffers are the statistics that a forward pass changes.
        limit: the run is lost after this many such steps in a row.
        report: file that gets a line for each such step with the images of this rank's batch.
    Attributes:
        dropped: steps of this run without an update, by reason.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, limit: int, report: Path):
        self.runtime, self.limit, self.report = runtime, limit, report
        self._lines: StepLines | None = None  # of the report, from the first on
        self.dropped: collections.Counter[Dropped] = collections.Counter()
        self._in_a_row: list[Dropped] = []
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

    def count(self, reason: Dropped | None, step: int, images: Callable[[], list[str]]) -> None:
        """Counts and reports a step without an update and, after too many in a row, ends the run.

        A loss that is not finite is one rank's, which names its images; a gradient that is not finite is known only of
        the sum over ranks, so every rank names its own. Steps that only the loss scale has cost are counted alone.

        Args:
            reason: None for a step that has changed the weights.
            images: gives the names of this rank's images of the step.
        Raises:
            FloatingPointError: ``limit`` steps in a row had a loss or a gradient that is not finite.
        """
        if reason is None:
            self._in_a_row = []
            return
        self.dropped[reason] += 1
        if not reason.is_lost:
            return
        self._in_a_row.append(reason)
        if self._own or reason is Dropped.GRADIENT:
            self._report(reason, step, images())
        if len(self._in_a_row) >= self.limit:
            raise FloatingPointError(
                f"no step of {step - self.limit + 1} to {step} has changed the weights: "
                f"{' or '.join(sorted({reason.value for reason in self._in_a_row}))}; their images are in "
                f"{self.report.parent}/not_finite_rank*.jsonl; look at these, lower --lr, or --resume from the last "
                "checkpoint"
            )

    def _report(self, reason: Dropped, step: int, names: list[str]) -> None:
        record = {
            "step": step,
            "rank": self.runtime.rank,
            "reason": reason.value,
            "losses": [str(loss.item()) for loss in self._losses],
            "images": names,
        }
        with contextlib.suppress(OSError):  # on a read-only disk the log line has to do
            self._lines = self._lines or StepLines(self.report)
            self._lines.add(record)
        log.error(
            "step %d skipped: %s on rank %d; its %d images are in %s: %s%s",
            step,
            reason.value,
            self.runtime.rank,
            len(names),
            self.report,
            ", ".join(names[:4]),
            " ..." if len(names) > 4 else "",
            extra={"event": "skipped", "step": step, "images": names},
        )


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
