"""Forecast of the memory that stage 1 takes on a rank, before it is taken."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from scf_fast.config import BackboneConfig
from scf_fast.engine.class_centers import fuses, rows_of
from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.face_template import FACE_SIZE

_FLOAT = 4  # bytes of a float32, which parameters, states and gradients are
_GB = 1e9


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that one rank needs, the one with most class centers, and those that it has."""

    backbone: int  # weights, gradients and optimizer states under the ZeRO stage
    class_centers: int
    center_momentum: int
    center_gradient: int
    activations: int  # an estimate: what autograd keeps of a micro-batch
    available: int

    @property
    def total(self) -> int:
        return self.backbone + self.class_centers + self.center_momentum + self.center_gradient + self.activations

    def __str__(self) -> str:
        gradient = f", their gradient {self.center_gradient / _GB:.2f}" if self.center_gradient else ""
        return (
            f"memory a rank, in GB: backbone {self.backbone / _GB:.2f}, class centers {self.class_centers / _GB:.2f}, "
            f"their momentum {self.center_momentum / _GB:.2f}{gradient}, activations about "
            f"{self.activations / _GB:.2f}; {self.total / _GB:.2f} of {self.available / _GB:.2f}"
        )

    def check(self) -> None:
        """Checks that it fits.

        Raises:
            InputError: it cannot; the message says what would make it smaller.
        """
        if self.total <= self.available:
            return
        ways = ["more ranks (the class centers are divided among them)"]
        if self.center_momentum == self.class_centers:
            ways.append("--centers_state bf16 (half their momentum)")
        if self.center_gradient:
            ways.append("--fused_center_update with --gradient_accumulation_steps 1 (no gradient of the class centers)")
        ways += [
            "a smaller --batch_size",
            "a higher --zero_stage" if self.backbone > self.class_centers else "a smaller --z_dim",
        ]
        raise InputError(f"this run does not fit into memory ({self}); what helps: {', '.join(ways)}")


def forecast(config: BackboneConfig, num_classes: int, world_size: int, precision: str) -> MemoryForecast:
    """Returns the forecast for stage 1 on this machine."""
    start, stop = rows_of(0, world_size, num_classes)
    centers = (stop - start) * config.z_dim * _FLOAT
    with FakeTensorMode():
        backbone = Backbone(config.network, config.z_dim, config.dropout)
        size = sum(parameter.numel() for parameter in backbone.parameters()) * _FLOAT
        # The difference of two batches, so that what does not grow with the batch drops out.
        an_image = (_kept_for_backward(backbone, 4, precision) - _kept_for_backward(backbone, 2, precision)) // 2
    stage = config.zero_stage_on(world_size)
    shares = [
        size // (world_size if stage >= 3 else 1),
        size // (world_size if stage >= 2 else 1),
        size // (world_size if stage >= 1 else 1),
    ]
    master = size // world_size if stage >= 1 else 0  # ZeRO keeps its own partition of float32 weights
    if torch.cuda.is_available():
        available = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
    else:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        assert found is not None, "Linux since 3.14 has it"
        kilobytes = int(found[1])
        available = kilobytes * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    micro_batch = config.batch_size // (world_size * config.gradient_accumulation_steps)
    momentum = centers // 2 if config.centers_state == "bf16" else centers
    return MemoryForecast(
        sum(shares) + master,
        centers,
        momentum,
        0 if fuses(config, precision) else centers,
        an_image * micro_batch,
        available,
    )


def _kept_for_backward(backbone: Backbone, batch: int, precision: str) -> int:
    """Returns the bytes that autograd keeps of a forward pass, weights excepted; on tensors without memory."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features, _ = backbone(torch.empty(batch, 3, FACE_SIZE, FACE_SIZE))
    weights = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
    del features
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
