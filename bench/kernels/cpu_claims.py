"""What the CPU path is held to, in one run: ours against the published way, in turns, medians.

    python -m bench.cpu_claims [--threads 1] [--out DIR]

Held to: the normalizer log C_d of 4096 values with its derivative at least 10 x as fast as the published way through
scipy; log I_v, and the whole SCF loss, forward and backward, at every batch size, faster than the published. Exit
status 1 where one of these is missed.

With one thread the clock is the processor time of this process: on a machine that is busy with other work, elapsed time
punishes long calls more than short ones, since they are the ones interrupted. With more threads it is elapsed time, so
keep the machine to yourself.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from bench.kernels import log_bessel, scf_loss
from bench.measuring.accuracy import tabulate
from bench.measuring.environment import RESULTS, environment
from bench.measuring.timing import interleaved_seconds

NORMALIZER_SIZE = 4096
SPEEDUPS = {"log_vmf_normalizer": 10.0, "log_bessel_i": 1.0}
ROUNDS = {256: 200, 1024: 100, 4096: 30, 16384: 10, 65536: 5}


def normalizer_seconds(quantity, clock):
    """{name: seconds} for value and gradient of NORMALIZER_SIZE values."""
    torch.compiler.reset()
    ways = log_bessel.FAMILY[quantity]
    buffers = log_bessel.fresh_kappas(NORMALIZER_SIZE, "cpu")
    for name in ways:
        log_bessel.check(quantity, name, buffers[0])
    calls = {name: partial(log_bessel.value_and_gradient, function) for name, function in ways.items()}
    return interleaved_seconds(calls, [(kappa,) for kappa in buffers], "cpu", rounds=100, clock=clock)


def loss_seconds(class_centers, batch, finetune, clock):
    """{name: seconds} for one forward and backward pass of each loss."""
    torch.compiler.reset()
    batches = scf_loss.fresh_batches(batch, class_centers, finetune)
    for name in scf_loss.LOSSES:
        scf_loss.check(name, batches[0])
    calls = {name: partial(scf_loss.forward_backward, loss) for name, loss in scf_loss.LOSSES.items()}
    return interleaved_seconds(calls, batches, "cpu", rounds=ROUNDS[batch], clock=clock)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_claims", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads PyTorch may use (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cpu", help="folder for the JSON file (default: bench/results/cpu)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter

    cases = [
        {
            "work": f"{quantity}, {NORMALIZER_SIZE} values",
            "needs": needs,
            "seconds": normalizer_seconds(quantity, clock),
        }
        for quantity, needs in SPEEDUPS.items()
    ]
    class_centers = scf_loss.fresh_class_centers(scf_loss.MS1M, "cpu")
    for finetune in (False, True):
        for batch in scf_loss.BATCHES[
            : -1 if finetune else None
        ]:  # the largest needs gigabytes and minutes with feature gradients
            work = f"loss, {'finetune' if finetune else 'confidence'}, B = {batch}"
            cases.append({"work": work, "needs": 1.0, "seconds": loss_seconds(class_centers, batch, finetune, clock)})
    for case in cases:
        medians = case["medians"] = {way: statistics.median(seconds) for way, seconds in case["seconds"].items()}
        case["speedup"] = medians["published"] / medians["scf_fast"]
        case["holds"] = case["speedup"] > case["needs"]

    names = list(scf_loss.LOSSES)
    rows = [
        [
            case["work"],
            *(f"{1e6 * case['medians'][name]:.0f}" if name in case["medians"] else "" for name in names),
            f"{case['speedup']:.2f}",
            f"{case['needs']:g}",
            "yes" if case["holds"] else "NO",
        ]
        for case in cases
    ]
    print(f"Forward and backward, median microseconds by {clock.__name__}, d = 512, float32")
    print(tabulate(["", *names, "published / scf_fast", "more than", "holds"], rows))

    measured = {"environment": environment("cpu"), "clock": clock.__name__, "cases": cases}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels-cpu-{measured['environment']['date']}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"\nWritten: {path}")
    return 0 if all(case["holds"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
