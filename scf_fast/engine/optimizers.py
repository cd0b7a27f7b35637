"""SGD and Adam in the fastest implementation that is there, and the learning rate as a function of the step."""

import importlib.util
import logging
import math

import torch

from scf_fast.config import Config
from scf_fast.errors import InputError

log = logging.getLogger(__name__)


def nvidia_apex_problem() -> str | None:
    """Why NVIDIA Apex's fused optimizers cannot be used, or None. The index's package called apex is an unrelated web
    project.
    """
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    try:
        has_optimizers = importlib.util.find_spec("apex.optimizers") is not None
    except ImportError as error:  # the unrelated package imports what is not there
        return f"does not import ({error})"
    if not has_optimizers:
        return "the installed package called apex is not NVIDIA Apex"
    if importlib.util.find_spec("amp_C") is None:
        return "built without its CUDA extensions"
    return None


def _apex(rule, parameters, lr, momentum, weight_decay, device):
    problem = nvidia_apex_problem() or (None if device.type == "cuda" else "needs CUDA")
    if problem:
        raise RuntimeError(problem)
    from apex.optimizers import FusedAdam, FusedSGD

    if rule == "sgd":
        return FusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return FusedAdam(parameters, lr=lr, weight_decay=weight_decay, adam_w_mode=False)


def _deepspeed(rule, parameters, lr, momentum, weight_decay, device):
    if rule == "sgd":
        raise RuntimeError("has no fused SGD")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device.type == "cpu":
        return DeepSpeedCPUAdam(parameters, lr=lr, weight_decay=weight_decay, adamw_mode=False)
    return FusedAdam(
        parameters, lr=lr, weight_decay=weight_decay, adam_w_mode=False
    )  # compiles its extension at the first use


def _torch(rule, parameters, lr, momentum, weight_decay, device):
    if rule == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


_IMPLEMENTATIONS = {"apex": _apex, "deepspeed": _deepspeed, "torch": _torch}


def build_optimizer(rule: str, parameters, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """SGD with momentum or Adam, both with the L2 term in the gradient; logs once which implementation it took and why
    not another.

    Args:
        rule: ``"sgd"`` or ``"adam"``.
        parameters: what ``torch.optim`` accepts.
        device: where training runs; with ``--offload_optimizer cpu`` the optimizer runs on the CPU all the same.
    Raises:
        ValueError: ``--optimizer`` names one implementation and it is not usable.
    """
    parameters = list(parameters)
    if config.offload_optimizer == "cpu":
        device = torch.device("cpu")
    # On a CPU DeepSpeed's extension takes a minute to compile and is no faster than torch's fused one, so auto leaves
    # it out there.
    names = (
        [config.optimizer]
        if config.optimizer != "auto"
        else ["apex", "deepspeed", "torch"]
        if device.type == "cuda"
        else ["torch"]
    )
    problems = []
    for name in names:
        try:
            optimizer = _IMPLEMENTATIONS[name](
                rule, parameters, config.lr, config.momentum, config.weight_decay, device
            )
        except Exception as error:  # a failed extension build raises almost anything
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        log.info(
            "optimizer: fused %s of %s%s",
            rule.upper() if rule == "sgd" else "Adam",
            name,
            f" ({'; '.join(problems)})" if problems else "",
        )
        if config.max_grad_clip > 0:
            _clip_values_before_step(optimizer, config.max_grad_clip)
        return optimizer
    raise InputError(f"--optimizer {config.optimizer} cannot be used here ({'; '.join(problems)}); use auto")


def _clip_values_before_step(optimizer, bound):
    """Clip values where ZeRO hands the reduced gradient partition to the optimizer: earlier there is no full gradient
    to clip.
    """

    def clip(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-bound, bound)

    optimizer.register_step_pre_hook(clip)


class LearningRate:
    """Sets the optimizer's learning rate before each step, by a closed form of the step, so that resuming needs no
    state.

    ReduceLROnPlateau is the exception: it follows the loss and keeps state (``state_dict``).
    """

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
        self.config, self.optimizer, self.steps_per_epoch = config, optimizer, steps_per_epoch
        self.plateau = None
        if config.lr_scheduler == "ReduceLROnPlateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.1, patience=config.plateau_patience
            )

    def at(self, step: int) -> float:
        """Learning rate of the optimizer step with this number, counted from 0."""
        c, per_epoch = self.config, self.steps_per_epoch
        warmup, total = c.warmup_epochs * per_epoch, c.epochs * per_epoch
        if step < warmup:
            return c.lr * (step + 1) / max(warmup, 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        epoch = step // per_epoch
        factor = {
            "Polynomial": lambda: (1.0 - progress) ** c.power,
            "Cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
            "StepLR": lambda: c.gamma ** (epoch // c.step_size),
            "MultiStep": lambda: c.gamma ** sum(epoch >= m for m in c.milestones),
            "Constant": lambda: 1.0,
        }[c.lr_scheduler]
        return c.lr * factor()

    def before_step(self, step: int) -> float:
        """Set and return the rate for this step."""
        if self.plateau is not None:
            return self.optimizer.param_groups[0]["lr"]
        rate = self.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def state_dict(self) -> dict:
        return self.plateau.state_dict() if self.plateau else {}

    def load_state_dict(self, state: dict) -> None:
        if self.plateau:
            self.plateau.load_state_dict(state)
            for group, rate in zip(
                self.optimizer.param_groups, state["_last_lr"]
            ):  # before_step takes the rate from there
                group["lr"] = rate
