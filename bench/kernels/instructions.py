"""Instructions, registers and memory of every kernel, compiled for GPUs that need not be there: a prediction of speed.

    python -m bench.instructions [--only PATTERN ...] [--architectures 80,90] [--out DIR] [--update]

Each kernel is compiled as the public functions launch it (bench/kernels/catalog.py has the list) and disassembled.
Columns of the table:

    instructions    a thread's, divided by the units that it computes: a straight line counts once, a loop as often as
                    the catalog says that it runs, and where branches part both ways count; a loop that runs as
                    the data want counts once
    beside          without those that multiply in a matrix product (HMMA, HGMMA, UTCHMMA; FFMA in the loop of a
                    float32 product)
    in loop         of these, the ones in the product's loop, such as copies and addresses; empty where ptxas has
                    unrolled that loop whole
    mufu .. integer by the unit that executes them; "integer" has comparisons, selections and moves too
    spilled         bytes of a thread's registers that do not fit and go through memory
    occupancy       resident warps, of those that a multiprocessor can hold

and the share of its copy bandwidth (products: of its tensor cores' rate; diagonal variances: of the rate of the fewest
instructions that do the work) that each GPU can reach at most: issue of four warps' instructions a clock and
multiprocessor, the rate of each class of instructions, everything overlapped. It is a bound from data sheets, not a
measurement. Compilations are kept in Triton's cache; all of them take 15 minutes of one core.
``--update`` writes the counts that tests/kernels/test_instructions.py holds the kernels to.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton

from bench.kernels.catalog import variants
from bench.kernels.variant import Variant
from bench.measuring import sass
from bench.measuring.chips import CHIPS, MULTIPROCESSORS, occupancy
from bench.measuring.compilation import compile_launch
from bench.measuring.environment import ROOT, environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import text_table
from scf_fast.command import Parser, run, split_commas
from scf_fast.errors import InputError

COMMITTED = ROOT / "tests" / "kernels" / "instruction_counts.json"
ARCHITECTURES = tuple(MULTIPROCESSORS)


def shares(variant: Variant, architecture: int, classes: dict[str, float]) -> dict[str, float]:
    """Returns the share of copy bandwidth, of the tensor cores' rate, or of the rate of the fewest instructions, that
    each chip of the architecture can reach.

    Args:
        classes: a thread's instructions by class, for one unit.
    """
    found = {}
    for chip in CHIPS:
        if chip.architecture == architecture:
            seconds = chip.seconds(classes)
            if variant.product:
                least = variant.product.flop / chip.flops_per_second[variant.product.dtype]
            elif variant.slots:
                least = chip.seconds({"fp32": variant.slots})
            else:
                least = (variant.nbytes or 0.0) / chip.copy_bytes_per_second
            found[chip.name] = round(least / max(least, seconds), 3)
    return found


def measure(variant: Variant, architecture: int) -> dict[str, Any]:
    """Returns the record of one kernel on one architecture; counts are a thread's for one unit."""
    launch = variant.record()
    compiled = compile_launch(launch, architecture)
    product = variant.product
    counts = sass.count(
        compiled.sass,
        compiled.ptx,
        sass.Turns(
            product.inner / launch.arguments[product.step] if product else 1, variant.turns, variant.inner_turns
        ),
        None if product is None else "fma" if product.dtype == "float32" else "tensor cores",
    )
    a_thread = variant.units(launch.arguments) / (32 * compiled.num_warps)  # units
    classes = {name: number / a_thread for name, number in counts.classes.items()}
    return {
        "work": variant.work,
        "kernel": variant.kernel,
        "architecture": architecture,
        "unit": variant.unit,
        "instructions": round(counts.total / a_thread, 2),
        "beside": round(counts.beside / a_thread, 2) if product else None,
        "in_loop": round(counts.loop / a_thread, 2) if product and counts.loop is not None else None,
        "classes": {name: round(number, 2) for name, number in classes.items()},
        "registers": compiled.registers,
        "spilled": compiled.stack + compiled.local,
        "shared": compiled.shared,
        "warps": compiled.num_warps,
        "occupancy": round(occupancy(architecture, compiled.registers, compiled.shared, compiled.num_warps), 3),
        "types": sorted(set(re.findall(r"\bf\d\d", compiled.ttir))),
        "possible": shares(variant, architecture, classes),
    }


def report(records: Sequence[dict[str, Any]]) -> str:
    """Returns the table as text."""
    head = ["kernel", "sm", "per", "instructions", "beside", "in loop", *sass.CLASSES]
    head += ["registers", "spilled", "shared", "occupancy", "at most"]
    rows = []
    for record in records:
        numbers = [record["instructions"], record["beside"], record["in_loop"], *record["classes"].values()]
        rows.append(
            [
                record["work"],
                str(record["architecture"]),
                record["unit"],
                *("" if number is None else f"{number:.1f}" for number in numbers),
                *(str(record[name]) for name in ("registers", "spilled", "shared")),
                f"{record['occupancy']:.0%}",
                ", ".join(f"{name} {share:.0%}" for name, share in record["possible"].items()),
            ]
        )
    return text_table(head, rows)


def chosen(patterns: Sequence[str]) -> list[Variant]:
    """Returns the variants whose work matches one of the patterns, all where there are none.

    Raises:
        InputError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(variant.work, pattern) for variant in variants()):
            raise InputError(
                f'--only must match the name of a kernel, as "SCF loss*" does, got {pattern!r}; see --list'
            )
    return [
        variant
        for variant in variants()
        if not patterns or any(fnmatchcase(variant.work, pattern) for pattern in patterns)
    ]


def checked_architectures(text: str) -> list[int]:
    """Returns the architectures that an argument like "80,90" names.

    Raises:
        InputError: an unknown one.
    """
    unknown = [word for word in split_commas(text) if word not in map(str, ARCHITECTURES)]
    if unknown:
        raise InputError(f"--architectures must be some of {', '.join(map(str, ARCHITECTURES))}, got {unknown[0]}")
    return [int(word) for word in split_commas(text)]


def write_committed(records: Sequence[dict[str, Any]], path: Path = COMMITTED) -> None:
    """Enters the counts and the spills into the committed file, whose other entries stay unless Triton has changed."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("triton") != triton.__version__:
        content = {"triton": triton.__version__, "kernels": []}
    known = {entry["work"]: entry for entry in content["kernels"]}
    for record in records:
        entry = known.setdefault(record["work"], {"work": record["work"], "instructions": {}, "spilled": {}})
        architecture = str(record["architecture"])
        entry["instructions"][architecture] = record["instructions"]
        entry["spilled"].pop(architecture, None)
        if record["spilled"]:
            entry["spilled"][architecture] = record["spilled"]
    kept = [known[variant.work] for variant in variants() if variant.work in known]
    write_json(path, content | {"kernels": kept})


def run_command(patterns: Sequence[str], architectures: Sequence[int], out: Path, update: bool) -> None:
    """Measures, prints and writes the records."""
    records: list[dict[str, Any]] = []
    path = out / "instructions.json"
    content = {"section": "instructions", "environment": environment("cpu"), "complete": False, "records": records}
    for architecture in architectures:
        of_architecture = [measure(variant, architecture) for variant in chosen(patterns)]
        records += of_architecture
        print(report(of_architecture), flush=True)
        write_json(path, content)
    write_json(path, content | {"complete": True})
    print(f"\nWritten: {path}")
    if update:
        write_committed(records)
        print(f"Written: {COMMITTED}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help='names of kernels, with wildcards: "SCF loss*" (default: all)',
    )
    parser.add_argument(
        "--architectures",
        default=",".join(map(str, ARCHITECTURES)),
        help="compute capabilities without the point, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="list the kernels and stop")
    parser.add_argument("--update", action="store_true", help=f"rewrite {COMMITTED.relative_to(ROOT)} too")
    add_out_argument(parser)
    options = parser.parse_args(arguments)

    def act() -> None:
        if options.list:
            print("\n".join(variant.work for variant in variants()))
            return
        run_command(options.only, checked_architectures(options.architectures), options.out, options.update)

    return run(parser.prog, act)


if __name__ == "__main__":
    sys.exit(main())
