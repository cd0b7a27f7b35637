"""Writes a synthetic face data set in the file formats that real ones are shipped in.

    OUT/train/            training records as MS1M and Glint360K ship them, and each picture's severity
    OUT/verification/     pairs as insightface ships lfw.bin: clean.bin, and mixed.bin with degraded pictures
    OUT/templates/        a template protocol in IJB-C's layout, 1:1 and 1:N
    OUT/contact_sheet.png a look at the pictures
    OUT/manifest.json     parameters and counts, written last: where it lies, the set is complete

The faces are drawn, no picture of any person went into them, and each picture is degraded by a known severity. It is a
function of the seed, its identity and its number alone: neither the size of the set nor the number of processes changes
it, and an interrupted set is completed by the same command.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from scf_fast.pipelines.command import Parser, print_lines, run
from scf_fast.pipelines.synthetic.dataset import write_synthetic_set
from scf_fast.pipelines.synthetic.pictures import Parameters
from scf_fast.pipelines.waiting import add_timeout_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(
        prog="python -m scf_fast.pipelines.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Parameters()
    parser.add_argument(
        "out", metavar="OUT", help="folder to write; an interrupted set is completed, a complete one is left as it is"
    )
    parser.add_argument(
        "--identities",
        type=int,
        metavar="N",
        default=defaults.identities,
        help="training identities (default: %(default)s)",
    )
    parser.add_argument(
        "--images-per-identity",
        type=int,
        metavar="M",
        default=defaults.images_per_identity,
        help="training pictures of each (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-identities",
        type=int,
        metavar="E",
        default=defaults.eval_identities,
        help="further identities for the evaluation sets, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        default=defaults.seed,
        help="another seed gives other faces (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="W", help="processes (default: one a core); the pictures do not depend on it"
    )
    add_timeout_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace whatever set OUT holds")
    options = parser.parse_args(arguments)

    return run(parser.prog, lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    parameters = Parameters(options.identities, options.images_per_identity, options.eval_identities, options.seed)
    try:
        manifest = write_synthetic_set(
            options.out,
            parameters,
            workers=options.workers,
            overwrite=options.overwrite,
            timeout=options.input_timeout,
        )
    except KeyboardInterrupt:
        print_lines(f"the same command goes on with what lies in {options.out}", file=sys.stderr)
        raise
    print_lines(f"{options.out}: {json.dumps(manifest['counts'])}")


if __name__ == "__main__":
    sys.exit(main())
