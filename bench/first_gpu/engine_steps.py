"""Steps of stage 2 through the engine, the next batch's backbone on a stream of its own as in training: with
DeepSpeed's throughput timer off, as a run has it, and on.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import write_json
from bench.measuring.samples import Samples
from bench.measuring.timing import synchronize
from bench.training.stage2_steps import CLASSES, Z_DIM, make_backbone
from scf_fast import distributed
from scf_fast.config import ConfidenceConfig
from scf_fast.engine.deepspeed_config import resolve_precision
from scf_fast.engine.engine import Engine
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.features.stream import FeatureBatch, one_ahead
from scf_fast.kernels import scf_loss
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net

NETWORK, BATCH, STEPS, WARM_UP = "ir_50", 512, 20, 3
TINY_NETWORK, TINY_BATCH, TINY_STEPS = "ir_tiny", 4, 2
_TIMER = {"timers": {"throughput": {"enabled": True, "synchronized": True}}}


class _Synchronizations:
    """Counts how often DeepSpeed waits for the whole device."""

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        self.count, self._accelerator = 0, get_accelerator()
        self._original = self._accelerator.synchronize

    def __enter__(self) -> "_Synchronizations":
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            return self._original(*arguments, **keywords)

        self._accelerator.synchronize = counted
        return self

    def __exit__(self, *_: object) -> None:
        self._accelerator.synchronize = self._original


def _batches(backbone: Backbone, images: list[torch.Tensor], steps: int) -> Iterator[FeatureBatch]:
    """Yields features of random images, on the current stream."""
    for step in range(steps):
        with torch.no_grad():
            features, convf = backbone(images[step % len(images)])
        size = len(features)
        yield FeatureBatch(features, convf, torch.arange(size, device=DEVICE) % CLASSES, torch.arange(size))


def _seconds(
    engine: Engine, backbone: Backbone, images: list[torch.Tensor], centers: torch.Tensor, steps: int
) -> float:
    """Returns the seconds of so many steps."""
    batches = _batches(backbone, images, steps)
    if DEVICE == "cuda":
        batches = one_ahead(batches, torch.cuda.Stream())
    synchronize(DEVICE)
    began = time.perf_counter()
    for batch in batches:
        engine.backward(scf_loss(batch.features, engine(batch.convf), centers, batch.labels))
        engine.step()
    synchronize(DEVICE)
    return time.perf_counter() - began


def measure(out: Path, tiny: bool) -> int:
    """Measures both ways in turns and writes ``first_gpu_engine.json``."""
    network, size, steps = (TINY_NETWORK, TINY_BATCH, TINY_STEPS) if tiny else (NETWORK, BATCH, STEPS)
    runtime, backbone = distributed.start(), make_backbone(network)
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    backbone = backbone.to(half, memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in torch's stubs
    centers = torch.randn(CLASSES, Z_DIM, device=DEVICE)
    images = [torch.randn(size, 3, 112, 112, device=DEVICE, dtype=half) for _ in range(2)]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "timer.json").write_text(json.dumps(_TIMER))
        engines = {}
        for way, file in ("timer off", None), ("timer on", str(Path(folder) / "timer.json")):
            config = ConfidenceConfig(
                data="-", output_dir="-", saved_bkb="-", saved_fc="-", batch_size=size, deepspeed_config=file
            )
            torch.manual_seed(1)
            architecture = backbone.architecture
            net = build_confidence_net("conv", architecture.widths[-1], architecture.map_size).to(DEVICE)
            optimizer = build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device)
            engines[way] = Engine(net, optimizer, config, runtime, resolve_precision(config, runtime.device))
        samples: dict[str, list[float]] = {way: [] for way in engines}
        counts = dict.fromkeys(engines, 0.0)
        for round_number in range(1 if tiny else 4):
            for way, engine in engines.items():
                with _Synchronizations() as waits:
                    _seconds(engine, backbone, images, centers, WARM_UP)
                    waits.count = 0
                    samples[way].append(_seconds(engine, backbone, images, centers, steps) / steps)
                counts[way] = waits.count / steps
            records[:] = [
                {
                    "work": f"engine step of stage 2, {network}, conv, B = {size}",
                    "way": way,
                    "seconds": Samples.summarize(values).as_dict(),
                    "median_seconds": Samples.summarize(values).median,
                    "synchronizations": counts[way],
                }
                for way, values in samples.items()
            ]
            content = {"section": "first_gpu_engine", "environment": environment(DEVICE), "records": records}
            write_json(out / "first_gpu_engine.json", content | {"rounds": round_number + 1})
        for engine in engines.values():
            engine.close()
    distributed.finish()
    distributed.leave(0)
