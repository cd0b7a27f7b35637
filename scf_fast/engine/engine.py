"""The engine: a module in training under DeepSpeed, and full weights back out of it under any ZeRO stage."""

import contextlib
import ctypes
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.config import Config
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import deepspeed_config
from scf_fast.engine.deepspeed_internals import DeepSpeedInternals
from scf_fast.engine.dropped import Dropped
from scf_fast.engine.loss_scale import LossScaler
from scf_fast.engine.optimizers import StepGate
from scf_fast.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>
_LARGE_NETWORK = 1 << 30  # bytes of parameters
_LEAST_SCALE = 1.0  # below it, gradients that overflow in fp16 do so without a loss scale
_OLDEST_DEEPSPEED = (0, 19, 8)


def keep_freed_memory() -> None:
    """Lets the C library keep what the process frees, where it is glibc.

    It gives large blocks back to the kernel at once, so that every step maps its activations and gradients in again,
    page by page: on a CPU a quarter of the time of stage 1 on a small backbone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


class Engine:
    """A module in training: forward, backward, step, and full weights under any ZeRO stage.

    Under every ZeRO stage and in every precision a step whose gradients are not all finite changes nothing, see
    :meth:`step`.

    Args:
        module: its trained parameters are those that ``optimizer`` has.
        optimizer: of :func:`scf_fast.engine.optimizers.build_optimizer`.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    Attributes:
        module: the module given, its parameters divided among the ranks under ZeRO 3.
        optimizer: the optimizer given; under ZeRO its parameters are flat partitions.
        loss_scaler: in fp16, else None.
        internals: the private parts of DeepSpeed, for this package alone.
    Raises:
        InputError: DeepSpeed is older than 0.19.8.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, runtime: Runtime, precision: str
    ):
        import deepspeed

        if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < _OLDEST_DEEPSPEED:
            raise InputError(
                f"DeepSpeed 0.19.8 or newer is needed, this is {deepspeed.__version__}, whose ZeRO does not leave out "
                "every step whose gradients are not finite; pip install --upgrade deepspeed"
            )
        if runtime.device.type == "cpu" and sum(weight.nbytes for weight in module.parameters()) < _LARGE_NETWORK:
            keep_freed_memory()  # in a larger network fragments would cost more memory than it saves time
        DeepSpeedInternals.leave_out_shared_memory_op()
        DeepSpeedInternals.leave_out_muon_compilation()
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, runtime, precision)
        )
        self.module, self.optimizer = module, optimizer
        self.internals = DeepSpeedInternals(self._engine)
        self.loss_scaler = LossScaler() if precision == "fp16" else None
        self.internals.take_over_loss_scale(self.loss_scaler)
        self.internals.keep_norm_from_overflow()
        if runtime.world_size == 1:
            self.internals.skip_gradient_sum()
        self._gate = StepGate(optimizer)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 0 is none."""
        return self._engine.zero_optimization_stage()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, over all ranks."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.module.parameters())

    @property
    def applied_steps(self) -> int:
        """Optimizer steps so far that changed the weights."""
        return self.internals.global_steps - self.internals.skipped_steps

    def train(self) -> None:
        """Puts the module into training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Puts the module into evaluation mode."""
        self._engine.eval()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The module's forward pass, under autocast in bf16 and fp16."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, averaged over ranks."""
        self._engine.backward(loss)

    def step(self, skip: bool = False) -> bool:
        """Ends a micro-batch: after the last one of a step, updates the weights.

        Args:
            skip: drop the gradients instead; the same on every rank.
        Returns:
            Whether the weights have changed: not where a gradient is not finite (then the loss scale falls), not where
            ``skip`` asks for it, and not before the last micro-batch.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        with self._gate.closed() if skip else contextlib.nullcontext():
            self._engine.step()
        applied = self._engine.was_step_applied()
        if self.loss_scaler and boundary:
            self.loss_scaler.update(overflow=not applied)
        if skip and applied:
            self.internals.skipped_steps += 1  # DeepSpeed does not know that the optimizer did nothing
        return applied and not skip

    @property
    def dropped_for(self) -> Dropped:
        """Why :meth:`step` has left out a step that it was not asked to: the gradients of one that is not applied are
        not all finite, in fp16 most likely because of the loss scale.
        """
        scaler = self.loss_scaler
        return Dropped.LOSS_SCALE if scaler is not None and scaler.scale >= _LEAST_SCALE else Dropped.GRADIENT

    def average_batchnorm_statistics(self) -> None:
        """Gives every rank the mean of the ranks' running statistics: nothing else synchronizes them, and a checkpoint
        holds rank 0's.
        """
        if dist.get_world_size() > 1:
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Returns CPU copies of all weights and buffers, gathered under ZeRO 3; collective there.

        Copies, because ZeRO's parameters are views into one flat buffer that saving would write whole.
        """
        gathered: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._engine.zero_optimization_partition_weights():
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(self.module.parameters()))
        with gathered:
            return {
                key: value.detach().to("cpu", copy=True).contiguous() for key, value in self.module.state_dict().items()
            }

    def full_optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        """Returns the optimizer's tensors for each trained parameter, of the parameter's shape, under any ZeRO stage;
        collective. Needs a step before.

        On the main rank they are there, on the CPU; the others take part and get empty dicts.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = self.optimizer
        first = next(iter(optimizer.state.values()))
        keys = [key for key, value in first.items() if torch.is_tensor(value) and value.dim()]
        states = []
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                continue
            state = {}
            for key in keys:
                if self.zero_stage == 0:
                    whole = optimizer.state[parameter][key]
                else:
                    whole = safe_get_full_optimizer_state(parameter, key)
                if dist.get_rank() == 0:
                    state[key] = whole.detach().to("cpu", copy=True)
            states.append(state)
        return states

    def close(self) -> None:
        """Gives hooks and memory back; the engine cannot be used afterwards."""
        self._engine.destroy()
