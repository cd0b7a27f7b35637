"""Sources that know where each image lies from an index: made once by scanning the data, kept beside it, mapped by
every process.
"""

import abc
import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.array_file import map_arrays, write_arrays
from scf_fast.pipelines.formats.recordio import read_num_classes
from scf_fast.pipelines.sources.base import LARGE_FILE, LARGEST_FILE, ImageSource

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of the arrays in an index; another number, and it is made anew
_PRINTED_FILES = 64  # files of one data set whose first bytes count: a stat is enough for the thousandth shard
_PRINTED_BYTES = 4096  # of each
LARGEST_LABEL = (1 << 31) - 1
LARGEST_OFFSET = 1 << 62  # bytes
_SMALL_GAP = 4096  # bytes
_KEPT_OPEN = 256  # files; of more, each is opened when it is read: a process may often hold just 1024


class IndexedImages(ImageSource):
    """Base of the sources with an index; made by their `open`.

    The index is a few arrays, mapped into memory: forked workers share it, and a pickled copy opens it anew. It is
    valid as long as the fingerprint of the data (sizes, dates, first bytes) is the one that it was made with. Beside
    the scan's result it holds the images that `python -m scf_fast.pipelines.index DATA --verify` could not decode.
    """

    FORMAT: str  # what the data is called in messages

    def __init__(self, path, index_path, root=None):
        self._path, self._index_path, self._root = Path(path), Path(index_path), root
        self._property = self._property_of(self._path)
        meta, arrays = map_arrays(index_path, check=False)  # checked by open
        self._arrays, self.labels, self.broken = arrays, arrays["labels"], arrays["broken"]
        self.skipped = meta["skipped"]  # {what: how many entries of the data are no image for that reason}
        self.verified = meta["verified"]  # whether every image has been decoded once
        self._meta = meta
        self.num_classes = meta["largest_label"] + 1 if self._property is None else read_num_classes(self._property)

    def __reduce__(self):
        return type(self), (self._path, self._index_path, self._root)

    @classmethod
    def open(cls, path, cache_dir=None, root=None):
        """The source at `path`; scans it, under a progress bar, where there is no valid index.

        Args:
            path: see the class.
            cache_dir: folder for the index; by default it lies beside the data, or where that is read-only in
                $XDG_CACHE_HOME/scf_fast (~/.cache/scf_fast).
            root: folder that relative paths in an image list start from; by default that of the list.
        Raises:
            ValueError: the data is missing, damaged or holds no image, or a label does not fit.
        """
        path = Path(path)
        for index_path in cls._index_places(path, cache_dir):
            meta, arrays = cls._load(index_path)
            fingerprint = cls._fingerprint(path, arrays)
            if meta is not None and meta["fingerprint"] == fingerprint:
                break
        else:
            index_path = cls._build(path, cls._index_places(path, cache_dir))
        source = cls(path, index_path, root)
        largest = source._meta["largest_label"]
        if largest >= source.num_classes:
            raise InputError(
                f"{source.name(int(source.labels.argmax()))} has label {largest}, but {source._property} says "
                f"{source.num_classes} classes; correct the property file, or take both files from the same data set"
            )
        return source

    @classmethod
    def _load(cls, index_path):
        """(meta, arrays) of an index, (None, None) where there is none that can be used."""
        try:
            meta, arrays = map_arrays(index_path)
            if (meta["version"], meta["format"]) != (_VERSION, cls.FORMAT):
                return None, None  # of another release, or of another kind of data that had the name before
            if not cls._is_sound(meta, arrays):
                raise InputError(f"{index_path} contradicts itself; delete it")
            return meta, arrays
        except FileNotFoundError:
            pass
        except (KeyError, TypeError, AttributeError) as error:
            _LOG.warning("making the index anew: %s is not one: %s", index_path, error)
        except (OSError, ValueError) as error:
            _LOG.warning("making the index anew: %s", error)
        return None, None

    @classmethod
    def _is_sound(cls, meta, arrays):
        """Whether what follows may rely on an index: it may come from a stranger, along with the data."""
        labels, broken = arrays["labels"], arrays["broken"]
        return (
            labels.dtype == broken.dtype == np.int64
            and labels.ndim == broken.ndim == 1
            and len(labels) > 0
            and 0 <= labels.min()
            and labels.max() == meta["largest_label"] <= LARGEST_LABEL
            and (not len(broken) or (0 <= broken[0] and broken[-1] < len(labels) and (np.diff(broken) > 0).all()))
            and type(meta["largest_label"]) is int
            and isinstance(meta["fingerprint"], str)
            and isinstance(meta["verified"], bool)
            and all(type(count) is int for count in meta["skipped"].values())
        )

    @classmethod
    def _build(cls, path, places):
        """Scan the data and write its index into the first of the places that can be written to; which one that was."""
        began = time.monotonic()
        with tqdm(
            total=cls._scan_size(path), desc=f"indexing {path.name}", unit="B", unit_scale=True, delay=2, disable=None
        ) as bar:
            try:
                arrays, skipped = cls._scan(path, bar.update)
            except OSError as error:
                raise InputError(
                    f"cannot read {error.filename or path}: {os.strerror(error.errno)}; check that the data is still "
                    "there"
                ) from error
        labels = arrays["labels"]
        if not len(labels):
            raise InputError(f"{path}: it holds no image; check that it is the right one" + _list_skipped(skipped))
        arrays = {**arrays, "labels": labels.astype(np.int64), "broken": np.empty(0, dtype=np.int64)}
        meta = {
            "version": _VERSION,
            "format": cls.FORMAT,
            "fingerprint": cls._fingerprint(path, arrays),
            "skipped": skipped,
            "verified": False,
            "largest_label": int(labels.max()),
        }
        index_path = next((place for place in places[:-1] if os.access(place.parent, os.W_OK)), places[-1])
        if index_path != places[0]:
            _LOG.info("%s is read-only: the index of %s goes to %s", places[0].parent, path.name, index_path.parent)
        try:
            write_arrays(index_path, meta, arrays)
        except OSError as error:
            raise InputError(
                f"cannot write the index {index_path}: {os.strerror(error.errno)}; make room there, or give another "
                "folder for indexes"
            ) from error
        _LOG.info(
            "%s: %d images in %s, indexed in %.1f s%s",
            path,
            len(labels),
            cls.FORMAT,
            time.monotonic() - began,
            _list_skipped(skipped),
        )
        return index_path

    def record_broken(self, broken):
        """Note in the index which images cannot be decoded, after all have been tried; sources opened from now on know.

        Args:
            broken: integers, positions in this source.
        """
        broken = np.unique(np.asarray(broken, dtype=np.int64))
        write_arrays(self._index_path, {**self._meta, "verified": True}, {**self._arrays, "broken": broken})

    @classmethod
    def _index_places(cls, path, cache_dir):
        """Where the index may lie, the best place first."""
        beside, places = cls._beside(path), []
        if cache_dir is None:
            cache_dir, places = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scf_fast", [beside]
        folder = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[
            :16
        ]  # one folder for each file called train.rec
        return [*places, Path(cache_dir) / folder / beside.name]

    @classmethod
    def _property_of(cls, path):
        """The file that says how many classes the data has, None where there is none."""
        return None

    @classmethod
    def _beside(cls, path):
        """Path of the index beside the data."""
        return path.with_name(f"{path.name}.index")

    @classmethod
    @abc.abstractmethod
    def _fingerprint(cls, path, arrays):
        """What changes with the data: a string. `arrays` are those of the index, None where there is none."""

    @classmethod
    @abc.abstractmethod
    def _scan_size(cls, path):
        """Total of what the scan reports as progress."""

    @classmethod
    @abc.abstractmethod
    def _scan(cls, path, progress):
        """(arrays, skipped): arrays for the index, with `labels`; and {reason: count} of entries that are no image."""


class PackedImages(IndexedImages):
    """Base of the sources whose images lie in a few large files. Its index holds `offsets`, `lengths` (N,) and `first`
    (F + 1,), where images first[f]..first[f + 1] - 1 lie in file f of `_files(path)`. A file is `path`, or all of a
    folder that end in `SUFFIX`, by name.
    """

    SUFFIX: str

    def __init__(self, path, index_path, root=None):
        super().__init__(path, index_path, root)
        self._offsets, self._lengths, self._first = (
            self._arrays["offsets"],
            self._arrays["lengths"],
            self._arrays["first"],
        )
        self._names = self._indexed_files()
        self._descriptors = [_open(name) for name in self._names] if len(self._names) <= _KEPT_OPEN else None

    def __del__(self):
        for descriptor in self.__dict__.get("_descriptors") or ():
            os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self, file):
        if self._descriptors is not None:
            yield self._descriptors[file]
            return
        descriptor = _open(self._names[file])
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def name(self, i):
        try:
            name = self._name_in_file(i)
        except ValueError:  # the data is gone or damaged; this is for the message that says so
            name = f"image {i}"
        return f"{self._names[self._file_of(i)]} {name}"

    @abc.abstractmethod
    def _name_in_file(self, i):
        """What to call image i among those of its file; ValueError where the file has to be read for that and cannot
        be.
        """

    def _file_of(self, i):
        return 0 if len(self._names) == 1 else int(np.searchsorted(self._first, i, side="right")) - 1

    def _indexed_files(self):
        """The files that hold the images, as `first` counts them."""
        return self._files(self._path)

    def _stored(self, i, before=0):
        """Entry i of the index and as many bytes before it."""
        return self._bytes_at(i, -before, int(self._lengths[i]) + before)

    def _bytes_at(self, i, start, length):
        """`length` bytes from byte `start` of entry i on. Read, not mapped: a page fault would hold up all threads for
        the disk, and where the disk is gone it would end the process.
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
            raise InputError(
                f"cannot read image {i} in {self._names[file]}: {os.strerror(error.errno)}; check that the data is "
                "still there"
            ) from error
        if len(data) != length:
            raise InputError(
                f"{self._names[file]} ends inside image {i}: it is truncated, or changed while in use; copy it again, "
                "or start again"
            )
        return data

    def read(self, indices):
        offsets, lengths = self._offsets[indices], self._lengths[indices].astype(np.int64)
        lengths[lengths > LARGE_FILE] = 0
        ends = np.cumsum(lengths)
        starts, data, complete = (
            ends - lengths,
            np.empty(lengths.sum(), dtype=np.uint8),
            np.zeros(len(indices), dtype=bool),
        )
        buffer = memoryview(data)
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files).tolist():
            here = np.flatnonzero(files == file)
            places = zip(starts[here].tolist(), ends[here].tolist(), offsets[here].tolist())
            with (
                contextlib.suppress(OSError, ValueError),
                self._opened(file) as descriptor,
            ):  # encoded() says what is wrong
                complete[here] = lengths[here] == [
                    os.preadv(descriptor, [buffer[start:end]], offset) for start, end, offset in places
                ]
        return data, *self._images_in(data, starts, np.where(complete, lengths, 0))

    def _images_in(self, data, starts, lengths):
        """(starts, lengths) of the images in entries of the index that were read; 0 lengths as for read()."""
        return starts, lengths

    def will_need(self, indices):
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files).tolist():
            here = np.sort(indices[files == file])
            starts, ends = self._offsets[here], self._offsets[here] + self._lengths[here]
            apart = np.flatnonzero(starts[1:] > ends[:-1] + _SMALL_GAP)  # neighbors on the disk are one request
            with contextlib.suppress(OSError, ValueError), self._opened(file) as descriptor:
                for start, end in zip(starts[[0, *(apart + 1)]].tolist(), ends[[*apart, -1]].tolist()):
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    @classmethod
    def _property_of(cls, path):
        beside = Path(cls._files(path)[0]).with_name("property")
        return beside if beside.exists() else None

    @classmethod
    def _is_sound(cls, meta, arrays):
        offsets, lengths, first = arrays["offsets"], arrays["lengths"], arrays["first"]
        return super()._is_sound(meta, arrays) and (
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
    def _beside(cls, path):
        return path / f"{cls.SUFFIX[1:]}.index" if path.is_dir() else super()._beside(path)

    @classmethod
    def _files(cls, path):
        """The large files, in the order of the index; at least one."""
        return (sorted(path.glob(f"*{cls.SUFFIX}")) or [path / f"*{cls.SUFFIX}"]) if path.is_dir() else [path]

    @classmethod
    @abc.abstractmethod
    def _scan_file(cls, path, progress):
        """({offsets, lengths, labels}, {reason: count}) of one file."""

    @classmethod
    def _scan_size(cls, path):
        return sum(os.path.getsize(name) for name in cls._files(path))

    @classmethod
    def _scan(cls, path, progress):
        parts, skipped = [], {}
        for name in cls._files(path):
            try:
                part, reasons = cls._scan_file(name, progress)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error
            parts.append(part)
            for reason, count in reasons.items():
                skipped[reason] = skipped.get(reason, 0) + count
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        arrays["first"] = np.cumsum([0, *(len(part["labels"]) for part in parts)])
        return arrays, skipped

    @classmethod
    def _fingerprint(cls, path, arrays):
        return fingerprint_of(cls._files(path))


def fingerprint_of(files):
    """Digest of the files' names, sizes, dates, and first bytes.

    Raises:
        ValueError: one cannot be read.
    """
    digest = hashlib.sha256()
    printed = set(np.linspace(0, len(files) - 1, num=min(_PRINTED_FILES, len(files)), dtype=np.int64).tolist())
    for number, name in enumerate(files):
        try:
            stat = os.stat(name)
            digest.update(os.fsencode(os.path.basename(name)) + f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
            if number in printed:
                with open(name, "rb") as file:
                    digest.update(file.read(_PRINTED_BYTES))
        except OSError as error:
            raise InputError(f"cannot open {name}: {os.strerror(error.errno)}; check the path") from error
    return digest.hexdigest()


def as_lengths(lengths):
    """Lengths as an index holds them, 4 bytes each: of entries of 4 GB and more, which are refused when they are read,
    only that they are.

    Args:
        lengths: (N,) integers.
    Returns:
        (N,) uint32.
    """
    return np.minimum(np.asarray(lengths, dtype=np.int64), (1 << 32) - 1).astype(np.uint32)


def check_labels(labels, name, largest=LARGEST_LABEL):
    """Refuse labels that are no class numbers.

    Args:
        labels: (N,) numbers.
        name: name(i) is what to call image i.
        largest: int, the largest label allowed.
    """
    is_class = (labels == np.floor(labels)) & (labels >= 0) & (labels <= largest)
    if not is_class.all():
        first = int(np.argmin(is_class))
        raise InputError(f"{name(first)} has label {labels[first]:g}; a label must be a whole number in 0..{largest}")


def _open(name):
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot open {name}: {os.strerror(error.errno)}; check the path") from error
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or each 10 KB image would bring 100 KB of its neighbors
    return descriptor


def _list_skipped(skipped):
    return "".join(f"; skipped {count} {reason}" for reason, count in skipped.items() if count)
