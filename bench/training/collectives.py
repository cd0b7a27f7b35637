"""Bytes of the real collectives, counted on CPU ranks that take training steps of both stages.

The launch starts ``python -m bench.scaling --worker FOLDER`` on every rank.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.environment import ROOT
from bench.measuring.results import write_json

if TYPE_CHECKING:
    from scf_fast.distributed import Runtime

NETWORK, CONFIDENCE_NET, Z_DIM, CLASSES, BATCH, STEPS = "ir_tiny", "conv", 32, 1000, 16, 3
OVERLAP_CLASSES, OVERLAP_BATCH, OVERLAP_ROUNDS = 20_000, 256, 7
STAGES, ZERO_STAGES = ("stage 1", "stage 2"), (0, 1, 2, 3)

Payload = dict[str, int]  # bytes by kind of collective

# By the prefix of the operator's name in PyTorch.
_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
}


class CountedCollectives(TorchDispatchMode):
    """Counts the payload bytes of every collective by kind: what is reduced, gathered or scattered in total, or sent to
    everyone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            kind = next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), None)
            if kind is not None:
                sides = [
                    sum(
                        tensor.nbytes
                        for tensor in torch.utils._pytree.tree_leaves(side)
                        if isinstance(tensor, torch.Tensor)
                    )
                    for side in args[:2]
                ]
                self.payload[kind] += max(sides)
        return func(*args, **(kwargs or {}))


def on_the_wire(payload: Mapping[str, int], ranks: int) -> float:
    """Returns the bytes that each rank sends with ring algorithms."""
    share = (ranks - 1) / ranks
    factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "broadcast": 1.0, "reduce": share}
    return sum(factor[kind] * nbytes for kind, nbytes in payload.items())


def counted_steps(engine: Any, take: Callable[[], object], loss_of: Callable[[], torch.Tensor]) -> Payload:
    """Returns the payload of one optimizer step, the mean of STEPS steps after a first one."""
    total: Counter[str] = Counter()
    for step in range(STEPS + 1):
        counted = CountedCollectives() if step else None
        with counted or contextlib.nullcontext():
            engine.backward(loss_of())
            take()
        if counted:
            total.update(counted.payload)
    return {kind: nbytes // STEPS for kind, nbytes in total.items()}


def measure_stage1(zero_stage: int, runtime: "Runtime") -> Payload:
    """Counts a step of stage 1: the backbone under ZeRO and the sharded class centers."""
    from scf_fast.config import BackboneConfig
    from scf_fast.engine.class_centers import ClassCenters
    from scf_fast.engine.engine import Engine
    from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
    from scf_fast.networks.backbones import Backbone

    config = BackboneConfig(
        data="-",
        output_dir="-",
        network=NETWORK,
        z_dim=Z_DIM,
        batch_size=BATCH,
        zero_stage=zero_stage,
    )
    backbone = Backbone(NETWORK, Z_DIM)
    engine = Engine(
        backbone,
        build_optimizer(OptimizerRule.SGD, backbone.parameters(), config, runtime.device),
        config,
        runtime,
        "fp32",
    )
    centers = ClassCenters(CLASSES, Z_DIM, config, runtime)
    images, labels = torch.randn(BATCH // runtime.world_size, 3, 112, 112), torch.arange(BATCH // runtime.world_size)

    def loss_of() -> torch.Tensor:
        return centers.loss(engine(images)[0], labels)[0]

    counts = counted_steps(engine, lambda: centers.step(engine.step()), loss_of)
    engine.close()
    return counts


def measure_stage2(zero_stage: int, runtime: "Runtime") -> Payload:
    """Counts a step of stage 2: the confidence net under ZeRO."""
    from scf_fast.config import ConfidenceConfig
    from scf_fast.engine.engine import Engine
    from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
    from scf_fast.kernels import scf_loss
    from scf_fast.networks.backbones import BACKBONES
    from scf_fast.networks.confidence import build_confidence_net

    config = ConfidenceConfig(
        data="-",
        output_dir="-",
        saved_bkb="-",
        saved_fc="-",
        batch_size=BATCH,
        zero_stage=zero_stage,
    )
    architecture, rows = BACKBONES[NETWORK], BATCH // runtime.world_size
    net = build_confidence_net(CONFIDENCE_NET, architecture.widths[-1], architecture.map_size)
    engine = Engine(
        net, build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device), config, runtime, "fp32"
    )
    convf = torch.randn(rows, architecture.widths[-1], architecture.map_size, architecture.map_size)
    features, centers, labels = torch.randn(rows, Z_DIM), torch.randn(CLASSES, Z_DIM), torch.arange(rows)
    counts = counted_steps(engine, lambda: engine.step(), lambda: scf_loss(features, engine(convf), centers, labels))
    engine.close()
    return counts


def measure_overlap(runtime: "Runtime") -> dict[str, float]:
    """Times the classifier's forward and backward pass with its communication beside the computation ("beside") and
    with every collective waited for at once ("in turn"); returns median seconds.
    """
    from scf_fast.config import BackboneConfig
    from scf_fast.engine import class_centers

    config = BackboneConfig(data="-", output_dir="-", z_dim=512, batch_size=OVERLAP_BATCH)
    centers = class_centers.ClassCenters(OVERLAP_CLASSES, 512, config, runtime)
    rows = OVERLAP_BATCH // runtime.world_size
    features, labels = torch.randn(rows, 512, requires_grad=True), torch.arange(rows)
    start: Callable[..., Callable[[], Any]] = class_centers._started

    def start_and_wait(*arguments: Any) -> Callable[[], Any]:
        result = start(*arguments)()
        return lambda: result

    ways = {"beside": start, "in turn": start_and_wait}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(OVERLAP_ROUNDS + 1):
        for name, way in ways.items():
            class_centers._started = way  # type: ignore[assignment]  # the same operator, waited for or not
            torch.distributed.barrier()
            began = time.perf_counter()
            centers.loss(features, labels)[0].backward()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    class_centers._started = start  # type: ignore[assignment]
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_rank(folder: Path) -> None:
    """Takes the steps on one rank; rank 0 writes the counts."""
    from scf_fast import distributed

    runtime = distributed.start()
    found = {
        "stage 1": {zero: measure_stage1(zero, runtime) for zero in ZERO_STAGES},
        "stage 2": {zero: measure_stage2(zero, runtime) for zero in ZERO_STAGES},
        "overlap": measure_overlap(runtime),
    }
    if runtime.is_main:
        write_json(folder / "counted.json", found)
    distributed.finish()
    distributed.leave(0)


def measure(ranks: int) -> dict[str, Any]:
    """Launches ``run_rank`` on ``ranks`` CPU processes and returns what rank 0 wrote.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "-m",
            "bench.scaling",
            "--worker",
            folder,
        ]
        environ = {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
        }
        if subprocess.run(command, cwd=ROOT, env=environ).returncode:
            raise RuntimeError(f"a launch of {ranks} ranks failed, see above")
        return json.loads((Path(folder) / "counted.json").read_text())
