"""Random access to the images of a RecordIO file by a small index beside it."""
import contextlib
import glob
import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from pipelines.files import atomic_output
from pipelines.recordio import read_num_classes, read_record, scan_image_records
from pipelines.sources import ImageSource

_LOG = logging.getLogger(__name__)
_EXACT_LABELS = 1 << 24  # float32 holds every integer up to here


class RecordIndex(ImageSource):
    """The image records of a `.rec`, in file order; made by RecordIndex.open.

    The file and its index are memory maps: forked workers share them, and a pickled copy opens them anew.
    """

    def __init__(self, rec_path, index_path, num_classes):
        self._rec_path, self._index_path, self.num_classes = Path(rec_path), Path(index_path), num_classes
        self._offsets, self.labels = np.asarray(np.load(index_path, mmap_mode="r"))
        self._data = _memory_map(self._rec_path)

    def __reduce__(self):
        return RecordIndex, (self._rec_path, self._index_path, self.num_classes)

    @classmethod
    def open(cls, path, cache_dir=None):
        """Index a `.rec`, or find the index made before.

        A `property` file beside the `.rec` gives num_classes; without one it is the largest label + 1.

        Args:
            path: the `.rec`, or the folder that holds `train.rec`.
            cache_dir: folder for the index; by default beside the `.rec`, or where that is read-only in
                $XDG_CACHE_HOME/scf_fast (~/.cache/scf_fast). 16 bytes an image; made anew when the `.rec` changes size or date.
        Returns:
            RecordIndex.
        Raises:
            ValueError: the file is missing, truncated, damaged or without images, or a label does not fit.
        """
        rec_path = Path(path)
        if rec_path.is_dir():
            rec_path = rec_path / "train.rec"
        data = _memory_map(rec_path)
        index_path = _index_path(rec_path, cache_dir)
        if not index_path.exists():
            _write_index(rec_path, data, index_path)
        property_path = rec_path.with_name("property")
        index = cls(rec_path, index_path, read_num_classes(property_path) if property_path.exists() else None)
        largest = int(index.labels.max())
        if index.num_classes is None:
            index.num_classes = largest + 1
        if largest >= index.num_classes:
            raise ValueError(f"{index.name(int(index.labels.argmax()))} has label {largest}, but {property_path} says {index.num_classes} "
                             "classes; correct the property file, or take both files from the same data set")
        return index

    def encoded(self, i):
        return self._record(i).image

    def name(self, i):
        return f"{self._rec_path} record {self._record(i).record_id}"

    def _record(self, i):
        try:
            return read_record(self._data, int(self._offsets[i]))
        except ValueError as error:
            raise ValueError(f"{self._rec_path} changed while in use: {error}") from error


def open_source(path):
    """The images at `path`, whatever format they are in.

    Args:
        path: a folder with `train.rec` (as MS1M and Glint360K are shipped), or a `.rec` file.
    Returns:
        ImageSource.
    Raises:
        ValueError: nothing is there, or nothing that is known; or the file is damaged.
    """
    path = Path(path)
    if path.suffix == ".rec" or (path / "train.rec").exists():
        return RecordIndex.open(path)
    if not path.exists():
        raise ValueError(f"there is no data set at {path}; check the path")
    raise ValueError(f"{path} must be a .rec file or a folder that holds train.rec; check the path")


def _memory_map(path):
    """(bytes,) uint8 array over the file; without pages of its own."""
    try:
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if os.path.getsize(path) else np.empty(0, dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"cannot open {path}: {os.strerror(error.errno)}; check the path") from error


def _index_path(rec_path, cache_dir):
    """Where the index of this very file belongs: another size or date, another name."""
    stat = rec_path.stat()
    name = f"{rec_path.name}.index-{stat.st_size:x}-{stat.st_mtime_ns:x}.npy"
    if cache_dir is None and os.access(rec_path.parent, os.W_OK):
        return rec_path.with_name(name)
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scf_fast"
        _LOG.info("%s is read-only: the index of %s goes to %s", rec_path.parent, rec_path.name, cache_dir)
    folder = hashlib.sha256(str(rec_path.resolve()).encode()).hexdigest()[:16]  # one folder for each file called train.rec
    return Path(cache_dir) / folder / name


def _write_index(rec_path, data, index_path):
    """Save a (2, N) int64 array: byte offset of each image record, label of each. Indices of the file's earlier states go."""
    try:
        offsets, labels = scan_image_records(data)
        if not len(offsets):
            raise ValueError("it holds no image record; check that it is the right file")
        is_class = (labels == np.floor(labels)) & (labels >= 0) & (labels <= _EXACT_LABELS)
        if not is_class.all():
            first = int(np.argmin(is_class))
            record_id = read_record(data, int(offsets[first])).record_id
            raise ValueError(f"record {record_id} has label {labels[first]:g}; a label must be a whole number in 0..{_EXACT_LABELS}")
    except ValueError as error:
        raise ValueError(f"{rec_path}: {error}") from error
    for stale in index_path.parent.glob(f"{glob.escape(rec_path.name)}.index-*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another rank may have been first
            if stale != index_path:
                stale.unlink()
    with atomic_output(index_path) as file:
        np.save(file, np.stack([offsets, labels.astype(np.int64)]))
