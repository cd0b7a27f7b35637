"""Confidence networks: last feature map of the backbone -> log kappa.

    convf (B, C, H, W) -> log_kappa (B,)

Both end in the published code's floor, log_kappa = log(1e-6 + exp(raw)), so kappa never falls below 1e-6.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError

LOG_KAPPA_FLOOR = math.log(1e-6)  # the published epsilon; it moves kappa by 1e-6, so it matters only for kappa << 1


def _floor(raw: torch.Tensor) -> torch.Tensor:
    """log(1e-6 + exp(raw)) in float32, without the overflow that exp alone has beyond 88."""
    raw = raw.float().squeeze(-1)
    return torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))


class MLPConfidence(nn.Module):
    """The published network: N - N/2 - N/4 - 1 with ReLU on the flattened map, N = C * H * W. Keys
    ``_log_kappa.{0,2,4}``.
    """

    def __init__(self, channels: int, map_size: int):
        super().__init__()
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
    """(B, C, H, W) -> (B, H - 2, W - 2, 3, 3, C): what a 3x3 convolution without padding reads for each output
    position.
    """

    @staticmethod
    def forward(ctx, x):
        batch, channels, height, width = ctx.shape = x.shape
        x = x.permute(0, 2, 3, 1).contiguous()
        image, row, pixel, _ = x.stride()
        return x.as_strided(
            (batch, height - 2, width - 2, 3, 3, channels), (image, row, pixel, row, pixel, 1)
        ).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        batch, channels, height, width = ctx.shape
        result = torch.zeros(batch, height, width, channels)  # float32, for nine summands
        for i in range(3):
            for j in range(3):
                result[:, i : i + height - 2, j : j + width - 2] += gradient[:, :, :, i, j]
        return result.to(gradient.dtype).permute(0, 3, 1, 2)


class _Convolution(nn.Conv2d):
    """``nn.Conv2d(inputs, outputs, 3, bias=False)``. Where a CPU trains in bf16, as one product of matrices: oneDNN has
    these at twice the rate of its convolutions of so small a map.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, bias=False)

    def forward(self, x):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not (x.is_cpu and self.training and dtype == torch.bfloat16):
            return super().forward(x)
        weight = self.weight.to(dtype).permute(0, 2, 3, 1)
        return F.linear(_Patches.apply(x.to(dtype)).flatten(3), weight.flatten(1)).permute(0, 3, 1, 2)


class ConvConfidence(nn.Module):
    """TFace's network: three unpadded 3x3 convolutions on the map, average pool, C - C/2 - C/4 - 1. Keys ``conv_.N``,
    ``_log_kappa.N``.
    """

    def __init__(self, channels: int, map_size: int):
        super().__init__()
        if map_size < 7:
            raise InputError(
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


CONFIDENCE_NETS = {"mlp": MLPConfidence, "conv": ConvConfidence}


def build_confidence_net(name: str, channels: int, map_size: int, initial_kappa: float | None = None) -> nn.Module:
    """A confidence net; ``initial_kappa`` sets the last bias so that training starts near that concentration."""
    net = CONFIDENCE_NETS[name](channels, map_size)
    if initial_kappa is not None:
        nn.init.constant_(net._log_kappa[-1].bias, math.log(initial_kappa))
    return net


def identify_confidence_net(state_dict: dict[str, torch.Tensor]) -> str:
    """``"mlp"`` or ``"conv"``, by the keys.

    Raises:
        ValueError: the keys are of neither.
    """
    if "_log_kappa.0.weight" not in state_dict:
        raise InputError(f"no confidence net: must have '_log_kappa.0.weight', got keys like {list(state_dict)[:3]}")
    return "conv" if "conv_.0.weight" in state_dict else "mlp"
