"""Sources whose images lie in a few large files: what RecordIO, tar shards and TFRecord have in common."""

import abc
import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import ByteArray, IntArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError, UnreadableError
from scf_fast.pipelines.formats.file_kinds import EMPTY, FileKind, Wanted, refusal
from scf_fast.pipelines.sources.base import LARGE_FILE, LARGEST_FILE, ReadFiles, reason_of
from scf_fast.pipelines.sources.digest import fingerprint_of_files
from scf_fast.pipelines.sources.image_names import visible
from scf_fast.pipelines.sources.indexed import Arrays, IndexedImages, Scan

LARGEST_OFFSET = 1 << 62  # bytes
_SMALL_GAP = 4096  # bytes
_KEPT_OPEN = 256  # files; of more, each is opened when it is read


class PackedImages(IndexedImages):
    """Base of the sources whose images lie in a few large files.

    The index holds ``offsets``, ``lengths`` (N,) and ``first`` (F + 1,), where images first[f]..first[f + 1] - 1 lie in
    file f of ``_files(path)``. A file is ``path``, or each in a folder that ends in ``SUFFIX``, by name, but for hidden
    ones.
    """

    SUFFIX: str
    KIND: FileKind  # of the files
    _descriptors: list[int] | None = None  # of all files; None where there are too many

    def __init__(self, path: StrPath, index_path: StrPath, root: StrPath | None = None):
        super().__init__(path, index_path, root)
        self._offsets: IntArray = self._arrays["offsets"]
        self._lengths: npt.NDArray[np.uint32] = self._arrays["lengths"]
        self._first: IntArray = self._arrays["first"]
        self._names = self._indexed_files()
        if len(self._names) <= min(_KEPT_OPEN, _free_descriptors() // 2):
            self._descriptors = [_open(name) for name in self._names]

    def __del__(self) -> None:
        for descriptor in self._descriptors or ():
            os.close(descriptor)

    def name(self, i: int) -> str:
        try:
            name = self._name_in_file(i)
        except InputError:  # the data is gone or damaged; this is for the message that says so
            name = f"image {i}"
        return f"{self._names[self._file_of(i)]} {name}"

    def read(self, indices: IntArray) -> ReadFiles:
        offsets, lengths = self._offsets[indices], self._lengths[indices].astype(np.int64)
        lengths[lengths > LARGE_FILE] = 0
        ends = np.cumsum(lengths)
        starts = ends - lengths
        data: ByteArray = np.empty(lengths.sum(), dtype=np.uint8)
        complete = np.zeros(len(indices), dtype=bool)
        buffer = data.data
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files).tolist():
            here = np.flatnonzero(files == file)
            places = zip(starts[here].tolist(), ends[here].tolist(), offsets[here].tolist())
            with contextlib.suppress(OSError, InputError), self._opened(file) as descriptor:  # encoded() says why
                complete[here] = lengths[here] == [
                    os.preadv(descriptor, [buffer[start:end]], offset) for start, end, offset in places
                ]
        return ReadFiles(data, *self._images_in(data, starts, np.where(complete, lengths, 0)))

    def will_need(self, indices: IntArray) -> None:
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files).tolist():
            here = np.sort(indices[files == file])
            starts, ends = self._offsets[here], self._offsets[here] + self._lengths[here]
            apart = np.flatnonzero(starts[1:] > ends[:-1] + _SMALL_GAP)  # neighbors on the disk are one request
            with contextlib.suppress(OSError, InputError), self._opened(file) as descriptor:
                for start, end in zip(starts[[0, *(apart + 1)]].tolist(), ends[[*apart, -1]].tolist()):
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    @abc.abstractmethod
    def _name_in_file(self, i: int) -> str:
        """Returns the name of image i within its file; raises InputError where that has to be read and cannot be."""

    def _images_in(self, data: ByteArray, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Finds the images, (starts, lengths), in entries of the index that were read; lengths of 0 as for read()."""
        return starts, lengths

    def _file_of(self, i: int) -> int:
        return 0 if len(self._names) == 1 else int(np.searchsorted(self._first, i, side="right")) - 1

    def _indexed_files(self) -> list[Path]:
        """Returns the files that hold the images, as ``first`` counts them."""
        return self._files(self._path)

    def _stored(self, i: int, before: int = 0) -> bytes:
        """Reads entry i of the index and ``before`` bytes in front of it."""
        return self._bytes_at(i, -before, int(self._lengths[i]) + before)

    def _bytes_at(self, i: int, start: int, length: int) -> bytes:
        """Reads ``length`` bytes from byte ``start`` of entry i on. They are not mapped: a page fault would hold up all
        threads for the disk, and where the disk is gone it would end the process.
        """
        file = self._file_of(i)
        if start + length > LARGEST_FILE:
            raise InputError(
                f"image {i} in {self._names[file]} must have at most {LARGEST_FILE} bytes and has {start + length}; "
                "replace it or leave it out"
            )
        try:
            with self._opened(file) as descriptor:
                data = os.pread(descriptor, length, int(self._offsets[i]) + start)
        except OSError as error:
            raise UnreadableError(
                f"cannot read image {i} in {self._names[file]}: {reason_of(error)}; check that the data is still there"
            ) from error
        if len(data) != length:
            raise InputError(
                f"{self._names[file]} ends inside image {i}: it is truncated, or changed while in use; copy it again, "
                "or start again"
            )
        return data

    @contextlib.contextmanager
    def _opened(self, file: int) -> Iterator[int]:
        if self._descriptors is not None:
            yield self._descriptors[file]
            return
        descriptor = _open(self._names[file])
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @classmethod
    def _property_of(cls, path: Path) -> Path | None:
        beside = cls._files(path)[0].with_name("property")
        return beside if beside.exists() else None

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        offsets, lengths, first = arrays["offsets"], arrays["lengths"], arrays["first"]
        return super()._is_sound(meta, arrays) and bool(
            offsets.dtype == first.dtype == np.int64
            and lengths.dtype == np.uint32
            and offsets.shape == lengths.shape == arrays["labels"].shape
            and 0 <= offsets.min()
            and offsets.max() <= LARGEST_OFFSET
            and first.ndim == 1
            and len(first) > 1
            and first[0] == 0
            and first[-1] == len(offsets)
            and (np.diff(first) >= 0).all()
        )

    @classmethod
    def _beside(cls, path: Path) -> Path:
        return path / f"{cls.SUFFIX[1:]}.index" if path.is_dir() else super()._beside(path)

    @classmethod
    def _files(cls, path: Path) -> list[Path]:
        """Returns the large files, in the order of the index; at least one."""
        return (visible(path.glob(f"*{cls.SUFFIX}")) or [path / f"*{cls.SUFFIX}"]) if path.is_dir() else [path]

    @classmethod
    @abc.abstractmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        """Goes through one file; the arrays are ``offsets``, ``lengths`` and ``labels``."""

    @classmethod
    def _scan_size(cls, path: Path) -> int:
        return sum(os.path.getsize(name) for name in cls._files(path))

    @classmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        parts: list[Arrays] = []
        skipped: dict[str, int] = {}
        for name in cls._files(path):
            try:
                part, reasons = cls._scan_file(name, progress)
            except InputError as error:
                raise InputError(f"{name}: {refusal(name, Wanted.DATA, cls.KIND, EMPTY) or error}") from error
            parts.append(part)
            for reason, count in reasons.items():
                skipped[reason] = skipped.get(reason, 0) + count
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        arrays["first"] = np.cumsum([0, *(len(part["labels"]) for part in parts)])
        return Scan(arrays, skipped)

    @classmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        return fingerprint_of_files(cls._files(path))


def _free_descriptors() -> int:
    """Returns how many files this process may still open; a process may often hold just 1024, of all data sets."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, most - len(os.listdir("/proc/self/fd"))) if most != resource.RLIM_INFINITY else _KEPT_OPEN * 2


def as_lengths(lengths: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Returns lengths as an index holds them, 4 bytes each; 4 GB stand for any length from there on, since such entries
    are refused when they are read.
    """
    return np.minimum(np.asarray(lengths, dtype=np.int64), (1 << 32) - 1).astype(np.uint32)


def _open(name: Path) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableError(f"cannot open {name}: {reason_of(error)}; check the path") from error
    # Without this advice each 10 KB image would bring 100 KB of its neighbors.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor
