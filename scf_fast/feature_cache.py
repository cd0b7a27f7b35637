"""What the frozen backbone makes of each image, on disk: computed once, read in every later epoch and by later runs.

    folder/meta.json         what the rows are, which backbone, preprocessing, arithmetic and data they come from, what their dtype loses
    folder/rows-NNNNN.bin    fixed-size records, one an image: both orientations, features float32, convf in the cache's dtype
    folder/checksums.bin     two uint32 an image: CRC-32 of each orientation's half of the record, 0 where it is missing
    folder/writing-R         there while rank R has the cache open for writing

A record counts as present only when its checksums have been stored, after the record itself, and is compared with them
when a run first reads it. A run that dies leaves its ``writing`` mark, and the next one to open the cache then checks
every record. ``python -m scf_fast.feature_cache --help`` builds, shows and checks.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scf_fast import distributed
from scf_fast.errors import InputError
from scf_fast.features.store import FeatureCache, layout_of, read_meta

log = logging.getLogger(__name__)


def _build(arguments, flags) -> None:
    """One pass over the data, no training."""
    from scf_fast.features.feature_pass import FeaturePass
    from scf_fast.features.open import open_stream
    from scf_fast.pipelines.sampling.sampler import EpochSampler

    folder = arguments.folder
    inputs = FeaturePass([*flags, "--feature_cache", str(folder)], folder)
    source = inputs.source
    runtime, size = inputs.start()
    sampler = EpochSampler(
        len(source), size, rank=runtime.rank, world_size=runtime.world_size, shuffle=False, last_batch="partial"
    )
    with (
        open_stream(inputs.config, inputs.backbone.backbone, source, sampler, runtime) as stream,
        tqdm(total=len(source), unit="img", unit_scale=True, desc="features", disable=not runtime.is_main) as bar,
    ):
        for batch, _ in enumerate(stream.batches(0)):
            bar.update(min(size, len(source) - batch * size))
    distributed.finish()
    if stream.cache.problem is not None:
        raise InputError(
            f"--feature_cache {folder}: cannot be written ({stream.cache.problem.strerror}); what is there is good, "
            "the same command goes on"
        )


def _info(arguments, _) -> None:
    meta = read_meta(arguments.folder)
    layout = layout_of(meta)
    present = int(
        np.count_nonzero(np.fromfile(arguments.folder / "checksums.bin", np.uint32).reshape(-1, 2).all(axis=1))
    )
    print(f"images     {present} of {layout.num_images} ({100 * present / layout.num_images:.1f} %), both orientations")
    print(
        f"record     features {layout.z_dim} float32, convf {'x'.join(map(str, layout.convf_shape))} {layout.dtype}, "
        f"{layout.record_bytes} bytes"
    )
    print(f"size       {layout.total_bytes / 1e9:.2f} GB")
    print(f"difference {meta['convf_error']:.1e} of convf, relative to what the backbone gives")
    for name, value in meta["key"].items():
        print(f"{name:<10} {value}")
    if list(arguments.folder.glob("writing-*")):
        print("state      open for writing now, or left so by a run that died; the next run checks it")


def _verify(arguments, _) -> None:
    cache = FeatureCache(arguments.folder, layout_of(read_meta(arguments.folder)), 0)
    bad = cache.verify()
    present = int(cache.present.sum())
    cache.close()
    print(f"{present} intact records, {bad} damaged ones marked as missing; the next run computes them anew")
    if bad:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.feature_cache", description="Build, show and check a feature cache for stage 2."
    )
    commands = parser.add_subparsers(required=True, metavar="build|info|verify")
    build = commands.add_parser(
        "build",
        help="compute the features of a whole data set; also under the deepspeed launcher or torchrun",
        usage="%(prog)s FOLDER --data DIR --saved_bkb FILE [flags of train.py: --cache_dtype, --cache_budget, "
        "--precision ...]",
    )
    build.add_argument("folder", type=Path)
    build.set_defaults(run=_build)
    for name, action, text in (
        ("info", _info, "what is in it"),
        ("verify", _verify, "check every record against its checksum; exit status 1 if any was bad"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        command.set_defaults(run=action)
    arguments, rest = parser.parse_known_args()
    if rest and arguments.run is not _build:
        parser.exit(2, f"{parser.prog}: error: unknown argument {rest[0]}\n")
    try:
        arguments.run(arguments, rest)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
    distributed.leave(0)
