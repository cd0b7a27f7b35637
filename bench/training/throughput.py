"""Stage 2 in images a second: the published way and ours, each switch on and off, whole epochs with and without the
feature cache.

    python -m bench.throughput [--networks ir_50 ir_100] [--confidence_net conv] [--batches 128 1024] [--images 20000]
    [--rounds 5]

Steps. The frozen backbone's forward pass, the confidence net's forward and backward pass, and Adam, on random images
that lie on the device:

    published             float32, NCHW, eager, unfolded; the loss through scipy on the host, as the published code composes it
    published, autocast   the same under bf16 autocast
    ours                  BatchNorm folded, channels_last, bf16, compiled (on a GPU as CUDA graphs), fused loss and Adam
    ours without ...      all of that but one switch
    cached                features read from a feature cache in place of the backbone

Epochs. The same from a file of JPEGs on, as a run has it: decoding included, ours under DeepSpeed with two decoding
threads and the confidence net in --precision, the published way with two decoding processes. ``cached`` is any epoch
but the first.

Cache. For each dtype: bytes an image (both orientations), what it loses of the map, and by how much the losses of
training differ from those on the exact map, at most over 40 steps.

Weights are random, with BatchNorm statistics of random images. They lose more in bf16 than trained ones, so the bounds
that a real backbone has to meet are not applied.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines.published_scf_loss import published_scf_loss
from bench.input.decode import make_records
from bench.measuring.accuracy import tabulate
from bench.measuring.environment import DEVICE, RESULTS, device_slug, environment
from bench.measuring.timing import interleaved_seconds, synchronize, write_json
from scf_fast import distributed
from scf_fast.config import ConfidenceConfig
from scf_fast.features.records import CACHE_DTYPES, CacheLayout, decode, encode, encoding_error
from scf_fast.features.store import CacheKey, FeatureCache
from scf_fast.features.stream import FeatureStream
from scf_fast.kernels import scf_loss
from scf_fast.networks import frozen
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.networks.confidence import CONFIDENCE_NETS, build_confidence_net
from scf_fast.networks.frozen import FoldedBackbone, FrozenBackbone
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler

CLASSES, Z_DIM, CACHED_BATCHES = 10_000, 512, 8
CACHE_STEPS, CACHE_LEARNING_RATE = 40, 3e-4  # in which kappa moves
SWITCHES = ("fold", "channels_last", "bf16", "compile", "graph")
ON_GPU = DEVICE == "cuda"


def make_backbone(network):
    torch.manual_seed(0)
    backbone = Backbone(network, Z_DIM, dropout=0.0).requires_grad_(False).to(DEVICE)
    for module in backbone.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all batches, of which there is one
    backbone(torch.randn(32, 3, FACE_SIZE, FACE_SIZE, device=DEVICE))
    return backbone.eval()


def make_head(options, architecture, initial_kappa=None):
    torch.manual_seed(1)
    return build_confidence_net(
        options.confidence_net, architecture.widths[-1], architecture.map_size, initial_kappa
    ).to(DEVICE)


def published_step(options, backbone, centers, autocast):
    """The published training step."""
    net = make_head(options, backbone.architecture)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-5, weight_decay=5e-4, foreach=False)
    scaled = 64.0 * F.normalize(centers)

    def step(images, labels):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                features, convf = backbone(images)
            log_kappa = net(convf)
        published_scf_loss(features.float(), log_kappa, scaled, labels).loss.mean().backward()
        optimizer.step()

    return step


def our_step(options, backbone, centers, features_of, bf16):
    """Our training step on the features that ``features_of(images)`` gives."""
    net = make_head(options, backbone.architecture)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-5, weight_decay=5e-4, fused=True)

    def step(images, labels):
        features, convf = features_of(images)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            log_kappa = net(convf if bf16 else convf.float())
        scf_loss(features, log_kappa, centers, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_backbone(backbone, without=None):
    """The frozen backbone with all switches on but one."""
    fold, channels_last, bf16, compiled, graph = (switch != without for switch in SWITCHES)
    dtype = torch.bfloat16 if bf16 else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = (FoldedBackbone(backbone, dtype) if fold else copy.deepcopy(backbone).to(dtype)).to(
        DEVICE, memory_format=layout
    )
    if compiled:
        net = torch.compile(net, mode="reduce-overhead" if graph and ON_GPU else None, dynamic=False)

    @torch.no_grad()
    def features_of(images):
        return net(images.to(dtype, memory_format=layout))

    return features_of


def cached_features(backbone, batch, folder):
    """A reader of random features in the backbone's shapes, from a cache on disk, batch after batch."""
    layout = cache_layout(backbone, CACHED_BATCHES * batch, "bf16")
    FeatureCache.create_or_check(folder, CacheKey("", "", "", ""), layout)
    cache = FeatureCache.open(folder, layout, 0)
    for start in range(0, layout.num_images, batch):
        rows = np.arange(start, start + batch)
        cache.write(
            rows, [(torch.randn(len(rows), Z_DIM), torch.randn(len(rows), *layout.convf_shape)) for _ in range(2)]
        )
    cache.refresh()
    rng = np.random.default_rng(0)

    def read(images):
        packed = cache.read(rng.permutation(layout.num_images)[:batch], rng.random(batch) < 0.5, pin_memory=ON_GPU)
        return decode(layout, packed.to(DEVICE, non_blocking=True))

    return read


def cache_layout(backbone, images, dtype):
    a = backbone.architecture
    return CacheLayout(images, Z_DIM, (a.widths[-1], a.map_size, a.map_size), dtype)


def measure_steps(options, backbone, batch):
    """Images a second of each way, step by step."""
    centers = torch.randn(CLASSES, Z_DIM, device=DEVICE)
    buffers = [
        (torch.randn(batch, 3, FACE_SIZE, FACE_SIZE, device=DEVICE), torch.randint(CLASSES, (batch,), device=DEVICE))
        for _ in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "published": published_step(options, backbone, centers, autocast=False),
            "published, autocast": published_step(options, backbone, centers, autocast=True),
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


class OurRun:
    """Epochs of our training, from a file of images or from a cache that an epoch has filled before."""

    def __init__(self, options, runtime, source, backbone, cache):
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

        def images(sampler, flip):
            return make_loader(source, sampler, Preprocessing(horizontal_flip=flip), device=DEVICE, num_workers=2)

        self.stream = FeatureStream(
            images, self.sampler, source.labels, network, flip=True, device=torch.device(DEVICE), cache=cache
        )

    def epoch(self, number):
        for batch in self.stream.batches(number):
            loss = scf_loss(
                batch.features, self.engine(batch.convf.to(self.dtype or batch.convf.dtype)), self.centers, batch.labels
            )
            self.engine.backward(loss)
            self.engine.step()

    def close(self):
        self.stream.close()
        self.engine.close()


def published_epoch(options, source, backbone):
    """One epoch of the published way as a function of its number."""
    step = published_step(options, backbone, torch.randn(source.num_classes, Z_DIM, device=DEVICE), autocast=False)
    loader = make_loader(
        source,
        EpochSampler(len(source), options.epoch_batch),
        Preprocessing(),
        device=DEVICE,
        backend="torch",
        num_workers=2,
    )

    def epoch(number):
        for batch in loader.batches(number):
            step(batch.images.contiguous(), batch.labels)

    return epoch, loader.close


def measure_epochs(options, runtime, backbone, source, folder):
    """Images a second of each way, epoch by epoch, and where the time of our uncached ones went."""
    layout = cache_layout(backbone, len(source), "bf16")
    FeatureCache.create_or_check(folder / "epochs", CacheKey("", "", "", ""), layout)
    uncached, cached = (
        OurRun(options, runtime, source, backbone, cache)
        for cache in (None, FeatureCache.open(folder / "epochs", layout, 0))
    )
    published, close = published_epoch(options, source, backbone)
    ways = {"published": published, "ours": uncached.epoch, "ours, cached": cached.epoch}
    cached.epoch(0)  # fills it
    rates = {name: [] for name in ways}
    with contextlib.closing(uncached), contextlib.closing(cached):
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
        close()
    torch.compiler.reset()
    return {name: values[1:] for name, values in rates.items()}, split  # the first epoch compiles


def print_rates(what, rates):
    medians = {way: statistics.median(samples) for way, samples in rates.items()}
    rows = [
        [way, f"{rate:.0f}", f"{rate / medians['published']:.2f}", f"{rate / medians['ours']:.2f}"]
        for way, rate in medians.items()
    ]
    print(tabulate([what, "images/s", "against published", "against ours"], rows), flush=True)


def measure_cache(options, backbone, source):
    """For each dtype: bytes an image, relative loss of the map, largest relative difference of the losses of training
    steps.
    """
    centers, exact, results = torch.randn(source.num_classes, Z_DIM, device=DEVICE), None, {}
    with (
        make_loader(source, EpochSampler(len(source), 32), Preprocessing(), device=DEVICE, num_workers=2) as loader,
        torch.no_grad(),
    ):
        batches = [
            (*backbone(batch.images), batch.labels) for batch in itertools.islice(loader.batches(0), CACHED_BATCHES)
        ]
    for dtype in CACHE_DTYPES:
        layout = cache_layout(backbone, len(source), dtype)
        net = make_head(
            options, backbone.architecture, initial_kappa=100.0
        )  # from where the loss depends on the map at once
        optimizer = torch.optim.Adam(net.parameters(), lr=CACHE_LEARNING_RATE, weight_decay=5e-4)
        losses = []
        for features, convf, labels in itertools.islice(itertools.cycle(batches), CACHE_STEPS):
            stored = decode(layout, encode(layout, features, convf))[1].float()
            loss = scf_loss(features, net(stored), centers, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        losses = torch.stack(losses)
        exact = losses if exact is None else exact
        results[dtype] = {
            "bytes": layout.record_bytes,
            "convf": encoding_error(layout, *batches[0][:2]),
            "loss": ((losses - exact) / exact).abs().max().item(),
            "losses": losses[[0, -1]].tolist(),
        }
    return results


def main():
    small = {"networks": ["ir_small"], "batches": [128], "images": 2048, "epoch_batch": 128}
    large = {"networks": ["ir_50", "ir_100"], "batches": [128, 256, 512, 1024], "images": 40_000, "epoch_batch": 1024}
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=list(BACKBONES), help=f"{small['networks']}, on a GPU {large['networks']}"
    )
    parser.add_argument("--confidence_net", default="conv", choices=list(CONFIDENCE_NETS))
    parser.add_argument(
        "--batches",
        nargs="*",
        type=int,
        help=f"batch sizes of the steps: {small['batches']}, on a GPU {large['batches']}",
    )
    parser.add_argument(
        "--epoch_batch",
        type=int,
        help=f"batch size of the epochs: {small['epoch_batch']}, on a GPU {large['epoch_batch']}",
    )
    parser.add_argument("--images", type=int, help=f"images of an epoch: {small['images']}, on a GPU {large['images']}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each way")
    parser.add_argument("--zero_stage", type=int, default=0, help="of our epochs; one rank has nothing to divide")
    parser.add_argument(
        "--precision", default="bf16", choices=["fp32", "bf16"], help="of the confidence net in our epochs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / device_slug(DEVICE),
        help="folder for the JSON file (default: bench/results/<device>)",
    )
    parser.set_defaults(**(large if ON_GPU else small))
    options = parser.parse_args()
    frozen.MIN_COSINE, frozen.MAX_CONVF_ERROR["bf16"] = 0.9, 1.0

    path, results = options.out / f"throughput-{'-'.join(options.networks)}-{options.confidence_net}.json", {}
    content = {
        "section": "throughput",
        "environment": environment(DEVICE),
        **{key: value for key, value in vars(options).items() if key != "out"},
        "results": results,
    }
    runtime = None
    for network in options.networks:
        backbone = make_backbone(network)
        result = results[network] = {"steps": {}}
        print(
            f"{network}, {options.confidence_net} confidence net, {environment(DEVICE)['device']}, images/s", flush=True
        )
        for batch in options.batches:
            rates = result["steps"][batch] = measure_steps(options, backbone, batch)
            print_rates(f"steps of {batch}", rates)
            write_json(path, content)
        if importlib.util.find_spec("deepspeed") is None:
            print("epochs: left out, DeepSpeed is not installed", flush=True)
            continue
        runtime = runtime or distributed.start()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "data").mkdir()
            make_records(Path(folder) / "data", options.images)
            source = open_source(Path(folder) / "data")
            rates, split = measure_epochs(options, runtime, backbone, source, Path(folder))
            result["epochs"], result["seconds"] = rates, split
            print_rates(f"epochs, batch {options.epoch_batch}", rates)
            cache = result["cache"] = measure_cache(options, backbone, source)
            rows = [
                [name, f"{entry['bytes']}", f"{entry['convf']:.1e}", f"{entry['loss']:.1e}"]
                for name, entry in cache.items()
            ]
            print(tabulate(["cache dtype", "bytes an image", "map", "loss"], rows), flush=True)
            write_json(path, content)
    if runtime is not None:
        distributed.finish()
        distributed.leave(0)


if __name__ == "__main__":
    main()
