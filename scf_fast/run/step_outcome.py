"""What one optimizer step has come to, for the log."""

from dataclasses import dataclass

import torch

from scf_fast import distributed
from scf_fast.engine.dropped import Dropped
from scf_fast.run.step_guard import Votes


@dataclass(frozen=True)
class StepOutcome:
    """Values to log of one optimizer step, still on the device.

    Attributes:
        loss_name: name of the first of ``values``.
        names: of the other ones.
        values: means over the micro-batches.
        distributions: of the last micro-batch, by name.
        votes: what the ranks have agreed on.
        dropped: why no weight has changed; None where they have.
    """

    loss_name: str
    names: list[str]
    values: torch.Tensor
    distributions: dict[str, torch.Tensor]
    votes: Votes
    dropped: Dropped | None

    def averaged(self) -> dict[str, float]:
        """Returns means over ranks, the loss first; synchronizes with the device."""
        means = distributed.average_over_ranks(self.values.clone()).tolist()
        return dict(zip([self.loss_name, *self.names], means))
