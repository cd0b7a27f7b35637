"""Runs the main job on synthetic faces: draws them, trains both stages under ``deepspeed``, evaluates on unseen
identities and writes a report; then trains SCF, SCF-G, PFE-G and PFE-v from the features that stage 2 has kept, and
writes the published table.

``python -m scf_fast.demo`` (or ``make demo``). Steps that are done are not repeated; an interrupted stage resumes where
it stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scf_fast.command import Parser, print_lines, run
from scf_fast.command_line import load_recipe
from scf_fast.distributed import launcher
from scf_fast.pipelines.formats.atomic_file import write_json
from scf_fast.steps import Step, module_command, run_steps
from scf_fast.table import TablePlan, devices_for

RECIPES = Path(__file__).resolve().parent / "recipes"
# The table compares objectives, so all four have the settings of stage 2 and one net: TFace's, since a CPU takes
# several times as long for the published one.
_OF_TABLE = {"confidence_net": "conv", "zero_stage": 0}


def plan_table(data: Path, out: Path) -> TablePlan:
    """Returns the plan of the published table, from the features that stage 2 keeps."""
    backbone = out / "backbone"
    recipe = load_recipe(str(RECIPES / "demo_confidence.yaml"))
    del recipe["stage"]
    files = {
        "data": str(data / "train"),
        "saved_bkb": str(backbone / "backbone.pth"),
        "saved_fc": str(backbone / "fc.pth"),
        "feature_cache": str(out / "feature_cache"),
    }
    return TablePlan(out / "systems", recipe | _OF_TABLE | files, evaluation_data=[data], name="cosface")


def make_steps(data: Path, out: Path, devices: Sequence[int] = ()) -> list[Step | Sequence[Step]]:
    """Returns the steps in order; all of them start modules of this package alone, so any current folder will do.

    Args:
        devices: GPUs that the table is trained on.
    """
    backbone, confidence = out / "backbone", out / "confidence"
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning"}

    def training(recipe: str, *arguments: str | Path) -> list[str]:
        flags = ["--config", RECIPES / recipe, "--data", data / "train", *arguments, "--resume"]
        return [*launcher(), *map(str, flags)]

    return [
        Step("data", "synthetic data set", lambda: module_command("pipelines.synthetic", data)),
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
                *("--output_dir", confidence, "--feature_cache", out / "feature_cache"),
            ),
            quiet,
        ),
        Step(
            "evaluation",
            "evaluation on unseen identities",
            lambda: module_command(
                "evaluation", "report", "--model", confidence, "--data", data, "--out", out / "report"
            ),
        ),
        *plan_table(data, out).steps(devices),
    ]


def run_demo(data: Path, out: Path) -> int:
    """Runs all steps and adds their seconds, and the table, to the report's results.json; returns the exit status."""
    status, seconds = run_steps(make_steps(data, out, devices_for({})), out / "seconds.json")
    if status:
        return status
    results_file, table = out / "report" / "results.json", out / "systems" / "table"
    results = json.loads(results_file.read_text())
    results["seconds"] = {**results.get("seconds", {}), **seconds, "total": sum(seconds.values())}
    results["tables"] = json.loads((table / "table.json").read_text())
    write_json(results_file, results, indent=2, end="\n")
    times = "  ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print_lines("", f"seconds: {times}", f"report: {out / 'report' / 'report.html'}", f"table: {table / 'report.html'}")
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
