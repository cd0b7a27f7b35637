"""Stage 1's classifier with millions of identities on the machine at hand: training steps, their time and the memory they took.

    python -m bench.center_memory [--classes 2000000] [--batch 32] [--steps 2] [--sample_rate 1.0] [--json FILE]

One rank holds all class centers and their momentum, with the update inside the backward pass. On the CPU the peak is the process's own
resident memory, as the system counts it; exit status 1 if, beyond class centers and momentum, the steps took as much as one (B, C)
float32 tensor.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

from bench._environment import DEVICE, environment
from scf_fast.class_centers import ClassCenters
from scf_fast.config import Config
from scf_fast.launch import Runtime


def resident_mib():
    """(now, most so far) of this process on the CPU; of PyTorch's allocator on a GPU."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.center_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sample_rate", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args()
    config = Config(stage="backbone", data="-", output_dir="-", z_dim=options.dim, batch_size=options.batch, sample_rate=options.sample_rate)
    centers = ClassCenters(options.classes, options.dim, config, Runtime(0, 1, torch.device(DEVICE)), "bf16" if DEVICE == "cuda" else "fp32")
    stored = (centers.weight.nbytes + centers.momentum.nbytes) / 2**20
    before, _ = resident_mib()

    losses, seconds = [], []
    for step in range(options.steps):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(options.batch, options.dim, generator=generator).to(DEVICE).requires_grad_()
        labels = torch.randint(options.classes, (options.batch,), generator=generator).to(DEVICE)
        began = time.perf_counter()
        loss, _ = centers.loss(features, labels)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)

    _, peak = resident_mib()
    logits = 4 * options.batch * options.classes / 2**20
    result = {**environment(DEVICE), "classes": options.classes, "batch": options.batch, "dim": options.dim, "sample_rate": options.sample_rate,
              "losses": losses, "seconds": seconds, "centers_and_momentum_mib": stored, "peak_mib": peak, "beyond_them_mib": peak - before,
              "logits_mib": logits}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(peak - before >= logits)


if __name__ == "__main__":
    main()
