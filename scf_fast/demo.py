"""The main job on embedded data: make faces, train both stages with ``deepspeed train.py``, evaluate on unseen
identities, report.

``python -m scf_fast.demo`` (or ``make demo``). What is there already is reused; an interrupted stage goes on where it
stopped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scf_fast.distributed import launcher

RECIPES = Path(__file__).resolve().parent / "recipes"


def call(command: list[str], **environment: str) -> None:
    """Run a command to its end; on Ctrl-C or failure it and all its children are gone.

    Raises:
        SystemExit: the command failed; its exit status is passed on.
    """
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **environment})
    try:
        status = process.wait()
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    if status:
        raise SystemExit(status)


class Progress:
    """Which steps are done and how long each took, kept on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def step(self, name: str, title: str, action) -> None:
        """Run ``action`` unless an earlier run has done it."""
        if name in self.seconds:
            print(f"== {title}: there already ({self.seconds[name]:.0f} s)", flush=True)
            return
        print(f"== {title}", flush=True)
        began = time.monotonic()
        action()
        self.seconds[name] = time.monotonic() - began
        self.path.write_text(json.dumps(self.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data", "demo"), help="where the synthetic faces go [%(default)s]"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs", "demo"), help="where the runs and the report go [%(default)s]"
    )
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    backbone, confidence, report = out / "backbone", out / "confidence", out / "report"
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(out / "seconds.json")
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning"}

    progress.step(
        "data", "embedded data set", lambda: call([sys.executable, "-m", "scf_fast.pipelines.synthetic", str(data)])
    )
    progress.step(
        "stage1",
        "stage 1: backbone",
        lambda: call(
            [
                *launcher(),
                "--config",
                str(RECIPES / "demo_backbone.yaml"),
                "--data",
                str(data / "train"),
                "--output_dir",
                str(backbone),
                "--resume",
            ],
            **quiet,
        ),
    )
    progress.step(
        "stage2",
        "stage 2: confidence",
        lambda: call(
            [
                *launcher(),
                "--config",
                str(RECIPES / "demo_confidence.yaml"),
                "--data",
                str(data / "train"),
                "--saved_bkb",
                str(backbone / "backbone.pth"),
                "--saved_fc",
                str(backbone / "fc.pth"),
                "--output_dir",
                str(confidence),
                "--resume",
            ],
            **quiet,
        ),
    )
    progress.step(
        "evaluation",
        "evaluation on unseen identities",
        lambda: call(
            [
                sys.executable,
                "-m",
                "scf_fast.evaluation",
                "report",
                "--model",
                str(confidence),
                "--data",
                str(data),
                "--out",
                str(report),
            ]
        ),
    )

    results_file = report / "results.json"
    results = json.loads(results_file.read_text())
    results["seconds"] = {**results.get("seconds", {}), **progress.seconds, "total": sum(progress.seconds.values())}
    results_file.write_text(json.dumps(results, indent=2) + "\n")
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print(f"\nseconds: {seconds}\nreport: {report / 'report.html'}")


if __name__ == "__main__":
    main()
