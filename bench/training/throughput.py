"""Images a second of stage 2: the published way and ours, each switch off in turn, whole epochs, feature cache.

    python -m bench.throughput [--networks ir_50 ir_100] [--confidence_net conv] [--batches 128 1024] [--images 20000]
    [--rounds 5]

Steps. The frozen backbone's forward pass, the confidence net's forward and backward pass, and Adam, on random images
that are already on the device:

    published             float32, NCHW, eager, unfolded; the loss through SciPy on the host, as in the published code
    published, TF32       the same with TF32 in products and convolutions, on a GPU
    published, autocast   the same under bf16 autocast
    ours                  BatchNorm folded, channels_last, bf16, compiled (on a GPU as CUDA graphs), fused loss and Adam
    ours without ...      all of that except one switch
    cached                features read from a feature cache instead of computed by the backbone

Epochs. The same from a file of JPEGs, as a run has it: with decoding, ours under DeepSpeed with two decoding threads
and the confidence net in ``--precision``, the published way with two decoding processes. ``cached`` is any epoch but
the first.

TF32 is off in steps and epochs, in the published way and in ours, except where a way says that it is on. The file
has the settings of each published way.

Cache. For each dtype: bytes an image (both orientations), the relative error of the map, and the largest relative
difference over 40 steps between the losses of training on it and on the exact map.

Weights are random, with BatchNorm statistics of random images. They lose more in bf16 than trained ones, so the bounds
that a real backbone has to meet are not applied.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.input.decode import make_records
from bench.measuring.environment import DEVICE, environment, is_installed
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import text_table
from bench.training.stage2_epochs import measure_epochs
from bench.training.stage2_steps import (
    CACHED_BATCHES,
    ON_GPU,
    PUBLISHED,
    Z_DIM,
    Rates,
    cache_layout,
    make_backbone,
    make_head,
    measure_steps,
)
from scf_fast import distributed
from scf_fast.command import Parser, run
from scf_fast.features.records import CACHE_DTYPES, decode, encode, encoding_error
from scf_fast.kernels import scf_loss
from scf_fast.networks import frozen
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.networks.confidence import CONFIDENCE_NETS
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import ImageSource

if TYPE_CHECKING:
    from scf_fast.distributed import Runtime

CACHE_STEPS, CACHE_LEARNING_RATE = 40, 3e-4  # enough to move kappa
SMALL: dict[str, Any] = {"networks": ["ir_small"], "batches": [128], "images": 2048, "epoch_batch": 128}
LARGE: dict[str, Any] = {
    "networks": ["ir_50", "ir_100"],
    "batches": [128, 256, 512, 1024],
    "images": 40_000,
    "epoch_batch": 1024,
}


def print_rates(title: str, rates: Rates) -> None:
    """Prints the median rate of each way, and its ratios to the published way and to ours."""
    medians = {way: statistics.median(samples) for way, samples in rates.items()}
    rows = [
        [way, f"{rate:.0f}", f"{rate / medians['published']:.2f}", f"{rate / medians['ours']:.2f}"]
        for way, rate in medians.items()
    ]
    print(text_table([title, "images/s", "against published", "against ours"], rows), flush=True)


def measure_cache(options: argparse.Namespace, backbone: Backbone, source: ImageSource) -> dict[str, dict[str, Any]]:
    """Measures for each cache dtype the bytes an image takes, the relative error of the map, and the largest relative
    difference in the losses of training steps.
    """
    centers = torch.randn(source.num_classes, Z_DIM, device=DEVICE)
    exact: torch.Tensor | None = None
    results: dict[str, dict[str, Any]] = {}
    with (
        make_loader(source, EpochSampler(len(source), 32), Preprocessing(), device=DEVICE, num_workers=2) as loader,
        torch.no_grad(),
    ):
        batches = [
            (*backbone(batch.images), batch.labels) for batch in itertools.islice(loader.batches(0), CACHED_BATCHES)
        ]
    for dtype in CACHE_DTYPES:
        layout = cache_layout(backbone, len(source), dtype)
        # From this kappa on the loss depends on the map at once.
        net = make_head(options, backbone.architecture, initial_kappa=100.0)
        optimizer = torch.optim.Adam(net.parameters(), lr=CACHE_LEARNING_RATE, weight_decay=5e-4)
        steps = []
        for features, convf, labels in itertools.islice(itertools.cycle(batches), CACHE_STEPS):
            stored = decode(layout, encode(layout, features, convf))[1].float()
            loss = scf_loss(features, net(stored), centers, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses = torch.stack(steps)
        exact = losses if exact is None else exact
        results[dtype] = {
            "bytes": layout.record_bytes,
            "convf": encoding_error(layout, *batches[0][:2]),
            "loss": ((losses - exact) / exact).abs().max().item(),
            "losses": losses[[0, -1]].tolist(),
        }
    return results


def measure_from_images(
    options: argparse.Namespace, runtime: "Runtime", backbone: Backbone, result: dict[str, Any]
) -> None:
    """Measures epochs and cache on a file of JPEGs and adds both to the network's result."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        make_records(Path(folder) / "data", options.images)
        source = open_source(Path(folder) / "data")
        result["epochs"], result["seconds"] = measure_epochs(options, runtime, backbone, source, Path(folder))
        print_rates(f"epochs, batch {options.epoch_batch}", result["epochs"])
        result["cache"] = measure_cache(options, backbone, source)
    rows = [
        [name, f"{entry['bytes']}", f"{entry['convf']:.1e}", f"{entry['loss']:.1e}"]
        for name, entry in result["cache"].items()
    ]
    print(text_table(["cache dtype", "bytes an image", "map", "loss"], rows), flush=True)


def measure(options: argparse.Namespace) -> None:
    """Measures every network; the JSON file is rewritten after each part."""
    frozen.MIN_COSINE, frozen.MAX_CONVF_ERROR["bf16"] = 0.9, 1.0
    path = options.out / f"throughput-{'-'.join(options.networks)}-{options.confidence_net}.json"
    results: dict[str, dict[str, Any]] = {}
    content = {
        "section": "throughput",
        "environment": environment(DEVICE),
        **{key: value for key, value in vars(options).items() if key != "out"},
        "published": {way: asdict(setting) for way, setting in PUBLISHED.items()},
        "results": results,
    }
    torch.backends.cudnn.allow_tf32 = False  # from the first step on, as distributed.start() has it from the epochs on
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
        if not is_installed("deepspeed"):
            print("epochs: left out, DeepSpeed is not installed", flush=True)
            continue
        runtime = runtime or distributed.start()
        measure_from_images(options, runtime, backbone, result)
        write_json(path, content)
    if runtime is not None:
        distributed.finish()
        distributed.leave(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def defaults(name: str) -> str:
        return f"(default: {SMALL[name]}, on a GPU {LARGE[name]})"

    parser.add_argument("--networks", nargs="+", choices=list(BACKBONES), help=defaults("networks"))
    parser.add_argument("--confidence_net", default="conv", choices=list(CONFIDENCE_NETS))
    parser.add_argument("--batches", nargs="*", type=int, help=f"batch sizes of the steps {defaults('batches')}")
    parser.add_argument("--epoch_batch", type=int, help=f"batch size of the epochs {defaults('epoch_batch')}")
    parser.add_argument("--images", type=int, help=f"images of an epoch {defaults('images')}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each way (default: %(default)s)")
    parser.add_argument(
        "--zero_stage",
        type=int,
        default=0,
        help="of our epochs; a single rank has nothing to divide (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="bf16",
        choices=["fp32", "bf16"],
        help="of the confidence net in our epochs (default: %(default)s)",
    )
    add_out_argument(parser)
    parser.set_defaults(**(LARGE if ON_GPU else SMALL))
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
