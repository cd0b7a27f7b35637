"""Training steps of stage 2 on random images: the published way, ours with and without each switch, and cached."""

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines.published_scf_loss import published_scf_loss
from bench.measuring.environment import DEVICE
from bench.measuring.timing import interleaved_seconds
from scf_fast.features.records import CacheLayout, decode
from scf_fast.features.store import CacheKey, FeatureCache
from scf_fast.kernels import scf_loss
from scf_fast.networks.backbones import Architecture, Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.networks.frozen import FoldedBackbone

CLASSES, Z_DIM, CACHED_BATCHES = 10_000, 512, 8
SWITCHES = ("fold", "channels_last", "bf16", "compile", "graph")
ON_GPU = DEVICE == "cuda"
CACHE_KEY = CacheKey("random", "random", "insightface", "bf16")  # nobody reads these caches again

Step = Callable[[torch.Tensor, torch.Tensor], None]  # of images and labels
Features = tuple[torch.Tensor, torch.Tensor]  # embeddings and the last feature map
Rates = dict[str, list[float]]  # images a second of each way, one for each round


@dataclass(frozen=True)
class PublishedSetting:
    """How the published step is run.

    Attributes:
        autocast: under bf16 autocast.
        tf32: with TF32 in matrix products and convolutions; else in neither, whatever the process allows. PyTorch
            allows it in convolutions alone, our runs nowhere.
        through_backbone: with the backward pass through the backbone too. The published code is written so: nothing in
            it stops the gradient, though no optimizer takes what is computed there.
    """

    autocast: bool = False
    tf32: bool = False
    through_backbone: bool = False


PUBLISHED = {
    "published": PublishedSetting(),
    "published, TF32": PublishedSetting(tf32=True),
    "published, autocast": PublishedSetting(autocast=True),
    "published, backward through the backbone": PublishedSetting(through_backbone=True),
}
PUBLISHED_EPOCHS = ("published", "published, TF32") if ON_GPU else ("published",)  # a CPU has no TF32


def make_backbone(network: str) -> Backbone:
    """Returns a frozen backbone with random weights and the BatchNorm statistics of random images."""
    torch.manual_seed(0)
    backbone = Backbone(network, Z_DIM, dropout=0.0).requires_grad_(False).to(DEVICE)
    for module in backbone.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean over all batches, here a single one
    backbone(torch.randn(32, 3, 112, 112, device=DEVICE))
    return backbone.eval()


def make_head(
    options: argparse.Namespace, architecture: Architecture, initial_kappa: float | None = None
) -> torch.nn.Module:
    """Returns a confidence net with the same random weights in every call."""
    torch.manual_seed(1)
    return build_confidence_net(
        options.confidence_net, architecture.widths[-1], architecture.map_size, initial_kappa
    ).to(DEVICE)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allows TF32 in matrix products and convolutions inside the block, or in neither."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def _gradients_of(backbone: torch.nn.Module) -> Iterator[None]:
    """Lets a frozen backbone's weights have gradients inside the block."""
    backbone.requires_grad_(True)
    try:
        yield
    finally:
        backbone.requires_grad_(False)
        backbone.zero_grad(set_to_none=True)


def published_step(
    options: argparse.Namespace,
    backbone: Backbone,
    centers: torch.Tensor,
    setting: PublishedSetting = PUBLISHED["published"],
) -> Step:
    """Returns a function that takes the published training step."""
    net = make_head(options, backbone.architecture)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-5, weight_decay=5e-4, foreach=False)
    scaled = 64.0 * F.normalize(centers)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        with _tf32(setting.tf32), _gradients_of(backbone) if setting.through_backbone else contextlib.nullcontext():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=setting.autocast):
                with torch.set_grad_enabled(setting.through_backbone):
                    features, convf = backbone(images)
                log_kappa = net(convf)
            published_scf_loss(features.float(), log_kappa, scaled, labels).loss.mean().backward()
        optimizer.step()

    return step


def our_step(
    options: argparse.Namespace,
    backbone: Backbone,
    centers: torch.Tensor,
    features_of: Callable[[torch.Tensor], Features],
    bf16: bool,
) -> Step:
    """Returns a function that takes our training step on what ``features_of(images)`` returns."""
    net = make_head(options, backbone.architecture)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-5, weight_decay=5e-4, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        features, convf = features_of(images)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            log_kappa = net(convf if bf16 else convf.float())
        scf_loss(features, log_kappa, centers, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_backbone(backbone: Backbone, without: str | None = None) -> Callable[[torch.Tensor], Features]:
    """Returns the frozen backbone with all switches on except ``without``."""
    fold, channels_last, bf16, compiled, graph = (switch != without for switch in SWITCHES)
    dtype = torch.bfloat16 if bf16 else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    folded = FoldedBackbone(backbone, dtype) if fold else copy.deepcopy(backbone).to(dtype)
    net: Callable = folded.to(DEVICE, memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
    if compiled:
        net = torch.compile(net, mode="reduce-overhead" if graph and ON_GPU else None, dynamic=False)

    @torch.no_grad()
    def features_of(images: torch.Tensor) -> Features:
        return net(images.to(dtype, memory_format=layout))

    return features_of


def cached_features(backbone: Backbone, batch: int, folder: Path) -> Callable[[torch.Tensor], Features]:
    """Fills a cache on disk with random features of the backbone's shapes and returns a function that reads a batch."""
    layout = cache_layout(backbone, CACHED_BATCHES * batch, "bf16")
    FeatureCache.create_or_check(folder, CACHE_KEY, layout)
    cache = FeatureCache.open(folder, layout, 0)
    for start in range(0, layout.num_images, batch):
        rows = np.arange(start, start + batch)
        cache.write(
            rows, [(torch.randn(len(rows), Z_DIM), torch.randn(len(rows), *layout.convf_shape)) for _ in range(2)]
        )
    cache.refresh()
    rng = np.random.default_rng(0)

    def read(images: torch.Tensor) -> Features:
        packed = cache.read(rng.permutation(layout.num_images)[:batch], rng.random(batch) < 0.5, pin_memory=ON_GPU)
        return decode(layout, packed.to(DEVICE, non_blocking=True))

    return read


def cache_layout(backbone: Backbone, images: int, dtype: str) -> CacheLayout:
    a = backbone.architecture
    return CacheLayout(images, Z_DIM, (a.widths[-1], a.map_size, a.map_size), dtype)


def measure_steps(options: argparse.Namespace, backbone: Backbone, batch: int) -> Rates:
    """Measures images a second of each way, step by step."""
    centers = torch.randn(CLASSES, Z_DIM, device=DEVICE)
    buffers = [
        (torch.randn(batch, 3, 112, 112, device=DEVICE), torch.randint(CLASSES, (batch,), device=DEVICE))
        for _ in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            **{
                way: published_step(options, backbone, centers, PUBLISHED[way])
                for way in (*PUBLISHED_EPOCHS, "published, autocast")
            },
            "ours": our_step(options, backbone, centers, our_backbone(backbone), bf16=True),
            **{
                f"ours without {switch}": our_step(
                    options, backbone, centers, our_backbone(backbone, switch), bf16=switch != "bf16"
                )
                for switch in SWITCHES
                if ON_GPU or switch != "graph"
            },
            "cached": our_step(
                options, backbone, centers, cached_features(backbone, batch, Path(folder) / "cache"), bf16=True
            ),
        }
        seconds = interleaved_seconds(ways, buffers, DEVICE, options.rounds)
    torch.compiler.reset()
    return {name: [batch / value for value in values] for name, values in seconds.items()}
