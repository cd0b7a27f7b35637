"""Loss scaling and skipped steps by one rule under every ZeRO stage."""

from collections.abc import Callable
from typing import Any

import torch

from scf_fast.engine.gradient_norm import total_norm

_GROWTH_INTERVAL = 2000  # steps, as torch.amp.GradScaler


class LossScaler:
    """Dynamic loss scaling for fp16 autocast under every ZeRO stage, by the rule of ``torch.amp.GradScaler``.

    Attributes:
        scale: factor of the next loss. It halves after a step that overflowed and doubles after 2000 in a row that did
            not.
        good_steps: steps since the last overflow or change of scale.
    """

    def __init__(self) -> None:
        self.scale, self.good_steps = 2.0**16, 0
        self._listener: Callable[[float], Any] = lambda scale: None

    def on_change(self, listener: Callable[[float], Any]) -> None:
        """Calls ``listener`` with the scale, now and whenever it changes."""
        self._listener = listener
        listener(self.scale)

    def _set(self, scale: float) -> None:
        self.scale = scale
        self._listener(scale)

    def update(self, overflow: bool) -> None:
        """Adapts the scale after an optimizer step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self._set(self.scale / 2)
        elif self.good_steps == _GROWTH_INTERVAL:
            self.good_steps = 0
            self._set(self.scale * 2)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good_steps = state["good_steps"]
        self._set(state["scale"])


class StepWithoutZero:
    """Stands where the engine without ZeRO has ``torch.amp.GradScaler`` and does as ZeRO does: it leaves out the steps
    whose gradients are not all finite, in every precision.

    PyTorch's scaler leaves it to a fused optimizer to unscale and to skip. Values are then clipped while they are
    scaled, and SGD whose first step is skipped goes on from a momentum that nothing has filled.
    """

    def __init__(self, loss_scaler: LossScaler | None):
        self._loss_scaler, self._unscaled = loss_scaler, False
        self._gradients: list[torch.Tensor] = []
        self._norm = torch.zeros(())

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._loss_scaler.scale if self._loss_scaler else loss

    def unscale_(self, optimizer: Any) -> None:
        """Divides the gradients by the scale; the engine asks for it before it clips the norm."""
        self._gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self._loss_scaler:
            torch._foreach_mul_(self._gradients, 1 / self._loss_scaler.scale)
        self._norm = total_norm(self._gradients)
        optimizer.overflow = not self._norm.isfinite()  # where the engine looks for it
        self._unscaled = True

    def clip(self, max_norm: float) -> None:
        """Scales the unscaled gradients down to this norm; DeepSpeed's own clipping would make them zero where its norm
        overflows.
        """
        factor = (max_norm / (self._norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self._gradients, factor.to(torch.float32))

    def step(self, optimizer: Any) -> None:
        if not self._unscaled:
            self.unscale_(optimizer)
        self._unscaled, self._gradients = False, []
        if not optimizer.overflow:
            optimizer.step()

    def update(self) -> None:
        """Does nothing: ``Engine.step`` updates the scale, as it does under ZeRO."""
