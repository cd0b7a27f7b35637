"""Random changes to decoded faces, the same for both decoders, on the device of the batch.

The changes are made in this order, each with its own probability: crop, down-up-sampling, blur, hue and saturation,
gray, occlusion. The first three are linear along rows and along columns, so each is two matrix products a channel with
matrices drawn for every image; the color changes are one 3 x 3 matrix an image. Only images that are changed are
computed, in float32, and rounded to uint8 once at the end.

All random numbers come from outside, so that an image looks the same in an epoch whatever rank or decoder makes it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from scf_fast.pipelines.errors import InputError

# Conversion to luma and chroma (YIQ): DALI's fn.hsv is the linear map that turns and scales the chroma there.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges of the changes; the defaults change nothing. ``PRESETS`` has named ones."""

    crop: float = 0.0  # probability of a random square crop, enlarged to the whole face
    crop_area: tuple[float, float] = (0.5, 1.0)  # share of the face's area that is kept
    resample: float = 0.0  # probability of down-sampling and up-sampling again
    resample_size: tuple[float, float] = (0.5, 0.8)  # share of the face's side
    blur: float = 0.0  # probability of a Gaussian blur
    blur_windows: tuple[int, ...] = (3, 5)  # pixels, odd; sigma = 0.15 (window - 3) + 0.8
    hue_saturation: float = 0.0  # probability of both changes
    hue: tuple[float, float] = (0.0, 20.0)  # degrees
    saturation: tuple[float, float] = (1.0, 1.2)  # factor of the chroma
    gray: float = 0.0  # probability of taking all color out
    occlusion: float = 0.0  # probability of a rectangle in one random color
    occlusion_area: tuple[float, float] = (0.02, 0.2)  # share of the face's area
    occlusion_aspect: tuple[float, float] = (0.5, 2.0)  # height over width

    NUM_UNIFORMS: ClassVar[int] = 20  # random numbers that an image takes

    def __post_init__(self) -> None:
        for name in ("crop", "resample", "blur", "hue_saturation", "gray", "occlusion"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be a probability in [0, 1], got {getattr(self, name)}")
        for name, least, most in (
            ("crop_area", 0.0, 1.0),
            ("resample_size", 0.0, 1.0),
            ("saturation", 0.0, math.inf),
            ("occlusion_area", 0.0, 1.0),
            ("occlusion_aspect", 0.0, math.inf),
            ("hue", -math.inf, math.inf),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most or (
                low == 0 and name in ("crop_area", "resample_size", "occlusion_aspect")
            ):
                raise InputError(
                    f"{name} must be a range (low, high) within {least:g}..{most:g}, got {getattr(self, name)}"
                )
        if not self.blur_windows or any(window < 1 or window % 2 == 0 for window in self.blur_windows):
            raise InputError(f"blur_windows must be odd numbers of pixels, got {self.blur_windows}")

    @property
    def does_something(self) -> bool:
        """Tells whether any change has a probability."""
        return any((self.crop, self.resample, self.blur, self.hue_saturation, self.gray, self.occlusion))

    def apply(self, faces: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        """Changes faces.

        Args:
            faces: (B, H, H, 3) uint8, not written to.
            uniforms: (B, NUM_UNIFORMS) float64 in [0, 1).
        Returns:
            (B, H, H, 3) uint8: new memory, or ``faces`` where no image changes.
        """
        u = dict(zip(_UNIFORMS, uniforms.T))
        chosen = {name: u[f"{name}?"] < getattr(self, name) for name in _STEPS}
        rows = np.flatnonzero(np.any(list(chosen.values()), axis=0))
        if not len(rows):
            return faces
        place = torch.from_numpy(rows).to(faces.device, non_blocking=True)
        images = faces[place].permute(0, 3, 1, 2).float()
        for name in _STEPS:
            here = np.flatnonzero(chosen[name][rows])
            if len(here):
                where = torch.from_numpy(here).to(faces.device, non_blocking=True)
                drawn = {key: values[rows[here]] for key, values in u.items()}
                images[where] = getattr(self, f"_{name}")(images[where], drawn)
        changed = faces.clone()
        changed[place] = images.clamp_(0, 255).round_().to(torch.uint8).permute(0, 2, 3, 1)
        return changed

    def _crop(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        size = images.shape[-1]
        side = size * np.sqrt(_between(self.crop_area, u["crop area"]))
        along = [
            _filter(
                (u[f"crop {axis}"] * (size - side))[:, None] + (np.arange(size) + 0.5) * (side / size)[:, None],
                np.ones(len(side)),
                np.full(len(side), size),
                size,
            )
            for axis in ("top", "left")
        ]
        return _separable(images, *along)

    def _resample(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        size = images.shape[-1]
        small = np.floor(size * _between(self.resample_size, u["resample size"]))
        number = np.arange(size) + 0.5
        down = _filter(number * (size / small)[:, None], size / small, np.full(len(small), size), size)
        down[number[None] > small[:, None]] = 0
        up = _filter(number * (small / size)[:, None], np.ones(len(small)), small, size)
        both = np.einsum("bij,bjk->bik", up, down)
        return _separable(images, both, both)

    def _blur(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        size, number = images.shape[-1], np.arange(images.shape[-1])
        kernels = []
        for window in self.blur_windows:

            def weight(
                distance: np.ndarray, radius: int = window // 2, sigma: float = 0.15 * (window - 3) + 0.8
            ) -> np.ndarray:
                return np.where(abs(distance) <= radius, np.exp(-(distance**2) / (2 * sigma**2)), 0.0)

            # Beyond the border the image is mirrored, without repeating its last pixel.
            i, j = number[:, None], number[None]
            kernel = (
                weight(i - j)
                + np.where(j > 0, weight(i + j), 0)
                + np.where(j < size - 1, weight(2 * (size - 1) - i - j), 0)
            )
            kernels.append(kernel / kernel.sum(axis=1, keepdims=True))
        chosen = np.stack(kernels)[(u["blur window"] * len(kernels)).astype(np.int64)]
        return _separable(images, chosen, chosen)

    def _hue_saturation(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        angle, factor = np.deg2rad(_between(self.hue, u["hue"])), _between(self.saturation, u["saturation"])
        turn = np.zeros((len(angle), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = factor * np.cos(angle)
        turn[:, 1, 2], turn[:, 2, 1] = factor * np.sin(angle), -factor * np.sin(angle)
        return _recolor(images, _RGB @ turn @ _YIQ)

    def _gray(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        return _recolor(images, np.broadcast_to(_YIQ[0], (len(images), 3, 3)))

    def _occlusion(self, images: torch.Tensor, u: Mapping[str, np.ndarray]) -> torch.Tensor:
        size = images.shape[-1]
        low, high = np.log(self.occlusion_aspect)
        area = _between(self.occlusion_area, u["occlusion area"])
        aspect = np.exp(low + (high - low) * u["occlusion aspect"])
        inside = []
        for length, axis in ((np.sqrt(area * aspect), "top"), (np.sqrt(area / aspect), "left")):
            length = np.minimum(length, 1) * size
            start = u[f"occlusion {axis}"] * (size - length)
            centers = np.arange(size) + 0.5
            inside.append((centers >= start[:, None]) & (centers < (start + length)[:, None]))
        mask = _to(inside[0][:, :, None] & inside[1][:, None, :], images.device, torch.bool)[:, None]
        color = np.stack([u[f"occlusion {channel}"] for channel in ("red", "green", "blue")], axis=1) * 255
        return torch.where(mask, _to(color, images.device)[:, :, None, None], images)


PRESETS = {
    "none": Augmentation(),
    # arcface_torch of insightface with dali_aug on
    "arcface_torch": Augmentation(resample=0.1, blur=0.2, hue_saturation=0.2, gray=0.1),
    # the same with crops and occlusions
    "strong": Augmentation(resample=0.1, blur=0.2, hue_saturation=0.2, gray=0.1, crop=0.2, occlusion=0.2),
}
_STEPS = ("crop", "resample", "blur", "hue_saturation", "gray", "occlusion")
_UNIFORMS = (
    *(f"{name}?" for name in _STEPS),
    "crop area",
    "crop top",
    "crop left",
    "resample size",
    "blur window",
    "hue",
    "saturation",
    *(f"occlusion {name}" for name in ("area", "aspect", "top", "left", "red", "green", "blue")),
)
assert len(_UNIFORMS) == Augmentation.NUM_UNIFORMS


def _between(limits: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _filter(centers: np.ndarray, scales: np.ndarray, limits: np.ndarray, size: int) -> np.ndarray:
    """Returns triangle filters, as image libraries resize with: (B, O, size) float64 whose rows sum to 1.

    Args:
        centers: (B, O), the place of each output pixel among the input pixels, where pixel i reaches from i to i + 1.
        scales: (B,), half the width of the triangle in pixels.
        limits: (B,), the number of input pixels; those from there on get no weight.
        size: the number of input pixels at most.
    """
    pixels = np.arange(size) + 0.5
    weights = (
        np.maximum(0, 1 - abs(pixels - centers[..., None]) / scales[:, None, None])
        * (pixels < limits[:, None])[:, None]
    )
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def _separable(images: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """Mixes rows and columns of each (3, H, W) image by its (H, H) and (W, W) matrices."""
    return _to(rows, images.device)[:, None] @ images @ _to(columns, images.device)[:, None].transpose(-1, -2)


def _recolor(images: torch.Tensor, matrices: np.ndarray) -> torch.Tensor:
    """Maps the colors of each (3, H, W) image by its (3, 3) matrix."""
    return (_to(matrices, images.device) @ images.flatten(2)).view_as(images)


def _to(array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(device, non_blocking=True)
