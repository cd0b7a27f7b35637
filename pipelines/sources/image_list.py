"""Image list files: one line `path label` an image, the layout of the published SCF code; and MXNet's `.lst`."""

import os

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import read_image_file
from scf_fast.pipelines.sources.indexed import LARGEST_LABEL, IndexedImages, fingerprint_of

_CHECKED = 64  # images looked for when the index is made; a stat of millions would take hours on a network mount
_LONGEST_LINE = 1 << 16  # bytes
_BLOCK = 1 << 14  # lines


class ListIndex(IndexedImages):
    """The images that a list names; made by `ListIndex.open(list_file, root=folder)`.

    A line is a path, white space, and a label, a whole number from 0 on. The path may hold spaces; empty lines are
    skipped. In a file `.lst`, as MXNet's im2rec writes it, a line is a number, a label, possibly more labels, and a
    path, between them tabs. Relative paths start from `root`, by default the folder of the list. num_classes is the
    largest label + 1. The index says where in the list each path lies, 20 bytes an image, so that millions of paths
    cost no memory.
    """

    FORMAT = "image list"

    def __init__(self, path, index_path, root=None):
        super().__init__(path, index_path, root)
        self._base = os.fsencode(self._path.parent if root is None else root)
        self._text = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if "_text" in self.__dict__:
            os.close(self._text)

    @classmethod
    def open(cls, path, cache_dir=None, root=None):
        source = super().open(path, cache_dir, root)
        tried = [source.name(int(i)) for i in np.linspace(0, len(source) - 1, num=min(_CHECKED, len(source)))]
        if not any(map(os.path.exists, tried)):
            raise InputError(
                f"{path} names {tried[0]} first, and there is no such file, nor {len(tried) - 1} others that it names; "
                "give the folder that its paths start from"
            )
        return source

    def encoded(self, i):
        return read_image_file(self._file(i))

    def name(self, i):
        return os.fsdecode(self._file(i))

    def _file(self, i):
        try:
            name = os.pread(self._text, int(self._arrays["lengths"][i]), int(self._arrays["offsets"][i]))
        except OSError as error:
            raise InputError(
                f"cannot read {self._path}: {os.strerror(error.errno)}; check that the data is still there"
            ) from error
        return os.path.join(self._base, name)

    @classmethod
    def _is_sound(cls, meta, arrays):
        offsets, lengths = arrays["offsets"], arrays["lengths"]
        return super()._is_sound(meta, arrays) and (
            offsets.dtype == np.int64
            and lengths.dtype == np.uint32
            and offsets.shape == lengths.shape == arrays["labels"].shape
            and 0 <= offsets.min()
            and lengths.max() <= _LONGEST_LINE
        )

    @classmethod
    def _fingerprint(cls, path, arrays):
        return fingerprint_of([path])

    @classmethod
    def _scan_size(cls, path):
        return os.path.getsize(path)

    @classmethod
    def _scan(cls, path, progress):
        parse, layout = (
            (_parse_lst, "number, label and path, between them tabs,")
            if path.suffix == ".lst"
            else (_parse_line, "`path label`")
        )
        offsets, lengths, labels = [], [], []
        for number, start, line in read_lines(path, progress):
            try:
                at, name, label = parse(line)
            except ValueError:
                raise InputError(
                    f"{path} line {number} must be {layout} with a whole number as label, got {shown(line)}"
                ) from None
            if not 0 <= label <= LARGEST_LABEL:
                raise InputError(f"{path} line {number} has label {label}; a label must lie in 0..{LARGEST_LABEL}")
            offsets.append(start + at)
            lengths.append(len(name))
            labels.append(label)
        labels = np.array(labels, dtype=np.int64)
        return {
            "offsets": np.array(offsets, dtype=np.int64),
            "lengths": np.array(lengths, dtype=np.uint32),
            "labels": labels,
        }, {}


def _parse_line(line):
    """(where the path starts, path, label) of `path label`."""
    name, label = line.strip().rsplit(maxsplit=1)
    return line.index(name), name, int(label)


def _parse_lst(line):
    """(where the path starts, path, label) of a line of a `.lst`; im2rec writes labels with six decimals."""
    _, label, *_, name = line.rstrip().split(b"\t")
    if not float(label).is_integer():
        raise ValueError
    return line.rindex(name), name, int(float(label))


def read_lines(path, progress):
    """(number, start, line) of the lines of a text file that are not empty; a line beyond 64 KB comes in pieces.

    Args:
        path: Path.
        progress: called with the number of bytes passed since its last call.
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


def shown(line):
    """A line for an error message."""
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")
