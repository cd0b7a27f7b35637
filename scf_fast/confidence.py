"""Confidence networks: last feature map of the backbone -> log kappa.

    convf (B, C, H, W) -> log_kappa (B,)

Both end in the published code's floor, log_kappa = log(1e-6 + exp(raw)), so kappa never falls below 1e-6.
"""
import math

import torch
from torch import nn

LOG_KAPPA_FLOOR = math.log(1e-6)  # the published epsilon; it moves kappa by 1e-6, so it matters only for kappa << 1


def _floor(raw: torch.Tensor) -> torch.Tensor:
    """log(1e-6 + exp(raw)) in float32, without the overflow that exp alone has beyond 88."""
    raw = raw.float().squeeze(-1)
    return torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))


class MLPConfidence(nn.Module):
    """The published network: N - N/2 - N/4 - 1 with ReLU on the flattened map, N = C * H * W. Keys ``_log_kappa.{0,2,4}``."""

    def __init__(self, channels: int, map_size: int):
        super().__init__()
        width = channels * map_size**2
        self._log_kappa = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(inplace=True), nn.Linear(width // 2, width // 4),
                                        nn.ReLU(inplace=True), nn.Linear(width // 4, 1))

    def forward(self, convf: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) or (B, C*H*W) -> (B,) float32 log kappa."""
        return _floor(self._log_kappa(convf.flatten(1)))


class ConvConfidence(nn.Module):
    """TFace's network: three unpadded 3x3 convolutions on the map, average pool, C - C/2 - C/4 - 1. Keys ``conv_.N``, ``_log_kappa.N``."""

    def __init__(self, channels: int, map_size: int):
        super().__init__()
        if map_size < 7:
            raise ValueError(f"the convolutional confidence net needs a feature map of at least 7 x 7, got {map_size} x {map_size}; use the mlp")
        self.conv_ = nn.Sequential(
            nn.Conv2d(channels, channels, 3, bias=False), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1))
        self._log_kappa = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(inplace=True), nn.Linear(channels // 2, channels // 4),
                                        nn.ReLU(inplace=True), nn.Linear(channels // 4, 1))

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
        raise ValueError(f"no confidence net: must have '_log_kappa.0.weight', got keys like {list(state_dict)[:3]}")
    return "conv" if "conv_.0.weight" in state_dict else "mlp"
