"""Weight files of every family: read with nothing but tensors let in, recognized by their keys, written complete or not
at all.

    python -m scf_fast.checkpoints inspect FILE
    python -m scf_fast.checkpoints convert IN OUT --to published|tface|insightface|scf_fast|safetensors

A file is a backbone, class centers, a confidence net, or several of these (:class:`Weights`); what its layout calls
them is in :func:`read` and :data:`LAYOUTS`. The folders that a run resumes from belong to
:mod:`scf_fast.run.checkpoints`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from scf_fast.errors import InputError
from scf_fast.weights.reading import _DEFAULT_RADIUS, Weights, read
from scf_fast.weights.writing import LAYOUTS, write


def backbone_state(spec: str | Path, flag: str = "--saved_bkb") -> dict[str, torch.Tensor]:
    """The backbone in a weight file of any family, under the names of :class:`scf_fast.networks.backbones.Backbone`;
    see :func:`read`.
    """
    return read(spec, flag).only("backbone").backbone


def class_centers(spec: str | Path, flag: str = "--saved_fc") -> torch.Tensor:
    """(C, z_dim) float32 class centers in weight files of any family, unnormalized; see :func:`read`."""
    return read(spec, flag).usable_class_centers()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.checkpoints",
        description="What is in a weight file, and the same weights for other code.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    files = "a file; several that belong together as a comma-separated list, a pattern or a folder"
    inspect = commands.add_parser("inspect", help="say what a file holds")
    inspect.add_argument("source", metavar="FILE", help=files)
    convert = commands.add_parser(
        "convert", help="write the weights as other code names them, bit for bit; optimizer states are left out"
    )
    convert.add_argument("source", metavar="IN", help=files)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=tuple(LAYOUTS), help="whose layout")
    convert.add_argument("--part", choices=Weights.PARTS, help="write this part alone")
    convert.add_argument(
        "--radius", type=float, help=f"radius of a model whose file does not say it [{_DEFAULT_RADIUS:g}]"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    options = parser.parse_args(arguments)
    try:
        weights = read(options.source)
        if options.command == "inspect":
            facts = [f"{key} {value}" for key, value in weights.facts.items()]
            other = [f"{len(state)} tensors of no known kind, such as {next(iter(state))}" for state in weights.other]
            print("\n".join([*weights.describe(), *facts, *other]))
            return 0
        if options.target.exists() and not options.overwrite:
            raise InputError(f"{options.target}: exists; give another name, or --overwrite")
        if options.part:
            weights = weights.only(options.part)
        if options.radius is not None:
            weights = replace(weights, facts={"radius": options.radius, **weights.facts})
        write(weights, options.target, options.to)
        print(f"{options.target}: {' and '.join(weights.describe())}, as {options.to}")
        return 0
    except (ValueError, OSError, SafetensorError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
