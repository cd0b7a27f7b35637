"""Image lists: text files with a line ``path label`` for each image, as the published SCF code reads them; and the
``.lst`` of MXNet and of insightface.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError, UnreadableError
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.formats.text_file import LONGEST_LINE, read_lines
from scf_fast.pipelines.sources.base import read_image_file, reason_of, spread_evenly
from scf_fast.pipelines.sources.digest import fingerprint_of_text
from scf_fast.pipelines.sources.indexed import LARGEST_LABEL, Arrays, IndexedImages, Scan
from scf_fast.pipelines.text import shown

_CHECKED = 64  # images looked for when the index is made; a stat of millions would take hours on a network mount
_SHOWN = 80  # characters of a line in a message


class ListIndex(IndexedImages):
    """The images that a list names; made by ``ListIndex.open(list_file, root=folder)``.

    A line is a path, white space or a comma, and a label, a whole number from 0 on. The path may hold spaces; empty
    lines are skipped. A line of columns separated by tabs may also be a number, a label, possibly more labels, and a
    path, as in a ``.lst`` of MXNet's im2rec; or a flag that says whether the face is aligned, a path, and a label, as
    in a ``.lst`` of insightface. The first line decides. Relative paths start from ``root``, by default the folder of
    the list. ``num_classes`` is the largest label + 1. The index says where in the list each path lies, 20 bytes an
    image, so that millions of paths cost no memory.
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
                + source._advice()
            )
        return source

    def _advice(self) -> str:
        """Returns what to do where no path leads to a file."""
        first = self._listed(0)
        if b"\\" in first:
            return "its paths have backslashes, as on Windows: write them with / instead"
        if os.path.isabs(first):
            return "its paths are absolute, of another machine: cut off what differs, and give the folder of the rest"
        return "give the folder that its paths start from"

    def encoded(self, i: int) -> ByteArray:
        return read_image_file(self._file(i))

    def name(self, i: int) -> str:
        return os.fsdecode(self._file(i))

    def _file(self, i: int) -> bytes:
        return os.path.join(self._base, self._listed(i))

    def _listed(self, i: int) -> bytes:
        """Returns path i as it stands in the list."""
        assert self._text is not None
        try:
            return os.pread(self._text, int(self._arrays["lengths"][i]), int(self._arrays["offsets"][i]))
        except OSError as error:
            raise UnreadableError(
                f"cannot read {self._path}: {reason_of(error)}; check that the data is still there"
            ) from error

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        offsets, lengths = arrays["offsets"], arrays["lengths"]
        return super()._is_sound(meta, arrays) and bool(
            offsets.dtype == np.int64
            and lengths.dtype == np.uint32
            and offsets.shape == lengths.shape == arrays["labels"].shape
            and 0 <= offsets.min()
            and lengths.max() <= LONGEST_LINE
        )

    @classmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        return fingerprint_of_text(path)

    @classmethod
    def _scan_size(cls, path: Path) -> int:
        return os.path.getsize(path)

    @classmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        layout: _Layout | None = None
        offsets: list[int] = []
        lengths: list[int] = []
        labels: list[int] = []
        for number, start, line in read_lines(path, progress):
            layout = layout or _layout_of(line, path.suffix == ".lst")
            try:
                listed = layout.parse(line)
            except ValueError:  # of int() and float(), and of too few parts
                what = None if labels else refusal(path, Wanted.DATA)
                raise InputError(
                    f"{path} line {number} must be {layout.columns} with a whole number as label, got "
                    f"{shown(line.strip(), _SHOWN)}" + (f"; the file {what}" if what else "")
                ) from None
            except _NotAligned:
                raise InputError(
                    f"{path} line {number} says that its face is not aligned (0 in the first column); give aligned "
                    "faces of 112 x 112, with 1 there"
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


def _parse_comma_line(line: bytes) -> _Listed:
    """Parses ``path,label``; the path may hold commas."""
    path, _, label = line.strip().rpartition(b",")
    if not path:
        raise ValueError
    return _Listed(line.index(path), path, int(label))


class _NotAligned(Exception):
    """A line says that its face is not aligned."""


def _parse_im2rec_line(line: bytes) -> _Listed:
    """Parses a line of MXNet's ``.lst``; im2rec writes labels with six decimals."""
    _, label, *_, path = line.rstrip().split(b"\t")
    if not float(label).is_integer():
        raise ValueError
    return _Listed(line.rindex(path), path, int(float(label)))


def _parse_insightface_line(line: bytes) -> _Listed:
    """Parses a line of insightface's ``.lst``; a box and landmarks may follow, for faces that are not aligned."""
    flag, path, label, *_ = line.rstrip().split(b"\t")
    if not float(flag):
        raise _NotAligned
    if not path.strip():
        raise ValueError
    return _Listed(len(flag) + 1, path, int(label))


def _parse_insightface_words(line: bytes) -> _Listed:
    """Parses a line of such a ``.lst`` whose columns somebody has separated by blanks; the path may hold some."""
    flag, rest = line.split(maxsplit=1)
    path, label = rest.rstrip().rsplit(maxsplit=1)
    if not float(flag):
        raise _NotAligned
    return _Listed(line.index(path, line.index(flag) + len(flag)), path, int(label))


class _Layout(NamedTuple):
    """How the lines of a list are to be read."""

    parse: Callable[[bytes], _Listed]  # raises ValueError where a line is something else
    columns: str  # for messages


_PATH_LABEL = _Layout(_parse_line, "`path label`")
_COMMA = _Layout(_parse_comma_line, "`path,label`")
_IM2REC = _Layout(_parse_im2rec_line, "number, label and path, separated by tabs,")
_INSIGHTFACE = _Layout(_parse_insightface_line, "1 for an aligned face, path and label, separated by tabs,")
_INSIGHTFACE_WORDS = _Layout(_parse_insightface_words, "1 for an aligned face, path and label")


def _layout_of(line: bytes, is_lst: bool) -> _Layout:
    """Returns the layout of a list, by its first line.

    Args:
        is_lst: whether the list is called ``.lst``, and so has columns separated by tabs.
    """
    path, comma, label = line.strip().rpartition(b",")
    if comma and path and label.strip().isdigit() and b"\t" not in line and len(label) == len(label.strip()):
        return _COMMA
    are_numbers = [_is_number(column) for column in line.rstrip().split(b"\t")]
    if are_numbers[:3] == [True, False, True]:
        return _INSIGHTFACE
    if len(are_numbers) >= 3 and all(are_numbers[:-1]) and not are_numbers[-1]:
        return _IM2REC
    if is_lst and len(are_numbers) < 3:
        words = [_is_number(word) for word in line.split()]
        if len(words) >= 2 and words[-1] and not words[-2]:
            return _INSIGHTFACE_WORDS if len(words) > 2 and words[0] else _PATH_LABEL
    return _IM2REC if is_lst else _PATH_LABEL


def _is_number(column: bytes) -> bool:
    try:
        float(column)
    except ValueError:
        return False
    return True
