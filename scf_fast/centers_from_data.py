"""Computes class centers from the images of their identities, for a backbone that has lost its own.

    center_c = s_c / |s_c|,   s_c = sum of x / |x| over the features x of the images of identity c
                              and, unless --no_flip, of their mirror images

Stage 2 needs class centers, and released backbones come without. This mean direction is the maximum-likelihood estimate
of mu of a von Mises-Fisher distribution (Mardia and Jupp, Directional Statistics, section 10.3). The centers that a
margin softmax trains are others: their own images pull at them by how badly they fit, the other identities push.
"""

import argparse
from pathlib import Path

from scf_fast import distributed
from scf_fast.command import Parser, print_lines, run
from scf_fast.command_line import parse_feature_pass
from scf_fast.errors import InputError
from scf_fast.features.feature_pass import FeaturePass
from scf_fast.features.mean_directions import compute_mean_directions
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.writing import write_weights


def _compute(output: Path, overwrite: bool, flags: list[str]) -> None:
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; give another name, or --overwrite")
    inputs = FeaturePass(parse_feature_pass(flags, output.parent))
    found = compute_mean_directions(inputs)
    if found is None:
        return
    facts = Facts(normalization=inputs.config.normalization)
    write_weights(Weights(str(output), class_centers=found.centers, facts=facts), output)
    print_lines(
        f"{output}: class centers of {len(found.centers)} identities; mean cosine of an image with its center "
        f"{found.cosine:.3f}" + (f"; {found.broken} broken images left out" if found.broken else "")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scf_fast.centers_from_data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        allow_abbrev=False,
        usage="%(prog)s --data DATA --saved_bkb FILE --output fc.pth [flags of train.py: --feature_cache, "
        "--precision, --normalization, --no_flip ...]",
        epilog="Also under the deepspeed launcher or torchrun. With --feature_cache each image is decoded once, and "
        "stage 2 finds the cache filled.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="where the class centers go; --saved_fc of stage 2"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    options, flags = parser.parse_known_args(arguments)
    try:
        return run(parser.prog, lambda: _compute(options.output, options.overwrite, flags))
    finally:
        distributed.finish()


if __name__ == "__main__":
    distributed.leave(main())
