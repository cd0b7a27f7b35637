"""Forecast of the memory that stage 1 takes on a rank, before it is taken."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime, decoding_workers, gpu_number, ranks_on_this_machine
from scf_fast.engine.class_centers import fuses, rows_of
from scf_fast.engine.deepspeed_config import deepspeed_config
from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.memory import free_memory

_FLOAT = 4  # bytes of a float32, which parameters, states and gradients are
_GB = 1e9
_PIXELS = 3 * FACE_SIZE**2
# Estimates of what only a GPU needs, read from the libraries' documentation and not measured.
_WORKSPACES = 1_000_000_000  # cuBLAS, cuDNN, NCCL and the kernels' code; the CUDA context is no longer free memory
_DECODER_THREAD = 2 * (16 << 20)  # of DALI's image decoder: device_memory_padding, for two images at once
# uint8 images of DALI: three batches (two ahead, and one handed out), as decoded and as mirrored.
_DALI_COPIES = 3 * 2
_FLOAT_COPIES = 2  # normalized images: the batch that is trained on, and the next one


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that one rank needs, the one with most class centers, and those that it has."""

    backbone: int  # weights, gradients and optimizer states under the ZeRO stage
    class_centers: int
    center_momentum: int
    center_gradient: int
    activations: int  # an estimate: the most that lives at once in a micro-batch's forward and backward pass
    buckets: int  # in which gradients are reduced
    images: int  # an estimate: decoded images on their way, and the decoder's own memory
    libraries: int  # an estimate: workspaces on a GPU
    available: int  # free now

    @property
    def total(self) -> int:
        return (
            self.backbone
            + self.class_centers
            + self.center_momentum
            + self.center_gradient
            + self.activations
            + self.buckets
            + self.images
            + self.libraries
        )

    def __str__(self) -> str:
        gradient = f", their gradient {self.center_gradient / _GB:.2f}" if self.center_gradient else ""
        return (
            f"memory a rank, in GB: backbone {self.backbone / _GB:.2f}, class centers {self.class_centers / _GB:.2f}, "
            f"their momentum {self.center_momentum / _GB:.2f}{gradient}, activations about "
            f"{self.activations / _GB:.2f}, reduction buckets {self.buckets / _GB:.2f}, images about "
            f"{self.images / _GB:.2f}, libraries about {self.libraries / _GB:.2f}; {self.total / _GB:.2f} of "
            f"{self.available / _GB:.2f} that are free"
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
            "ending what else holds memory there",
            "a smaller --batch_size",
            "a higher --zero_stage" if self.backbone > self.class_centers else "a smaller --z_dim",
        ]
        raise InputError(f"this run does not fit into memory ({self}); what helps: {', '.join(ways)}")


def forecast(config: BackboneConfig, num_classes: int, world_size: int, precision: str) -> MemoryForecast:
    """Returns the forecast for stage 1 on this machine."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", gpu_number()) if on_gpu else torch.device("cpu")
    start, stop = rows_of(0, world_size, num_classes)
    centers = (stop - start) * config.z_dim * _FLOAT
    micro_batch = config.batch_size // (world_size * config.gradient_accumulation_steps)
    with FakeTensorMode():
        backbone = Backbone(config.network, config.z_dim, config.dropout)
        size = sum(parameter.numel() for parameter in backbone.parameters()) * _FLOAT
        activations = _pass_peak(backbone, max(2, micro_batch), precision)
    stage = config.zero_stage_on(world_size)
    states = [
        size // (world_size if stage >= 1 else 1),  # momentum
        size // world_size if stage >= 1 else 0,  # ZeRO keeps its own partition of float32 weights
    ]
    shares = [
        size // (world_size if stage >= 3 else 1),
        size // (world_size if stage >= 2 else 1),
        *(() if on_gpu and config.offload_optimizer != "none" else states),
    ]
    momentum = centers // 2 if config.centers_state == "bf16" else centers
    return MemoryForecast(
        sum(shares),
        centers,
        momentum,
        0 if fuses(config, precision) else centers,
        activations,
        _buckets(config, Runtime(0, world_size, device), precision, size),
        _image_bytes(config, world_size, on_gpu),
        _WORKSPACES if on_gpu else 0,
        _free_memory(device),
    )


def _buckets(config: BackboneConfig, runtime: Runtime, precision: str, gradients: int) -> int:
    """Returns the bytes in which DeepSpeed collects gradients to reduce them.

    Args:
        gradients: bytes of all of them; ZeRO 0 copies no more than there is, and nothing on one rank.
    """
    zero = deepspeed_config(config, runtime, precision)["zero_optimization"]
    bucket = int(zero["reduce_bucket_size"]) * _FLOAT
    if zero["stage"] == 0:
        return min(bucket, gradients) if runtime.world_size > 1 else 0
    return bucket * (2 if zero["overlap_comm"] else 1)


def _image_bytes(config: BackboneConfig, world_size: int, on_gpu: bool) -> int:
    """Returns the bytes of a rank's images between the file and the network, where they go."""
    count = config.batch_size // world_size
    normalized = _FLOAT_COPIES * count * _PIXELS * _FLOAT
    workers = decoding_workers(config.num_workers)
    if config.loader == "torch":  # each process is a batch ahead, in host memory
        return normalized + (1 if on_gpu else 1 + workers) * count * _PIXELS
    return normalized + _DALI_COPIES * count * _PIXELS + (workers * _DECODER_THREAD if on_gpu else 0)


def _free_memory(device: torch.device) -> int:
    """Returns the bytes that are free for this rank: on its GPU, beside other programs and this one's CUDA context; on
    a CPU, its part of the machine's.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return free_memory() // ranks_on_this_machine()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}  # by the storage's address, while it lives
        self._live = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _pass_peak(backbone: Backbone, batch: int, precision: str) -> int:
    """Returns the most bytes that live at once in a forward and backward pass, beside the weights and their gradients;
    on tensors without memory.
    """
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in backbone.parameters()
        if parameter.requires_grad
    ]
    images = torch.empty(batch, 3, FACE_SIZE, FACE_SIZE)
    with _LiveBytes() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            features, _ = backbone(images)
        features.float().sum().backward()
    for handle in handles:
        handle.remove()
    return counter.peak
