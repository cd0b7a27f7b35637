"""The private parts of DeepSpeed that the engine relies on."""

import importlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scf_fast.engine.gradient_norm import total_norm
from scf_fast.engine.loss_scale import LossScaler, StepWithoutZero


class Place(NamedTuple):
    """Where the elements of a piece of a parameter lie.

    Attributes:
        name: of the parameter.
        start: first element of the flattened parameter.
        weight: 1-D float32 view of the weights.
        flat: the tensor that the optimizer knows, ``optimizer.state[flat]``.
        slice: the elements' place in ``flat``, flattened.
    """

    name: str
    start: int
    weight: torch.Tensor
    flat: torch.Tensor
    slice: slice


class DeepSpeedInternals:
    """Everything that is read or set in a DeepSpeed engine beside its documented interface, as found in 0.19.8.

    Args:
        engine: what ``deepspeed.initialize`` returns.
    """

    def __init__(self, engine: Any):
        self._engine = engine

    @staticmethod
    def leave_out_shared_memory_op() -> None:
        """Keeps DeepSpeed from building ``deepspeed_shm_comm``, which only inference uses: it takes 30 s to compile and
        leaves 66 MiB a rank in shared memory after the process has ended.
        """
        import deepspeed

        # Set, not asked for: that would try every op's compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False

    @staticmethod
    def leave_out_muon_compilation() -> None:
        """Imports DeepSpeed's Muon optimizer without ``torch.compile``: ZeRO asks of every optimizer whether it is a
        Muon, and the decorator of a function of it would make each rank load the compiler, 600 modules in 1.5 s.
        """
        before = os.environ.get("TORCHDYNAMO_DISABLE")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        finally:
            os.environ.pop("TORCHDYNAMO_DISABLE")
            if before is not None:
                os.environ["TORCHDYNAMO_DISABLE"] = before

    def take_over_loss_scale(self, scaler: LossScaler | None) -> None:
        """Makes ``scaler`` (None: no scaling) the only one, with or without ZeRO; without it, clipping goes along.

        With ZeRO, DeepSpeed's own never hears of an overflow, since ZeRO skips the step before it asks; the scale set
        here is honored in the backward pass, in clipping and in the update.
        """
        if not self._engine.zero_optimization():
            self._engine.torch_autocast_z0_gradscaler = StepWithoutZero(scaler, self._engine.gradient_clipping())
            self._engine.clip_fp32_gradients = lambda: None  # done with the norm that StepWithoutZero has computed
        elif scaler is not None:
            self._engine.optimizer.torch_autocast_gradscaler = None
            scaler.on_change(self._engine.optimizer.override_loss_scale)

    def keep_norm_from_overflow(self) -> None:
        """Computes the norm of ZeRO's gradients once more where DeepSpeed's is not finite: its last sum is in float32
        (in ZeRO 3 without offload in float64), and it drops the step, though every gradient may be finite.
        """
        zero, stage = self._engine.optimizer, self._engine.zero_optimization_stage()
        offloads = stage > 0 and bool(zero.cpu_offload if stage < 3 else zero.offload_optimizer)
        if stage == 0 or (stage == 3 and not offloads):
            return
        name = "scaled_global_norm" if stage < 3 else "complete_grad_norm_calculation_for_cpu_offload"
        theirs = getattr(zero, name)

        def norm(*arguments: Any) -> torch.Tensor:
            found = theirs(*arguments)
            if found.isfinite() and found >= 0:
                return found
            if offloads:
                norms = [torch.as_tensor(value, dtype=torch.float64) for value in zero.norm_for_param_grads.values()]
                own = torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)
            else:
                own = total_norm([part for group in zero.averaged_gradients.values() for part in group or ()])
            square = own.square().to(self._engine.device)
            dist.all_reduce(square)
            return square.sqrt().to(found.device)

        setattr(zero, name, norm)

    def skip_gradient_sum(self) -> None:
        """Leaves out the sum over ranks of a single rank without ZeRO: it would copy all gradients into one buffer and
        back.
        """
        if not self._engine.zero_optimization():
            self._engine.enable_backward_allreduce = False

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that changed nothing."""
        return self._engine.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._engine.skipped_steps = count

    @property
    def global_steps(self) -> int:
        """Optimizer steps, the skipped ones included."""
        return self._engine.global_steps

    @global_steps.setter
    def global_steps(self, count: int) -> None:
        self._engine.global_steps = count

    def places(self, share: int, shares: int) -> Iterator[Place]:
        """Yields the pieces of all trained parameters that this rank holds.

        Args:
            share, shares: without ZeRO every rank holds everything: of that, share number ``share`` of ``shares`` equal
                ones. With ZeRO the shares are the ranks' own.
        """
        stage, rank, zero = self._engine.zero_optimization_stage(), dist.get_rank(), self._engine.optimizer
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if stage == 0:
                place = slice(parameter.numel() * share // shares, parameter.numel() * (share + 1) // shares)
                if place.start < place.stop:
                    yield Place(name, place.start, parameter.detach().reshape(-1)[place], parameter, place)
            elif stage < 3:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: this rank has no part of the parameter
                    inside, within = mapping.hp_fragment_address, mapping.lp_fragment_address
                    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    place = slice(inside.start, inside.start + inside.numel)
                    yield Place(name, within.start, flat.detach()[place], flat, place)
            else:
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                size = min(size, parameter.ds_numel - rank * size)  # the last ranks' parts may be padding
                if size > 0:
                    flat, place = zero.fp32_partitioned_groups_flat[group], slice(offset, offset + size)
                    yield Place(name, rank * parameter.ds_tensor.numel(), flat.detach()[place], flat, place)
