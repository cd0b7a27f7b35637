"""FLOP counts of the networks and peak rates of devices, from which a run's share of the device's peak follows."""

import functools
import re
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.pipelines.face_template import FACE_SIZE

# Dense bf16 and fp16 products, FLOP/s, from the vendors' data sheets; of the SXM form if there are several.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "V100": 125e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "A6000": 155e12,
}


class NetworkCounts(NamedTuple):
    """FLOP of a forward pass for one image, and numbers of parameters; 0 for a confidence net that is not there."""

    backbone_flop: int
    backbone_parameters: int
    confidence_flop: int
    confidence_parameters: int


@functools.cache
def network_counts(network: str, confidence_net: str | None, z_dim: int = 512, outputs: int = 1) -> NetworkCounts:
    """Counts FLOP and parameters of a backbone and of the confidence net on it, which predicts ``outputs`` values for
    an image, without using memory for them.

    FLOP are those of matrix products and convolutions, a multiplication and an addition counted as two.
    """
    with torch.device("meta"):
        backbone = Backbone(network, z_dim).eval()
        with FlopCounterMode(display=False) as whole:
            _, convf = backbone(torch.empty(1, 3, FACE_SIZE, FACE_SIZE))
        parameters = _count_parameters(backbone)
        if confidence_net is None:
            return NetworkCounts(whole.get_total_flops(), parameters, 0, 0)
        architecture = backbone.architecture
        net = build_confidence_net(
            confidence_net, architecture.widths[-1], architecture.map_size, outputs=outputs
        ).eval()
        with FlopCounterMode(display=False) as head:
            net(convf)
        return NetworkCounts(whole.get_total_flops(), parameters, head.get_total_flops(), _count_parameters(net))


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def peak_flops(device_name: str) -> float | None:
    """Returns the FLOP/s of a device in bf16 or fp16; None if it is not known."""
    known = [name for name in PEAKS if re.search(rf"\b{name}\b", device_name.replace("-", " "), re.IGNORECASE)]
    return PEAKS[max(known, key=len)] if known else None
