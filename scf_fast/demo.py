"""Runs the main job on synthetic faces: draws them, trains both stages under ``deepspeed``, evaluates on unseen
identities and writes a report.

``python -m scf_fast.demo`` (or ``make demo``). Steps that are done are not repeated; an interrupted stage resumes where
it stopped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scf_fast.command import Parser, run
from scf_fast.distributed import launcher
from scf_fast.pipelines.formats.atomic_file import write_json

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str  # in seconds.json
    title: str
    command: Callable[[], list[str]]  # made when the step starts: a launcher's port must be free then
    environment: dict[str, str] = field(default_factory=dict)


def make_steps(data: Path, out: Path) -> list[Step]:
    """Returns the steps in order; all of them start modules of this package alone, so any current folder will do."""
    backbone, confidence = out / "backbone", out / "confidence"
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning"}

    def module(name: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", f"scf_fast.{name}", *map(str, arguments)]

    def training(recipe: str, *arguments: str | Path) -> list[str]:
        flags = ["--config", RECIPES / recipe, "--data", data / "train", *arguments, "--resume"]
        return [*launcher(), *map(str, flags)]

    return [
        Step("data", "synthetic data set", lambda: module("pipelines.synthetic", data)),
        Step(
            "stage1",
            "stage 1: backbone",
            lambda: training("demo_backbone.yaml", "--output_dir", backbone),
            quiet,
        ),
        Step(
            "stage2",
            "stage 2: confidence",
            lambda: training(
                "demo_confidence.yaml",
                *("--saved_bkb", backbone / "backbone.pth", "--saved_fc", backbone / "fc.pth"),
                *("--output_dir", confidence),
            ),
            quiet,
        ),
        Step(
            "evaluation",
            "evaluation on unseen identities",
            lambda: module("evaluation", "report", "--model", confidence, "--data", data, "--out", out / "report"),
        ),
    ]


def run_to_its_end(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its exit status; on Ctrl-C or failure it and all its children are ended."""
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **environment})
    try:
        return process.wait()
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def run_steps(steps: list[Step], seconds_file: Path) -> tuple[int, dict[str, float]]:
    """Runs the steps that are not done yet.

    Args:
        seconds_file: records the steps that are done.
    Returns:
        The exit status of the step that failed, or 0; seconds of each step that is done.
    """
    seconds: dict[str, float] = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    for step in steps:
        if step.name in seconds:
            print(f"== {step.title}: there already ({seconds[step.name]:.0f} s)", flush=True)
            continue
        print(f"== {step.title}", flush=True)
        began = time.monotonic()
        status = run_to_its_end(step.command(), step.environment)
        if status:
            return status, seconds
        seconds[step.name] = time.monotonic() - began
        write_json(seconds_file, seconds)
    return 0, seconds


def run_demo(data: Path, out: Path) -> int:
    """Runs all steps and adds their seconds to the report's results.json; returns the exit status."""
    status, seconds = run_steps(make_steps(data, out), out / "seconds.json")
    if status:
        return status
    results_file = out / "report" / "results.json"
    results = json.loads(results_file.read_text())
    results["seconds"] = {**results.get("seconds", {}), **seconds, "total": sum(seconds.values())}
    write_json(results_file, results, indent=2, end="\n")
    times = "  ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print(f"\nseconds: {times}\nreport: {out / 'report' / 'report.html'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scf_fast.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data", "demo"), help="folder for the synthetic faces (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs", "demo"),
        help="folder for the runs and the report (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: run_demo(options.data, options.out))


if __name__ == "__main__":
    sys.exit(main())
