"""SGD and Adam in the fastest implementation that is there, and the gate before their step."""

import contextlib
import enum
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from scf_fast.config import Config
from scf_fast.errors import InputError

log = logging.getLogger(__name__)


def nvidia_apex_problem() -> str | None:
    """Returns why NVIDIA Apex's fused optimizers cannot be used, or None.

    The package named apex on the Python package index is an unrelated web project.
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


class OptimizerRule(enum.Enum):
    """The update rule, whichever implementation computes it."""

    SGD = "sgd"
    ADAM = "adam"


class _Unusable(Exception):
    """An implementation that cannot be used here; says why."""


_Parameters = list[nn.Parameter]


def _apex(
    rule: OptimizerRule, parameters: _Parameters, lr: float, momentum: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    problem = nvidia_apex_problem() or (None if device.type == "cuda" else "needs CUDA")
    if problem:
        raise _Unusable(problem)
    from apex.optimizers import FusedAdam, FusedSGD

    if rule is OptimizerRule.SGD:
        return FusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return FusedAdam(parameters, lr=lr, weight_decay=weight_decay, adam_w_mode=False)


def _deepspeed(
    rule: OptimizerRule, parameters: _Parameters, lr: float, momentum: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    if rule is OptimizerRule.SGD:
        raise _Unusable("has no fused SGD")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device.type == "cpu":
        return DeepSpeedCPUAdam(parameters, lr=lr, weight_decay=weight_decay, adamw_mode=False)
    # It compiles its extension at the first use.
    return FusedAdam(parameters, lr=lr, weight_decay=weight_decay, adam_w_mode=False)


def _torch(
    rule: OptimizerRule, parameters: _Parameters, lr: float, momentum: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    if rule is OptimizerRule.SGD:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


_IMPLEMENTATIONS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "apex": _apex,
    "deepspeed": _deepspeed,
    "torch": _torch,
}


def build_optimizer(
    rule: OptimizerRule,
    parameters: Iterable[nn.Parameter],
    config: Config,
    device: torch.device,
    *,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Returns SGD with momentum or Adam, both with the L2 term in the gradient; logs once which implementation it took
    and why not another.

    Args:
        config: reads optimizer, offload_optimizer, lr, weight_decay and max_grad_clip.
        device: where training runs; with ``--offload_optimizer cpu`` the optimizer runs on the CPU all the same.
        momentum: of SGD.
    Raises:
        InputError: ``--optimizer`` names one implementation and it is not usable.
    """
    trained = list(parameters)
    if config.offload_optimizer == "cpu":
        device = torch.device("cpu")
    if config.optimizer != "auto":
        names = [config.optimizer]
    else:
        # DeepSpeed's extension takes a minute to compile at its first use, needs a compiler then, and is no faster.
        names = ["apex", "torch"] if device.type == "cuda" else ["torch"]
    problems: list[str] = []
    for name in names:
        try:
            optimizer = _IMPLEMENTATIONS[name](rule, trained, config.lr, momentum, config.weight_decay, device)
        except Exception as error:  # a failed extension build raises almost anything
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        log.info(
            "optimizer: fused %s of %s%s",
            {OptimizerRule.SGD: "SGD", OptimizerRule.ADAM: "Adam"}[rule],
            name,
            f" ({'; '.join(problems)})" if problems else "",
        )
        if config.max_grad_clip > 0:
            _clip_values_before_step(optimizer, config.max_grad_clip)
        return optimizer
    raise InputError(f"--optimizer {config.optimizer} cannot be used here ({'; '.join(problems)}); use auto")


def gradients_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the gradients of the optimizer's parameters, of those that have one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clip_values_before_step(optimizer: torch.optim.Optimizer, bound: float) -> None:
    """Clips values where ZeRO hands the reduced gradient partition to the optimizer: earlier there is no full gradient
    to clip.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = gradients_of(optimizer)
        if gradients:  # none behind a closed gate
            torch._foreach_clamp_min_(gradients, -bound)
            torch._foreach_clamp_max_(gradients, bound)

    optimizer.register_step_pre_hook(clip)


class StepGate:
    """Makes an optimizer's ``step`` change nothing while the gate is closed.

    Under ZeRO it is the engine that calls ``step``, with partitions of its own, so the gate stands right before it:
    without gradients every implementation leaves weights and moments alone. The gradients come back afterwards, since
    offloading writes into their memory, and so do the counts of steps that fused Adam of Apex and of DeepSpeed keep in
    the parameter groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._is_closed = False
        self._depth = 0  # a step that calls its base class's runs the hooks again
        self._gradients: list[tuple[nn.Parameter, torch.Tensor | None]] = []
        self._counts: list[Any] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Closes the gate for the steps inside the block."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed, self._depth = False, 0

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_closed:
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._counts = [group.get("step") for group in optimizer.param_groups]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_closed:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        for group, count in zip(optimizer.param_groups, self._counts):
            if count is None:
                group.pop("step", None)
            else:
                group["step"] = count
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []
