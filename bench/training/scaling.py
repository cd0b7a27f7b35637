"""Several GPUs and nodes: bytes of the real collectives, counted on CPU ranks, and a model built on them.

    python -m bench.scaling [--out DIR] [--ranks 2] [--measure_only] [--images_per_second 5000]
    [--inter_gb_per_s 50] ...

Measured: a launch of ``--ranks`` processes on this machine takes steps of both stages under each ZeRO stage, and every
collective that reaches the process group is counted with its payload. The model predicts the same counts from shapes;
both are printed, to show how far to trust it. Also measured: the classifier's step with its communication beside the
computation, against the same with every collective waited for at once.

Modeled, not measured: images a second of stage 1 on 8 to 512 GPUs with 1 M to 29 M identities, from the assumptions
that are printed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import markdown_table
from bench.training.collectives import OVERLAP_BATCH, OVERLAP_CLASSES, STAGES, measure, on_the_wire, run_rank
from bench.training.scaling_model import GPUS, IDENTITIES, Assumptions, model, predicted
from scf_fast.command import Parser, run


def overlap_line(measured: Mapping[str, Any]) -> str:
    """Says in a sentence what the classifier gains by communication beside computation."""
    overlap = measured["counted"]["overlap"]
    return (
        f"Classifier, {OVERLAP_CLASSES:,} identities, batch {OVERLAP_BATCH}: {1e3 * overlap['beside']:.1f} ms with "
        "communication beside the computation, "
        f"{1e3 * overlap['in turn']:.1f} ms in turn. Ranks of one machine share its cores and its memory; a network "
        "card would not."
    )


def assumptions_line(assumptions: Mapping[str, Any]) -> str:
    """Says in a paragraph what the model assumes and what its cells hold."""
    return (
        "A model, not a measurement. Assumptions: "
        + ", ".join(f"{name} {value}" for name, value in assumptions.items())
        + ". Each cell: images/s of stage 1, share of what as many GPUs would do without communication and "
        "classifier, class centers and momentum on each GPU."
    )


def volume_table(measured: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the bytes counted against those of the model."""
    rows, ranks = [], measured["ranks"]
    for stage in STAGES:
        for zero_stage, payload in measured["counted"][stage].items():
            model_bytes = on_the_wire(predicted(stage, int(zero_stage)), ranks)
            counted = on_the_wire(payload, ranks)
            kinds = ", ".join(f"{kind} {nbytes:,}" for kind, nbytes in sorted(payload.items()))
            rows.append(
                [stage, zero_stage, kinds, f"{counted:,.0f}", f"{model_bytes:,.0f}", f"{counted / model_bytes:.3f}"]
            )
    return markdown_table(
        ["", "ZeRO", f"payload bytes a step, {ranks} ranks", "sent by a rank", "model", "ratio"], rows
    )


def model_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the model, identities down and GPUs across."""
    cells = {(row["identities"], row["gpus"]): row for row in rows}
    return markdown_table(
        ["identities", *(f"{gpus} GPUs" for gpus in GPUS)],
        [
            [
                f"{identities / 1e6:g} M",
                *(
                    f"{c['images_per_second']:,.0f} img/s, {c['efficiency']:.0%}, {c['centers_gb']:.2g} GB"
                    if c["fits"]
                    else "does not fit"
                    for c in (cells[identities, gpus] for gpus in GPUS)
                ),
            ]
            for identities in IDENTITIES
        ],
    )


def measure_and_model(options: argparse.Namespace) -> None:
    """Counts, models, prints both and writes the JSON file."""
    measured = {"ranks": options.ranks, "counted": measure(options.ranks)}
    print(f"{volume_table(measured)}\n\n{overlap_line(measured)}")
    result: dict[str, Any] = {"section": "scaling", "environment": environment(DEVICE), "measured": measured}
    if not options.measure_only:
        assumptions = Assumptions(**{name: getattr(options, name) for name in asdict(Assumptions())})
        rows = model(assumptions)
        result |= {"assumptions": asdict(assumptions), "model": rows}
        print(f"\n{assumptions_line(asdict(assumptions))}\n\n{model_table(rows)}")
    write_json(options.out / "scaling.json", result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_out_argument(parser)
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes whose collectives are counted (default: %(default)s)"
    )
    parser.add_argument("--measure_only", action="store_true", help="leave the model out")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help="assumption of the model (default: %(default)s)"
        )
    options = parser.parse_args(arguments)
    if options.worker:
        run_rank(options.worker)
    return run(parser.prog, lambda: measure_and_model(options))


if __name__ == "__main__":
    sys.exit(main())
