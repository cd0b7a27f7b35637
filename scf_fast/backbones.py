"""IR-ResNet backbones with the architecture and parameter names of the published SCF code.

    images (B, 3, 112, 112) -> features (B, z_dim), convf (B, C, 7, 7)

``features`` is the embedding before normalisation (mu = features / |features|), ``convf`` the last feature map that the confidence net
reads. An IR unit is BN - conv3x3 - PReLU - conv3x3(stride) - BN [- SE] beside a shortcut, with no BN between its convolutions.
"""
from dataclasses import dataclass

import torch
from torch import nn

IMAGE_SIZE = 112


@dataclass(frozen=True)
class Architecture:
    """What sets one IR-ResNet apart from another: channels of the stem and the four stages, units and stride of each stage."""
    units: tuple[int, int, int, int]
    widths: tuple[int, ...] = (64, 64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2, 2)
    squeeze_excitation: bool = False

    @property
    def map_size(self) -> int:
        """Side of the last feature map."""
        size = IMAGE_SIZE
        for stride in self.strides:
            size = -(-size // stride)
        return size

    @property
    def convf_dim(self) -> int:
        """Length of the flattened last feature map."""
        return self.widths[-1] * self.map_size**2


_UNITS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
# A CPU trains this one: the stem halves the image, so that nothing runs at 112 x 112, and the last stage stays at 7 x 7.
_SMALL = {"widths": (16, 16, 32, 64, 128), "strides": (2, 2, 2, 2, 1)}
_MEDIUM = {"widths": (32, 32, 64, 128, 256), "strides": (2, 2, 2, 2, 1)}
BACKBONES: dict[str, Architecture] = {
    **{f"ir_{depth}": Architecture(units) for depth, units in _UNITS.items()},
    **{f"ir_se_{depth}": Architecture(units, squeeze_excitation=True) for depth, units in _UNITS.items()},
    "ir_small": Architecture((1, 2, 2, 1), **_SMALL),
    "ir_se_small": Architecture((1, 2, 2, 1), **_SMALL, squeeze_excitation=True),
    "ir_medium": Architecture((1, 2, 2, 1), **_MEDIUM),
}


class SqueezeExcitation(nn.Module):
    """Channel gates from the globally pooled map (Hu et al., 2018); names as in the published code."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class IRUnit(nn.Module):
    """BN - conv3x3 - PReLU - conv3x3(stride) - BN [- SE], added to the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, squeeze_excitation: bool):
        super().__init__()
        if in_channels == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        layers = [nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.PReLU(channels),
                  nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)]
        self.res_layer = nn.Sequential(*layers, *([SqueezeExcitation(channels)] if squeeze_excitation else []))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """An IR-ResNet for 112 x 112 faces.

    Args:
        name: a key of :data:`BACKBONES`.
        z_dim: embedding width.
        dropout: rate before the embedding layer.
    """

    def __init__(self, name: str = "ir_100", z_dim: int = 512, dropout: float = 0.4):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"network must be one of {', '.join(BACKBONES)}, got {name!r}")
        architecture = BACKBONES[name]
        self.name, self.z_dim, self.architecture = name, z_dim, architecture
        stem, *widths = architecture.widths
        self.input_layer = nn.Sequential(nn.Conv2d(3, stem, 3, architecture.strides[0], 1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem))
        units, in_channels = [], stem
        for channels, count, stride in zip(widths, architecture.units, architecture.strides[1:]):
            for index in range(count):
                units.append(IRUnit(in_channels, channels, stride if index == 0 else 1, architecture.squeeze_excitation))
                in_channels = channels
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(in_channels), nn.Dropout(dropout), nn.Flatten(),
                                          nn.Linear(architecture.convf_dim, z_dim), nn.BatchNorm1d(z_dim, affine=False))
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalised RGB -> features (B, z_dim), convf (B, C, 7, 7)."""
        convf = self.body(self.input_layer(images))
        return self.output_layer(convf), convf


def identify_backbone(state_dict: dict[str, torch.Tensor]) -> tuple[str, int]:
    """Name and embedding width of the architecture that a state_dict belongs to, by its keys and shapes.

    Raises:
        ValueError: no known architecture has these keys; the message names the nearest and what differs.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    last = shapes.get("output_layer.3.weight")
    if last is None:
        raise ValueError(f"no backbone: must have 'output_layer.3.weight', got keys like {list(shapes)[:3]}; give the file that stage 1 wrote")
    best = None
    for name in BACKBONES:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in Backbone(name, last[0]).state_dict().items()}
        missing, unexpected = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
        misshaped = [key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key]]
        distance = len(missing) + len(unexpected) + len(misshaped)
        if distance == 0:
            return name, last[0]
        if best is None or distance < best[0]:
            best = (distance, name, sorted(missing), sorted(unexpected), sorted(misshaped))
    _, name, missing, unexpected, misshaped = best
    parts = [f"{len(keys)} {what} (e.g. {keys[0]})" for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)) if keys]
    raise ValueError(f"backbone of no known architecture; nearest is {name}: {', '.join(parts)}")
