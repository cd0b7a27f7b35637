"""Opens any data set by its path, and says what is in one: `python -m scf_fast.pipelines.index DATA [--verify]`."""

import argparse
import collections
import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loading.decode import load_face, read_header
from scf_fast.pipelines.sources.base import ConcatenatedSources
from scf_fast.pipelines.sources.image_folder import FolderIndex
from scf_fast.pipelines.sources.image_list import ListIndex
from scf_fast.pipelines.sources.recordio import RecordIndex
from scf_fast.pipelines.sources.tar import TarIndex
from scf_fast.pipelines.sources.tfrecord import TFRecordIndex, TFRecordList, is_tfrecord_list

_SAMPLE = 2000  # images whose headers the report reads where not all are decoded
_CHUNK = 256  # images a task of --verify
_SHOWN = 20  # broken images named in the report
_KINDS = {
    ".rec": RecordIndex,
    ".tar": TarIndex,
    ".tfrecord": TFRecordIndex,
}  # a folder of several kinds is the first of them


def open_source(path, root=None, cache_dir=None):
    """The images at `path`, whatever format they are in; the first time they are scanned, and an index is kept.

    Args:
        path: one of
            a `.rec` file, or a folder with `train.rec`, or with other `.rec` files that are parts of one set
            (RecordIndex); a `.tar` file, or a folder of them (TarIndex); a `.tfrecord` file, or a folder of them, with
            labels in the records (TFRecordIndex); a text file with lines `name shard offset label` between tabs
            (TFRecordList), or with lines `path label` (ListIndex); a folder of one folder of image files for each
            identity (FolderIndex); or a list or tuple of such paths: several data sets, each with its own identities
            (ConcatenatedSources).
        root: folder that names and relative paths in a text file start from; by default its own.
        cache_dir: folder for the index; by default beside the data, see IndexedImages.open.
    Returns:
        ImageSource.
    Raises:
        ValueError: nothing is there, or nothing that is known; or the data is damaged.
    """
    if isinstance(path, (list, tuple)):
        if not path:
            raise InputError("there must be at least one data set, got none")
        sources = [open_source(one, root, cache_dir) for one in path]
        return sources[0] if len(sources) == 1 else ConcatenatedSources(sources)
    path = Path(path)
    if not path.exists() and path.suffix not in _KINDS:
        raise InputError(f"there is no data set at {path}; check the path")
    return _kind(path).open(path, cache_dir, root)


def _kind(path):
    if not path.is_dir():
        return _KINDS.get(path.suffix) or (TFRecordList if is_tfrecord_list(path) else ListIndex)
    try:
        with os.scandir(path) as entries:
            entries = list(entries)
    except OSError as error:
        raise InputError(f"cannot list {path}: {os.strerror(error.errno)}; check its permissions") from error
    for suffix, kind in _KINDS.items():
        if any(entry.name.endswith(suffix) and entry.is_file() for entry in entries):
            return kind
    if any(entry.is_dir() for entry in entries):
        return FolderIndex
    raise InputError(
        f"{path} must hold train.rec, .tar or .tfrecord shards, or a folder of images for each identity; to use an "
        "image list, give the file; "
        "check the path"
    )


def describe(source):
    """What is in an indexed source, as lines of text; reads the headers of up to 2000 images, evenly spread.

    Args:
        source: IndexedImages.
    Returns:
        list of str.
    """
    used = np.unique(source.labels, return_counts=True)[1]
    lines = [
        f"format                 {source.FORMAT}",
        f"images                 {len(source):,}",
        f"identities             {len(used):,} with images, {source.num_classes - len(used):,} numbers without",
        f"images per identity    {used.min():,} to {used.max():,}, median {np.median(used):g}, mean {used.mean():.1f}",
        *(f"skipped                {count:,} {reason}" for reason, count in source.skipped.items() if count),
    ]
    kinds, sizes, bad = collections.Counter(), [], collections.Counter()
    sample = np.unique(np.linspace(0, len(source) - 1, num=min(_SAMPLE, len(source)), dtype=np.int64)).tolist()
    for i in sample:
        try:
            encoded = source.encoded(i)
            header = read_header(encoded)
        except ValueError as error:
            bad[_reason(source, i, error)] += 1
            continue
        kinds[f"{header.format} {header.width} x {header.height}"] += 1
        sizes.append(len(encoded))
    where = "" if len(sample) == len(source) else f" (of {len(sample):,} looked at)"
    if sizes:
        lines.append(f"bytes an image         {min(sizes):,} to {max(sizes):,}, mean {np.mean(sizes):,.0f}{where}")
    lines += [f"kind                   {count:,} {kind}{where}" for kind, count in kinds.most_common(8)]
    lines += [f"unreadable             {count:,} {reason}{where}" for reason, count in bad.most_common(8)]
    lines.append(
        f"broken                 {len(source.broken):,} of {len(source):,}"
        if source.verified
        else "broken                 not known; --verify decodes every image"
    )
    return lines


def find_broken(source, workers=None):
    """Decode every image.

    Args:
        source: ImageSource.
        workers: int, processes; by default one a core.
    Returns:
        dict of position -> message, ascending.
    """
    workers = workers or len(os.sched_getaffinity(0))
    starts = range(0, len(source), _CHUNK)
    broken = {}
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _set_source, (source,)) as pool,
        tqdm(total=len(source), desc="decoding", unit="img", unit_scale=True, disable=None) as bar,
    ):
        for start, found in zip(starts, pool.map(_broken_from, starts)):
            broken.update(found)
            bar.update(min(_CHUNK, len(source) - start))
    return broken


def _set_source(source):
    global _source
    _source = source


def _broken_from(start):
    found = {}
    for i in range(start, min(start + _CHUNK, len(_source))):
        try:
            _source.check(i)
            load_face(_source, i)
        except ValueError as error:
            found[i] = str(error)
    return found


def _reason(source, i, error):
    """An error's message without the image's name."""
    return str(error).replace(source.name(i), "").strip()


def _check_offsets_file(source, rec_path):
    """One line on the `.idx` beside a `.rec`: it is not used, but other programs will read it."""
    path = Path(rec_path).with_suffix(".idx")
    if not path.exists():
        return f"{path.name:<23}missing; not needed"
    columns = path.read_bytes().split()[1::2]  # lines of 'id offset'
    try:
        listed = np.array(columns, dtype=np.int64)
    except ValueError:
        listed = np.empty(0, dtype=np.int64)
    missing = int(np.count_nonzero(~np.isin(source.offsets_in(rec_path), listed)))
    return f"{path.name:<23}" + (
        f"wrong: {missing:,} images are not where it says; not used" if missing else "agrees; not used"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.pipelines.index", description="Index a face data set and say what is in it."
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a .rec file or a folder with train.rec; .tar or .tfrecord shards or their folder; a list of images "
        "or of TFRecords; or a folder of one folder of images for each identity",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="where names and relative paths in a list start (default: the list's folder)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="where the index goes (default: beside the data)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="decode every image and record the broken ones, which training then replaces; "
        "exit status 1 if there are any",
    )
    parser.add_argument("--workers", type=int, metavar="W", help="processes that decode (default: one a core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        source = open_source(options.data, options.root, options.cache_dir)
        found = {}
        if options.verify:
            found = find_broken(source, options.workers)
            source.record_broken(list(found))
            source = open_source(options.data, options.root, options.cache_dir)
        print("\n".join(describe(source)))
        if isinstance(source, RecordIndex):
            print("\n".join(_check_offsets_file(source, path) for path in source.rec_paths))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for message in list(found.values())[:_SHOWN]:
        print(f"broken                 {message}")
    if len(found) > _SHOWN:
        print(f"broken                 ... and {len(found) - _SHOWN:,} more")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
