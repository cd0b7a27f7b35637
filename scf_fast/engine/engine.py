"""The DeepSpeed engine: its configuration from ours, and full weights back out of it under any ZeRO stage."""

import contextlib
import ctypes
import re

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.config import Config
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import deepspeed_config
from scf_fast.engine.loss_scale import LossScaler, _StepWithoutZero
from scf_fast.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>
_LARGE_NETWORK = 1 << 30  # bytes of parameters


def keep_freed_memory() -> None:
    """Let the C library keep what the process frees, where it is glibc.

    It gives large blocks back to the kernel at once, so that every step maps its activations and gradients in anew,
    page by page: on a CPU a quarter of the time of stage 1 on a small backbone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def initialize_engine(module: nn.Module, optimizer, config: Config, runtime: Runtime, precision: str):
    """The DeepSpeed engine around ``module``; ``engine.loss_scaler`` is a :class:`LossScaler` in fp16, else None.

    Under every ZeRO stage and in every precision a step whose gradients are not all finite is left out: see
    :func:`take_step`.

    Raises:
        ValueError: DeepSpeed is older than 0.19.8.
    """
    import deepspeed

    if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < (0, 19, 8):
        raise InputError(
            f"DeepSpeed 0.19.8 or newer is needed, this is {deepspeed.__version__}, whose ZeRO does not leave out "
            "every step "
            "whose gradients are not finite; pip install --upgrade deepspeed"
        )
    if (
        runtime.device.type == "cpu" and sum(parameter.nbytes for parameter in module.parameters()) < _LARGE_NETWORK
    ):  # fragments would cost more memory
        keep_freed_memory()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config, runtime, precision)
    )
    engine.loss_scaler = LossScaler() if precision == "fp16" else None
    if engine.zero_optimization():
        if engine.loss_scaler:
            engine.optimizer.torch_autocast_gradscaler = (
                None  # it never hears of an overflow, since ZeRO skips the step before it asks
            )
            engine.loss_scaler.tell(
                engine.optimizer.override_loss_scale
            )  # honored in the backward pass, in clipping and in the update
    else:
        engine.torch_autocast_z0_gradscaler = _StepWithoutZero(engine.loss_scaler)
        if runtime.world_size == 1:
            engine.enable_backward_allreduce = (
                False  # it would copy all gradients into one buffer and back to sum them over one rank
            )
    return engine


def take_step(engine) -> bool:
    """``engine.step()``, and whether it changed the weights: not where a gradient is not finite, and then the loss
    scale falls.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    engine.step()
    applied = engine.was_step_applied()
    if engine.loss_scaler and boundary:
        engine.loss_scaler.update(overflow=not applied)
    return applied


def average_batchnorm_statistics(module: nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics: nothing else synchronizes them, and a checkpoint holds
    rank 0's.
    """
    if dist.get_world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def full_state_dict(engine, module: nn.Module) -> dict[str, torch.Tensor]:
    """CPU copies of all weights and buffers of ``module`` (the engine's or a part of it), gathered under ZeRO 3;
    collective there.

    Copies, because ZeRO's parameters are views into one flat buffer that saving would write whole.
    """
    gathered = contextlib.nullcontext()
    if engine.zero_optimization_partition_weights():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(module.parameters()))
    with gathered:
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}


def full_optimizer_state(engine) -> list[dict[str, torch.Tensor]]:
    """The optimizer's tensors for each trained parameter, of the parameter's shape, under any ZeRO stage; collective.
    Needs a step before.

    On the main rank they are there, on the CPU; the others take part and get empty dicts.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    keys = [
        key for key, value in next(iter(optimizer.state.values())).items() if torch.is_tensor(value) and value.dim()
    ]
    states = []
    for parameter in _trained(engine):
        state = {}
        for key in keys:
            whole = optimizer.state[parameter][key] if stage == 0 else safe_get_full_optimizer_state(parameter, key)
            if dist.get_rank() == 0:
                state[key] = whole.detach().to("cpu", copy=True)
        states.append(state)
    return states


def _trained(engine) -> list[nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
