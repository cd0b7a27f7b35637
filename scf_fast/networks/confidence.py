"""Confidence networks: last feature map of the backbone -> log kappa or log variance.

    convf (B, C, H, W) -> (B,), or (B, d) for a variance in each dimension

All end in the floor of the published codes, log(1e-6 + exp(raw)), so neither kappa nor a variance falls below 1e-6.
"""

import abc
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

DEFAULT_RADIUS = 64.0  # of the sphere, in the published command line and in TFace; their files do not say it
LOG_KAPPA_FLOOR = math.log(1e-6)  # the published epsilon; it moves kappa by 1e-6, so it matters only for kappa << 1
PFE_HIDDEN = 512  # width of PFE's hidden layer, that of its embedding


def _floor(raw: torch.Tensor, passes_gradient: bool = False) -> torch.Tensor:
    """log(1e-6 + exp(raw)) in float32, without the overflow that exp alone has beyond 88. A single output loses its
    axis.

    Args:
        passes_gradient: the gradient of raw is that of the result, also below the floor, where nothing else would bring
            raw back.
    """
    raw = raw.float()
    raw = raw.squeeze(-1) if raw.shape[-1] == 1 else raw
    floored = torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))
    return _PassedThrough.apply(raw, floored.detach()) if passes_gradient else floored


class _PassedThrough(torch.autograd.Function):
    """(raw, result) -> result, with the gradient of the result for raw."""

    @staticmethod
    def forward(ctx: Any, raw: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class ConfidenceNet(nn.Module, abc.ABC):
    """A network that predicts log kappa, log variance, or d of these.

    Args:
        channels, map_size: of the backbone's last feature map, (B, channels, map_size, map_size).
        outputs: values for each image.
    Attributes:
        floor_passes_gradient: whether the floor is no obstacle to gradients, see ``_floor``. Set by whoever trains.
    """

    floor_passes_gradient = False

    def __init__(self, channels: int, map_size: int, outputs: int = 1):
        super().__init__()

    @abc.abstractmethod
    def start_at(self, value: float) -> None:
        """Makes training start near this kappa or variance, in all outputs."""

    @abc.abstractmethod
    def multiply(self, factor: float) -> None:
        """Multiplies what the net predicts, kappa or variance, by a positive factor, in its last bias."""


class _Head(ConfidenceNet):
    """A network whose last layers have the published code's name."""

    _log_kappa: nn.Sequential

    def start_at(self, value: float) -> None:
        last = self._log_kappa[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, math.log(value))

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        last = self._log_kappa[-1]
        assert isinstance(last, nn.Linear)
        last.bias.add_(math.log(factor))


class MLPConfidence(_Head):
    """The published network: N - N/2 - N/4 - outputs with ReLU on the flattened map, N = C * H * W. Keys
    ``_log_kappa.{0,2,4}``.
    """

    def __init__(self, channels: int, map_size: int, outputs: int = 1):
        super().__init__(channels, map_size, outputs)
        width = channels * map_size**2
        self._log_kappa = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.ReLU(inplace=True),
            nn.Linear(width // 2, width // 4),
            nn.ReLU(inplace=True),
            nn.Linear(width // 4, outputs),
        )

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) or (B, C*H*W) -> (B,) or (B, outputs) float32."""
        return _floor(self._log_kappa(convf.flatten(1)), self.floor_passes_gradient)


class _Patches(torch.autograd.Function):
    """(B, C, H, W) -> (B, H - 2, W - 2, 3, 3, C): the values that a 3x3 convolution without padding reads for each
    output position.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = ctx.shape = x.shape
        x = x.permute(0, 2, 3, 1).contiguous()
        image, row, pixel, _ = x.stride()
        return x.as_strided(
            (batch, height - 2, width - 2, 3, 3, channels), (image, row, pixel, row, pixel, 1)
        ).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = ctx.shape
        result = torch.zeros(batch, height, width, channels)  # float32, for nine summands
        for i in range(3):
            for j in range(3):
                result[:, i : i + height - 2, j : j + width - 2] += gradient[:, :, :, i, j]
        return result.to(gradient.dtype).permute(0, 3, 1, 2)


class _Convolution(nn.Conv2d):
    """``nn.Conv2d(inputs, outputs, 3, bias=False)``, computed as one product of matrices when a CPU trains in bf16:
    for maps this small oneDNN multiplies matrices at twice the rate at which it convolves.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not (x.is_cpu and self.training and dtype == torch.bfloat16):
            return super().forward(x)
        weight = self.weight.to(dtype).permute(0, 2, 3, 1)
        return F.linear(_Patches.apply(x.to(dtype)).flatten(3), weight.flatten(1)).permute(0, 3, 1, 2)


class ConvConfidence(_Head):
    """TFace's network: three unpadded 3x3 convolutions on the map, average pool, C - C/2 - C/4 - outputs. Keys
    ``conv_.N``, ``_log_kappa.N``.

    Raises:
        ValueError: the map is too small for three such convolutions.
    """

    def __init__(self, channels: int, map_size: int, outputs: int = 1):
        super().__init__(channels, map_size, outputs)
        if map_size < 7:
            raise ValueError(
                f"the convolutional confidence net needs a feature map of at least 7 x 7, got {map_size} x "
                f"{map_size}; use the mlp"
            )
        self.conv_ = nn.Sequential(
            _Convolution(channels, channels),
            nn.ReLU(inplace=True),
            _Convolution(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _Convolution(channels, channels),
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(1),
        )
        self._log_kappa = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 2, channels // 4),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, outputs),
        )

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B,) or (B, outputs) float32."""
        return _floor(self._log_kappa(self.conv_(convf).flatten(1)), self.floor_passes_gradient)


class PFEConfidence(ConfidenceNet):
    """PFE's uncertainty module: Linear(N, hidden) - BatchNorm - ReLU - Linear(hidden, outputs) - BatchNorm without
    affine parameters on the flattened map, N = C * H * W, then one scale and one shift for all outputs.

    Both linear layers lack the bias that the BatchNorm after them takes away. Source: Shi and Jain, ICCV 2019,
    section 4.3, and its code.
    """

    def __init__(self, channels: int, map_size: int, outputs: int = 1, hidden: int = PFE_HIDDEN):
        super().__init__(channels, map_size, outputs)
        self.fc1 = nn.Linear(channels * map_size**2, hidden, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, outputs, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs, affine=False)
        self.scale = nn.Parameter(torch.tensor([1e-4]))
        self.shift = nn.Parameter(torch.tensor([-7.0]))

    def start_at(self, value: float) -> None:
        nn.init.constant_(self.shift, math.log(value))

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        self.shift.add_(math.log(factor))

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) or (B, C*H*W) -> (B,) or (B, outputs) float32."""
        hidden = F.relu(self.bn1(self.fc1(convf.flatten(1))))
        return _floor(self.scale * self.bn2(self.fc2(hidden)) + self.shift, self.floor_passes_gradient)


CONFIDENCE_NETS: dict[str, type[ConfidenceNet]] = {"mlp": MLPConfidence, "conv": ConvConfidence, "pfe": PFEConfidence}


class ConfidenceNetShape(NamedTuple):
    """What a state_dict tells of its confidence net."""

    name: str  # a key of CONFIDENCE_NETS
    inputs: int  # values that its first linear layer takes
    outputs: int  # for each image


def build_confidence_net(
    name: str, channels: int, map_size: int, initial_kappa: float | None = None, *, outputs: int = 1
) -> ConfidenceNet:
    """Returns an untrained confidence net.

    Args:
        name: a key of :data:`CONFIDENCE_NETS`.
        channels, map_size: of the backbone's last feature map, (B, channels, map_size, map_size).
        initial_kappa: the concentration (of a net for variances: the variance) that training starts near; None leaves
            the net's own initialization.
        outputs: values for each image: 1, or d for a variance in each dimension.
    """
    net = CONFIDENCE_NETS[name](channels, map_size, outputs)
    if initial_kappa is not None:
        net.start_at(initial_kappa)
    return net


def is_confidence_net(names: Iterable[str]) -> bool:
    """Returns whether the names of a state_dict are those of a confidence net."""
    names = set(names)
    return "_log_kappa.0.weight" in names or names >= {"fc1.weight", "fc2.weight", "scale", "shift"}


def identify_confidence_net(state_dict: dict[str, torch.Tensor]) -> ConfidenceNetShape:
    """Returns the kind and the size of the net that a state_dict belongs to, by its names.

    Raises:
        ValueError: its names are those of no confidence net.
    """
    if not is_confidence_net(state_dict):
        raise ValueError(f"no confidence net: must have '_log_kappa.0.weight', got keys like {list(state_dict)[:3]}")
    if "fc1.weight" in state_dict:
        return ConfidenceNetShape("pfe", state_dict["fc1.weight"].shape[1], len(state_dict["fc2.weight"]))
    last = state_dict.get("_log_kappa.4.weight")
    return ConfidenceNetShape(
        "conv" if "conv_.0.weight" in state_dict else "mlp",
        state_dict["_log_kappa.0.weight"].shape[1],
        1 if last is None else len(last),
    )
