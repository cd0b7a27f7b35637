"""An inference-only backbone: every BatchNorm folded exactly, low precision, channels_last, compiled.

A BatchNorm is y = a x + b for each channel, with a = weight / sqrt(var + eps) and b = bias - a mean.

    after a convolution:        scales the filters by a and adds b
    before a padded one:        conv(pad(a x + b), w) = conv(pad(x), w a) + conv(pad(b 1), w)

The padding of the second is zero in y, not in x, so its constant term differs at the border: a map over positions,
computed once.

In bf16 and fp16 the weights and what passes from layer to layer are rounded; constants, slopes and sums between two
layers are float32. That costs nothing where the pointwise work is fused, and rounding the constants alone moves the
features as much as rounding the filters.
"""

import contextlib
import copy
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.face_template import FACE_SIZE

log = logging.getLogger(__name__)

MIN_COSINE = 0.9999  # of the features against the float32 model, in bf16 and fp16
MAX_CONVF_ERROR = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # relative, in the Frobenius norm
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_IMAGES = 32


def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of a BatchNorm in evaluation mode, float64."""
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    weight = norm.weight.double() if norm.affine else torch.ones_like(mean)
    bias = norm.bias.double() if norm.affine else torch.zeros_like(mean)
    a = weight / torch.sqrt(variance + norm.eps)
    return a, bias - a * mean


class FoldedConv(nn.Module):
    """[BN -] conv [- BN] as one convolution and one addition: x (B, C, H, W) in ``dtype`` -> (B, C', H', W') float32,
    or float64 as the module.

    Args:
        before, conv, after: the modules, in evaluation mode; the BatchNorms may be None.
        size: side of the input map, to which the constant term belongs.
        dtype: of the weights.
    """

    def __init__(
        self,
        before: nn.Module | None,
        conv: nn.Conv2d,
        after: nn.Module | None,
        size: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
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
        # The inner constant takes part in the convolution's own sum, before that is rounded; the addition has the rest
        # of it.
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

    def __init__(self, unit: nn.Module, size: int, dtype: torch.dtype):
        super().__init__()
        layers = list(unit.res_layer)
        first_norm, conv1, *rest = layers
        middle = rest.pop(0) if isinstance(rest[0], nn.BatchNorm2d) else None
        prelu, conv2, last_norm, *gate = rest
        self.conv1 = FoldedConv(first_norm, conv1, middle, size, dtype)
        self.register_buffer("slope", prelu.weight.detach().float())
        self.conv2 = FoldedConv(None, conv2, last_norm, size, dtype)
        self.gate = (
            copy.deepcopy(gate[0]).to(dtype) if gate else None
        )  # a change of dtype here must not reach the model it came from
        if isinstance(unit.shortcut_layer, nn.MaxPool2d):
            self.shortcut, self.step = None, unit.shortcut_layer.stride
        else:
            conv, norm = unit.shortcut_layer
            self.shortcut, self.step = FoldedConv(None, conv, norm, size, dtype), 1

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

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32):
        super().__init__()
        conv, norm, prelu = backbone.input_layer
        size = FACE_SIZE
        self.stem = FoldedConv(None, conv, norm, size, dtype)
        self.register_buffer("slope", prelu.weight.detach().float())
        size = -(-size // conv.stride[0])
        units = []
        for unit in backbone.body:
            folded = FoldedUnit(unit, size, dtype)
            units.append(folded)
            size = -(-size // folded.conv2.stride[0])
        self.body = nn.ModuleList(units)
        norm2d, linear, norm1d = (
            next(m for m in backbone.output_layer if isinstance(m, kind))
            for kind in (nn.BatchNorm2d, nn.Linear, nn.BatchNorm1d)
        )
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
def full_float32():
    """Float32 convolutions in float32: cuDNN may use TF32 unless told otherwise, whose 10 bits cost a thousandth of the
    map.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _plain_products():
    """Convolutions by plain products of matrices, in which float32 is judged: cuDNN may take Winograd's algorithm,
    which rounds far more than the folding does.
    """
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)


def frozen_precisions(precision: str, device: torch.device) -> tuple[str, ...]:
    """The precisions to try for a frozen backbone, in order. float16 resolves eight times finer than bfloat16 at the
    same speed on a GPU.
    """
    if precision != "auto":
        return (precision,) if precision == "fp32" else (precision, "fp32")
    if device.type == "cuda":
        return ("fp16", "bf16", "fp32")
    return ("bf16", "fp32") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",)


class FrozenBackbone(nn.Module):
    """A backbone for inference alone, as fast as the device allows while it stays accurate.

    Args:
        backbone: any of :mod:`scf_fast.networks.backbones`, with its weights; left as it is.
        device: where to run.
        precisions: of ``"fp32"``, ``"bf16"``, ``"fp16"``: the first that is accurate enough becomes the dtype of
            weights and activations.
        compile: fuse the pointwise work with torch.compile; on CUDA as one graph a batch size, whose outputs are
            overwritten by the next call. Each takes a minute or more, so that a batch smaller than the largest before
            it is filled up to the next quarter of that.
        calibration: gives the images (B, 3, 112, 112) that the precisions are judged on; by default those of the first
            call. Ranks that must decide alike give the same images.
        batch_size: of the largest batch to come, where that is known beforehand.
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
    ):
        super().__init__()
        self.z_dim, self.architecture = backbone.z_dim, backbone.architecture
        self._reference = copy.deepcopy(backbone).eval().requires_grad_(False).to(device)
        self._device, self._precisions, self._compile, self._calibration = (
            torch.device(device),
            precisions,
            compile,
            calibration,
        )
        self._folded = self._call = self.dtype = None
        self._largest_batch = batch_size

    @torch.no_grad()
    @full_float32()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalized RGB -> features (B, z_dim) float32, convf (B, C, 7, 7) in ``self.dtype``, which
        the first call sets.

        Raises:
            ValueError: on the first call only: no precision is accurate enough.
        """
        if self._call is None:
            self.choose(images if self._calibration is None else self._calibration().to(self._device))
        images = images.to(self.dtype, memory_format=torch.channels_last)
        if self._call is self._folded or not len(images):
            return self._folded(images)
        try:
            features, convf = self._call(self._filled_up(images))
            return features[: len(images)], convf[: len(images)]
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler on this machine, as a rule
            log.warning("frozen backbone: not compiled, so it runs slower (%s)", str(error).strip().splitlines()[0])
            self._call = self._folded
            return self._folded(images)

    def _filled_up(self, images):
        self._largest_batch = max(self._largest_batch, len(images))
        quarter = -(-self._largest_batch // 4)
        missing = min(-len(images) % quarter, self._largest_batch - len(images))
        return F.pad(images, (0, 0) * 3 + (0, missing)) if missing else images

    @torch.no_grad()
    @full_float32()
    def choose(self, images: torch.Tensor) -> str:
        """Take the first precision that agrees with the float32 model on some of these images, and return it; lets go
        of that model.

        Raises:
            ValueError: no precision is accurate enough.
        """
        images = images[:CHECK_IMAGES]
        with _plain_products():
            expected, expected_map = self._reference(images.float())
        for precision in self._precisions:
            self.dtype = DTYPES[precision]
            self._folded = FoldedBackbone(self._reference, self.dtype).to(
                self._device, memory_format=torch.channels_last
            )
            with _plain_products() if precision == "fp32" else contextlib.nullcontext():
                features, convf = self._folded(images.to(self.dtype, memory_format=torch.channels_last))
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
                self._reference = None
                self._call = self._folded
                if self._compile:
                    self._call = torch.compile(
                        self._folded, mode="reduce-overhead" if self._device.type == "cuda" else None, dynamic=False
                    )
                return precision
        raise InputError(
            f"the frozen backbone differs from the float32 model in every precision of {', '.join(self._precisions)}: "
            "cosine must be >= "
            f"{MIN_COSINE} and the relative error of convf <= {MAX_CONVF_ERROR[precision]:.0e}; the weights may be "
            "damaged"
        )
