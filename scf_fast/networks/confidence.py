"""Confidence networks: last feature map of the backbone -> log kappa.

    convf (B, C, H, W) -> log_kappa (B,)

Both end in the published code's floor, log_kappa = log(1e-6 + exp(raw)), so kappa never falls below 1e-6.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DEFAULT_RADIUS = 64.0  # of the sphere, in the published command line and in TFace; their files do not say it
LOG_KAPPA_FLOOR = math.log(1e-6)  # the published epsilon; it moves kappa by 1e-6, so it matters only for kappa << 1


def _floor(raw: torch.Tensor) -> torch.Tensor:
    """log(1e-6 + exp(raw)) in float32, without the overflow that exp alone has beyond 88."""
    raw = raw.float().squeeze(-1)
    return torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))


class ConfidenceNet(nn.Module):
    """A network that predicts log kappa; made from the channels and the side of the backbone's last feature map."""

    _log_kappa: nn.Sequential  # the last layers, under the published code's name

    def __init__(self, channels: int, map_size: int):
        super().__init__()

    def start_at(self, kappa: float) -> None:
        """Sets the last bias so that training starts near this concentration."""
        last = self._log_kappa[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, math.log(kappa))


class MLPConfidence(ConfidenceNet):
    """The published network: N - N/2 - N/4 - 1 with ReLU on the flattened map, N = C * H * W. Keys
    ``_log_kappa.{0,2,4}``.
    """

    def __init__(self, channels: int, map_size: int):
        super().__init__(channels, map_size)
        width = channels * map_size**2
        self._log_kappa = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.ReLU(inplace=True),
            nn.Linear(width // 2, width // 4),
            nn.ReLU(inplace=True),
            nn.Linear(width // 4, 1),
        )

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) or (B, C*H*W) -> (B,) float32 log kappa."""
        return _floor(self._log_kappa(convf.flatten(1)))


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


class ConvConfidence(ConfidenceNet):
    """TFace's network: three unpadded 3x3 convolutions on the map, average pool, C - C/2 - C/4 - 1. Keys ``conv_.N``,
    ``_log_kappa.N``.

    Raises:
        ValueError: the map is too small for three such convolutions.
    """

    def __init__(self, channels: int, map_size: int):
        super().__init__(channels, map_size)
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
            nn.Linear(channels // 4, 1),
        )

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B,) float32 log kappa."""
        return _floor(self._log_kappa(self.conv_(convf).flatten(1)))


CONFIDENCE_NETS: dict[str, type[ConfidenceNet]] = {"mlp": MLPConfidence, "conv": ConvConfidence}


def build_confidence_net(name: str, channels: int, map_size: int, initial_kappa: float | None = None) -> ConfidenceNet:
    """Returns an untrained confidence net.

    Args:
        name: a key of :data:`CONFIDENCE_NETS`.
        channels, map_size: of the backbone's last feature map, (B, channels, map_size, map_size).
        initial_kappa: the concentration that training starts near; None leaves PyTorch's initialization.
    """
    net = CONFIDENCE_NETS[name](channels, map_size)
    if initial_kappa is not None:
        net.start_at(initial_kappa)
    return net


def identify_confidence_net(state_dict: dict[str, torch.Tensor]) -> str:
    """Returns the key of :data:`CONFIDENCE_NETS` that a state_dict belongs to, by its names.

    Raises:
        ValueError: its names are those of no confidence net.
    """
    if "_log_kappa.0.weight" not in state_dict:
        raise ValueError(f"no confidence net: must have '_log_kappa.0.weight', got keys like {list(state_dict)[:3]}")
    return "conv" if "conv_.0.weight" in state_dict else "mlp"
