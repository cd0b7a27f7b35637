"""The feature cache: the frozen backbone's features of each image, on disk, for later epochs and later runs.

    folder/meta.json         layout of the rows; digests of the backbone and the data, pixel convention and arithmetic
                             that they were computed with; what their dtype loses
    folder/rows-NNNNN.bin    fixed-size records, one for each image (:mod:`scf_fast.features.records`)
    folder/checksums.bin     two uint32 for each image: CRC-32 of each orientation's half of the record, 0 while missing
    folder/writing-R         exists while rank R has an incomplete cache open, and so may write to it
                             (:mod:`scf_fast.features.write_marks`)

A record counts as present only once its checksums are stored, after the record itself, and is compared with them when a
run first reads it. A run that dies leaves its ``writing`` mark, and the next one to open the cache then checks every
record.
"""

import errno
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scf_fast.errors import InputError
from scf_fast.features.records import CACHE_DTYPES, CacheLayout, encode
from scf_fast.features.write_marks import WriteMark, dead_marks, only_maker
from scf_fast.pipelines.formats.atomic_file import write_json
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads, TimedOut, Wait, result_of

log = logging.getLogger(__name__)

_META_FILE = "meta.json"
_CHECKSUMS_FILE = "checksums.bin"
_FORMAT = 3
_WRITE_BEHIND = 2  # batches
_THREADS = 8  # reads under way at once, so that a disk has a queue

View = tuple[torch.Tensor, torch.Tensor]  # features (B, z_dim) and convf (B, C, H, W) of one orientation


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the cached values, besides their layout."""

    backbone: str  # digest of its weights
    data: str  # digest of the data set
    normalization: str  # pixel convention
    precision: str  # that the features were computed in, a key of PRECISION_DTYPES


@dataclass(frozen=True)
class CacheMeta:
    """The contents of a cache's meta.json."""

    key: CacheKey
    layout: CacheLayout
    convf_error: float  # relative loss by storing, see encoding_error

    def differences(self, key: CacheKey, layout: CacheLayout) -> list[str]:
        """Returns one phrase for each value that differs from these."""
        held, wanted = {**asdict(self.key), **asdict(self.layout)}, {**asdict(key), **asdict(layout)}
        return [f"{name}: cached {held[name]}, needed {value}" for name, value in wanted.items() if held[name] != value]


class FeatureCache:
    """A cache folder, open for reading and writing by one rank; several ranks may have it open for different images.

    Made by :meth:`open`.

    Attributes:
        present: (num_images,) bool, which images were there at the last :meth:`refresh`.
        problem: the error that ended writing; None while all is well.
        records_moved: counts those read and written, about: it shows only that there is progress.
    """

    present: np.ndarray

    def __init__(self, folder: Path, layout: CacheLayout, rank: int, timeout: float = DEFAULT_TIMEOUT):
        self.folder, self.layout, self._timeout = folder, layout, timeout
        self.records_moved = 0
        self._mark = WriteMark(folder, rank)
        self._shards = [
            os.open(_shard_path(folder, shard), os.O_RDWR)
            for shard in range(-(-layout.num_images // layout.rows_per_shard))
        ]
        for shard in self._shards:
            # Otherwise the kernel would read neighbors that nobody has asked for.
            os.posix_fadvise(shard, 0, 0, os.POSIX_FADV_RANDOM)
        self._checksums_file = np.memmap(folder / _CHECKSUMS_FILE, dtype=np.uint32, mode="r+")
        self._checksums = self._checksums_file.reshape(-1, 2)
        self.problem: OSError | None = None
        self._verified = np.zeros(self._checksums.shape, dtype=bool)  # compared with the checksum by this process
        self._threads = DaemonThreads(_THREADS, "feature-cache")
        self._writer = DaemonThreads(1, "feature-cache-writer")
        self._writing: deque[Future[None]] = deque()
        self.refresh()

    @classmethod
    def create_or_check(cls, folder: Path, key: CacheKey, layout: CacheLayout, convf_error: float = 0.0) -> None:
        """Makes the folder's files, or checks that they hold what this run needs; by one rank, before the others
        :meth:`open` it.

        Args:
            convf_error: to be noted in a new cache, see :func:`scf_fast.features.records.encoding_error`.
        Raises:
            InputError: the folder belongs to another backbone, preprocessing, data set or layout, the disk is too
                small, or the dtype's range is.
            OSError: a file cannot be written.
        """
        if not math.isfinite(convf_error):
            raise InputError(
                f"--cache_dtype {layout.dtype}: cannot hold the last map of this backbone, whose values are too large "
                "for it; use bf16"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with only_maker(folder):
            cls._create_or_check(folder, key, layout, convf_error)

    @classmethod
    def _create_or_check(cls, folder: Path, key: CacheKey, layout: CacheLayout, convf_error: float) -> None:
        if (folder / _META_FILE).exists():
            different = read_meta(folder).differences(key, layout)
            if different:
                raise InputError(
                    f"--feature_cache {folder}: was made for something else ({'; '.join(different)}); give another "
                    "folder, or delete it"
                )
            cls._check_after_crash(folder, layout)
            return
        _remove_files(folder)  # of a process that was killed before they were a cache
        free = shutil.disk_usage(folder).free
        if layout.total_bytes > free:
            budget = 0.9 * free / 1e9
            ways = "use --cache_dtype int8" + (
                f", or --cache_budget {budget:.3g} (GB; the rest is recomputed in every epoch)"
                if 0.9 * free > layout.image_bytes
                else " and another disk"
            )
            raise InputError(
                f"--feature_cache {folder}: needs {layout.total_bytes / 1e9:.3g} GB for {layout.num_images} images, "
                f"but {free / 1e9:.3g} GB are free; {ways}"
            )
        try:
            for shard, start in enumerate(range(0, layout.num_images, layout.rows_per_shard)):
                rows = min(layout.rows_per_shard, layout.num_images - start)
                _allocate(_shard_path(folder, shard), rows * layout.record_bytes)
            _allocate(folder / _CHECKSUMS_FILE, 8 * layout.num_images)
        except BaseException:
            _remove_files(folder)
            raise
        meta = {"format": _FORMAT, "key": asdict(key), "layout": asdict(layout), "convf_error": convf_error}
        write_json(folder / _META_FILE, meta, indent=2, end="\n")

    @classmethod
    def _check_after_crash(cls, folder: Path, layout: CacheLayout) -> None:
        """Checks every record if a run has left its mark, and takes the mark away."""
        marks = dead_marks(folder)
        if not marks:
            return
        checked = cls(folder, layout, 0)
        bad = checked.verify()
        checked.close()
        for mark in marks:
            mark.unlink(missing_ok=True)
        tqdm.write(
            f"feature cache: the last run died while writing; checked every record, {bad} were damaged and will be "
            "made again",
            file=sys.stderr,
        )

    @classmethod
    def open(cls, folder: Path, layout: CacheLayout, rank: int, timeout: float = DEFAULT_TIMEOUT) -> "FeatureCache":
        """Opens the cache and marks it as being written, unless it is complete: several runs may read it then.

        Args:
            timeout: seconds that writing may take without progress, see :mod:`scf_fast.pipelines.waiting`.
        """
        cache = cls(folder, layout, rank, timeout)
        if not cache.present.all():
            cache._mark.take()
        return cache

    def refresh(self) -> None:
        """Updates ``present``, after everything given to :meth:`write` is stored."""
        self.flush()
        self.present = (np.asarray(self._checksums) != 0).all(axis=1)

    def write(self, indices: np.ndarray, views: Sequence[View]) -> None:
        """Stores images, in the background.

        Images beyond the rows are left out. If the disk refuses one, ``problem`` says why and nothing more is stored:
        what is missing can be computed again.

        Args:
            views: of the plain and of the mirrored images.
        """
        if self.problem is not None:
            return
        packed = torch.cat([encode(self.layout, *view) for view in views], dim=1)
        copied = None
        if packed.is_cuda:
            packed = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True).copy_(packed, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._writing.append(self._writer.submit(self._write, indices, packed, copied))
        self.flush(but=_WRITE_BEHIND)

    def _write(self, indices: np.ndarray, packed: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            # A thread starts on GPU 0, where every rank would take some hundred megabytes just to wait.
            with torch.cuda.device(copied.device):
                copied.synchronize()
        rows = packed.numpy()

        def store(row: int) -> None:
            shard, offset = self._place(indices[row])
            if os.pwrite(shard, rows[row], offset) < len(rows[row]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._checksums[indices[row]] = self._checksums_of(rows[row].data)
            self.records_moved += 1

        try:
            list(self._threads.map(store, np.flatnonzero(indices < self.layout.num_images)))
        except OSError as error:
            if self.problem is None:
                log.error(
                    "feature cache: %s cannot be written (%s); what is not in it is computed again in every epoch",
                    self.folder,
                    error.strerror,
                    extra={"event": "cache_failed"},
                )
            self.problem = error

    def flush(self, but: int = 0) -> None:
        """Waits for the batches that are being written, except for the newest ``but``.

        Raises:
            TimedOut: nothing of them gets onto the disk; they are given up.
        """
        while len(self._writing) > but:
            try:
                self._finish(self._writing.popleft())
            except TimedOut:
                self._writing.clear()  # or closing would wait for them once more
                raise

    def _finish(self, written: Future[None]) -> None:
        wait = Wait(
            "stage 2",
            f"the background writer of the feature cache {self.folder}",
            self._timeout,
            lambda: self.records_moved,
        )
        result_of(written, wait)

    def read(self, indices: np.ndarray, flips: np.ndarray, pin_memory: bool = False) -> torch.Tensor:
        """Reads present images in the orientation asked for: (B, view_bytes) uint8 on the CPU, for
        :func:`scf_fast.features.records.decode`.

        Raises:
            OSError: a file is shorter than it was.
            InputError: a record is not what was written; it counts as missing from then on, so that the next run makes
                it again.
        """
        size = self.layout.view_bytes
        packed = torch.empty(len(indices), size, dtype=torch.uint8, pin_memory=pin_memory)
        rows = packed.numpy()

        def fill(part: np.ndarray) -> None:
            for row in part:
                self.records_moved += 1
                shard, offset = self._place(indices[row])
                if os.preadv(shard, [rows[row]], offset + size * int(flips[row])) != size:
                    raise OSError(
                        f"--feature_cache {self.folder}: image {indices[row]} lies beyond the end of its file; delete "
                        "the folder and build it again"
                    )
                view = (indices[row], int(flips[row]))
                if not self._verified[view]:
                    if _checksum(rows[row].data) != self._checksums[view]:
                        self._checksums[indices[row]] = 0
                        raise InputError(
                            f"--feature_cache {self.folder}: the record of image {indices[row]} is damaged; start "
                            "again with --resume, which makes it again; python -m scf_fast.feature_cache verify looks "
                            "for more"
                        )
                    self._verified[view] = True

        list(self._threads.map(fill, np.array_split(np.arange(len(indices)), _THREADS)))
        return packed

    def _checksums_of(self, record: memoryview | bytes) -> list[int]:
        return [_checksum(record[start : start + self.layout.view_bytes]) for start in (0, self.layout.view_bytes)]

    def _place(self, index: int | np.integer) -> tuple[int, int]:
        """Returns file and offset of an image's record."""
        shard, place = divmod(int(index), self.layout.rows_per_shard)
        return self._shards[shard], place * self.layout.record_bytes

    def verify(self, progress: bool = True) -> int:
        """Checks every record against its checksums; damaged ones become missing. Returns how many there were."""

        def damaged(index: int) -> bool:
            shard, offset = self._place(index)
            if self._checksums_of(os.pread(shard, self.layout.record_bytes, offset)) == self._checksums[index].tolist():
                return False
            self._checksums[index] = 0
            return True

        rows = np.flatnonzero((np.asarray(self._checksums) != 0).all(axis=1))
        bad = sum(
            tqdm(
                self._threads.map(damaged, rows, chunksize=64),
                total=len(rows),
                desc="checking",
                unit="img",
                unit_scale=True,
                disable=not progress,
            )
        )
        self.refresh()
        return bad

    def close(self) -> None:
        """Writes everything out and takes the mark away.

        Raises:
            TimedOut: the disk does not take it; the mark stays.
        """
        try:
            self.flush()
            self._finish(self._writer.submit(self._close_files))
        finally:
            self._writer.shutdown()
            self._threads.shutdown()
        self._mark.remove()

    def _close_files(self) -> None:
        for shard in self._shards:
            os.fsync(shard)
            os.close(shard)
        self._checksums_file.flush()


def read_meta(folder: Path) -> CacheMeta:
    """Reads meta.json of a cache.

    Raises:
        InputError: there is none, or it is damaged or of another format.
    """
    try:
        return _parse_meta(json.loads((folder / _META_FILE).read_bytes()))
    except OSError as error:
        raise InputError(f"--feature_cache {folder}: holds no feature cache ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--feature_cache {folder}: {_META_FILE} is damaged ({error}); delete the folder and build it again"
        ) from None


def _parse_meta(meta: Any) -> CacheMeta:
    """Returns the contents of meta.json.

    Raises:
        ValueError, KeyError, TypeError: they are not what they should be.
    """
    if meta["format"] != _FORMAT:
        raise ValueError(f"format {meta['format']}")
    layout = CacheLayout(**{**meta["layout"], "convf_shape": tuple(meta["layout"]["convf_shape"])})
    sizes = (layout.num_images, layout.z_dim, *layout.convf_shape)
    if (
        layout.dtype not in CACHE_DTYPES
        or len(sizes) != 5
        or not all(isinstance(size, int) and 0 < size < 1 << 40 for size in sizes)
    ):
        raise ValueError(f"layout {meta['layout']}")
    if not isinstance(meta["key"], dict) or not isinstance(meta["convf_error"], float):
        raise TypeError("key and convf_error")
    return CacheMeta(CacheKey(**meta["key"]), layout, meta["convf_error"])


def count_present(folder: Path) -> int:
    """Returns how many images a cache holds, in both orientations; nobody has to have it open."""
    checksums = np.fromfile(folder / _CHECKSUMS_FILE, np.uint32).reshape(-1, 2)
    return int(np.count_nonzero(checksums.all(axis=1)))


def _checksum(view: memoryview | bytes) -> int:
    return zlib.crc32(view) or 1  # 0 means missing


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"rows-{shard:05d}.bin"


def _remove_files(folder: Path) -> None:
    """Removes rows and checksums of a folder that is no cache yet."""
    for path in (*folder.glob("rows-[0-9][0-9][0-9][0-9][0-9].bin"), folder / _CHECKSUMS_FILE):
        path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """Makes a file of zeros whose blocks exist: a memory map over a hole would die of a full disk."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f"--feature_cache {path}: cannot allocate {size / 1e9:.2f} GB ({error.strerror})"
            ) from None
