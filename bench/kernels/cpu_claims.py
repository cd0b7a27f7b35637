"""Checks what the project claims of its CPU path: ours against the published way in one run, in turns, medians.

    python -m bench.cpu_claims [--threads 1] [--out DIR]

The claims: the normalizer log C_d of 4096 values with its derivative is at least 10 x as fast as the published way
through SciPy; log I_v, and the whole SCF loss at every batch size, forward and backward, are faster than the published.
The exit status is 1 where one of them does not hold.

With one thread the clock is the processor time of this process: on a machine busy with other work, elapsed time
penalizes long calls more than short ones, since they are the ones interrupted. With more threads it is elapsed time, so
keep the machine to yourself.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.kernels import log_bessel, scf_loss
from bench.measuring.environment import RESULTS, environment
from bench.measuring.results import write_json
from bench.measuring.samples import Samples
from bench.measuring.tables import text_table
from bench.measuring.timing import Clock, interleaved_seconds
from scf_fast.command import Parser, run

NORMALIZER_SIZE = 4096
SPEEDUPS = {"log_vmf_normalizer": 10.0, "log_bessel_i": 1.0}
ROUNDS = {256: 200, 1024: 100, 4096: 30, 16384: 10, 65536: 5}


def normalizer_seconds(quantity: str, clock: Clock) -> dict[str, list[float]]:
    """Times value and gradient of NORMALIZER_SIZE values, {way: seconds}."""
    torch.compiler.reset()
    ways = log_bessel.FAMILY[quantity]
    buffers = log_bessel.fresh_kappas(NORMALIZER_SIZE, "cpu")
    for name in ways:
        log_bessel.check(quantity, name, buffers[0])
    calls = {name: partial(log_bessel.value_and_gradient, function) for name, function in ways.items()}
    return interleaved_seconds(calls, [(kappa,) for kappa in buffers], "cpu", rounds=100, clock=clock)


def loss_seconds(class_centers: torch.Tensor, batch: int, finetune: bool, clock: Clock) -> dict[str, list[float]]:
    """Times one forward and backward pass of each loss, {way: seconds}."""
    torch.compiler.reset()
    batches = scf_loss.fresh_batches(batch, class_centers, finetune)
    for name in scf_loss.LOSSES:
        scf_loss.check(name, batches[0])
    calls = {name: partial(scf_loss.forward_backward, loss) for name, loss in scf_loss.LOSSES.items()}
    return interleaved_seconds(calls, batches, "cpu", rounds=ROUNDS[batch], clock=clock)


def judge(work: str, needed: float, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the record of one claim: it holds if ours is more than ``needed`` times as fast as the published way."""
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    speedup = medians["published"] / medians["scf_fast"]
    return {
        "work": work,
        "needs": needed,
        "seconds": {way: Samples.summarize(values).as_dict() for way, values in seconds.items()},
        "medians": medians,
        "speedup": speedup,
        "holds": speedup > needed,
    }


def measure(clock: Clock) -> list[dict[str, Any]]:
    """Measures all claims."""
    cases = [
        judge(f"{quantity}, {NORMALIZER_SIZE} values", needed, normalizer_seconds(quantity, clock))
        for quantity, needed in SPEEDUPS.items()
    ]
    class_centers = scf_loss.fresh_class_centers(scf_loss.MS1M, "cpu")
    for finetune in (False, True):
        # With feature gradients the largest batch needs gigabytes and minutes.
        for batch in scf_loss.BATCHES[: -1 if finetune else None]:
            work = f"loss, {'finetune' if finetune else 'confidence'}, B = {batch}"
            cases.append(judge(work, 1.0, loss_seconds(class_centers, batch, finetune, clock)))
    return cases


def check_claims(threads: int, out: Path) -> int:
    """Measures, prints and writes the claims; returns 0 if all hold, else 1."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.process_time if threads == 1 else time.perf_counter
    cases = measure(clock)
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
    print(text_table(["", *names, "published / scf_fast", "more than", "holds"], rows))
    measured_on = environment("cpu")
    path = out / f"kernels-cpu-{measured_on['date']}.json"
    write_json(path, {"environment": measured_on, "clock": clock.__name__, "cases": cases})
    print(f"\nWritten: {path}")
    return 0 if all(case["holds"] for case in cases) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.cpu_claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads PyTorch may use (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cpu", help="folder for the JSON file (default: bench/results/cpu)"
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: check_claims(options.threads, options.out))


if __name__ == "__main__":
    sys.exit(main())
