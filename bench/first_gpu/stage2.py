"""Steps of stage 2 with the full-size backbone, the published way under each of its settings and ours, in turns."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import write_json
from bench.measuring.samples import Samples
from bench.measuring.timing import interleaved_seconds
from bench.training.stage2_steps import (
    CLASSES,
    PUBLISHED,
    Z_DIM,
    Step,
    cached_features,
    make_backbone,
    our_backbone,
    our_step,
    published_step,
)
from scf_fast.networks.backbones import Backbone

NETWORK, BATCH, ROUNDS = "ir_100", 1024, 5
TINY_NETWORK, TINY_BATCH, TINY_ROUNDS = "ir_tiny", 4, 1


def fits(step: Step, buffer: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Returns whether one step fits into the device's memory."""
    try:
        step(*buffer)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def buffers_of(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns batches of random images and labels."""
    return [
        (torch.randn(size, 3, 112, 112, device=DEVICE), torch.randint(CLASSES, (size,), device=DEVICE))
        for _ in range(3)
    ]


def measure(out: Path, tiny: bool) -> int:
    """Measures each way and writes ``first_gpu_stage2.json`` after each step of the work."""
    network, batch, rounds = (TINY_NETWORK, TINY_BATCH, TINY_ROUNDS) if tiny else (NETWORK, BATCH, ROUNDS)
    without = "compile" if tiny else None  # the compiler takes longer than everything else
    options = argparse.Namespace(confidence_net="conv")
    records: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "section": "first_gpu_stage2",
        "environment": environment(DEVICE),
        "records": records,
        "left_out": {},
        "complete": False,
    }
    backbone = make_backbone(network)
    centers = torch.randn(CLASSES, Z_DIM, device=DEVICE)

    def record(seconds: dict[str, list[float]], size: int) -> None:
        work = f"stage 2 step, {network}, conv, B = {size}"
        for way, samples in seconds.items():
            summary = Samples.summarize(samples)
            records.append(
                {
                    "work": work,
                    "way": way,
                    "seconds": summary.as_dict(),
                    "median_seconds": summary.median,
                    "per_second": size / summary.median,
                    "unit": "images",
                    **(asdict(PUBLISHED[way]) if way in PUBLISHED else {}),
                }
            )
        write_json(out / "first_gpu_stage2.json", content)

    with tempfile.TemporaryDirectory() as folder:
        cached = cached_features(backbone, batch, Path(folder) / "cache")

        def make(way: str) -> Step:
            if way in PUBLISHED:
                return published_step(options, backbone, centers, PUBLISHED[way])
            features_of = cached if way == "cached" else our_backbone(backbone, without)
            return our_step(options, backbone, centers, features_of, bf16=True)

        buffers = buffers_of(batch)
        steps = {}
        # What compiles comes last: it may be all that time allows.
        for way in ("published", "cached", "published, TF32", "published, autocast", "ours"):
            step = make(way)
            if fits(step, buffers[0]):
                steps[way] = step
                record(interleaved_seconds({way: step}, buffers, DEVICE, 1), batch)
            else:
                content["left_out"][way] = f"B = {batch} does not fit into the device's memory"
        first = len(records)
        seconds = interleaved_seconds(steps, buffers, DEVICE, rounds)
        del records[:first]
        record(seconds, batch)
    del buffers
    _measure_through_backbone(options, backbone, centers, batch, record)
    content["complete"] = True
    write_json(out / "first_gpu_stage2.json", content)
    return 0


def _measure_through_backbone(
    options: argparse.Namespace,
    backbone: Backbone,
    centers: torch.Tensor,
    batch: int,
    record: Callable[[dict[str, list[float]], int], None],
) -> None:
    """Measures the published step with its backward pass through the backbone, at the largest batch that fits."""
    way = "published, backward through the backbone"
    while batch >= 1:
        buffers = buffers_of(batch)
        step = published_step(options, backbone, centers, PUBLISHED[way])
        if fits(step, buffers[0]):
            record(interleaved_seconds({way: step}, buffers, DEVICE, 2), batch)
            return
        del buffers, step
        batch //= 2
