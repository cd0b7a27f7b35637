"""Shows and converts weight files of every family.

    python -m scf_fast.checkpoints inspect FILE
    python -m scf_fast.checkpoints convert IN OUT --to published|tface|insightface|scf_fast|safetensors

A file is a backbone, class centers, a confidence net, or several of these, recognized by the names of its tensors; code
in it is never run. The folders that a run resumes from belong to :mod:`scf_fast.run.checkpoints`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from scf_fast.command import Parser, print_lines, run
from scf_fast.errors import InputError
from scf_fast.networks.confidence import DEFAULT_RADIUS
from scf_fast.weights.contents import Facts, Part
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import LAYOUTS, write_weights

_FILES = "a file; several that belong together as a comma-separated list, a pattern or a folder"


def _inspect(options: argparse.Namespace) -> None:
    weights = read_weights(options.source)
    facts = [f"{name} {value}" for name, value in weights.facts.known().items()]
    other = [f"{len(state)} tensors of no known kind, such as {next(iter(state))}" for state in weights.other]
    print_lines(*weights.describe(), *facts, *other)


def _convert(options: argparse.Namespace) -> None:
    weights = read_weights(options.source)
    if options.target.exists() and not options.overwrite:
        raise InputError(f"{options.target}: exists; give another name, or --overwrite")
    if options.part:
        weights = weights.only(Part(options.part))
    weights = replace(weights, facts=weights.facts.completed_by(Facts(radius=options.radius)))
    write_weights(weights, options.target, options.to)
    print_lines(f"{options.target}: {' and '.join(weights.describe())}, as {options.to}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scf_fast.checkpoints",
        description="Show what is in a weight file, or write the same weights for other code.",
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|convert")
    inspect = commands.add_parser("inspect", help="show what a file holds")
    inspect.add_argument("source", metavar="FILE", help=_FILES)
    inspect.set_defaults(action=_inspect)
    convert = commands.add_parser(
        "convert", help="write the weights as other code names them, bit for bit; optimizer states are left out"
    )
    convert.add_argument("source", metavar="IN", help=_FILES)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=tuple(LAYOUTS), help="the code that shall read it")
    convert.add_argument("--part", choices=[part.value for part in Part], help="write this part alone")
    convert.add_argument(
        "--radius", type=float, help=f"radius of a model whose file does not say it [{DEFAULT_RADIUS:g}]"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    convert.set_defaults(action=_convert)
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: options.action(options))


if __name__ == "__main__":
    sys.exit(main())
