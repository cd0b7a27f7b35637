"""Soft shapes, smooth fields and colors that faces are drawn from."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from scf_fast.pipelines.face_template import FACE_SIZE


def palette_color(stops: Sequence[tuple[int, int, int]], position: float) -> np.ndarray:
    """Returns the color at ``position`` in [0, 1] along equally spaced 8-bit stops, as (3,) float32 in [0, 1]."""
    colors = np.asarray(stops, dtype=np.float64) / 255
    at = np.clip(position, 0, 1) * (len(colors) - 1)
    return np.array([np.interp(at, np.arange(len(colors)), colors[:, c]) for c in range(3)], dtype=np.float32)


def cover(distance: np.ndarray) -> np.ndarray:
    """Returns the covered share of pixels whose centers lie ``distance`` pixels outside (positive) or inside an edge.

    The filter is a box one pixel wide.
    """
    return np.clip(0.5 - distance, 0.0, 1.0)


def bump(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Returns a Gaussian bump: 1 at the origin, exp(-1) at the ends of the half axes."""
    return np.exp(-((x / width) ** 2) - (y / height) ** 2)


def smooth_step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns a smooth step from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def paint(layers: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    """Paints over (3, H, W) layers in place, with one color (3,), gray planes (H, W) or colored planes (3, H, W)."""
    layers += coverage * ((color[:, None, None] if color.ndim == 1 else color) - layers)


def enlarge(grid: np.ndarray, shape: tuple[int, int] = (FACE_SIZE, FACE_SIZE)) -> np.ndarray:
    """Returns a float32 grid interpolated to ``shape``.

    Pillow gives the same bits with any number of threads, which a matrix product would not.
    """
    return np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC))


def refine(coarse: np.ndarray) -> np.ndarray:
    """Returns the (112, 112) interpolation of a (58, 58) float32 plane.

    The coarse plane has every second pixel, and one beyond each border.
    """
    end = len(coarse) - 1
    resized = Image.fromarray(coarse).resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BICUBIC, box=(1, 1, end, end))
    return np.asarray(resized)


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Returns noise of unit variance on ``cells`` x ``cells`` points, interpolated to ``shape``."""
    return enlarge(rng.standard_normal((cells, cells), dtype=np.float32), shape)
