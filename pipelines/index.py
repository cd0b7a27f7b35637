"""Opens any data set by its path, and reports on one: ``python -m scf_fast.pipelines.index DATA [--verify]``."""

import collections
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from tqdm import tqdm

from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.command import Parser, log_to_terminal, print_lines, run
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.file_kinds import Wanted, recognize, refusal
from scf_fast.pipelines.loading.decode import load_face, read_header
from scf_fast.pipelines.sources.base import ConcatenatedSources, ImageSource, reason_of, spread_evenly
from scf_fast.pipelines.sources.image_folder import FolderIndex
from scf_fast.pipelines.sources.image_list import ListIndex
from scf_fast.pipelines.sources.image_names import is_hidden
from scf_fast.pipelines.sources.indexed import IndexedImages
from scf_fast.pipelines.sources.packed import PackedImages
from scf_fast.pipelines.sources.recordio import RecordIndex
from scf_fast.pipelines.sources.tar import TarIndex
from scf_fast.pipelines.sources.tfrecord import TFRecordIndex, TFRecordList, is_tfrecord_list
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, add_timeout_argument, in_processes

_SAMPLE = 2000  # images whose headers the report reads where not all are decoded
_CHUNK = 256  # images in a task of --verify
_SHOWN = 20  # broken images named in the report
# A folder that holds several of these kinds is the first of them.
_KINDS: dict[str, type[PackedImages]] = {".rec": RecordIndex, ".tar": TarIndex, ".tfrecord": TFRecordIndex}


@overload
def open_source(path: StrPath, root: StrPath | None = None, cache_dir: StrPath | None = None) -> IndexedImages: ...
@overload
def open_source(
    path: Sequence[StrPath], root: StrPath | None = None, cache_dir: StrPath | None = None
) -> ImageSource: ...
def open_source(
    path: StrPath | Sequence[StrPath], root: StrPath | None = None, cache_dir: StrPath | None = None
) -> ImageSource:
    """Opens the images at ``path``, whatever their format; the first time they are scanned, and an index is kept.

    Args:
        path: one of
            a ``.rec`` file, or a folder with ``train.rec``, or with other ``.rec`` files that are parts of one set
            (RecordIndex); a ``.tar`` file, or a folder of them (TarIndex); a ``.tfrecord`` file, or a folder of them,
            with labels in the records (TFRecordIndex); a text file with lines ``name shard offset label`` separated by
            tabs (TFRecordList), or with lines ``path label`` (ListIndex); a folder with a folder of image files for
            each identity (FolderIndex); or a list or tuple of such paths: several data sets, each with its own
            identities (ConcatenatedSources).
        root: folder from which names and relative paths in a text file start; by default its own.
        cache_dir: folder for the index; by default beside the data, see IndexedImages.open.
    Raises:
        InputError: nothing is there, or nothing of a known format; or the data is damaged.
    """
    if not isinstance(path, (list, tuple)):
        assert isinstance(path, (str, os.PathLike))
        return _open_indexed(path, root, cache_dir)
    if not path:
        raise InputError("there must be at least one data set, got none")
    sources = [open_source(one, root, cache_dir) for one in path]
    return sources[0] if len(sources) == 1 else ConcatenatedSources(sources)


def _open_indexed(path: StrPath, root: StrPath | None, cache_dir: StrPath | None) -> IndexedImages:
    if not os.fspath(path):  # which Path would take for the current folder
        raise InputError("the path of a data set must not be empty; give the path")
    path = Path(path)
    if not path.exists() and path.suffix not in _KINDS:
        raise InputError(f"there is no data set at {path}; check the path")
    return _kind(path).open(path, cache_dir, root)


def _kind(path: Path) -> type[IndexedImages]:
    if not path.is_dir():
        return _KINDS.get(path.suffix) or _kind_of_file(path)
    try:
        with os.scandir(path) as listed:
            entries = list(listed)
    except OSError as error:
        raise InputError(f"cannot list {path}: {reason_of(error)}; check its permissions") from error
    entries = [entry for entry in entries if not is_hidden(entry.name)]
    packed = _packed_kind(entries)
    if packed is not None:
        return packed
    if any(entry.is_dir() for entry in entries):
        return FolderIndex
    files = sorted(entry.path for entry in entries if entry.is_file())
    found = refusal(files[0], Wanted.DATA) if files else None
    raise InputError(
        f"{path} must hold train.rec, .tar or .tfrecord shards, or a folder of images for each identity; check the "
        "path, or give the file of an image list; python -m scf_fast.embed scores pictures without identities"
        + (f" ({os.path.basename(files[0])} {found})" if found else "")
    )


def _packed_kind(entries: Sequence[os.DirEntry[str]]) -> type[PackedImages] | None:
    """Returns the source of the large files in a folder; None where there are none."""
    for suffix, kind in _KINDS.items():
        if any(entry.name.endswith(suffix) and entry.is_file() for entry in entries):
            return kind
    return None


def holds_shards_alone(path: StrPath) -> bool:
    """Tells whether a folder holds ``.rec``, ``.tar`` or ``.tfrecord`` files and no folders, hidden ones aside."""
    with os.scandir(path) as listed:
        entries = [entry for entry in listed if not is_hidden(entry.name)]
    return not any(entry.is_dir() for entry in entries) and _packed_kind(entries) is not None


def _kind_of_file(path: Path) -> type[IndexedImages]:
    """Returns the source of a file whose name does not say what it is."""
    try:
        kind = recognize(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}; check the path") from error
    for source in _KINDS.values():
        if source.KIND is kind:
            return source
    if not kind.is_text:
        raise InputError(f"{path} is {kind.name}, no data set; {kind.advice(Wanted.DATA)}")
    return TFRecordList if is_tfrecord_list(path) else ListIndex


def describe(source: IndexedImages) -> list[str]:
    """Reports what is in a source, as lines of text; reads the headers of up to 2000 images, evenly spread."""
    used = np.unique(source.labels, return_counts=True)[1]
    lines = [
        f"format                 {source.FORMAT}",
        f"images                 {len(source):,}",
        f"identities             {len(used):,} with images, {source.num_classes - len(used):,} numbers without",
        f"images per identity    {used.min():,} to {used.max():,}, median {np.median(used):g}, mean {used.mean():.1f}",
        *(f"skipped                {count:,} {reason}" for reason, count in source.skipped.items() if count),
        *source.remarks(),
    ]
    kinds: collections.Counter[str] = collections.Counter()
    bad: collections.Counter[str] = collections.Counter()
    sizes = []
    sample = spread_evenly(len(source), _SAMPLE)
    for i in sample:
        try:
            encoded = source.encoded(i)
            header = read_header(encoded)
        except InputError as error:
            bad[str(error).replace(source.name(i), "").strip()] += 1
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


def find_broken(source: ImageSource, workers: int | None = None, timeout: float = DEFAULT_TIMEOUT) -> dict[int, str]:
    """Decodes every image, in ``workers`` processes (one for each core by default).

    Args:
        timeout: seconds without progress, see :mod:`scf_fast.pipelines.waiting`.
    Returns:
        position -> message of the broken ones, ascending.
    Raises:
        InputError: a process has died, or none of them makes progress.
    """
    workers = workers or len(os.sched_getaffinity(0))
    starts = range(0, len(source), _CHUNK)
    broken: dict[int, str] = {}
    parts = in_processes(
        _broken_from,
        starts,
        workers,
        who="the search for broken images",
        doing="decode images",
        timeout=timeout,
        initializer=_set_source,
        initargs=(source,),
    )
    with (
        contextlib.closing(parts),
        tqdm(total=len(source), desc="decoding", unit="img", unit_scale=True, disable=None) as bar,
    ):
        for looked_at, found in parts:
            broken.update(found)
            bar.update(looked_at)
    return dict(sorted(broken.items()))


_source: ImageSource  # of a worker process of find_broken


def _set_source(source: ImageSource) -> None:
    global _source
    _source = source


def _broken_from(start: int) -> tuple[int, dict[int, str]]:
    """Returns how many images a task has, and which of them are broken."""
    found, images = {}, range(start, min(start + _CHUNK, len(_source)))
    for i in images:
        try:
            _source.check(i)
            load_face(_source, i)
        except InputError as error:
            found[i] = str(error)
    return len(images), found


def _check_offsets_file(source: RecordIndex, rec_path: Path) -> str:
    """Reports in a line on the ``.idx`` beside a ``.rec``: it is not used, but other programs will read it."""
    path = rec_path.with_suffix(".idx")
    if not path.exists():
        return f"{path.name:<23}missing; not needed"
    columns = path.read_bytes().split()[1::2]  # lines of 'id offset'
    try:
        listed = np.array(columns, dtype=np.int64)
    except ValueError:  # a column that is no number
        listed = np.empty(0, dtype=np.int64)
    missing = int(np.count_nonzero(~np.isin(source.offsets_in(rec_path), listed)))
    verdict = f"wrong: {missing:,} images are not where it says; not used" if missing else "agrees; not used"
    return f"{path.name:<23}{verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = Parser(prog="python -m scf_fast.pipelines.index", description="Index a face data set and report on it.")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a .rec file or a folder with train.rec; .tar or .tfrecord shards or their folder; a list of images "
        "or of TFRecords; or a folder with a folder of images for each identity",
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
    parser.add_argument("--workers", type=int, metavar="W", help="processes that decode (default: one for each core)")
    add_timeout_argument(parser)
    options = parser.parse_args(arguments)
    log_to_terminal()

    def report() -> int:
        if (options.workers or 0) < 0:
            raise InputError(f"--workers must be at least 1, got {options.workers}")

        source, found = open_source(options.data, options.root, options.cache_dir), {}
        if options.verify:
            found = find_broken(source, options.workers, options.input_timeout)
            source.record_broken(list(found))
            source = open_source(options.data, options.root, options.cache_dir)
        print_lines(*describe(source))
        if isinstance(source, RecordIndex):
            for path in source.rec_paths:
                print_lines(_check_offsets_file(source, path))
        for message in list(found.values())[:_SHOWN]:
            print_lines(f"broken                 {message}")
        if len(found) > _SHOWN:
            print_lines(f"broken                 ... and {len(found) - _SHOWN:,} more")
        return 1 if found else 0

    return run(parser.prog, report)


if __name__ == "__main__":
    sys.exit(main())
