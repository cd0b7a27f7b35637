"""The benchmark suite: every section in a process of its own, with a time limit, its results written as they come.

    python -m bench.suite [--out DIR] [--sections floors,stage1] [--tiny] [--budget SECONDS] [--profile DIR] [--list]

Runs on the GPU where there is one, else on the CPU: there on one core unless OMP_NUM_THREADS says otherwise, since
threads that share cores with other work wait for each other. ``python -m bench.gpu`` is the same and insists on the
GPU. The floors come first: every other number is set against what the device copies, multiplies and launches. DIR
(default: bench/results/<device>) gets one JSON file for each section. A section that is interrupted, fails or reaches
its limit keeps what it had, and the others go on. A section that needs a package which is not installed is left out,
and the output says so. The exit status is 1 where a section failed or a way computed wrong values. ``python -m
bench.report`` makes tables and plots of the files.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measuring import process_group, roofline
from bench.measuring.case import LEFT_OUT, Case, measure
from bench.measuring.environment import DEVICE, RESULTS, ROOT, device_slug, environment, is_installed
from bench.measuring.results import write_json
from scf_fast.command import Parser, run
from scf_fast.errors import InputError

FLOORS = "floors"


@dataclass(frozen=True)
class Section:
    """A part of the suite: either cases, or programs of their own.

    Attributes:
        shows: what it measures, in one line.
        cases: "module:function" that returns its cases for (device, tiny), or None.
        commands: argument lists of programs that write their own JSON file into ``--out``, by size: "tiny", "cpu" or
            "cuda".
        limit: seconds after which it is ended.
        needs: modules without which it is left out.
    """

    shows: str
    cases: str | None = None
    commands: dict[str, list[list[str]]] | None = None
    limit: int = 470
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "ok", "failed", "out of time" or "left out: needs ..."."""

    seconds: float
    status: str


@dataclass
class Options:
    """The command's options, resolved."""

    out: Path
    tiny: bool = False
    budget: float = 1.0  # seconds to sample each case for
    profile: Path | None = None  # folder for traces


_STAGE2 = ["--images", "20480", "--batches", "1024", "--epochs", "2"]  # five networks are compiled for each batch size
_TINY_STAGE2 = (
    "bench.throughput --networks ir_tiny --batches 4 --images 64 --epoch_batch 16 --rounds 1 --epochs 1".split()
)
SECTIONS = {
    FLOORS: Section("copy bandwidth, matrix rates and launch time of the device", limit=120),
    "accuracy": Section(
        "errors of the log-Bessel family on the device, against 60-digit arithmetic",
        commands={
            "tiny": [],
            "cpu": [["bench.accuracy"]],
            "cuda": [["bench.accuracy"], ["pytest", "-q", "-m", "gpu", "tests/kernels"]],
        },
    ),
    "log_bessel": Section("the log-Bessel family, forward and backward", "bench.kernels.log_bessel:cases"),
    "scf_loss": Section("the SCF loss, forward and backward", "bench.kernels.scf_loss:cases"),
    "objective_losses": Section(
        "SCF, SCF-G, PFE-G and PFE-v, forward and backward, against plain PyTorch",
        "bench.kernels.objective_losses:cases",
    ),
    "margin_softmax": Section("margin softmax over up to millions of identities", "bench.kernels.margin_softmax:cases"),
    "stage1": Section("training steps of stage 1 by batch size", "bench.training.stage1:cases"),
    "stage2": Section(
        "training steps of stage 2: frozen backbone switch by switch, feature cache, by batch size",
        commands={
            "tiny": [_TINY_STAGE2],
            "cpu": [["bench.throughput"]],
            "cuda": [["bench.throughput", "--networks", "ir_100", *_STAGE2]],
        },
    ),
    "stage2_ir_50": Section(
        "the same for a smaller backbone",
        commands={"tiny": [], "cpu": [], "cuda": [["bench.throughput", "--networks", "ir_50", *_STAGE2]]},
    ),
    "decoding": Section(
        "index, source and decoders, against DALI's MXNet reader",
        commands={
            "tiny": [["bench.decode", "--images", "200", "--batch", "16", "--batches", "1", "--rounds", "1"]],
            "cpu": [["bench.decode", "--images", "20000"]],
            "cuda": [["bench.decode", "--threads", str(os.cpu_count())]],
        },
        needs=("nvidia.dali",),
    ),
    "scoring": Section("Eqn (13) of all pairs, template pooling", "bench.scoring.scoring:cases"),
    "scaling": Section(
        "bytes of the collectives of two ranks, and a model of many GPUs",
        commands={"tiny": [], "cpu": [["bench.scaling"]], "cuda": []},
    ),
    "center_memory": Section(
        "memory of stage 1's class centers",
        commands={
            "tiny": [["bench.center_memory", "--classes", "2000", "--batch", "4"]],
            "cpu": [["bench.center_memory", "--classes", classes] for classes in ("250000", "1000000", "2000000")],
            "cuda": [
                ["bench.center_memory", "--classes", classes, "--batch", "1024"] for classes in ("4000000", "10000000")
            ],
        },
    ),
}


def file_head(name: str, options: Options) -> dict[str, Any]:
    """Returns the fields that every file of a section begins with."""
    command = f"python -m bench.suite --sections {name} --budget {options.budget:g}"
    return {
        "section": name,
        "environment": environment(DEVICE) | {"command": command + " --tiny" * options.tiny},
        "tiny": options.tiny,
    }


def run_cases(name: str, cases: Iterable[Case], options: Options, machine: roofline.Machine) -> bool:
    """Measures one case after another and rewrites the section's file after each; returns whether one was wrong or
    failed.
    """
    path = options.out / f"{name}.json"
    records: list[dict[str, Any]] = []
    content = {**file_head(name, options), "machine": machine.as_dict(), "complete": False, "records": records}
    for case in cases:
        trace = options.profile / name / f"{case}.json" if options.profile else None
        record = measure(case, DEVICE, machine, options.budget, trace)
        records.append(record)
        write_json(path, content)
        outcome = ", ".join(f"{kind}: {record[kind]}" for kind in LEFT_OUT if kind in record)
        if not outcome:
            outcome = f"{1e3 * record['median_seconds']:.3f} ms, {record['times_floor']:.1f} x floor"
        print(f"  {case.work}, {case.way}: {outcome}", flush=True)
    write_json(path, content | {"complete": True})
    return any("wrong" in record or "failed" in record for record in records)


def measure_floors(options: Options) -> None:
    """Measures the device's rates and writes them to the file that the other sections read."""
    machine = roofline.Machine.measure(DEVICE, small=options.tiny)
    write_json(
        options.out / f"{FLOORS}.json",
        file_head(FLOORS, options) | {"machine": machine.as_dict(), "complete": True, "records": []},
    )
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in machine.flops_per_second.items())
    print(
        f"  copy {machine.copy_bytes_per_second / 1e9:.4g} GB/s, {rates}, launch {1e6 * machine.launch_seconds:.1f} us",
        flush=True,
    )


def run_worker(name: str, options: Options) -> int:
    """Runs one section in its own process and returns the exit status."""
    if name == FLOORS:
        measure_floors(options)
        return 0
    machine = roofline.Machine(**json.loads((options.out / f"{FLOORS}.json").read_text())["machine"])
    module, _, function = (SECTIONS[name].cases or "").partition(":")
    cases = getattr(importlib.import_module(module), function)(DEVICE, options.tiny)
    if options.tiny:
        # The compiler takes longer than everything else.
        cases = [case for case in cases if not case.way.endswith("compiled")]
    cases.sort(key=lambda case: case.way.endswith("compiled"))  # last, so that compilation delays no other case
    return int(run_cases(name, cases, options, machine))


def commands_of(name: str, options: Options) -> list[list[str]]:
    """Returns the argument lists of the processes that a section consists of."""
    section = SECTIONS[name]
    if section.commands is None:
        words = ["bench.suite", "--worker", name, "--out", str(options.out), "--budget", str(options.budget)]
        return [words + ["--tiny"] * options.tiny + (["--profile", str(options.profile)] if options.profile else [])]
    commands = section.commands["tiny" if options.tiny else DEVICE]
    return [words if words[0] == "pytest" else [*words, "--out", str(options.out)] for words in commands]


def run_section(name: str, options: Options) -> Outcome:
    """Runs the processes of one section until they are done or out of time."""
    missing = [module for module in SECTIONS[name].needs if not is_installed(module)]
    if missing:
        return Outcome(0.0, f"left out: needs {', '.join(missing)}")
    began, status = time.monotonic(), "ok"
    deadline = began + SECTIONS[name].limit
    environ = ({} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}) | dict(os.environ)
    for words in commands_of(name, options):
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=environ)
        try:
            if process.wait(timeout=max(0.0, deadline - time.monotonic())):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            break
        finally:
            if process.poll() is None:  # out of time, or interrupted
                process.kill()
                process.wait()
    return Outcome(round(time.monotonic() - began, 1), status)


def run_suite(chosen: list[str], options: Options) -> int:
    """Runs the chosen sections, the floors first, and returns the exit status."""
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise InputError(f"--sections must be some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    outcomes = {}
    for name in (name for name in SECTIONS if name == FLOORS or name in chosen):
        print(f"{name}: {SECTIONS[name].shows}", flush=True)
        outcomes[name] = run_section(name, options)
        print(f"  {outcomes[name].status} after {outcomes[name].seconds:.0f} s", flush=True)
    write_json(
        options.out / "suite.json",
        {
            "environment": environment(DEVICE),
            "tiny": options.tiny,
            "sections": {name: asdict(outcome) for name, outcome in outcomes.items()},
        },
    )
    print(f"Written: {options.out}")
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes.values()))


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: bench/results/<device>)")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="sections to run, separated by commas (default: all)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes, to see that everything runs; the figures mean nothing"
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds to sample each case for (default: 1 on a GPU, 0.2 on a CPU, 0.01 with --tiny)",
    )
    parser.add_argument(
        "--profile", type=Path, help="write a PyTorch profiler trace of one call of each case to this folder"
    )
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    parser.add_argument("--worker", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench.suite", gpu_only: bool = False) -> int:
    given = build_parser(prog).parse_args(arguments)

    def act() -> int:
        if given.list:
            print("\n".join(f"{name:16}{section.shows}" for name, section in SECTIONS.items()))
            return 0
        if gpu_only and DEVICE != "cuda" and not given.tiny:
            raise InputError(
                "a CUDA device is needed, and none was found; python -m bench.suite runs on the CPU, --tiny tries this "
                "command out on it"
            )
        if given.tiny and given.out is None:
            raise InputError(
                "--tiny must be given with --out: its figures mean nothing and would replace real ones in bench/results"
            )
        budget = given.budget
        if budget is None:
            budget = 0.01 if given.tiny else 1.0 if DEVICE == "cuda" else 0.2
        options = Options(
            (given.out or RESULTS / device_slug(DEVICE)).resolve(),
            given.tiny,
            budget,
            given.profile.resolve() if given.profile else None,
        )
        if given.worker:
            return run_worker(given.worker, options)
        return run_suite(given.sections.split(","), options)

    return run(prog, act)


if __name__ == "__main__":
    process_group.end_process(main())
