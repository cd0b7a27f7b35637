from collections.abc import Callable

import torch


class LossScaler:
    """Dynamic loss scaling for fp16 autocast under every ZeRO stage, by the rule of ``torch.amp.GradScaler``.

    Attributes:
        scale: what the next loss is multiplied by. It halves after a step that overflowed and doubles after 2000 in a
            row that did not.
        good_steps: how many have not in a row.
    """

    def __init__(self):
        self.scale, self.good_steps = 2.0**16, 0
        self._listener = lambda scale: None

    def tell(self, listener: Callable[[float], None]) -> None:
        """Call it with the scale, now and whenever it changes."""
        self._listener = listener
        listener(self.scale)

    def _set(self, scale: float) -> None:
        self.scale = scale
        self._listener(scale)

    def update(self, overflow: bool) -> None:
        """After each optimizer step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self._set(self.scale / 2)
        elif self.good_steps == 2000:
            self.good_steps = 0
            self._set(self.scale * 2)

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        self.good_steps = state["good_steps"]
        self._set(state["scale"])


class _StepWithoutZero:
    """Stands where the engine without ZeRO has ``torch.amp.GradScaler``, and does as ZeRO does: it leaves out the steps
    whose gradients are not all finite, in every precision.

    PyTorch's scaler leaves it to a fused optimizer to unscale and to skip. Values are then clipped while they are
    scaled, and SGD whose first step is skipped goes on from a momentum that nothing has filled.
    """

    def __init__(self, loss_scaler: LossScaler | None):
        self._loss_scaler, self._unscaled = loss_scaler, False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._loss_scaler.scale if self._loss_scaler else loss

    def unscale_(self, optimizer) -> None:
        """The engine asks for it before it clips the norm."""
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self._loss_scaler:
            torch._foreach_mul_(gradients, 1 / self._loss_scaler.scale)
        optimizer.overflow = not torch.nn.utils.get_total_norm(gradients).isfinite()  # where the engine looks for it
        self._unscaled = True

    def step(self, optimizer) -> None:
        if not self._unscaled:
            self.unscale_(optimizer)
        self._unscaled = False
        if not optimizer.overflow:
            optimizer.step()

    def update(self) -> None:
        """:func:`take_step` does it, as under ZeRO."""
