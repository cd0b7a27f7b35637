"""Real optimizer steps of the published confidence net at full size, 393.4 million parameters: losses, memory, seconds.

    python -m bench.big_head [--batch 32] [--steps 4] [--only "ZeRO 2"] [--out DIR]

Each way is a launch of its own: one or two processes on one machine, with the engine that a training run uses. The last
feature map is random, of unit variance as a BatchNorm leaves it, and features are class centers with as much noise
added. Every step sees the same batch, so its loss must fall; the learning rate is a third of the published one, which
overshoots on a batch seen again and again. Without a GPU the peak is the most memory that a process ever held resident,
its interpreter and libraries included.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measuring.environment import DEVICE, ROOT, environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import text_table
from bench.measuring.timing import synchronize
from scf_fast.command import Parser, run
from scf_fast.kernels import scf_loss

WAYS: dict[str, dict[str, Any]] = {
    "no ZeRO": {"zero_stage": 0},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 2, bf16": {"zero_stage": 2, "precision": "bf16"},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 2, offload": {"zero_stage": 2, "offload_optimizer": "cpu"},
}
RANKS = {
    "no ZeRO": 1,
    "ZeRO 2, offload": 1,
}  # the default of a single rank, and the case offload is made for; others have two
CLASSES, Z_DIM, CHANNELS, MAP = 1000, 512, 512, 7
LEARNING_RATE = 1e-5


def run_rank(options: argparse.Namespace, way: str) -> None:
    """Takes the steps on one rank and writes the outcome to that rank's file."""
    from scf_fast import distributed
    from scf_fast.config import ConfidenceConfig
    from scf_fast.engine.engine import Engine
    from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
    from scf_fast.networks.confidence import build_confidence_net

    runtime = distributed.start()
    config = ConfidenceConfig(
        **{
            "data": "-",
            "output_dir": "-",
            "saved_bkb": "-",
            "saved_fc": "-",
            "batch_size": options.batch,
            "precision": "fp32",
            "lr": LEARNING_RATE,
            **WAYS[way],
        }
    )
    torch.manual_seed(0)
    net = build_confidence_net("mlp", CHANNELS, MAP).to(runtime.device)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    engine = Engine(
        net,
        build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device),
        config,
        runtime,
        config.precision,
    )
    torch.manual_seed(1 + runtime.rank)
    rows = options.batch // runtime.world_size
    centers, labels = torch.randn(CLASSES, Z_DIM), torch.randint(CLASSES, (rows,))
    features = centers[labels] + torch.randn(rows, Z_DIM)
    features, convf, centers, labels = (
        t.to(runtime.device) for t in (features, torch.randn(rows, CHANNELS, MAP, MAP), centers, labels)
    )

    losses, seconds = [], []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = scf_loss(features, engine(convf), centers, labels, radius=config.radius)
        engine.backward(loss)
        applied = engine.step()
        synchronize(runtime.device)
        seconds.append(time.perf_counter() - began)
        losses.append(distributed.average_over_ranks(loss.detach()).item())
        assert applied
    on_gpu = runtime.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"parameters": parameters, "losses": losses, "seconds": seconds, "peak_gib": peak / 2**30}
    (options.worker / f"{runtime.rank}.json").write_text(json.dumps(result))
    engine.close()
    distributed.finish()
    distributed.leave(0)


def launch(options: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    """Launches one way and returns the results of all its ranks.

    Raises:
        SystemExit: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(RANKS.get(way, 2)),
            "-m",
            "bench.big_head",
            "--worker",
            folder,
            "--only",
            way,
            "--batch",
            str(options.batch),
            "--steps",
            str(options.steps),
        ]
        status = subprocess.run(
            command, cwd=ROOT, env={"PYTHONWARNINGS": "ignore::FutureWarning", **os.environ}
        ).returncode
        if status:
            raise SystemExit(f"{way}: a rank failed, see above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS.get(way, 2))]


def measure(options: argparse.Namespace) -> int:
    """Launches all ways, or the one chosen, prints and writes their results, and returns 1 if a loss did not fall."""
    results = {way: launch(options, way) for way in ([options.only] if options.only else WAYS)}
    rows = [
        [
            way,
            str(1 + len(others)),
            *(f"{main['losses'][step]:.2f}" for step in (0, -1)),
            f"{max(rank['peak_gib'] for rank in (main, *others)):.2f}",
            f"{statistics.median(main['seconds']):.1f}",
        ]
        for way, (main, *others) in results.items()
    ]
    parameters = next(iter(results.values()))[0]["parameters"]
    print(f"{parameters / 1e6:.1f} M parameters, batch {options.batch}, {environment(DEVICE)['device']}")
    print(
        text_table(
            ["way", "ranks", "first loss", f"loss of step {options.steps}", "peak GiB a rank", "seconds a step"], rows
        )
    )
    settings = {"batch": options.batch, "steps": options.steps, "lr": LEARNING_RATE}
    write_json(
        options.out / "big_head.json",
        {"section": "big_head", "environment": environment(DEVICE), **settings, "ways": results},
    )
    if not all(ranks[0]["losses"][-1] < ranks[0]["losses"][0] for ranks in results.values()):
        print("a loss did not fall", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.big_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="images a step over all ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=list(WAYS), help="run only this way")
    add_out_argument(parser)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        run_rank(options, options.only)
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
