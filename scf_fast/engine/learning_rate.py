"""The learning rate as a function of the step."""

import math
from typing import Any

import torch

from scf_fast.config import Config


class LearningRate:
    """Sets the optimizer's learning rate before each step, by a closed form of the step, so that resuming needs no
    state.

    ReduceLROnPlateau is the exception: it follows the loss and keeps state (``state_dict``).

    Args:
        limit: the highest rate that the untrained network bears, in place of a higher ``--lr``; kept over resumption.
    """

    def __init__(
        self, config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int, limit: float | None = None
    ):
        self.config, self.optimizer, self.steps_per_epoch, self.limit = config, optimizer, steps_per_epoch, limit
        if limit is not None:
            for group in optimizer.param_groups:
                group["lr"] = min(group["lr"], limit)
        self.plateau = None
        if config.lr_scheduler == "ReduceLROnPlateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.1, patience=config.plateau_patience
            )

    def at(self, step: int) -> float:
        """Returns the learning rate of the optimizer step with this number, counted from 0."""
        c, per_epoch = self.config, self.steps_per_epoch
        highest = c.lr if self.limit is None else min(c.lr, self.limit)
        warmup, total = c.warmup_epochs * per_epoch, c.epochs * per_epoch
        if step < warmup:
            return highest * (step + 1) / max(warmup, 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        epoch = step // per_epoch
        factor = {
            "Polynomial": lambda: (1.0 - progress) ** c.power,
            "Cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
            "StepLR": lambda: c.gamma ** (epoch // c.step_size),
            "MultiStep": lambda: c.gamma ** sum(epoch >= m for m in c.milestones),
            "Constant": lambda: 1.0,
        }[c.lr_scheduler]
        return highest * factor()

    def before_step(self, step: int) -> float:
        """Sets and returns the rate of this step, counted from 0."""
        if self.plateau is not None:
            return self.optimizer.param_groups[0]["lr"]
        rate = self.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.limit is None else {"limit": self.limit}
        return {**self.plateau.state_dict(), **own} if self.plateau else own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.limit = state.pop("limit", None)
        if self.plateau:
            self.plateau.load_state_dict(state)
            for group, rate in zip(self.optimizer.param_groups, state["_last_lr"]):
                group["lr"] = rate  # where before_step finds it
