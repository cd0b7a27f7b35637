"""Sources that know where each image lies from an index: made once by scanning the data, kept beside it, mapped by every process."""
import abc
import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.files import map_arrays, write_arrays
from pipelines.recordio import read_num_classes
from pipelines.sources import ImageSource

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of the arrays in an index; another number, and it is made anew
_PRINTED_FILES = 64  # files of one data set whose first bytes count: a stat is enough for the thousandth shard
_PRINTED_BYTES = 4096  # of each
LARGEST_LABEL = (1 << 31) - 1
_KEPT_OPEN = 256  # files; of more, each is opened when it is read: a process may often hold just 1024


class IndexedImages(ImageSource):
    """Base of the sources with an index; made by their `open`.

    The index is a few arrays, mapped into memory: forked workers share it, and a pickled copy opens it anew. It is valid as long as
    the fingerprint of the data (sizes, dates, first bytes) is the one that it was made with. Beside the scan's result it holds the
    images that `python -m pipelines.index DATA --verify` could not decode.
    """

    FORMAT: str  # what the data is called in messages
    _property = None  # file that says how many classes there are

    def __init__(self, path, index_path, root=None):
        self._path, self._index_path, self._root = Path(path), Path(index_path), root
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
        index_path = cls._index_path_for(path, cache_dir)
        meta, arrays = _load(index_path)
        fingerprint = cls._fingerprint(path, arrays)
        if meta is None or meta["version"] != _VERSION or meta["format"] != cls.FORMAT or meta["fingerprint"] != fingerprint:
            cls._build(path, index_path)
        source = cls(path, index_path, root)
        largest = source._meta["largest_label"]
        if largest >= source.num_classes:
            raise ValueError(f"{source.name(int(source.labels.argmax()))} has label {largest}, but {source._property} says "
                             f"{source.num_classes} classes; correct the property file, or take both files from the same data set")
        return source

    @classmethod
    def _build(cls, path, index_path):
        began = time.monotonic()
        with tqdm(total=cls._scan_size(path), desc=f"indexing {path.name}", unit="B", unit_scale=True, delay=2, disable=None) as bar:
            arrays, skipped = cls._scan(path, bar.update)
        labels = arrays["labels"]
        if not len(labels):
            raise ValueError(f"{path}: it holds no image; check that it is the right one" + _list_skipped(skipped))
        arrays = {**arrays, "labels": labels.astype(np.int64), "broken": np.empty(0, dtype=np.int64)}
        meta = {"version": _VERSION, "format": cls.FORMAT, "fingerprint": cls._fingerprint(path, arrays), "skipped": skipped,
                "verified": False, "largest_label": int(labels.max())}
        write_arrays(index_path, meta, arrays)
        _LOG.info("%s: %d images in %s, indexed in %.1f s%s", path, len(labels), cls.FORMAT, time.monotonic() - began, _list_skipped(skipped))

    def record_broken(self, broken):
        """Note in the index which images cannot be decoded, after all have been tried; sources opened from now on know.

        Args:
            broken: integers, positions in this source.
        """
        broken = np.unique(np.asarray(broken, dtype=np.int64))
        write_arrays(self._index_path, {**self._meta, "verified": True}, {**self._arrays, "broken": broken})

    @classmethod
    def _index_path_for(cls, path, cache_dir):
        beside = cls._beside(path)
        if cache_dir is None and os.access(beside.parent, os.W_OK):
            return beside
        if cache_dir is None:
            cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scf_fast"
            if beside.exists():
                return beside
            _LOG.info("%s is read-only: the index of %s goes to %s", beside.parent, path.name, cache_dir)
        folder = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]  # one folder for each file called train.rec
        return Path(cache_dir) / folder / beside.name

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
    """Base of the sources whose images lie in a few large files. Its index holds `offsets`, `lengths` (N,) and `first` (F + 1,), where
    images first[f]..first[f + 1] - 1 lie in file f of `_files(path)`."""

    def __init__(self, path, index_path, root=None):
        self._names = self._files(Path(path))
        property_file = Path(self._names[0]).with_name("property")
        self._property = property_file if property_file.exists() else None
        self._descriptors = [_open(name) for name in self._names] if len(self._names) <= _KEPT_OPEN else None
        super().__init__(path, index_path, root)
        self._offsets, self._lengths, self._first = self._arrays["offsets"], self._arrays["lengths"], self._arrays["first"]

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

    def _file_of(self, i):
        return 0 if len(self._names) == 1 else int(np.searchsorted(self._first, i, side="right")) - 1

    def _stored(self, i, before=0):
        """Entry i of the index and as many bytes before it. Read, not mapped: a page fault would hold up all threads for the disk."""
        file, start, length = self._file_of(i), int(self._offsets[i]) - before, int(self._lengths[i]) + before
        if self._descriptors is not None:
            data = os.pread(self._descriptors[file], length, start)
        else:
            with self._opened(file) as descriptor:
                data = os.pread(descriptor, length, start)
        if len(data) != length:
            raise ValueError(f"{self._names[file]} changed while in use: it ends inside image {i}; start again")
        return data

    def will_need(self, indices):
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files).tolist():
            here = indices[files == file]
            with self._opened(file) as descriptor:
                for offset, length in zip(self._offsets[here].tolist(), self._lengths[here].tolist()):
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    @classmethod
    @abc.abstractmethod
    def _files(cls, path):
        """The large files, in the order of the index; at least one."""

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
                raise ValueError(f"{name}: {error}") from error
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
            raise ValueError(f"cannot open {name}: {os.strerror(error.errno)}; check the path") from error
    return digest.hexdigest()


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
        raise ValueError(f"{name(first)} has label {labels[first]:g}; a label must be a whole number in 0..{largest}")


def _open(name):
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"cannot open {name}: {os.strerror(error.errno)}; check the path") from error
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or each 10 KB image would bring 100 KB of its neighbours
    return descriptor


def _load(index_path):
    """(meta, arrays) of an index, (None, None) where there is none that can be used."""
    try:
        return map_arrays(index_path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _LOG.warning("making the index anew: %s", error)
    return None, None


def _list_skipped(skipped):
    return "".join(f"; skipped {count} {reason}" for reason, count in skipped.items() if count)
