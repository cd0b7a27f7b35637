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


def allocated_in_a_pass(network, batch):
    """Most bytes allocated at once in a forward and backward pass of real tensors, as PyTorch's profiler has them."""
    backbone = Backbone(network, 32)
    for parameter in backbone.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        features, _ = backbone(torch.zeros(batch, 3, 112, 112))
        features.sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_activations_are_the_most_that_lives_in_a_pass():
    """What autograd keeps, and the backward pass's own gradients of maps."""
    fp32 = forecast(make_config(batch_size=32), CLASSES, RANKS, "fp32").activations
    allocated = allocated_in_a_pass("ir_small", 16)
    assert 0.94 * allocated < fp32 < allocated  # oneDNN's own buffers are not tensors
    larger = forecast(make_config(batch_size=64), CLASSES, RANKS, "fp32").activations
    half = forecast(make_config(batch_size=64), CLASSES, RANKS, "bf16").activations
    assert larger / 2 <= half < 0.6 * larger
    accumulated = forecast(make_config(gradient_accumulation_steps=2), CLASSES, RANKS, "fp32").activations
    assert accumulated == fp32 > larger / 2


def test_buckets_and_images_are_counted(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = forecast(make_config(zero_stage=1), CLASSES, RANKS, "fp32")
    assert found.buckets == 4 * 50_000_000 and found.libraries == 0  # overlap_comm would double them on a GPU
    size = 4 * sum(parameter.numel() for parameter in Backbone("ir_small", 32).parameters())
    assert forecast(make_config(zero_stage=0), CLASSES, RANKS, "fp32").buckets == size
    assert forecast(make_config(zero_stage=0), CLASSES, 1, "fp32").buckets == 0
    pixels = 32 * 3 * 112 * 112
    assert found.images == pixels * (2 * 4 + 6)
    on_torch = make_config(loader="torch", num_workers=5)
    assert forecast(on_torch, CLASSES, RANKS, "fp32").images == pixels * (2 * 4 + 1 + 5)


def test_on_a_gpu_free_memory_counts(monkeypatch):
    """Other programs have their part of it; a total says nothing. What only a GPU needs is added."""
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: asked.append(device) or (7_000_000_000, 80_000_000_000)
    )
    found = forecast(make_config(num_workers=4, zero_stage=1), CLASSES, RANKS, "bf16")
    assert found.available == 7_000_000_000 and asked == [torch.device("cuda", 1)]
    assert found.libraries == 1_000_000_000 and found.images > 4 * 2 * 16 * 2**20
    offloaded = forecast(make_config(zero_stage=1, offload_optimizer="cpu"), CLASSES, RANKS, "bf16")
    size = 4 * sum(parameter.numel() for parameter in Backbone("ir_small", 32).parameters())
    assert found.backbone - offloaded.backbone == pytest.approx(size, abs=8)  # momentum and ZeRO's weights, halved


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_a_machines_memory_is_divided_among_its_own_ranks(monkeypatch, variable):
    """deepspeed sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; WORLD_SIZE counts the ranks of other machines too."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    alone = forecast(make_config(), CLASSES, 16, "fp32").available
    monkeypatch.setenv(variable, "2")
    assert forecast(make_config(), CLASSES, 16, "fp32").available == pytest.approx(8 * alone, rel=0.2)


def test_what_cannot_fit_is_refused_with_the_way_out():
    found = MemoryForecast(10, 4_000, 4_000, 4_000, 60, 20, 10, 10, 20_000)
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
