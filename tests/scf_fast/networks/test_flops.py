"""FLOP of a training step. The networks' own counts are compared with the paper's in tests/bench/test_roofline.py."""

import pytest

from scf_fast.config import BackboneConfig, ConfidenceConfig
from scf_fast.networks.flops import network_counts, peak_flops
from scf_fast.stages.base import NetworkShape, flop_per_image

STAGE2 = {"data": "d", "output_dir": "o", "saved_bkb": "b", "saved_fc": "f"}


def test_a_step_counts_what_it_cannot_do_without():
    backbone, _, head, _ = network_counts("ir_50", "mlp")
    network = NetworkShape("ir_50", 512)
    assert flop_per_image(ConfidenceConfig(**STAGE2), network, 10) == backbone + 3 * head
    assert flop_per_image(ConfidenceConfig(**STAGE2, feature_cache="c"), network, 10) == 3 * head
    assert flop_per_image(ConfidenceConfig(**STAGE2, finetune_bkb=True), network, 10) == 3 * backbone + 3 * head
    diagonal = network_counts("ir_50", "pfe", 512, 512).confidence_flop
    assert diagonal == 2 * 512 * (25088 + 512)
    options = {**STAGE2, "feature_cache": "c", "confidence_net": "pfe", "variance": "diagonal"}
    for objective in (("pfe", "pfe_vmf"), ("scf", "scf_gaussian")):
        config = ConfidenceConfig(**options, objective=objective)
        assert flop_per_image(config, network, 10) == 3 * (diagonal + 2 * 512 * (25088 + 1))
    stage1 = BackboneConfig(data="d", output_dir="o", network="ir_50", sample_rate=0.5)
    assert flop_per_image(stage1, network, 1000) == 3 * backbone + 4 * 512 * 1000


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA T4", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_flops(name) == peak
