"""The record of one image in the feature cache: its layout, and the types its last map can be stored in.

A record holds both orientations of the image, each of them

    scale (float32), features (z_dim float32), convf ((H, W, C), in the cache's dtype), padding to 64 bytes

fp8 and int8 store convf divided by the scale, which makes the largest magnitude of the map the largest of the type.
"""

from dataclasses import dataclass

import numpy as np
import torch

from scf_fast.networks.precision import PRECISION_DTYPES

CACHE_DTYPES: dict[str, torch.dtype] = {
    **{name: PRECISION_DTYPES[name] for name in ("fp32", "fp16", "bf16")},
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_LARGEST = {"fp8": 448.0, "int8": 127.0}  # the value that the largest magnitude of a record is scaled to
_SHARD_BYTES = 1 << 34  # Glint360K's 1.8 TB are 110 files, all open at once
_ALIGN = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class CacheLayout:
    """Shapes and types of a cache's records."""

    num_images: int  # rows of the cache: the first images of the data set, all of them unless a budget cuts it
    z_dim: int
    convf_shape: tuple[int, int, int]  # (C, H, W)
    dtype: str  # a key of CACHE_DTYPES

    @property
    def convf_bytes(self) -> int:
        """Bytes of one map."""
        return int(np.prod(self.convf_shape)) * CACHE_DTYPES[self.dtype].itemsize

    @property
    def view_bytes(self) -> int:
        """Bytes of one orientation, padding included."""
        return -(-(_SCALE_BYTES + 4 * self.z_dim + self.convf_bytes) // _ALIGN) * _ALIGN

    @property
    def record_bytes(self) -> int:
        """Bytes of both orientations."""
        return 2 * self.view_bytes

    @property
    def image_bytes(self) -> int:
        """Bytes of a record and its checksums."""
        return self.record_bytes + 8

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_images * self.image_bytes

    @property
    def rows_per_shard(self) -> int:
        """Records in one file."""
        return max(1, _SHARD_BYTES // self.record_bytes)


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
    """Undoes :func:`encode`: features (B, z_dim) float32, convf (B, C, H, W) channels_last; fp8 and int8 to float32."""
    rows, (c, h, w) = packed.shape[0], layout.convf_shape
    features_end = _SCALE_BYTES + 4 * layout.z_dim
    scale = packed[:, :_SCALE_BYTES].contiguous().view(torch.float32)
    features = packed[:, _SCALE_BYTES:features_end].contiguous().view(torch.float32)
    convf = packed[:, features_end : features_end + layout.convf_bytes].contiguous().view(CACHE_DTYPES[layout.dtype])
    if layout.dtype in _LARGEST:
        convf = convf.float() * scale
    return features, convf.view(rows, h, w, c).permute(0, 3, 1, 2)


def encoding_error(layout: CacheLayout, features: torch.Tensor, convf: torch.Tensor) -> float:
    """Returns how far storing moves convf (B, C, H, W), relative, in the Frobenius norm; features stay as they are."""
    stored, exact = decode(layout, encode(layout, features, convf))[1].double(), convf.double()
    return ((stored - exact).norm() / exact.norm()).item()
