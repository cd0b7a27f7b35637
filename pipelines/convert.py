"""Writes a data set in another format: python -m scf_fast.pipelines.convert SRC DST --to recordio|tar|tfrecord|folder

    recordio    DST/train.rec, train.idx, property      as MS1M and Glint360K are shipped
    tar         DST/shard-NNNNNN.tar, property          WebDataset: NNNNNNNNN.jpg and .cls for each image
    tfrecord    DST/NAME-NNNNN.tfrecord, NAME.txt, property
                                                        features "image" and "label"; NAME is DST's own name, NAME.txt
                                                        an index as TFace reads it
    folder      DST/LABEL/NNNNNNNNN.jpg, property       one folder for each identity, named by its number

Image files are copied byte for byte, identities keep their numbers, images are sorted by identity. Images that
python -m scf_fast.pipelines.index SRC --verify recorded as broken are left out. An interrupted conversion continues
where it stopped; at the end everything is read again and compared with the source.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.command import INTERRUPTED, Parser, log_to_terminal, print_lines, run
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import (
    atomic_output,
    publish,
    remove_leftovers,
    write_bytes,
    write_json,
)
from scf_fast.pipelines.formats.mapped_file import map_file
from scf_fast.pipelines.formats.recordio import pack_record, whole_records, write_property
from scf_fast.pipelines.formats.tfrecord import write_shard as write_tfrecords
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loading.decode import read_header
from scf_fast.pipelines.sources.base import ImageSource, SelectedImages
from scf_fast.pipelines.sources.digest import sampled_digest
from scf_fast.pipelines.sources.image_folder import image_path
from scf_fast.pipelines.sources.tar import shard_path
from scf_fast.pipelines.sources.tar import write_shard as write_tar
from scf_fast.pipelines.sources.tfrecord import TFRecordIndex

_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "PPM": ".ppm",
    "TIFF": ".tiff",
    "GIF": ".gif",
}
_STATE = ".conversion.json"
_EXACT_IN_FLOAT = 1 << 24  # RecordIO stores labels as float32


def convert(source: ImageSource, dst: StrPath, to: str, shard_images: int = 10_000) -> int:
    """Writes the images of a source in another format, or continues a conversion, and compares the result.

    Args:
        source: has labels.
        dst: folder; empty, missing, or with an unfinished conversion of the same source.
        to: one of FORMATS.
        shard_images: images in a tar or TFRecord shard.
    Returns:
        images written in all.
    Raises:
        InputError: the folder holds something else, an image has no label or cannot be read, or what was written
            differs from the source.
    """
    dst = Path(dst)
    if to not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {to!r}")
    if source.labels.min(initial=0) < 0:
        raise InputError("every image must have a label to be converted; this source has images without")
    if to == "recordio" and source.num_classes > _EXACT_IN_FLOAT:
        raise InputError(
            f"RecordIO holds labels up to {_EXACT_IN_FLOAT} exactly, the source has {source.num_classes} classes; use "
            "another format"
        )
    order = np.argsort(source.labels, kind="stable")
    images = SelectedImages(source, order[~np.isin(order, source.broken)])
    state = {
        "to": to,
        "images": len(images),
        "classes": source.num_classes,
        "shard_images": shard_images,
        "source": sampled_digest(images, images=16),
    }
    if not _claim(dst, state):
        return len(images)
    write_property(dst, source.num_classes)
    with tqdm(total=len(images), desc=f"writing {to}", unit="img", unit_scale=True, disable=None) as bar:
        _WRITERS[to](images, dst, shard_images, bar.update)
    _compare(images, dst)
    _save_state(dst, {**state, "complete": True})
    return len(images)


def _claim(dst: Path, state: dict[str, Any]) -> bool:
    """Checks that ``dst`` is free or this conversion's, and tells whether there is work left to do in it."""
    dst.mkdir(parents=True, exist_ok=True)
    remove_leftovers(dst)
    if not (dst / _STATE).exists():
        if any(dst.iterdir()):
            raise InputError(
                f"{dst} must be empty or hold an unfinished conversion, it holds other files; give another folder"
            )
        _save_state(dst, state)
        return True
    try:
        found = json.loads((dst / _STATE).read_bytes())
    except ValueError:  # no JSON, or no text
        found = None
    if not isinstance(found, dict) or {**found, "complete": None} != {**state, "complete": None}:
        raise InputError(
            f"{dst} holds the conversion of another source or to another format; give another folder, or delete it"
        )
    return not found.get("complete")


def _save_state(dst: Path, state: dict[str, Any]) -> None:
    write_json(dst / _STATE, state, indent=2)


def _write_recordio(images: ImageSource, dst: Path, _: int, progress: Progress) -> None:
    """Appends the missing records to the unfinished file; record k has the id k."""
    count = len(images)
    if (dst / "train.rec").exists():  # it takes its name when it is complete
        progress(count)
        return
    ends = np.searchsorted(images.labels, np.arange(images.num_classes), side="right") + 1
    partial = dst / "train.rec.partial"
    with open(partial, "ab") as file:
        done, end = whole_records(map_file(partial))
        file.truncate(end)
        progress(min(max(len(done) - 1, 0), count))
        for record in range(len(done), 1 + count + images.num_classes):
            if record == 0:
                packed = pack_record(0, [count + 1, count + 1 + images.num_classes], b"")
            elif record <= count:
                packed = pack_record(record, int(images.labels[record - 1]), images.encoded(record - 1))
                progress(1)
            else:
                label = record - count - 1
                packed = pack_record(record, [ends[label - 1] if label else 1, ends[label]], b"")
            file.write(packed)
    starts, _ = whole_records(map_file(partial))
    with atomic_output(dst / "train.idx") as file:
        file.writelines(f"{record}\t{start}\n".encode() for record, start in enumerate(starts.tolist()))
    publish(partial, dst / "train.rec")


def _missing_shards(
    images: ImageSource, path_of: Callable[[int], Path], shard_images: int, progress: Progress
) -> Iterator[tuple[Path, range]]:
    """Yields (path, positions of its images) for the shards that are not there yet."""
    for number, first in enumerate(range(0, len(images), shard_images)):
        members = range(first, min(first + shard_images, len(images)))
        path = path_of(number)
        if path.exists():
            progress(len(members))
        else:
            yield path, members


def _write_tar(images: ImageSource, dst: Path, shard_images: int, progress: Progress) -> None:
    def entries(members: range) -> Iterator[tuple[str, str, ByteArray, int]]:
        for i in members:
            encoded = images.encoded(i)
            yield f"{i:09d}", _suffix(images, i, encoded), encoded, int(images.labels[i])
            progress(1)

    for path, members in _missing_shards(images, lambda number: shard_path(dst, number), shard_images, progress):
        write_tar(path, entries(members))


def _write_tfrecord(images: ImageSource, dst: Path, shard_images: int, progress: Progress) -> None:
    def entries(members: range) -> Iterator[tuple[ByteArray, int]]:
        for i in members:
            yield images.encoded(i), int(images.labels[i])
            progress(1)

    name = dst.resolve().name
    for path, members in _missing_shards(
        images, lambda number: dst / f"{name}-{number:05d}.tfrecord", shard_images, progress
    ):
        write_tfrecords(path, entries(members))
    files, offsets = TFRecordIndex.open(dst).places()
    with atomic_output(dst / f"{name}.txt") as file:
        file.writelines(
            b"%b\t%d\t%d\t%d\n" % (os.fsencode(name), *place)
            for place in zip(files.tolist(), offsets.tolist(), images.labels.tolist())
        )


def _write_folder(images: ImageSource, dst: Path, _: int, progress: Progress) -> None:
    for identity in filter(Path.is_dir, dst.iterdir()):
        remove_leftovers(identity)
    present = {int(path.stem) for path in dst.glob("*/*") if path.stem.isdigit()}
    for i in range(len(images)):
        if i not in present:
            encoded = images.encoded(i)
            path = image_path(dst, int(images.labels[i]), i, _suffix(images, i, encoded))
            write_bytes(path, encoded.data, sync=False)
        progress(1)


_WRITERS: dict[str, Callable[[ImageSource, Path, int, Progress], None]] = {
    "recordio": _write_recordio,
    "tar": _write_tar,
    "tfrecord": _write_tfrecord,
    "folder": _write_folder,
}
FORMATS = tuple(_WRITERS)


def _suffix(images: ImageSource, i: int, encoded: ByteArray) -> str:
    try:
        return _SUFFIXES[read_header(encoded).format]
    except InputError as error:
        raise InputError(
            f"{images.name(i)} is no image of a known kind ({error}); run `python -m scf_fast.pipelines.index SRC "
            "--verify`, which records broken images so that they are left out, and start again"
        ) from None


def _compare(images: ImageSource, dst: Path) -> None:
    written = open_source(dst)
    same = (
        len(written) == len(images)
        and written.num_classes == images.num_classes
        and np.array_equal(written.labels, images.labels)
    )
    if not same:
        raise InputError(f"{dst} differs from the source in its labels; delete it and start again")
    for i in tqdm(range(len(images)), desc="comparing", unit="img", unit_scale=True, disable=None):
        if not np.array_equal(written.encoded(i), images.encoded(i)):
            raise InputError(
                f"{written.name(i)} differs from {images.name(i)}, which it was copied from: the disk is failing, or "
                f"the source changed; delete {dst} and start again"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = Parser(
        prog="python -m scf_fast.pipelines.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src", metavar="SRC", nargs="+", help="data set in any format; several become one, each with its own identities"
    )
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument(
        "--root", metavar="DIR", help="where names and relative paths in a list start (default: the list's folder)"
    )
    parser.add_argument(
        "--shard-images",
        type=int,
        default=10_000,
        metavar="N",
        help="images in a tar or TFRecord shard (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    log_to_terminal()

    def convert_and_report() -> int:
        if options.shard_images < 1:
            raise InputError(f"--shard-images must be at least 1, got {options.shard_images}")
        source = open_source(options.src, options.root)
        try:
            count = convert(source, options.dst, options.to, options.shard_images)
        except KeyboardInterrupt:
            print_lines(f"stopped; the same command continues with what lies in {options.dst}", file=sys.stderr)
            return INTERRUPTED
        left_out = f", {len(source.broken):,} broken ones left out" if len(source.broken) else ""
        identities = f"{source.num_classes:,} identities"
        print_lines(f"{options.dst}: {count:,} images of {identities}, equal to the source{left_out}")
        return 0

    return run(parser.prog, convert_and_report)


if __name__ == "__main__":
    sys.exit(main())
