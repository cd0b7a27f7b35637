"""An epoch of all four objectives of stage 2 from a feature cache: in two passes over it, and in four.

    python -m bench.objective_epochs [--network ir_small] [--images 4096] [--rounds 3]

"together" trains SCF with SCF-G, and PFE-G with PFE-v, as ``python -m scf_fast.table`` does on one device: each batch
is read and decoded once for both nets. "separately" trains the four one after the other. The features are random, the
cache is complete and in the page cache, batches are of 256 images (64 groups of 4), the nets run under the engine. The
ways take turns; the seconds of reading are the stream's own.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.samples import Samples
from bench.measuring.tables import text_table
from bench.measuring.timing import synchronize
from bench.training.stage2_steps import CACHE_KEY, Z_DIM, cache_layout, make_backbone
from scf_fast import distributed
from scf_fast.command import Parser, run
from scf_fast.config import ConfidenceConfig
from scf_fast.features.store import FeatureCache
from scf_fast.features.stream import FeatureStream
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.networks.confidence import CONFIDENCE_NETS
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.objectives import Objective
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.weights.files import save_torch_file

TOGETHER = ("scf,scf_gaussian", "pfe,pfe_vmf")
SEPARATELY = tuple(objective.value for objective in Objective)
GROUPS, IMAGES_OF_GROUP = 64, 4
IMAGES_OF_IDENTITY = 16


class _Labels:
    """What a stage asks of a data set whose images nobody reads."""

    def __init__(self, images: int):
        self.labels = np.arange(images, dtype=np.int64) // IMAGES_OF_IDENTITY
        self.num_classes = int(self.labels[-1]) + 1


class _Training:
    """A stage with its engine and its stream, epoch by epoch."""

    def __init__(
        self,
        objectives: str,
        options: argparse.Namespace,
        folder: Path,
        backbone: Backbone,
        runtime: distributed.Runtime,
    ):
        from scf_fast.engine.deepspeed_config import resolve_precision
        from scf_fast.engine.engine import Engine
        from scf_fast.stages.confidence import ConfidenceStage

        data, batch = _Labels(options.images), options.groups * IMAGES_OF_GROUP
        is_pairwise = objectives in (TOGETHER[1], "pfe", "pfe_vmf")
        sizes: dict[str, Any] = (
            {"pair_batch": (options.groups, IMAGES_OF_GROUP)} if is_pairwise else {"batch_size": batch}
        )
        config = ConfidenceConfig(
            data="-",
            output_dir="-",
            saved_bkb=str(folder / "backbone.pth"),
            saved_fc=str(folder / "fc.pth"),
            confidence_net=options.confidence_net,
            objective=tuple(objectives.split(",")),
            feature_cache=str(folder / "cache"),
            initial_kappa="100",
            zero_stage=0,
            **sizes,
        )
        self._stage = ConfidenceStage(config, data)  # type: ignore[arg-type]  # no image of it is read
        precision = resolve_precision(config, runtime.device)
        net = self._stage.build(runtime, precision)
        optimizer = self._stage.build_optimizer(net.parameters(), runtime.device)
        self._engine = Engine(net, optimizer, config, runtime, precision)
        self._engine.train()
        sampler: PairSampler | EpochSampler
        if is_pairwise:
            sampler = PairSampler(data.labels, options.groups, IMAGES_OF_GROUP)
        else:
            sampler = EpochSampler(options.images, batch)
        layout = cache_layout(backbone, options.images, "bf16")
        self._stream = FeatureStream(
            _no_images,
            sampler,
            data.labels,
            FrozenBackbone(backbone, DEVICE, ("fp32",)),
            flip=True,
            device=runtime.device,
            cache=FeatureCache.open(folder / "cache", layout, 0),
        )
        self._loader = self._stage.pair_up(self._stream, sampler)

    def epoch(self, number: int) -> float:
        """Trains one epoch and returns the seconds that the host waited for the cache."""
        before = self._stream.seconds["data"]
        for batch in self._loader.batches(number):
            for part in self._stage.divide(batch, 1):
                self._engine.backward(self._stage.loss(self._engine, part).loss)
            self._engine.step()
        return self._stream.seconds["data"] - before

    def close(self) -> None:
        self._stream.close()
        self._engine.close()


def _no_images(*_: object) -> Any:
    raise AssertionError("the cache is complete")


def fill_files(folder: Path, backbone: Backbone, images: int) -> None:
    """Writes random weights and a complete cache of random features."""
    torch.manual_seed(0)
    save_torch_file(backbone.state_dict(), folder / "backbone.pth")
    classes = _Labels(images).num_classes
    save_torch_file({"arc_face_state_dict": {"weight": torch.randn(classes, Z_DIM)}}, folder / "fc.pth")
    layout = cache_layout(backbone, images, "bf16")
    FeatureCache.create_or_check(folder / "cache", CACHE_KEY, layout)
    cache = FeatureCache.open(folder / "cache", layout, 0)
    for start in range(0, images, 256):
        rows = np.arange(start, min(start + 256, images))
        views = [(torch.randn(len(rows), Z_DIM), torch.randn(len(rows), *layout.convf_shape)) for _ in range(2)]
        cache.write(rows, views)
    cache.close()


def measure(options: argparse.Namespace) -> None:
    """Measures both ways in turns; the JSON file is rewritten after each round."""
    runtime, backbone = distributed.start(), make_backbone(options.network)
    images = 4 * options.images  # shown in an epoch of each way, by all objectives
    work = f"epoch of four objectives, {options.network}, {options.confidence_net}, {options.images} images"
    seconds: dict[str, list[float]] = {"together": [], "separately": []}
    waits: dict[str, list[float]] = {"together": [], "separately": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill_files(folder, backbone, options.images)
        ways = {
            way: [_Training(objectives, options, folder, backbone, runtime) for objectives in lists]
            for way, lists in (("together", TOGETHER), ("separately", SEPARATELY))
        }
        for number in range(options.rounds + 1):
            for way, trainings in ways.items():
                synchronize(DEVICE)
                began = time.perf_counter()
                wait = sum(training.epoch(number) for training in trainings)
                synchronize(DEVICE)
                if number:  # the first round reads the records' checksums
                    seconds[way].append(time.perf_counter() - began)
                    waits[way].append(wait)
            if number:
                records = [
                    {
                        "work": work,
                        "way": f"ours, {way}",
                        "seconds": Samples.summarize(values).as_dict(),
                        "median_seconds": statistics.median(values),
                        "reading_seconds": statistics.median(waits[way]),
                        "per_second": images / statistics.median(values),
                        "unit": "images",
                    }
                    for way, values in seconds.items()
                ]
                content = {"section": "objective_epochs", "environment": environment(DEVICE), "records": records}
                write_json(options.out / "objective_epochs.json", content)
        for trainings in ways.values():
            for training in trainings:
                training.close()
    rows = [
        [
            record["way"],
            f"{record['median_seconds']:.2f}",
            f"{record['reading_seconds']:.2f}",
            f"{record['per_second']:.0f}",
        ]
        for record in records
    ]
    print(text_table([work, "s", "waiting for the cache, s", "images/s"], rows), flush=True)
    distributed.finish()
    distributed.leave(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.objective_epochs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", default="ir_small", choices=list(BACKBONES), help="(default: %(default)s)")
    parser.add_argument(
        "--confidence_net", default="conv", choices=list(CONFIDENCE_NETS), help="(default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=4096, help="of an epoch (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of a batch of pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each way (default: %(default)s)")
    add_out_argument(parser)
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
