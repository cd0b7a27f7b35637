"""Speed of stage 1's training steps on one device, by batch size: ours, and the way arcface_torch takes them.

    python -m bench.suite --sections stage1
    python -m pytest bench/bench_stage1.py --benchmark-json=bench/results/<device>/stage1-<date>.json

A step is the backbone's forward and backward pass, the margin softmax over all identities, and SGD on both. Decoding is
left out: the images are random and already on the device. The ways:

    dense                 NCHW images, dense logits and their cross-entropy through autograd, torch.optim.SGD on all
                          parameters
    scf_fast              channels_last images, sharded class centers on their one rank with the update in the backward
                          pass, fused SGD
    scf_fast, engine      the same with the backbone in the DeepSpeed engine, as a run on one device has it; left out
                          where DeepSpeed is not installed
    scf_fast, compiled    without the engine, the backbone through torch.compile, which training does not do yet

On a GPU all of them run the backbone under bf16 autocast, on the CPU in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from bench.baselines.dense_margin_softmax import dense_margin_softmax_loss
from bench.measuring import process_group, roofline
from bench.measuring.case import Case, NotMeasured, benchmark_case
from bench.measuring.environment import DEVICE, is_installed
from bench.measuring.roofline import Machine
from bench.measuring.timing import Buffers
from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.engine import Engine
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.face_template import FACE_SIZE

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of images and labels; returns the loss
WAYS = ("dense", "scf_fast", "scf_fast, engine", "scf_fast, compiled")
DIM = 512


def config_of(network: str, batch: int) -> BackboneConfig:
    return BackboneConfig(
        data="-",
        output_dir="-",
        network=network,
        z_dim=DIM,
        batch_size=batch,
        margin_gradient="straight_through",
    )


def features_of(backbone: Callable, images: torch.Tensor, half: bool) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        return backbone(images)[0].float()


def dense_step(backbone: Backbone, classes: int, config: BackboneConfig, half: bool) -> Step:
    """Returns a function that takes one step in the usual way."""
    class_centers = torch.nn.Parameter(torch.randn(classes, DIM, device=next(backbone.parameters()).device).mul_(0.01))
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), class_centers],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )

    margins = config.margins
    assert margins is not None  # the configuration resolves them

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = dense_margin_softmax_loss(
            features_of(backbone, images, half),
            class_centers,
            labels,
            config.scale,
            margins,
            torch.bfloat16 if half else torch.float32,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    return step


def our_step(backbone: Backbone, classes: int, config: BackboneConfig, half: bool, compiled: bool) -> Step:
    """Returns a function that takes one of our steps."""
    device = next(backbone.parameters()).device
    centers = ClassCenters(classes, DIM, config, Runtime(0, 1, device), "bf16" if half else "fp32")
    optimizer = build_optimizer(OptimizerRule.SGD, backbone.parameters(), config, device)
    network = torch.compile(backbone) if compiled else backbone

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss, _ = centers.loss(features_of(network, images.contiguous(memory_format=torch.channels_last), half), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.max_grad_norm)
        optimizer.step()
        centers.step()
        return loss.detach()

    return step


class EngineStep:
    """Our step as a run takes it, through the DeepSpeed engine.

    Raises:
        NotMeasured: DeepSpeed is not installed.
    """

    def __init__(self, backbone: Backbone, classes: int, config: BackboneConfig, half: bool):
        if not is_installed("deepspeed"):
            raise NotMeasured("deepspeed is not installed")
        runtime, precision = process_group.join(), "bf16" if half else "fp32"
        self.centers = ClassCenters(classes, DIM, config, runtime, precision)
        optimizer = build_optimizer(OptimizerRule.SGD, backbone.parameters(), config, runtime.device)
        self.engine = Engine(backbone, optimizer, config, runtime, precision)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features, _ = self.engine(images.contiguous(memory_format=torch.channels_last))
        self.centers.lr = self.engine.learning_rate
        loss, _ = self.centers.loss(features.float(), labels)
        self.engine.backward(loss)
        self.centers.step(self.engine.step())
        return loss.detach()

    def close(self) -> None:
        self.engine.close()


def prepare(way: str, network: str, batch: int, classes: int, device: torch.device | str) -> tuple[Step, Buffers]:
    config, half = config_of(network, batch), torch.device(device).type == "cuda"
    backbone = Backbone(network, DIM).to(device)
    step: Step
    if way == "dense":
        step = dense_step(backbone, classes, config, half)
    elif way == "scf_fast, engine":
        step = EngineStep(backbone, classes, config, half)
    else:
        step = our_step(backbone, classes, config, half, way == "scf_fast, compiled")
    buffers = [
        (torch.randn(batch, 3, FACE_SIZE, FACE_SIZE, device=device), torch.randint(classes, (batch,), device=device))
        for _ in range(4)
    ]
    assert step(*buffers[0]).isfinite(), "the loss is not finite"
    return step, buffers


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every way, network and batch size."""
    if tiny:
        settings = [("ir_tiny", 4, 100)]
    elif device == "cuda":
        settings = [(network, batch, 85_742) for network in ("ir_50", "ir_100") for batch in (128, 256, 512)] + [
            ("ir_100", 256, 1_000_000)
        ]
    else:
        settings = [("ir_small", batch, 10_000) for batch in (32, 64, 128)]
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        Case(
            f"stage 1 step, {network}, B = {batch}, C = {classes}",
            way,
            partial(prepare, way, network, batch, classes, device),
            roofline.stage1_step(network, batch, classes, dtype, DIM),
            (batch, "images"),
            {"network": network, "batch": batch, "classes": classes, "dim": DIM, "dtype": dtype},
        )
        # After all others: on a CPU the engine changes how the process allocates memory.
        for engine in (False, True)
        for network, batch, classes in settings
        for way in WAYS
        if engine == (way == "scf_fast, engine") and (device == "cuda" or way != "scf_fast, compiled")
    ]


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_stage1(benchmark: "BenchmarkFixture", case: Case, device: str, machine: Machine) -> None:
    benchmark_case(benchmark, case, device, machine)
