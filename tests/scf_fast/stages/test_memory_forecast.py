import dataclasses

import pytest
import torch

from scf_fast.config import BackboneConfig
from scf_fast.networks.backbones import Backbone
from scf_fast.stages.memory_forecast import MemoryForecast, forecast

CLASSES, RANKS = 1003, 2


def make_config(**options):
    return BackboneConfig(
        **{
            "data": "-",
            "output_dir": "-",
            "network": "ir_small",
            "z_dim": 32,
            "batch_size": 64,
            **options,
        }
    )


def test_class_centers_and_backbone_are_counted_by_what_each_rank_holds():
    size = 4 * sum(parameter.numel() for parameter in Backbone("ir_small", 32).parameters())
    centers = 4 * 32 * 502  # of the rank with one more
    for zero_stage, copies in (
        (0, 3),
        (1, 2 + 2 / RANKS),
        (2, 1 + 3 / RANKS),
        (3, 4 / RANKS),
    ):  # weights, gradients, momentum, and ZeRO's own weights
        found = forecast(make_config(zero_stage=zero_stage), CLASSES, RANKS, "fp32")
        assert found.backbone == pytest.approx(copies * size, abs=8)
        assert (found.class_centers, found.center_momentum, found.center_gradient) == (centers, centers, 0)
    assert forecast(make_config(centers_state="bf16"), CLASSES, RANKS, "fp32").center_momentum == centers // 2
    assert forecast(make_config(gradient_accumulation_steps=2), CLASSES, RANKS, "fp32").center_gradient == centers


def test_activations_are_what_autograd_keeps():
    """Against real tensors: the storages alive because of the graph."""
    kept = {}
    backbone = Backbone("ir_small", 32)

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    counts = []
    for batch in (4, 8):
        kept.clear()
        alive = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            backbone(torch.zeros(batch, 3, 112, 112))
        counts.append(sum(kept.values()))
    an_image = (counts[1] - counts[0]) / 4
    fp32 = forecast(make_config(), CLASSES, RANKS, "fp32").activations
    assert fp32 == pytest.approx(32 * an_image, rel=0.01)
    half = forecast(make_config(), CLASSES, RANKS, "bf16").activations
    assert fp32 / 2 <= half < fp32
    assert forecast(make_config(gradient_accumulation_steps=4), CLASSES, RANKS, "fp32").activations == fp32 // 4


def test_what_cannot_fit_is_refused_with_the_way_out():
    found = MemoryForecast(10, 4_000, 4_000, 4_000, 100, 20_000)
    found.check()
    with pytest.raises(
        ValueError,
        match=r"does not fit into memory .*more ranks.*--centers_state bf16.*--fused_center_update.*smaller "
        r"--batch_size",
    ):
        dataclasses.replace(found, available=12_000).check()
    with pytest.raises(ValueError) as error:
        dataclasses.replace(found, center_momentum=2_000, center_gradient=0, available=6_000).check()
    assert "--fused_center_update" not in str(error.value) and "--centers_state" not in str(error.value)
    assert str(forecast(make_config(), 10_000_000, 1, "fp32")).startswith(
        "memory a rank, in GB: backbone 0.01, class centers 1.28, their momentum 1.28, act"
    )
