"""The computation that a training step cannot do without, and what devices can do: how far a run is from its floor."""

import functools
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.pipelines.face_template import FACE_SIZE

# Dense bf16 and fp16 products, FLOP/s, from the makers' data sheets; the SXM form where there are several.
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


@functools.cache
def network_counts(network: str, confidence_net: str | None, z_dim: int = 512) -> tuple[int, int, int, int]:
    """(FLOP of the backbone's forward pass for an image, its parameters, FLOP of the confidence net's, its parameters);
    no memory is used.

    FLOP of matrix products and convolutions, a multiplication and an addition counted as two.
    """
    with torch.device("meta"):
        backbone = Backbone(network, z_dim).eval()
        with FlopCounterMode(display=False) as whole:
            _, convf = backbone(torch.empty(1, 3, FACE_SIZE, FACE_SIZE))
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        if confidence_net is None:
            return whole.get_total_flops(), parameters, 0, 0
        net = build_confidence_net(
            confidence_net, backbone.architecture.widths[-1], backbone.architecture.map_size
        ).eval()
        with FlopCounterMode(display=False) as head:
            net(convf)
        return (
            whole.get_total_flops(),
            parameters,
            head.get_total_flops(),
            sum(parameter.numel() for parameter in net.parameters()),
        )


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device in bf16 or fp16; None where it is not known."""
    known = [name for name in PEAKS if re.search(rf"\b{name}\b", device_name.replace("-", " "), re.IGNORECASE)]
    return PEAKS[max(known, key=len)] if known else None
