"""IR-ResNet backbones of the published SCF code, TFace and insightface, in one class with one set of parameter names.

    images (B, 3, 112, 112) -> features (B, z_dim), convf (B, C, 7, 7)

``features`` is the embedding before normalization (mu = features / |features|), ``convf`` the last feature map, which
the confidence net reads. An IR unit is BN - conv3x3 [- BN] - PReLU - conv3x3(stride) - BN [- SE] beside a shortcut. The
names are those of the published code; :mod:`scf_fast.weights.family_names` maps those of the other families to them.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from scf_fast.pipelines.face_template import FACE_SIZE


@dataclass(frozen=True)
class Family:
    """The traits that all networks of one code base share: how their units are built and how they are trained."""

    inner_batchnorm: bool  # between the two convolutions of a unit
    strided_projection: bool  # a shortcut with a stride is conv1x1 - BN even if the width stays
    affine_features: bool  # the last BatchNorm has a bias, and a weight that stays 1
    dropout: float
    normalization: str  # of the pixels, a name that scf_fast.pipelines.loading.base.Preprocessing knows


FAMILIES = {
    "published": Family(
        inner_batchnorm=False, strided_projection=False, affine_features=False, dropout=0.4, normalization="published"
    ),
    "tface": Family(
        inner_batchnorm=True, strided_projection=False, affine_features=False, dropout=0.4, normalization="insightface"
    ),
    "insightface": Family(
        inner_batchnorm=True, strided_projection=True, affine_features=True, dropout=0.0, normalization="insightface"
    ),
}


@dataclass(frozen=True)
class Architecture:
    """An IR-ResNet: its family, channels of the stem and the four stages, units and stride of each stage."""

    units: tuple[int, ...]
    family: str = "published"
    widths: tuple[int, ...] = (64, 64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2, 2)
    squeeze_excitation: bool = False

    @property
    def normalization(self) -> str:
        """Pixel convention that the family's networks were trained with."""
        return FAMILIES[self.family].normalization

    @property
    def map_size(self) -> int:
        """Side of the last feature map."""
        size = FACE_SIZE
        for stride in self.strides:
            size = -(-size // stride)
        return size

    @property
    def convf_dim(self) -> int:
        """Length of the flattened last feature map."""
        return self.widths[-1] * self.map_size**2


_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (6, 26, 60, 6),
}
# Small enough to be trained on a CPU: the stem halves the image, so that nothing runs at 112 x 112, and the last stage
# stays at 7 x 7.
_SMALL = Architecture((1, 2, 2, 1), widths=(16, 16, 32, 64, 128), strides=(2, 2, 2, 2, 1))
_MEDIUM = replace(_SMALL, widths=(32, 32, 64, 128, 256))
_TINY = replace(_SMALL, units=(1, 1, 1, 1), widths=(16, 16, 16, 16, 16))  # its MLP confidence net: 0.4 M parameters
BACKBONES: dict[str, Architecture] = {
    **{f"ir_{depth}": Architecture(_UNITS[depth]) for depth in (50, 100, 152)},
    **{f"ir_se_{depth}": Architecture(_UNITS[depth], squeeze_excitation=True) for depth in (50, 100, 152)},
    "ir_tiny": _TINY,
    "ir_small": _SMALL,
    "ir_se_small": replace(_SMALL, squeeze_excitation=True),
    "ir_medium": _MEDIUM,
    **{f"iresnet{depth}": Architecture(_UNITS[depth], "insightface") for depth in (18, 34, 50, 100, 200)},
    "iresnet_small": replace(_SMALL, family="insightface"),
    # TFace calls the network of 100 layers IR_101.
    **{f"tface_ir_{depth + (depth == 100)}": Architecture(_UNITS[depth], "tface") for depth in (18, 34, 50, 100)},
    **{
        f"tface_ir_se_{depth + (depth == 100)}": Architecture(_UNITS[depth], "tface", squeeze_excitation=True)
        for depth in (50, 100)
    },
    "tface_ir_small": replace(_SMALL, family="tface"),
}
ALIASES = {f"r{depth}": f"iresnet{depth}" for depth in (18, 34, 50, 100, 200)}  # names in insightface's recipes


class SqueezeExcitation(nn.Module):
    """Channel gates from the globally pooled map (Hu et al., 2018); names as in the published code."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class Subsampling(nn.Module):
    """Every ``stride``-th row and column, the shortcut without weights; for a stride of 1 the map itself.

    The published code has ``MaxPool2d(1, stride)`` here, which gives the same bits and keeps an int64 index of every
    value for the backward pass: 26.5 of 72.8 MB an image in ir_100.
    """

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]


class IRUnit(nn.Module):
    """BN - conv3x3 [- BN] - PReLU - conv3x3(stride) - BN [- SE], added to the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, family: Family, squeeze_excitation: bool):
        super().__init__()
        self.stride = stride
        self.shortcut_layer: nn.Module
        if in_channels != channels or (family.strided_projection and stride != 1):
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        else:
            self.shortcut_layer = Subsampling(stride)
        layers: list[nn.Module] = [
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False),
        ]
        layers += [nn.BatchNorm2d(channels)] if family.inner_batchnorm else []
        layers += [
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        layers += [SqueezeExcitation(channels)] if squeeze_excitation else []
        self.res_layer = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """An IR-ResNet for 112 x 112 faces.

    Args:
        name: a key of :data:`BACKBONES`.
        z_dim: embedding width.
        dropout: rate before the embedding layer; by default the family's.
    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str = "ir_100", z_dim: int = 512, dropout: float | None = None):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"network must be one of {', '.join(BACKBONES)}, got {name!r}")
        architecture = BACKBONES[name]
        family = FAMILIES[architecture.family]
        self.name, self.z_dim, self.architecture = name, z_dim, architecture
        stem, *widths = architecture.widths
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, stem, 3, architecture.strides[0], 1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
        )
        units: list[nn.Module] = []
        in_channels = stem
        for channels, count, stride in zip(widths, architecture.units, architecture.strides[1:]):
            for index in range(count):
                units.append(
                    IRUnit(in_channels, channels, stride if index == 0 else 1, family, architecture.squeeze_excitation)
                )
                in_channels = channels
        self.body = nn.Sequential(*units)
        last = nn.BatchNorm1d(z_dim, affine=family.affine_features)
        if family.affine_features:
            last.weight.requires_grad_(False)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Dropout(family.dropout if dropout is None else dropout),
            nn.Flatten(),
            nn.Linear(architecture.convf_dim, z_dim),
            last,
        )
        self._initialize()

    def _initialize(self) -> None:
        """Draws weights as the family does: under BatchNorm their size decides how far a learning rate turns a
        convolution.
        """
        if self.output_layer[3].weight.is_meta:
            return  # it would take a second for a deep network, and draw nothing
        for module in self.modules():
            if self.architecture.family == "insightface":
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalized RGB -> features (B, z_dim), convf (B, C, 7, 7)."""
        convf = self.body(self.input_layer(images))
        return self.output_layer(convf), convf
