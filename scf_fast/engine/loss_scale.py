"""Loss scaling and skipped steps by one rule under every ZeRO stage."""

from collections.abc import Callable
from typing import Any

import torch

from scf_fast.engine.gradient_norm import total_norm
from scf_fast.engine.optimizers import gradients_of

_GROWTH_INTERVAL = 2000  # steps, as torch.amp.GradScaler
_NORM_FLOOR = 1e-6  # added to a norm before it divides the bound, as in torch.nn.utils.clip_grad_norm_ and in ZeRO


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
    """Stands where the engine without ZeRO has ``torch.amp.GradScaler`` and does as ZeRO does: it clips the norm of the
    gradients, and leaves out the steps whose gradients are not all finite, in every precision.

    PyTorch's scaler leaves it to a fused optimizer to unscale and to skip. Values are then clipped while they are
    scaled, and SGD whose first step is skipped goes on from a momentum that nothing has filled. DeepSpeed clips one
    parameter after another, in two small kernels each; here the norm that says whether the gradients are finite also
    clips them, and both scale and bound are one product for all parameters.

    Args:
        max_norm: bound of the norm of the gradients without the loss scale; 0 is none.
    """

    def __init__(self, loss_scaler: LossScaler | None, max_norm: float):
        self._loss_scaler, self._max_norm, self._unscaled = loss_scaler, max_norm, False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._loss_scaler.scale if self._loss_scaler else loss

    def unscale_(self, optimizer: Any) -> None:
        """Divides the gradients by the scale and clips their norm; where the norm is to be clipped, the engine calls it
        before :meth:`step`.
        """
        gradients = gradients_of(optimizer)
        scale = self._loss_scaler.scale if self._loss_scaler else 1.0
        norm = total_norm(gradients) / scale
        if self._max_norm > 0:
            # Of gradients that are not finite it makes NaN or 0; that step is left out.
            factor = ((self._max_norm / (norm + _NORM_FLOOR)).clamp(max=1.0) / scale).float()
            torch._foreach_mul_(gradients, factor)
        elif self._loss_scaler:
            torch._foreach_mul_(gradients, 1 / scale)
        optimizer.overflow = not norm.isfinite()  # where the engine looks for it; waits for the device
        self._unscaled = True

    def step(self, optimizer: Any) -> None:
        if not self._unscaled:
            self.unscale_(optimizer)
        self._unscaled = False
        if not optimizer.overflow:
            optimizer.step()

    def update(self) -> None:
        """Does nothing: ``Engine.step`` updates the scale, as it does under ZeRO."""
