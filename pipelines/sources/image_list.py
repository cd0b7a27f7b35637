"""Image lists: text files with a line ``path label`` for each image, as the published SCF code reads them; and MXNet's
``.lst``.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError, UnreadableError
from scf_fast.pipelines.sources.base import read_image_file, reason_of, spread_evenly
from scf_fast.pipelines.sources.digest import fingerprint_of_files
from scf_fast.pipelines.sources.indexed import LARGEST_LABEL, Arrays, IndexedImages, Scan

_CHECKED = 64  # images looked for when the index is made; a stat of millions would take hours on a network mount
_LONGEST_LINE = 1 << 16  # bytes
_BLOCK = 1 << 14  # lines


class ListIndex(IndexedImages):
    """The images that a list names; made by ``ListIndex.open(list_file, root=folder)``.

    A line is a path, white space, and a label, a whole number from 0 on. The path may hold spaces; empty lines are
    skipped. In a ``.lst``, as MXNet's im2rec writes it, a line is a number, a label, possibly more labels, and a path,
    separated by tabs. Relative paths start from ``root``, by default the folder of the list. ``num_classes`` is the
    largest label + 1. The index says where in the list each path lies, 20 bytes an image, so that millions of paths
    cost no memory.
    """

    FORMAT = "image list"

    _text: int | None = None  # descriptor of the list

    def __init__(self, path: StrPath, index_path: StrPath, root: StrPath | None = None):
        super().__init__(path, index_path, root)
        self._base = os.fsencode(self._path.parent if root is None else root)
        self._text = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._text is not None:
            os.close(self._text)

    @classmethod
    def open(cls, path: StrPath, cache_dir: StrPath | None = None, root: StrPath | None = None) -> "ListIndex":
        source = super().open(path, cache_dir, root)
        tried = [source.name(i) for i in spread_evenly(len(source), _CHECKED)]
        if not any(map(os.path.exists, tried)):
            raise InputError(
                f"{path} names {tried[0]} first, and there is no such file, nor {len(tried) - 1} others that it names; "
                "give the folder that its paths start from"
            )
        return source

    def encoded(self, i: int) -> ByteArray:
        return read_image_file(self._file(i))

    def name(self, i: int) -> str:
        return os.fsdecode(self._file(i))

    def _file(self, i: int) -> bytes:
        assert self._text is not None
        try:
            name = os.pread(self._text, int(self._arrays["lengths"][i]), int(self._arrays["offsets"][i]))
        except OSError as error:
            raise UnreadableError(
                f"cannot read {self._path}: {reason_of(error)}; check that the data is still there"
            ) from error
        return os.path.join(self._base, name)

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        offsets, lengths = arrays["offsets"], arrays["lengths"]
        return super()._is_sound(meta, arrays) and bool(
            offsets.dtype == np.int64
            and lengths.dtype == np.uint32
            and offsets.shape == lengths.shape == arrays["labels"].shape
            and 0 <= offsets.min()
            and lengths.max() <= _LONGEST_LINE
        )

    @classmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        return fingerprint_of_files([path])

    @classmethod
    def _scan_size(cls, path: Path) -> int:
        return os.path.getsize(path)

    @classmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        is_lst = path.suffix == ".lst"
        parse = _parse_lst_line if is_lst else _parse_line
        layout = "number, label and path, separated by tabs," if is_lst else "`path label`"
        offsets, lengths, labels = [], [], []
        for number, start, line in read_lines(path, progress):
            try:
                listed = parse(line)
            except ValueError:  # of int() and float(), and of too few parts
                raise InputError(
                    f"{path} line {number} must be {layout} with a whole number as label, got {shown(line)}"
                ) from None
            if not 0 <= listed.label <= LARGEST_LABEL:
                raise InputError(
                    f"{path} line {number} has label {listed.label}; a label must lie in 0..{LARGEST_LABEL}"
                )
            offsets.append(start + listed.start)
            lengths.append(len(listed.path))
            labels.append(listed.label)
        arrays: Arrays = {
            "offsets": np.array(offsets, dtype=np.int64),
            "lengths": np.array(lengths, dtype=np.uint32),
            "labels": np.array(labels, dtype=np.int64),
        }
        return Scan(arrays, {})


class _Listed(NamedTuple):
    """An image as a line lists it."""

    start: int  # byte of the line at which the path starts
    path: bytes
    label: int


def _parse_line(line: bytes) -> _Listed:
    """Parses ``path label``; ValueError where it is something else."""
    path, label = line.strip().rsplit(maxsplit=1)
    return _Listed(line.index(path), path, int(label))


def _parse_lst_line(line: bytes) -> _Listed:
    """Parses a line of a ``.lst``; im2rec writes labels with six decimals."""
    _, label, *_, path = line.rstrip().split(b"\t")
    if not float(label).is_integer():
        raise ValueError
    return _Listed(line.rindex(path), path, int(float(label)))


def read_lines(path: Path, progress: Progress) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, byte at which it starts, line) for the lines of a text file that are not empty; a line beyond
    64 KB comes in pieces.
    """
    end = reported = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), 1):
            start, end = end, end + len(line)
            if number % _BLOCK == 0:
                progress(end - reported)
                reported = end
            if line.strip():
                yield number, start, line


def shown(line: bytes) -> str:
    """Returns a line as an error message quotes it."""
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")
