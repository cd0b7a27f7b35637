"""What the frozen backbone makes of each image, on disk: computed once, read in every later epoch and by later runs.

    folder/meta.json         what the rows are and which backbone, preprocessing and data they come from
    folder/rows-NNNNN.bin    fixed-size records, one an image: both orientations, features float32, convf in the cache's dtype
    folder/checksums.bin     uint32 an image: CRC-32 of its record, 0 where it is missing
    folder/writing-R         there while rank R has the cache open for writing

A record counts as present only when its checksum has been stored, after the record itself. A run that dies leaves its ``writing``
mark, and the next one to open the cache then checks every record. ``python -m scf_fast.feature_cache --help`` builds, shows and checks.
"""
import argparse
import hashlib
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {"fp8": 448.0, "int8": 127.0}  # the value that the largest magnitude of a record is scaled to
_SHARD_BYTES = 1 << 30
_ALIGN = 64
_FORMAT = 1


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
    def total_bytes(self) -> int:
        return self.num_images * (self.record_bytes + 4)

    @property
    def rows_per_shard(self) -> int:
        return max(1, _SHARD_BYTES // self.record_bytes)


def cache_key(backbone_state: dict[str, torch.Tensor], source, normalization: str, precision: str) -> dict[str, str]:
    """What decides the cached values: digests of the backbone's weights and of the data, pixel convention and arithmetic."""
    weights = hashlib.sha256()
    for name in sorted(backbone_state):
        weights.update(name.encode())
        weights.update(backbone_state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    data = hashlib.sha256(np.ascontiguousarray(source.labels))
    for index in np.linspace(0, len(source) - 1, num=min(64, len(source)), dtype=np.int64):
        data.update(source.encoded(int(index)))
    return {"backbone": weights.hexdigest()[:16], "data": data.hexdigest()[:16], "normalization": normalization, "precision": precision}


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
    """Inverse of :func:`encode`: features (B, z_dim) float32, convf (B, C, H, W) channels_last, float32 for fp8 and int8."""
    rows, (c, h, w) = packed.shape[0], layout.convf_shape
    features_end = 4 + 4 * layout.z_dim
    scale = packed[:, :4].contiguous().view(torch.float32)
    features = packed[:, 4:features_end].contiguous().view(torch.float32)
    convf = packed[:, features_end:features_end + layout.convf_bytes].contiguous().view(CACHE_DTYPES[layout.dtype])
    if layout.dtype in _LARGEST:
        convf = convf.float() * scale
    return features, convf.view(rows, h, w, c).permute(0, 3, 1, 2)


class FeatureCache:
    """A cache folder, open for reading and writing by one rank; several ranks may have it open for different images.

    Use :meth:`open`. ``present`` is (num_images,) bool, what was there at the last :meth:`refresh`.
    """

    def __init__(self, folder: Path, layout: CacheLayout, rank: int):
        self.folder, self.layout = folder, layout
        self._mark = folder / f"writing-{rank}"
        shards = -(-layout.num_images // layout.rows_per_shard)
        self._shards = [np.memmap(folder / f"rows-{i:05d}.bin", dtype=np.uint8, mode="r+").reshape(-1, layout.record_bytes) for i in range(shards)]
        self._checksums = np.memmap(folder / "checksums.bin", dtype=np.uint32, mode="r+")
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="feature-cache")
        self.refresh()

    @classmethod
    def create_or_check(cls, folder: Path, key: dict, layout: CacheLayout) -> None:
        """Make the folder's files, or check that they hold what this run needs; by one rank, before the others :meth:`open` it.

        Raises:
            ValueError: the folder belongs to another backbone, preprocessing, data set or layout, or the disk is too small.
        """
        meta_file = folder / "meta.json"
        if meta_file.exists():
            meta = read_meta(folder)
            wanted = {**key, **_plain(layout)}
            different = [f"{name}: cached {meta['key'].get(name, meta['layout'].get(name))}, needed {value}" for name, value in wanted.items()
                         if {**meta["key"], **meta["layout"]}.get(name) != value]
            if different:
                raise ValueError(f"--feature_cache {folder}: was made for something else ({'; '.join(different)}); give another folder, or delete it")
            if list(folder.glob("writing-*")):
                checked = cls(folder, layout, 0)
                bad = checked.verify()
                checked.close()
                for mark in folder.glob("writing-*"):
                    mark.unlink()
                tqdm.write(f"feature cache: the last run died while writing; checked every record, {bad} were damaged and will be made anew", file=sys.stderr)
            return
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if layout.total_bytes > free:
            raise ValueError(f"--feature_cache {folder}: needs {layout.total_bytes / 1e9:.1f} GB for {layout.num_images} images, but {free / 1e9:.1f} GB are "
                             f"free; use --cache_dtype int8, or --cache_budget {0.9 * free / 1e9:.1f} (GB; the rest is recomputed in every epoch)")
        for start in range(0, layout.num_images, layout.rows_per_shard):
            rows = min(layout.rows_per_shard, layout.num_images - start)
            _allocate(folder / f"rows-{start // layout.rows_per_shard:05d}.bin", rows * layout.record_bytes)
        _allocate(folder / "checksums.bin", 4 * layout.num_images)
        part = folder / "meta.json.part"
        part.write_text(json.dumps({"format": _FORMAT, "key": key, "layout": _plain(layout)}, indent=2) + "\n")
        os.replace(part, meta_file)

    @classmethod
    def open(cls, folder: Path, layout: CacheLayout, rank: int) -> "FeatureCache":
        """The cache, marked as being written."""
        cache = cls(folder, layout, rank)
        cache._mark.touch()
        return cache

    def refresh(self) -> None:
        """Take a new look at what is present."""
        self.present = np.asarray(self._checksums) != 0

    def write(self, indices: np.ndarray, views: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Store images: ``views`` holds (features, convf) of the plain and of the mirrored images. Images beyond the rows are left out."""
        packed = torch.cat([encode(self.layout, *view) for view in views], dim=1).cpu().numpy()
        keep = np.flatnonzero(indices < self.layout.num_images)

        def store(row):
            shard, place = divmod(int(indices[row]), self.layout.rows_per_shard)
            self._shards[shard][place] = packed[row]
            self._checksums[indices[row]] = zlib.crc32(packed[row]) or 1  # 0 means missing

        list(self._threads.map(store, keep))

    def read(self, indices: np.ndarray, flips: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """features (B, z_dim), convf (B, C, H, W) of present images in the orientation asked for, on ``device``."""
        size = self.layout.view_bytes
        packed = torch.empty(len(indices), size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        out = packed.numpy()
        shards, places = np.divmod(indices, self.layout.rows_per_shard)
        for row, (shard, place, flip) in enumerate(zip(shards.tolist(), places.tolist(), flips.tolist())):
            out[row] = self._shards[shard][place, size * flip:size * (flip + 1)]
        return decode(self.layout, packed.to(device, non_blocking=True))

    def verify(self, progress: bool = True) -> int:
        """Check every record against its checksum; damaged ones become missing. Returns how many there were."""
        def damaged(index):
            shard, place = divmod(int(index), self.layout.rows_per_shard)
            if (zlib.crc32(self._shards[shard][place]) or 1) == self._checksums[index]:
                return False
            self._checksums[index] = 0
            return True

        rows = np.flatnonzero(np.asarray(self._checksums))
        bad = sum(tqdm(self._threads.map(damaged, rows, chunksize=64), total=len(rows), desc="checking", unit="img", unit_scale=True, disable=not progress))
        self.refresh()
        return bad

    def close(self) -> None:
        """Write everything out and take the mark away."""
        self._threads.shutdown()
        for shard in self._shards:
            shard.flush()
        self._checksums.flush()
        self._mark.unlink(missing_ok=True)


def read_meta(folder: Path) -> dict:
    """meta.json of a cache.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        layout = meta["layout"]
        if meta["format"] != _FORMAT or layout["dtype"] not in CACHE_DTYPES:
            raise KeyError(f"format {meta['format']}")
    except OSError as error:
        raise ValueError(f"--feature_cache {folder}: holds no feature cache ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--feature_cache {folder}: meta.json is damaged ({error}); delete the folder and build it anew") from None
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
            raise ValueError(f"--feature_cache {path}: cannot allocate {size / 1e9:.2f} GB ({error.strerror})") from None


def _build(arguments, flags) -> None:
    """One pass over the data, no training."""
    from pipelines.sampler import EpochSampler
    from scf_fast import checkpoints, launch
    from scf_fast.backbones import BACKBONES, identify_backbone
    from scf_fast.config import parse
    from scf_fast.features import open_stream
    from scf_fast.inputs import open_data

    folder = str(arguments.folder)
    config = parse(["--stage", "confidence", "--output_dir", folder, "--saved_fc", "none", "--batch_size", "256", *flags, "--feature_cache", folder])
    source, state = open_data(config), checkpoints.backbone_state(config.saved_bkb)
    if config.normalization is None:
        config.normalization = BACKBONES[identify_backbone(state)[0]].normalization
    runtime = launch.start()
    size = max(min(config.batch_size, len(source)) // runtime.world_size, 1) * runtime.world_size
    sampler = EpochSampler(len(source), size, rank=runtime.rank, world_size=runtime.world_size, shuffle=False, last_batch="partial")
    with open_stream(config, state, source, sampler, runtime) as stream, \
            tqdm(total=len(source), unit="img", unit_scale=True, desc="features", disable=not runtime.is_main) as bar:
        for batch, _ in enumerate(stream.batches(0)):
            bar.update(min(size, len(source) - batch * size))
    launch.finish()


def _info(arguments, _) -> None:
    meta = read_meta(arguments.folder)
    layout = layout_of(meta)
    present = int(np.count_nonzero(np.fromfile(arguments.folder / "checksums.bin", np.uint32)))
    print(f"images     {present} of {layout.num_images} ({100 * present / layout.num_images:.1f} %), both orientations")
    print(f"record     features {layout.z_dim} float32, convf {'x'.join(map(str, layout.convf_shape))} {layout.dtype}, {layout.record_bytes} bytes")
    print(f"size       {layout.total_bytes / 1e9:.2f} GB")
    for name, value in meta["key"].items():
        print(f"{name:<10} {value}")
    if list(arguments.folder.glob("writing-*")):
        print("state      open for writing now, or left so by a run that died; the next run checks it")


def _verify(arguments, _) -> None:
    cache = FeatureCache(arguments.folder, layout_of(read_meta(arguments.folder)), 0)
    bad = cache.verify()
    present = int(cache.present.sum())
    cache.close()
    print(f"{present} intact records, {bad} damaged ones marked as missing; the next run computes them anew")
    if bad:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scf_fast.feature_cache", description="Build, show and check a feature cache for stage 2.")
    commands = parser.add_subparsers(required=True, metavar="build|info|verify")
    build = commands.add_parser("build", help="compute the features of a whole data set; also under the deepspeed launcher or torchrun",
                                usage="%(prog)s FOLDER --data DIR --saved_bkb FILE [flags of train.py: --cache_dtype, --cache_budget, --precision ...]")
    build.add_argument("folder", type=Path)
    build.set_defaults(run=_build)
    for name, action, text in (("info", _info, "what is in it"), ("verify", _verify, "check every record against its checksum; exit status 1 if any was bad")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        command.set_defaults(run=action)
    arguments, rest = parser.parse_known_args()
    if rest and arguments.run is not _build:
        parser.exit(2, f"{parser.prog}: error: unknown argument {rest[0]}\n")
    try:
        arguments.run(arguments, rest)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
