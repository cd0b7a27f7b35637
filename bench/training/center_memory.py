"""Time and memory of stage 1's classifier with millions of identities, in training steps on the machine at hand.

    python -m bench.center_memory [--classes 2000000] [--batch 32] [--steps 2] [--centers_state fp32]
    [--sample_rate 1.0] [--out DIR]

One rank holds all class centers and their momentum, with the update inside the backward pass. On the CPU the peak is
the process's own resident memory, as the system counts it, less what it had before there were class centers. The exit
status is 1 if the peak is more than 10 % above class centers, momentum and, where one is stored, the gradient, or if
the steps took as much as one (B, C) float32 tensor beyond them.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import add_out_argument, write_json
from scf_fast.command import Parser, run
from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters

MOST = 1.10  # times class centers, momentum and gradient
# Noise of a process's resident memory, the libraries' own buffers included; small classifiers are not judged by it.
NOISE_MIB = 64


def resident_mib() -> tuple[float, float]:
    """Returns (now, highest so far) of this process on the CPU, of PyTorch's allocator on a GPU."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def take_steps(centers: ClassCenters, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """Takes steps on random features and returns their losses and seconds."""
    losses, seconds = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(batch, centers.width, generator=generator).to(DEVICE).requires_grad_()
        labels = torch.randint(centers.num_classes, (batch,), generator=generator).to(DEVICE)
        began = time.perf_counter()
        loss, _ = centers.loss(features, labels)
        loss.backward()
        centers.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def measure(options: argparse.Namespace) -> int:
    """Takes the steps, prints and writes what they took, and returns the exit status."""
    config = BackboneConfig(
        data="-",
        output_dir="-",
        z_dim=options.dim,
        batch_size=options.batch,
        sample_rate=options.sample_rate,
        centers_state=options.centers_state,
    )
    precision = "bf16" if DEVICE == "cuda" else "fp32"
    runtime = Runtime(0, 1, torch.device(DEVICE))
    # A small classifier first, so that the libraries load what they need.
    take_steps(ClassCenters(100, options.dim, config, runtime, precision), options.batch, 1)
    empty, _ = resident_mib()
    centers = ClassCenters(options.classes, options.dim, config, runtime, precision)
    stored = (centers.weight.nbytes + centers.momentum.nbytes + (0 if centers.fused else centers.weight.nbytes)) / 2**20
    before, _ = resident_mib()
    losses, seconds = take_steps(centers, options.batch, options.steps)
    peak = resident_mib()[1] - empty
    logits, beyond = 4 * options.batch * options.classes / 2**20, peak + empty - before
    holds = {"within_10_percent": peak <= MOST * stored + NOISE_MIB, "no_logits": beyond < max(logits, NOISE_MIB)}
    result = {
        "section": "center_memory",
        "environment": environment(DEVICE),
        "classes": options.classes,
        "batch": options.batch,
        "dim": options.dim,
        "sample_rate": options.sample_rate,
        "centers_state": options.centers_state,
        "losses": losses,
        "seconds": seconds,
        "stored_mib": stored,
        "peak_mib": peak,
        "peak_over_stored": peak / stored,
        "beyond_them_mib": beyond,
        "logits_mib": logits,
        "holds": holds,
    }
    print(json.dumps(result, indent=2))
    state = "" if options.centers_state == "fp32" else f"-{options.centers_state}"
    write_json(options.out / f"center_memory-{options.classes}{state}.json", result)
    return 0 if all(holds.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.center_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sample_rate", type=float, default=1.0)
    parser.add_argument("--centers_state", default="fp32", choices=("fp32", "bf16"))
    add_out_argument(parser)
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
