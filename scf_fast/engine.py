"""The DeepSpeed engine: its configuration from ours, and full weights back out of it under any ZeRO stage."""
import contextlib
import ctypes
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.config import Config
from scf_fast.launch import Runtime

# DeepSpeed ignores unknown top-level keys without a word, so a typing error would silently train something else.
_KNOWN_KEYS = frozenset("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 amp torch_autocast data_types gradient_clipping prescale_gradients
    gradient_predivide_factor sparse_gradients communication_data_type seq_parallel_communication_data_type gradient_allreduce_op
    graph_harvesting dump_state steps_per_print wall_clock_breakdown memory_breakdown log_level flops_profiler tensorboard wandb comet
    csv_monitor comms_logger activation_checkpointing aio checkpoint data_efficiency curriculum_learning compile
    disable_allgather load_universal_checkpoint dataloader_drop_last use_data_before_expert_parallel_ timers nebula
    """.split())


def resolve_precision(config: Config, device: torch.device) -> str:
    """``"fp32"``, ``"bf16"`` or ``"fp16"``."""
    if config.precision != "auto":
        return config.precision
    # Older GPUs emulate bf16, slower than float32.
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def load_deepspeed_config(path: str) -> dict:
    """A user's DeepSpeed JSON, its top-level keys checked.

    Raises:
        ValueError: unreadable, no JSON object, an unknown top-level key, or a key that belongs to our own flags.
    """
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path}: is no valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--deepspeed_config {path}: must hold a JSON object, got {type(values).__name__}")
    for key in values:
        if key not in _KNOWN_KEYS:
            close = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            raise ValueError(f"--deepspeed_config {path}: DeepSpeed has no key {key!r} and would ignore it{f'; did you mean {close[0]}?' if close else ''}")
        if key in ("optimizer", "scheduler"):
            raise ValueError(f"--deepspeed_config {path}: {key!r} is set by our flags (--optimizer, --lr, --lr_scheduler ...); leave it out")
        if key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            raise ValueError(f"--deepspeed_config {path}: {key!r} is set by --batch_size and --gradient_accumulation_steps; leave it out")
        if key in ("fp16", "bf16", "amp", "torch_autocast"):
            raise ValueError(f"--deepspeed_config {path}: {key!r} is set by --precision, which keeps parameters in float32; leave it out")
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}) if isinstance(zero, dict) else None
    if not isinstance(offload, dict):
        raise ValueError(f"--deepspeed_config {path}: 'zero_optimization', and 'offload_optimizer' in it, must be JSON objects")
    for flag, given in (("zero_stage", "stage" in zero), ("offload_optimizer", "device" in offload)):  # memory and resume are planned by these
        if given:
            raise ValueError(f"--deepspeed_config {path}: --{flag} sets it; leave out {'stage' if flag == 'zero_stage' else 'device'!r}")
    return values


def _merge(base: dict, override: dict) -> dict:
    merged = dict(base)
    for key, value in override.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def deepspeed_config(config: Config, runtime: Runtime, precision: str) -> dict:
    """The DeepSpeed configuration of a run, with the keys of ``--deepspeed_config`` on top.

    Mixed precision is autocast: parameters and BatchNorm statistics stay float32, and gradients are reduced in float32
    (``lower_precision_safe_modules``), so that every ZeRO stage trains the same.
    """
    generated: dict = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (runtime.world_size * config.gradient_accumulation_steps),
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed clips at 1.0 when the key is absent
        "zero_allow_untested_optimizer": True,  # SGD is elementwise, so it is safe on ZeRO's flat partitions
        # The bucket is allocated whole, twice with overlap: DeepSpeed's default of 500 million values would take more than the network.
        "zero_optimization": {"stage": config.zero_stage_on(runtime.world_size), "overlap_comm": runtime.device.type == "cuda",
                              "reduce_bucket_size": 50_000_000},
    }
    if config.offload_optimizer != "none":
        generated["zero_optimization"]["offload_optimizer"] = {"device": config.offload_optimizer, "pin_memory": runtime.device.type == "cuda"}
        generated["zero_force_ds_cpu_optimizer"] = False  # torch's fused Adam works there too, without a compiler
    if precision != "fp32":
        generated["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision], "lower_precision_safe_modules": []}
    return _merge(generated, load_deepspeed_config(config.deepspeed_config)) if config.deepspeed_config else generated


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>
_LARGE_NETWORK = 1 << 30  # bytes of parameters


def keep_freed_memory() -> None:
    """Let the C library keep what the process frees, where it is glibc.

    It gives large blocks back to the kernel at once, so that every step maps its activations and gradients in anew, page by page: on a CPU a
    quarter of the time of stage 1 on a small backbone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def initialise_engine(module: nn.Module, optimizer, config: Config, runtime: Runtime, precision: str):
    """The DeepSpeed engine around ``module``; ``engine.loss_scaler`` is a :class:`LossScaler` in fp16, else None.

    Under every ZeRO stage and in every precision a step whose gradients are not all finite is left out: see :func:`take_step`.

    Raises:
        ValueError: DeepSpeed is older than 0.19.8.
    """
    import deepspeed
    if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < (0, 19, 8):
        raise ValueError(f"DeepSpeed 0.19.8 or newer is needed, this is {deepspeed.__version__}, whose ZeRO does not leave out every step "
                         "whose gradients are not finite; pip install --upgrade deepspeed")
    if runtime.device.type == "cpu" and sum(parameter.nbytes for parameter in module.parameters()) < _LARGE_NETWORK:  # fragments would cost more memory
        keep_freed_memory()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, runtime, precision))
    engine.loss_scaler = LossScaler() if precision == "fp16" else None
    if engine.zero_optimization():
        if engine.loss_scaler:
            engine.optimizer.torch_autocast_gradscaler = None  # it never hears of an overflow, since ZeRO skips the step before it asks
            engine.loss_scaler.tell(engine.optimizer.override_loss_scale)  # honoured in the backward pass, in clipping and in the update
    else:
        engine.torch_autocast_z0_gradscaler = _StepWithoutZero(engine.loss_scaler)
        if runtime.world_size == 1:
            engine.enable_backward_allreduce = False  # it would copy all gradients into one buffer and back to sum them over one rank
    return engine


class LossScaler:
    """Dynamic loss scaling for fp16 autocast under every ZeRO stage, by the rule of ``torch.amp.GradScaler``.

    Attributes:
        scale: what the next loss is multiplied by. It halves after a step that overflowed and doubles after 2000 in a row that did not.
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
        """After each optimiser step."""
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
    """Stands where the engine without ZeRO has ``torch.amp.GradScaler``, and does as ZeRO does: it leaves out the steps whose gradients are not
    all finite, in every precision.

    PyTorch's scaler leaves it to a fused optimiser to unscale and to skip. Values are then clipped while they are scaled, and SGD whose first
    step is skipped goes on from a momentum that nothing has filled.
    """

    def __init__(self, loss_scaler: LossScaler | None):
        self._loss_scaler, self._unscaled = loss_scaler, False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._loss_scaler.scale if self._loss_scaler else loss

    def unscale_(self, optimizer) -> None:
        """The engine asks for it before it clips the norm."""
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
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


def take_step(engine) -> bool:
    """``engine.step()``, and whether it changed the weights: not where a gradient is not finite, and then the loss scale falls."""
    boundary = engine.is_gradient_accumulation_boundary()
    engine.step()
    applied = engine.was_step_applied()
    if engine.loss_scaler and boundary:
        engine.loss_scaler.update(overflow=not applied)
    return applied


def average_batchnorm_statistics(module: nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics: nothing else synchronises them, and a checkpoint holds rank 0's."""
    if dist.get_world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def full_state_dict(engine, module: nn.Module) -> dict[str, torch.Tensor]:
    """CPU copies of all weights and buffers of ``module`` (the engine's or a part of it), gathered under ZeRO 3; collective there.

    Copies, because ZeRO's parameters are views into one flat buffer that saving would write whole.
    """
    gathered = contextlib.nullcontext()
    if engine.zero_optimization_partition_weights():
        import deepspeed
        gathered = deepspeed.zero.GatheredParameters(list(module.parameters()))
    with gathered:
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}


def full_optimizer_state(engine) -> list[dict[str, torch.Tensor]]:
    """The optimiser's tensors for each trained parameter, of the parameter's shape, under any ZeRO stage; collective. Needs a step before.

    On the main rank they are there, on the CPU; the others take part and get empty dicts.
    """
    from deepspeed.utils import safe_get_full_optimizer_state
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    keys = [key for key, value in next(iter(optimizer.state.values())).items() if torch.is_tensor(value) and value.dim()]
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
