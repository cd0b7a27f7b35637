"""An inference-only backbone: every BatchNorm folded exactly, low precision, channels_last, compiled.

A BatchNorm is y = a x + b for each channel, with a = weight / sqrt(var + eps) and b = bias - a mean.

    after a convolution:        scales the filters by a and adds b
    before a padded one:        conv(pad(a x + b), w) = conv(pad(x), w a) + conv(pad(b 1), w)

The padding of the second is zero in y, not in x, so its constant term differs at the border: a map over positions,
computed once.

In bf16 and fp16 the weights and the maps between layers are rounded; constants, slopes and the sums within a layer are
float32. That costs nothing where the pointwise work is fused, and rounding the constants alone moves the features as
much as rounding the filters.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone, IRUnit, SqueezeExcitation
from scf_fast.networks.precision import PRECISION_DTYPES
from scf_fast.pipelines.face_template import FACE_SIZE

log = logging.getLogger(__name__)

MIN_COSINE = 0.9999  # of the features against the float32 model, in bf16 and fp16
MAX_CONVF_ERROR = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # relative, in the Frobenius norm
CHECK_IMAGES = 32

_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d
_Layer = TypeVar("_Layer", bound=nn.Module)


def _affine(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (a, b) of a BatchNorm in evaluation mode, float64."""
    assert norm.running_var is not None and norm.running_mean is not None
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    weight = norm.weight.double() if norm.affine else torch.ones_like(mean)
    bias = norm.bias.double() if norm.affine else torch.zeros_like(mean)
    a = weight / torch.sqrt(variance + norm.eps)
    return a, bias - a * mean


def _layers_of(kind: type[_Layer], layers: Iterable[nn.Module]) -> list[_Layer]:
    """Returns the layers of one kind, in order."""
    return [layer for layer in layers if isinstance(layer, kind)]


class FoldedConv(nn.Module):
    """[BN -] conv [- BN] as one convolution and one addition: x (B, C, H, W) in ``dtype`` -> (B, C', H', W') float32,
    or float64 as the module.

    Args:
        before, conv, after: the modules, in evaluation mode; the BatchNorms may be None.
        size: side of the input map, to which the constant term belongs.
        dtype: of the weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rest: torch.Tensor | None

    def __init__(
        self,
        before: _BatchNorm | None,
        conv: nn.Conv2d,
        after: _BatchNorm | None,
        size: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.stride, self.padding = conv.stride, conv.padding
        weight = conv.weight.double()
        constant = weight.new_zeros(1, weight.shape[0], 1, 1)
        if before is not None:
            a, b = _affine(before)
            constant = F.conv2d(
                b[None, :, None, None].expand(1, -1, size, size), weight, None, conv.stride, conv.padding
            )
            weight = weight * a[None, :, None, None]
        if after is not None:
            a, b = _affine(after)
            weight = weight * a[:, None, None, None]
            constant = constant * a[None, :, None, None] + b[None, :, None, None]
        # The constant of the map's inside takes part in the convolution's own sum, before that is rounded; what is left
        # of it is added afterwards.
        middle = constant.shape[-1] // 2
        bias = constant[0, :, middle, middle].to(dtype)
        rest = constant - bias.double()[:, None, None]
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias)
        self.register_buffer("rest", None if dtype == torch.float32 and rest.shape[-1] == 1 else rest.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if self.rest is None else y + self.rest


class FoldedUnit(nn.Module):
    """An IR unit with its BatchNorms folded; map in, map out in ``dtype``."""

    slope: torch.Tensor

    def __init__(self, unit: IRUnit, size: int, dtype: torch.dtype):
        super().__init__()
        first_norm, *middle, last_norm = _layers_of(nn.BatchNorm2d, unit.res_layer)
        conv1, conv2 = _layers_of(nn.Conv2d, unit.res_layer)
        (prelu,) = _layers_of(nn.PReLU, unit.res_layer)
        gates = _layers_of(SqueezeExcitation, unit.res_layer)
        self.conv1 = FoldedConv(first_norm, conv1, middle[0] if middle else None, size, dtype)
        self.register_buffer("slope", prelu.weight.detach().float())
        self.conv2 = FoldedConv(None, conv2, last_norm, size, dtype)
        self.gate = copy.deepcopy(gates[0]).to(dtype) if gates else None  # a copy: the model must keep its dtype
        self.shortcut: FoldedConv | None = None
        self.step = unit.stride  # of a shortcut without weights
        if isinstance(unit.shortcut_layer, nn.Sequential):
            (conv,) = _layers_of(nn.Conv2d, unit.shortcut_layer)
            (norm,) = _layers_of(nn.BatchNorm2d, unit.shortcut_layer)
            self.shortcut = FoldedConv(None, conv, norm, size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.prelu(self.conv1(x), self.slope).to(x.dtype))
        if self.gate is not None:
            y = self.gate(y.to(x.dtype))
        if self.shortcut is not None:
            return (y + self.shortcut(x)).to(x.dtype)
        return (y + (x if self.step == 1 else x[:, :, :: self.step, :: self.step])).to(x.dtype)


class FoldedBackbone(nn.Module):
    """images (B, 3, 112, 112) in ``dtype`` -> features (B, z_dim) float32, unnormalized, and convf (B, C, 7, 7) in
    ``dtype``, channels_last.

    The embedding layer (BN - flatten - linear - BN) is one linear map. Its weight is stored in the order of the
    channels_last map, so that flattening the map copies nothing.
    """

    slope: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32):
        super().__init__()
        (conv,) = _layers_of(nn.Conv2d, backbone.input_layer)
        (norm,) = _layers_of(nn.BatchNorm2d, backbone.input_layer)
        (prelu,) = _layers_of(nn.PReLU, backbone.input_layer)
        size = FACE_SIZE
        self.stem = FoldedConv(None, conv, norm, size, dtype)
        self.register_buffer("slope", prelu.weight.detach().float())
        size = -(-size // conv.stride[0])
        units = []
        for unit in _layers_of(IRUnit, backbone.body):
            units.append(FoldedUnit(unit, size, dtype))
            size = -(-size // unit.stride)
        self.body = nn.ModuleList(units)
        (norm2d,) = _layers_of(nn.BatchNorm2d, backbone.output_layer)
        (linear,) = _layers_of(nn.Linear, backbone.output_layer)
        (norm1d,) = _layers_of(nn.BatchNorm1d, backbone.output_layer)
        (a_in, b_in), (a_out, b_out) = _affine(norm2d), _affine(norm1d)
        weight = linear.weight.double().unflatten(1, (-1, size, size))
        bias = linear.bias.double() + (weight * b_in[:, None, None]).sum((1, 2, 3))
        weight = (weight * a_in[:, None, None] * a_out[:, None, None, None]).permute(0, 2, 3, 1)  # (z_dim, H, W, C)
        self.register_buffer("weight", weight.flatten(1).to(dtype).contiguous())
        self.register_buffer("bias", (bias * a_out + b_out).float())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.prelu(self.stem(images), self.slope).to(images.dtype)
        for unit in self.body:
            x = unit(x)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight) + self.bias, x


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keeps float32 convolutions in float32: cuDNN may use TF32 unless told otherwise, whose 10 bits cost a thousandth
    of the map.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _plain_products() -> contextlib.AbstractContextManager[None]:
    """Makes convolutions plain products of matrices, in which float32 is judged: cuDNN may take Winograd's algorithm,
    which rounds far more than the folding does.
    """
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)


def frozen_precisions(precision: str, device: torch.device) -> tuple[str, ...]:
    """Returns the precisions to try for a frozen backbone, in order. float16 resolves eight times finer than bfloat16
    at the same speed on a GPU.
    """
    if precision != "auto":
        return (precision,) if precision == "fp32" else (precision, "fp32")
    if device.type == "cuda":
        return ("fp16", "bf16", "fp32")
    return ("bf16", "fp32") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",)


class FrozenBackbone(nn.Module):
    """A backbone for inference alone, as fast as the device allows while it stays accurate.

    Args:
        backbone: any of :mod:`scf_fast.networks.backbones`, with its weights; it is copied.
        device: where to run.
        precisions: of ``"fp32"``, ``"bf16"``, ``"fp16"``: the first that is accurate enough becomes the dtype of
            weights and activations.
        compile: fuse the pointwise work with torch.compile; on CUDA as one graph for each batch size, whose outputs are
            overwritten by the next call. Compiling takes a minute or more, so a batch smaller than the largest so far
            is filled up to the next of a few sizes.
        calibration: returns the images (B, 3, 112, 112) that the precisions are judged on; by default those of the
            first call. Ranks that must come to the same decision give the same images.
        batch_size: of the largest batch to come, if that is known beforehand.
        batch_sizes: number of sizes that batches are filled up to: even parts of the largest.
    Attributes:
        dtype: of weights and activations; None until :meth:`choose` or the first call has settled it.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device | str = "cpu",
        precisions: tuple[str, ...] = ("fp32",),
        compile: bool = False,
        calibration: Callable[[], torch.Tensor] | None = None,
        batch_size: int = 0,
        batch_sizes: int = 4,
    ):
        super().__init__()
        self.z_dim, self.architecture = backbone.z_dim, backbone.architecture
        self.dtype: torch.dtype | None = None
        self._reference: Backbone | None = copy.deepcopy(backbone).eval().requires_grad_(False).to(device)
        self._device, self._precisions, self._compile = torch.device(device), precisions, compile
        self._calibration, self._largest_batch, self._batch_sizes = calibration, batch_size, batch_sizes
        self._folded: FoldedBackbone | None = None
        self._call: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None  # folded, or compiled

    @torch.no_grad()
    @full_float32()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalized RGB -> features (B, z_dim) float32, convf (B, C, 7, 7) in ``self.dtype``, which
        the first call sets.

        Raises:
            InputError: on the first call only: no precision is accurate enough.
        """
        if self._call is None:
            self.choose(images if self._calibration is None else self._calibration().to(self._device))
        assert self._folded is not None and self._call is not None and self.dtype is not None
        images = images.to(self.dtype, memory_format=torch.channels_last)
        if self._call is self._folded or not len(images):
            return self._folded(images)
        try:
            features, convf = self._call(self._filled_up(images))
            return features[: len(images)], convf[: len(images)]
        except torch._dynamo.exc.TorchDynamoException as error:  # usually there is no compiler on this machine
            log.warning("frozen backbone: not compiled, so it runs slower (%s)", str(error).strip().splitlines()[0])
            self._call = self._folded
            return self._folded(images)

    def _filled_up(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the images with zeros behind them, up to one of the few batch sizes that are compiled."""
        self._largest_batch = max(self._largest_batch, len(images))
        part = -(-self._largest_batch // self._batch_sizes)
        missing = min(-len(images) % part, self._largest_batch - len(images))
        return F.pad(images, (0, 0) * 3 + (0, missing)) if missing else images

    @torch.no_grad()
    @full_float32()
    def choose(self, images: torch.Tensor) -> str:
        """Takes the first precision that agrees with the float32 model on the first of these images, and returns it.
        The float32 model is given up then.

        Raises:
            InputError: no precision is accurate enough.
        """
        reference, images = self._reference, images[:CHECK_IMAGES]
        assert reference is not None, "the precision is chosen once"
        with _plain_products():
            expected, expected_map = reference(images.float())
        for precision in self._precisions:
            dtype = PRECISION_DTYPES[precision]
            folded = FoldedBackbone(reference, dtype).to(self._device)
            folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in PyTorch's overloads
            with _plain_products() if precision == "fp32" else contextlib.nullcontext():
                features, convf = folded(images.to(dtype, memory_format=torch.channels_last))
            cosine = F.cosine_similarity(features.float(), expected).min().item()
            error = ((convf.float() - expected_map).norm() / expected_map.norm()).item()
            accurate = cosine >= MIN_COSINE and error <= MAX_CONVF_ERROR[precision]
            log.info(
                "frozen backbone: %s %s: against float32, cosine of features >= %.6f, relative error of convf %.1e",
                precision,
                "taken" if accurate else "refused, not accurate enough",
                cosine,
                error,
            )
            if accurate:
                self.dtype, self._reference = dtype, None
                self._folded = self._call = folded
                if self._compile:
                    mode = "reduce-overhead" if self._device.type == "cuda" else None
                    self._call = torch.compile(folded, mode=mode, dynamic=False)
                return precision
        raise InputError(
            f"the frozen backbone differs from the float32 model in every precision of {', '.join(self._precisions)}: "
            f"cosine must be >= {MIN_COSINE} and the relative error of convf <= {MAX_CONVF_ERROR[precision]:.0e}; the "
            "weights may be damaged"
        )
