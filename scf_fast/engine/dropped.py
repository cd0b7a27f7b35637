"""Reasons for a step that changes no weight."""

import enum


class Dropped(enum.Enum):
    """Why a step has changed nothing; the value is what stands in messages."""

    LOSS = "the loss is not finite"
    GRADIENT = "a gradient is not finite"
    LOSS_SCALE = "gradients overflow under the loss scale"  # fp16: it halves, and the next steps count

    @property
    def is_lost(self) -> bool:
        """True where the same is to be expected of the next step, so that a run ends after some in a row."""
        return self is not Dropped.LOSS_SCALE
