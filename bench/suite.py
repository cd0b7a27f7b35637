"""The benchmark suite: every section in a process of its own, with a time limit, its results written as they come.

    python -m bench.suite [--out DIR] [--sections floors,stage1] [--tiny] [--budget SECONDS] [--profile DIR] [--list]

Runs on the GPU where there is one and on the CPU elsewhere, there on one core unless OMP_NUM_THREADS says otherwise:
threads that share cores with other work wait for each other. ``python -m bench.gpu`` is the same and insists on the
GPU. The floors come first: what the device copies, multiplies and launches is what every other number is set against.
DIR (default: bench/results/<device>) gets one JSON file a section. A section that is interrupted, fails or runs into
its limit leaves what it had; the others go on. One that needs a package which is not installed is left out, and says
so. Exit status 1 where a section failed or a way computed something wrong. ``python -m bench.report`` makes tables and
plots of the files.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measuring import roofline
from bench.measuring.case import LEFT_OUT, measure
from bench.measuring.environment import DEVICE, RESULTS, device_slug, environment
from bench.measuring.timing import write_json

ROOT = Path(__file__).parents[1]
FLOORS = "floors"


@dataclass(frozen=True)
class Section:
    """
    Attributes:
        shows: one line.
        cases: "module:function" giving cases(device, tiny), or None.
        commands: argument lists of programs that write their own JSON file into --out, by size: "tiny", "cpu" or
            "cuda".
        limit: seconds after which it is ended.
        needs: modules without which it is left out.
    """

    shows: str
    cases: str | None = None
    commands: dict[str, list[list[str]]] | None = None
    limit: int = 470
    needs: tuple[str, ...] = ()


_STAGE2 = ["--images", "20480", "--batches", "1024", "--epochs", "2"]  # five networks are compiled for each batch size
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
    "margin_softmax": Section("margin softmax over up to millions of identities", "bench.kernels.margin_softmax:cases"),
    "stage1": Section("training steps of stage 1 by batch size", "bench.training.stage1:cases"),
    "stage2": Section(
        "training steps of stage 2: frozen backbone switch by switch, feature cache, by batch size",
        commands={
            "tiny": [
                [
                    "bench.throughput",
                    "--networks",
                    "ir_tiny",
                    "--batches",
                    "4",
                    "--images",
                    "64",
                    "--epoch_batch",
                    "16",
                    "--rounds",
                    "1",
                    "--epochs",
                    "1",
                ]
            ],
            "cpu": [["bench.throughput"]],
            "cuda": [["bench.throughput", "--networks", "ir_100", *_STAGE2]],
        },
    ),
    "stage2_ir_50": Section(
        "the same of a smaller backbone",
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


def heading(name, options):
    """What every file of a section says first."""
    command = f"python -m bench.suite --sections {name} --budget {options.budget:g}"
    return {
        "section": name,
        "environment": environment(DEVICE) | {"command": command + " --tiny" * options.tiny},
        "tiny": options.tiny,
    }


def run_cases(name, cases, options, machine):
    """Measure one case after another; the section's file is complete after each."""
    path = options.out / f"{name}.json"
    content = {**heading(name, options), "machine": machine.as_dict(), "complete": False, "records": []}
    for case in cases:
        trace = options.profile and options.profile / name / f"{case}.json"
        content["records"].append(measure(case, DEVICE, machine, options.budget, trace))
        write_json(path, content)
        record = content["records"][-1]
        outcome = ", ".join(f"{kind}: {record[kind]}" for kind in LEFT_OUT if kind in record)
        if not outcome:
            outcome = f"{1e3 * record['median_seconds']:.3f} ms, {record['times_floor']:.1f} x floor"
        print(f"  {case.work}, {case.way}: {outcome}", flush=True)
    write_json(path, content | {"complete": True})
    return any("wrong" in record or "failed" in record for record in content["records"])


def work(name, options):
    """What the process of a section of cases, or of the floors, does; its exit status."""
    if name == FLOORS:
        machine = roofline.Machine.measure(DEVICE, small=options.tiny)
        write_json(
            options.out / f"{FLOORS}.json",
            heading(name, options) | {"machine": machine.as_dict(), "complete": True, "records": []},
        )
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in machine.flops_per_second.items())
        print(
            f"  copy {machine.copy_bytes_per_second / 1e9:.4g} GB/s, {rates}, launch "
            f"{1e6 * machine.launch_seconds:.1f} us",
            flush=True,
        )
        return 0
    machine = roofline.Machine(**json.loads((options.out / f"{FLOORS}.json").read_text())["machine"])
    module, function = SECTIONS[name].cases.split(":")
    cases = getattr(importlib.import_module(module), function)(DEVICE, options.tiny)
    if options.tiny:
        cases = [
            case for case in cases if not case.way.endswith("compiled")
        ]  # the compiler takes longer than everything else
    cases.sort(key=lambda case: case.way.endswith("compiled"))  # so that it takes nobody else's time
    return int(run_cases(name, cases, options, machine))


def commands_of(name, options):
    """The argument lists that a section consists of."""
    section = SECTIONS[name]
    if section.commands is None:
        words = ["bench.suite", "--worker", name, "--out", str(options.out), "--budget", str(options.budget)]
        return [words + ["--tiny"] * options.tiny + (["--profile", str(options.profile)] if options.profile else [])]
    commands = section.commands["tiny" if options.tiny else DEVICE]
    return [words if words[0] == "pytest" else [*words, "--out", str(options.out)] for words in commands]


def is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def run_section(name, options):
    """{"seconds", "status"}: "ok", "failed", "out of time" or "left out: needs ..."."""
    missing = [module for module in SECTIONS[name].needs if not is_installed(module)]
    if missing:
        return {"seconds": 0.0, "status": f"left out: needs {', '.join(missing)}"}
    deadline, began, status = time.monotonic() + SECTIONS[name].limit, time.monotonic(), "ok"
    environ = ({} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}) | os.environ
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
    return {"seconds": round(time.monotonic() - began, 1), "status": status}


def main(arguments=None, prog="python -m bench.suite"):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: bench/results/<device>)")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="some of them, with commas between (default: all)"
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
        "--profile", type=Path, help="write a PyTorch profiler trace of a call of each case under this folder"
    )
    parser.add_argument("--list", action="store_true", help="say what the sections are")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:16}{section.shows}" for name, section in SECTIONS.items()))
        return 0
    if options.tiny and options.out is None:
        parser.error(
            "--tiny must be given with --out: its figures mean nothing and would replace real ones in bench/results"
        )
    options.out = (options.out or RESULTS / device_slug(DEVICE)).resolve()
    options.profile = options.profile and options.profile.resolve()
    if options.budget is None:
        options.budget = 0.01 if options.tiny else 1.0 if DEVICE == "cuda" else 0.2
    if options.worker:
        return work(options.worker, options)
    chosen = options.sections.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections must be some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if FLOORS not in chosen:
        chosen.insert(0, FLOORS)
    summary = {}
    for name in sorted(chosen, key=list(SECTIONS).index):
        print(f"{name}: {SECTIONS[name].shows}", flush=True)
        summary[name] = run_section(name, options)
        print(f"  {summary[name]['status']} after {summary[name]['seconds']:.0f} s", flush=True)
    write_json(
        options.out / "suite.json", {"environment": environment(DEVICE), "tiny": options.tiny, "sections": summary}
    )
    print(f"Written: {options.out}")
    return int(any(section["status"] in ("failed", "out of time") for section in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
