"""Builds, shows and checks a feature cache for stage 2.

    python -m scf_fast.feature_cache build FOLDER --data DATA --saved_bkb FILE [flags of train.py]
    python -m scf_fast.feature_cache info|verify FOLDER

:mod:`scf_fast.features.store` says how a cache lies on the disk.
"""

from pathlib import Path

from scf_fast import distributed
from scf_fast.command import Parser, print_lines, run
from scf_fast.command_line import parse_feature_pass
from scf_fast.features.feature_pass import FeaturePass, fill_cache
from scf_fast.features.store import FeatureCache, count_present, read_meta
from scf_fast.features.write_marks import is_marked


def _build(folder: Path, flags: list[str]) -> None:
    try:
        fill_cache(FeaturePass(parse_feature_pass(flags, folder, feature_cache=str(folder))))
    finally:
        distributed.finish()


def _show(folder: Path) -> None:
    meta = read_meta(folder)
    layout, present = meta.layout, count_present(folder)
    print_lines(
        f"images     {present} of {layout.num_images} ({100 * present / layout.num_images:.1f} %), both orientations"
    )
    print_lines(
        f"record     features {layout.z_dim} float32, convf {'x'.join(map(str, layout.convf_shape))} {layout.dtype}, "
        f"{layout.record_bytes} bytes"
    )
    print_lines(f"size       {layout.total_bytes / 1e9:.2f} GB")
    print_lines(f"difference {meta.convf_error:.1e} of convf, relative to the backbone's output")
    for name, value in vars(meta.key).items():
        print_lines(f"{name:<10} {value}")
    if is_marked(folder):
        print_lines("state      open for writing now, or left so by a run that died; the next run checks it")


def _verify(folder: Path) -> int:
    cache = FeatureCache(folder, read_meta(folder).layout, 0)
    bad = cache.verify()
    present = int(cache.present.sum())
    cache.close()
    print_lines(f"{present} intact records, {bad} damaged ones marked as missing; the next run computes them again")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scf_fast.feature_cache", description="Build, show and check a feature cache for stage 2."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="build|info|verify")
    commands.add_parser(
        "build",
        help="compute the features of a whole data set; also under the deepspeed launcher or torchrun",
        usage="%(prog)s FOLDER --data DIR --saved_bkb FILE [flags of train.py: --cache_dtype, --cache_budget, "
        "--precision ...]",
    )
    commands.add_parser("info", help="show what is in it")
    commands.add_parser("verify", help="check every record against its checksums; exit status 1 if any was damaged")
    for command in commands.choices.values():
        command.add_argument("folder", type=Path)
    options, flags = parser.parse_known_args(arguments)
    if flags and options.command != "build":
        parser.error(f"unknown argument {flags[0]}")
    if options.command == "build":
        return run(parser.prog, lambda: _build(options.folder, flags))
    return run(parser.prog, lambda: _show(options.folder) if options.command == "info" else _verify(options.folder))


if __name__ == "__main__":
    distributed.leave(main())
