"""Tables and plots of the result files: bench/RESULTS.md, and PNG files beside the JSON of each device.

    python -m bench.report [--results bench/results] [--out bench/RESULTS.md]

Only the newest file of each kind counts. What no file holds is a cell that says "not measured".
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measuring.environment import RESULTS
from bench.measuring.results import by_device
from bench.measuring.tables import markdown_table
from bench.reporting.device import EPOCHS, Device
from bench.reporting.plots import draw
from bench.reporting.tables import (
    decoding_table,
    instructions_part,
    left_out,
    machine_table,
    memory_table,
    projection_table,
    scaling_part,
    timing_tables,
)
from scf_fast.command import Parser, run
from scf_fast.errors import InputError

TABLES = {
    "log_bessel": "Log-Bessel family",
    "scf_loss": "SCF loss",
    "objective_losses": "Losses of the published table",
    "objective_epochs": "Epochs of the published table from one cache",
    "margin_softmax": "Margin softmax",
    "stage1": "Stage 1, steps",
    "stage2": "Stage 2, steps and epochs",
    "scoring": "Scoring",
}


def file_table(device: Device, out: Path) -> str:
    """Returns a row for each result file, linked from the page ``out``."""
    rows = [
        [
            f"[{file.path.name}]({file.path.relative_to(out.parent).as_posix()})",
            file.environment["date"],
            f"`{file.environment.get('command')}`",
            file.environment["commit"],
            "" if file.content.get("complete", True) else "interrupted",
        ]
        for file in device.files
    ]
    return markdown_table(["file", "date", "command", "revision", ""], rows)


def describe(device: Device, folder: Path, out: Path) -> str:
    """Returns the device's part of the page ``out`` and draws its plots into ``folder``."""
    parts = [f"## {device.label}", machine_table(device.machine)]
    for section, title in TABLES.items():
        parts += [f"### {title}", *timing_tables(device, section), *filter(None, [left_out(device, section)])]
    parts += ["### Memory of stage 1's class centers", memory_table(device), "### Decoding", decoding_table(device)]
    parts += [
        f"### Projected: {EPOCHS} epochs on one such device",
        "Not measured but computed: images times epochs over the best step rate above, for stage 1 with the margin "
        "softmax's time scaled to the "
        "identities; decoding, checkpoints and evaluation are left out. The network that was measured is named.",
        projection_table(device),
        *scaling_part(device),
        *instructions_part(device),
    ]
    parts += [f"![{path.stem}]({path.relative_to(out.parent).as_posix()})" for path in draw(device, folder)]
    return "\n\n".join([*parts, "### Files", file_table(device, out)])


def write_page(results: Path, out: Path) -> None:
    """Writes the page and the plots of all devices.

    Raises:
        InputError: there are no results.
    """
    devices = [Device(name, files) for name, files in by_device(results).items()]
    if not devices:
        raise InputError(
            f"{results} must hold a folder of JSON files for each device; python -m bench.suite writes them"
        )
    intro = [
        "# Results",
        "Written by `python -m bench.report` from the files under `results/`; what each measures is in "
        "[README.md](README.md). Times are medians of calls on fresh random data, the wait for the device included. A "
        "floor is the least time that bytes, FLOP or one launch allow at the rates measured in the same run "
        "([roofline.py](measuring/roofline.py)); the figure in brackets is how many floors a way takes.",
    ]
    if not any(device.name != "cpu" for device in devices):
        intro.append("No GPU has been at hand: every GPU figure is **not measured**.")
    out.write_text("\n\n".join([*intro, *(describe(device, results / device.name, out) for device in devices)]) + "\n")
    print(f"Written: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder with one folder for each device (default: bench/results)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parent / "RESULTS.md", help="page to write (default: bench/RESULTS.md)"
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: write_page(options.results.resolve(), options.out.resolve()))


if __name__ == "__main__":
    sys.exit(main())
