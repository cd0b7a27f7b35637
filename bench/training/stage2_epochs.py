"""Epochs of stage 2 from a file of JPEGs, as a run has them: the published way, ours, and ours from a feature cache."""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.measuring.environment import DEVICE
from bench.measuring.timing import synchronize
from bench.training.stage2_steps import (
    CACHE_KEY,
    PUBLISHED,
    PUBLISHED_EPOCHS,
    Z_DIM,
    PublishedSetting,
    Rates,
    cache_layout,
    make_head,
    published_step,
)
from scf_fast.config import ConfidenceConfig
from scf_fast.features.store import FeatureCache
from scf_fast.features.stream import FeatureStream
from scf_fast.kernels import scf_loss
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Loader, Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler
from scf_fast.pipelines.sources.base import ImageSource

if TYPE_CHECKING:
    from scf_fast.distributed import Runtime


class OurRun:
    """Our training, epoch by epoch, from a file of images or from a cache that an earlier epoch has filled."""

    def __init__(
        self,
        options: argparse.Namespace,
        runtime: "Runtime",
        source: ImageSource,
        backbone: Backbone,
        cache: FeatureCache | None,
    ) -> None:
        from scf_fast.engine.deepspeed_config import resolve_precision
        from scf_fast.engine.engine import Engine
        from scf_fast.engine.optimizers import OptimizerRule, build_optimizer

        config = ConfidenceConfig(
            data="-",
            output_dir="-",
            saved_bkb="-",
            saved_fc="-",
            batch_size=options.epoch_batch,
            zero_stage=options.zero_stage,
            precision=options.precision,
        )
        precision = resolve_precision(config, runtime.device)
        self.dtype = torch.float32 if precision == "fp32" else None
        net = make_head(options, backbone.architecture)
        self.engine = Engine(
            net,
            build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device),
            config,
            runtime,
            precision,
        )
        self.centers = torch.randn(source.num_classes, Z_DIM, device=DEVICE)
        network = FrozenBackbone(backbone, DEVICE, ("bf16",), compile=True)
        self.sampler = EpochSampler(len(source), options.epoch_batch)

        def images(sampler: Sampler, flip: bool) -> Loader:
            return make_loader(source, sampler, Preprocessing(horizontal_flip=flip), device=DEVICE, num_workers=2)

        self.stream = FeatureStream(
            images, self.sampler, source.labels, network, flip=True, device=torch.device(DEVICE), cache=cache
        )

    def epoch(self, number: int) -> None:
        for batch in self.stream.batches(number):
            loss = scf_loss(
                batch.features, self.engine(batch.convf.to(self.dtype or batch.convf.dtype)), self.centers, batch.labels
            )
            self.engine.backward(loss)
            self.engine.step()

    def close(self) -> None:
        self.stream.close()
        self.engine.close()


def published_epoch(
    options: argparse.Namespace, source: ImageSource, backbone: Backbone, setting: PublishedSetting
) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Returns a function that runs one epoch of the published way, given its number, and one that closes its loader."""
    step = published_step(options, backbone, torch.randn(source.num_classes, Z_DIM, device=DEVICE), setting)
    loader = make_loader(
        source,
        EpochSampler(len(source), options.epoch_batch),
        Preprocessing(),
        device=DEVICE,
        backend="torch",
        num_workers=2,
    )

    def epoch(number: int) -> None:
        for batch in loader.batches(number):
            step(batch.images.contiguous(), batch.labels)

    return epoch, loader.close


def measure_epochs(
    options: argparse.Namespace, runtime: "Runtime", backbone: Backbone, source: ImageSource, folder: Path
) -> tuple[Rates, dict[str, float]]:
    """Measures images a second of each way, epoch by epoch, and the seconds that parts of our uncached epochs took."""
    layout = cache_layout(backbone, len(source), "bf16")
    FeatureCache.create_or_check(folder / "epochs", CACHE_KEY, layout)
    uncached, cached = (
        OurRun(options, runtime, source, backbone, cache)
        for cache in (None, FeatureCache.open(folder / "epochs", layout, 0))
    )
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(uncached))
        opened.enter_context(contextlib.closing(cached))
        cached.epoch(0)  # fills it
        ways = {}
        for way in PUBLISHED_EPOCHS:
            ways[way], close = published_epoch(options, source, backbone, PUBLISHED[way])
            opened.callback(close)
        ways |= {"ours": uncached.epoch, "ours, cached": cached.epoch}
        rates: Rates = {name: [] for name in ways}
        for number in range(options.epochs + 1):
            for name, epoch in ways.items():
                synchronize(DEVICE)
                began = time.perf_counter()
                epoch(number)
                synchronize(DEVICE)
                rates[name].append(
                    uncached.sampler.batches_per_epoch * options.epoch_batch / (time.perf_counter() - began)
                )
        split = uncached.stream.seconds
    torch.compiler.reset()
    return {name: values[1:] for name, values in rates.items()}, split  # the first epoch compiles
