import errno
import hashlib
import json
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger(__name__)
import math
import os
import shutil
import sys
import zlib

import numpy as np
import torch

from scf_fast.errors import InputError
from scf_fast.pipelines.sources.digest import sampled_digest

CACHE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_LARGEST = {"fp8": 448.0, "int8": 127.0}  # the value that the largest magnitude of a record is scaled to
_SHARD_BYTES = 1 << 34  # Glint360K's 1.8 TB are 110 files, all open at once
_ALIGN = 64
_WRITE_BEHIND = 2  # batches
_THREADS = 8  # reads under way at once, so that a disk has a queue
_FORMAT = 3


@dataclass(frozen=True)
class CacheLayout:
    """Shapes and types of a cache's records."""

    num_images: int  # rows of the cache: the first images of the data set, all of them unless a budget cuts it
    z_dim: int
    convf_shape: tuple[int, int, int]  # (C, H, W)
    dtype: str  # a key of CACHE_DTYPES

    @property
    def convf_bytes(self) -> int:
        return int(np.prod(self.convf_shape)) * CACHE_DTYPES[self.dtype].itemsize

    @property
    def view_bytes(self) -> int:
        """One orientation: scale, features, convf in (H, W, C) order; padded."""
        return -(-(4 + 4 * self.z_dim + self.convf_bytes) // _ALIGN) * _ALIGN

    @property
    def record_bytes(self) -> int:
        return 2 * self.view_bytes

    @property
    def image_bytes(self) -> int:
        """A record and its checksums."""
        return self.record_bytes + 8

    @property
    def total_bytes(self) -> int:
        return self.num_images * self.image_bytes

    @property
    def rows_per_shard(self) -> int:
        return max(1, _SHARD_BYTES // self.record_bytes)


def cache_key(backbone_state: dict[str, torch.Tensor], source, normalization: str, precision: str) -> dict[str, str]:
    """What decides the cached values: digests of the backbone's weights and of the data, pixel convention and
    arithmetic.
    """
    weights = hashlib.sha256()
    for name in sorted(backbone_state):
        weights.update(name.encode())
        weights.update(backbone_state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "backbone": weights.hexdigest()[:16],
        "data": sampled_digest(source, images=64)[:16],
        "normalization": normalization,
        "precision": precision,
    }


def encode(layout: CacheLayout, features: torch.Tensor, convf: torch.Tensor) -> torch.Tensor:
    """features (B, z_dim), convf (B, C, H, W) -> (B, view_bytes) uint8 on the same device."""
    rows = features.shape[0]
    flat = convf.permute(0, 2, 3, 1).reshape(rows, -1).float()
    scale = torch.ones(rows, 1, device=flat.device)
    if layout.dtype in _LARGEST:
        scale = (flat.abs().amax(1, keepdim=True) / _LARGEST[layout.dtype]).clamp_min(torch.finfo(torch.float32).tiny)
        flat = flat / scale
        if layout.dtype == "int8":
            flat = flat.round()
    parts = [scale, features.float(), flat.to(CACHE_DTYPES[layout.dtype])]
    packed = torch.cat([part.contiguous().view(torch.uint8).reshape(rows, -1) for part in parts], dim=1)
    return torch.nn.functional.pad(packed, (0, layout.view_bytes - packed.shape[1]))


def decode(layout: CacheLayout, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`encode`: features (B, z_dim) float32, convf (B, C, H, W) channels_last, float32 for fp8 and
    int8.
    """
    rows, (c, h, w) = packed.shape[0], layout.convf_shape
    features_end = 4 + 4 * layout.z_dim
    scale = packed[:, :4].contiguous().view(torch.float32)
    features = packed[:, 4:features_end].contiguous().view(torch.float32)
    convf = packed[:, features_end : features_end + layout.convf_bytes].contiguous().view(CACHE_DTYPES[layout.dtype])
    if layout.dtype in _LARGEST:
        convf = convf.float() * scale
    return features, convf.view(rows, h, w, c).permute(0, 3, 1, 2)


def encoding_error(layout: CacheLayout, features: torch.Tensor, convf: torch.Tensor) -> float:
    """What the cache's dtype loses of convf (B, C, H, W), relative, in the Frobenius norm; features lose nothing."""
    stored, exact = decode(layout, encode(layout, features, convf))[1].double(), convf.double()
    return ((stored - exact).norm() / exact.norm()).item()


class FeatureCache:
    """A cache folder, open for reading and writing by one rank; several ranks may have it open for different images.

    Use :meth:`open`. ``present`` is (num_images,) bool, what was there at the last :meth:`refresh`.
    """

    def __init__(self, folder: Path, layout: CacheLayout, rank: int):
        self.folder, self.layout = folder, layout
        self._mark = folder / f"writing-{rank}"
        self._shards = [
            os.open(folder / f"rows-{i:05d}.bin", os.O_RDWR)
            for i in range(-(-layout.num_images // layout.rows_per_shard))
        ]
        for shard in self._shards:
            os.posix_fadvise(
                shard, 0, 0, os.POSIX_FADV_RANDOM
            )  # or the kernel would read neighbors that nothing has asked for
        self._checksums = np.memmap(folder / "checksums.bin", dtype=np.uint32, mode="r+").reshape(-1, 2)
        self.problem: OSError | None = None
        self._sound = np.zeros(self._checksums.shape, dtype=bool)  # compared with its checksum by this process
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="feature-cache")
        self._writer, self._writing = ThreadPoolExecutor(1, thread_name_prefix="feature-cache-writer"), deque()
        self.refresh()

    @classmethod
    def create_or_check(cls, folder: Path, key: dict, layout: CacheLayout, convf_error: float = 0.0) -> None:
        """Make the folder's files, or check that they hold what this run needs; by one rank, before the others
        :meth:`open` it.

        Args:
            convf_error: to be noted in a new cache, see :func:`encoding_error`.
        Raises:
            ValueError: the folder belongs to another backbone, preprocessing, data set or layout, the disk is too
                small, or the dtype's range is.
        """
        if not math.isfinite(convf_error):
            raise InputError(
                f"--cache_dtype {layout.dtype}: cannot hold the last map of this backbone, whose values are too large "
                "for it; use bf16"
            )
        meta_file = folder / "meta.json"
        if meta_file.exists():
            meta = read_meta(folder)
            wanted = {**key, **_plain(layout)}
            different = [
                f"{name}: cached {meta['key'].get(name, meta['layout'].get(name))}, needed {value}"
                for name, value in wanted.items()
                if {**meta["key"], **meta["layout"]}.get(name) != value
            ]
            if different:
                raise InputError(
                    f"--feature_cache {folder}: was made for something else ({'; '.join(different)}); give another "
                    "folder, or delete it"
                )
            if list(folder.glob("writing-*")):
                checked = cls(folder, layout, 0)
                bad = checked.verify()
                checked.close()
                for mark in folder.glob("writing-*"):
                    mark.unlink()
                tqdm.write(
                    f"feature cache: the last run died while writing; checked every record, {bad} were damaged and "
                    "will be made anew",
                    file=sys.stderr,
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if layout.total_bytes > free:
            raise InputError(
                f"--feature_cache {folder}: needs {layout.total_bytes / 1e9:.1f} GB for {layout.num_images} images, "
                f"but {free / 1e9:.1f} GB are "
                f"free; use --cache_dtype int8, or --cache_budget {0.9 * free / 1e9:.1f} (GB; the rest is recomputed "
                "in every epoch)"
            )
        for start in range(0, layout.num_images, layout.rows_per_shard):
            rows = min(layout.rows_per_shard, layout.num_images - start)
            _allocate(folder / f"rows-{start // layout.rows_per_shard:05d}.bin", rows * layout.record_bytes)
        _allocate(folder / "checksums.bin", 8 * layout.num_images)
        part = folder / "meta.json.part"
        part.write_text(
            json.dumps({"format": _FORMAT, "key": key, "layout": _plain(layout), "convf_error": convf_error}, indent=2)
            + "\n"
        )
        os.replace(part, meta_file)

    @classmethod
    def open(cls, folder: Path, layout: CacheLayout, rank: int) -> "FeatureCache":
        """The cache, marked as being written."""
        cache = cls(folder, layout, rank)
        cache._mark.touch()
        return cache

    def refresh(self) -> None:
        """Take a new look at what is present, once everything given to :meth:`write` is."""
        self.flush()
        self.present = (np.asarray(self._checksums) != 0).all(axis=1)

    def write(self, indices: np.ndarray, views: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Store images, in the background: ``views`` holds (features, convf) of the plain and of the mirrored images.
        Images beyond the rows are left out. Where the disk refuses one, ``problem`` says why and nothing more is
        stored: what is missing can be computed anew.
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

    def _write(self, indices, packed, copied):
        if copied is not None:
            with torch.cuda.device(
                copied.device
            ):  # a thread starts on GPU 0, where every rank would take some hundred megabytes to wait
                copied.synchronize()
        rows = packed.numpy()

        def store(row):
            shard, offset = self._place(indices[row])
            if os.pwrite(shard, rows[row], offset) < len(rows[row]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._checksums[indices[row]] = self._checksums_of(rows[row])

        try:
            list(self._threads.map(store, np.flatnonzero(indices < self.layout.num_images)))
        except OSError as error:
            if self.problem is None:
                log.error(
                    "feature cache: %s cannot be written (%s); what is not in it is computed anew in every epoch",
                    self.folder,
                    error.strerror,
                    extra={"event": "cache_failed"},
                )
            self.problem = error

    def flush(self, but: int = 0) -> None:
        """Wait for the batches that are being written, except for the newest so many."""
        while len(self._writing) > but:
            self._writing.popleft().result()

    def read(self, indices: np.ndarray, flips: np.ndarray, pin_memory: bool = False) -> torch.Tensor:
        """(B, view_bytes) uint8 on the CPU, for :func:`decode`: present images in the orientation asked for.

        Raises:
            OSError: a file is shorter than it was.
            ValueError: a record is not what was written; it is missing from then on, so that the next run makes it
                anew.
        """
        size = self.layout.view_bytes
        packed = torch.empty(len(indices), size, dtype=torch.uint8, pin_memory=pin_memory)
        rows = packed.numpy()

        def fill(part):
            for row in part:
                shard, offset = self._place(indices[row])
                if os.preadv(shard, [rows[row]], offset + size * int(flips[row])) != size:
                    raise OSError(
                        f"--feature_cache {self.folder}: image {indices[row]} lies beyond the end of its file; delete "
                        "the folder and build it anew"
                    )
                view = (indices[row], int(flips[row]))
                if not self._sound[view]:
                    if _checksum(rows[row]) != self._checksums[view]:
                        self._checksums[indices[row]] = 0
                        raise InputError(
                            f"--feature_cache {self.folder}: the record of image {indices[row]} is damaged; start "
                            "again with --resume, which "
                            "makes it anew; python -m scf_fast.feature_cache verify looks for more"
                        )
                    self._sound[view] = True

        list(self._threads.map(fill, np.array_split(np.arange(len(indices)), _THREADS)))
        return packed

    def _checksums_of(self, record) -> list[int]:
        return [_checksum(record[start : start + self.layout.view_bytes]) for start in (0, self.layout.view_bytes)]

    def _place(self, index) -> tuple[int, int]:
        """File and offset of an image's record."""
        shard, place = divmod(int(index), self.layout.rows_per_shard)
        return self._shards[shard], place * self.layout.record_bytes

    def verify(self, progress: bool = True) -> int:
        """Check every record against its checksum; damaged ones become missing. Returns how many there were."""

        def damaged(index):
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
        """Write everything out and take the mark away."""
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            self._threads.shutdown()
        for shard in self._shards:
            os.fsync(shard)
            os.close(shard)
        self._checksums.flush()
        self._mark.unlink(missing_ok=True)


def _checksum(view) -> int:
    return zlib.crc32(view) or 1  # 0 means missing


def read_meta(folder: Path) -> dict:
    """meta.json of a cache.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != _FORMAT:
            raise InputError(f"format {meta['format']}")
        layout = layout_of(meta)
        sizes = (layout.num_images, layout.z_dim, *layout.convf_shape)
        if (
            layout.dtype not in CACHE_DTYPES
            or len(sizes) != 5
            or not all(isinstance(size, int) and 0 < size < 1 << 40 for size in sizes)
        ):
            raise InputError(f"layout {meta['layout']}")
        if not isinstance(meta["key"], dict) or not isinstance(meta["convf_error"], float):
            raise TypeError("key and convf_error")
    except OSError as error:
        raise InputError(f"--feature_cache {folder}: holds no feature cache ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--feature_cache {folder}: meta.json is damaged ({error}); delete the folder and build it anew"
        ) from None
    return meta


def layout_of(meta: dict) -> CacheLayout:
    """The layout in a cache's meta.json."""
    return CacheLayout(**{**meta["layout"], "convf_shape": tuple(meta["layout"]["convf_shape"])})


def _plain(layout: CacheLayout) -> dict:
    return json.loads(json.dumps(asdict(layout)))


def _allocate(path: Path, size: int) -> None:
    """A file of zeros whose blocks are really there: a memory map over a hole would die of a full disk."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f"--feature_cache {path}: cannot allocate {size / 1e9:.2f} GB ({error.strerror})"
            ) from None
