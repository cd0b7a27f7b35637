"""Degradations of known severity: a clean picture and a severity in [0, 1] in, a JPEG file out.

Six kinds take part: blur, down-sampling, sensor noise, JPEG coding, occlusion and low light. A picture's mixture is a
vector of six amounts in [0, 1], drawn with a random direction and a length equal to its severity:

    sqrt(sum_k amounts_k^2) = severity

Each kind's strength at a given amount stands in a table (``_STRENGTHS``), set so that an amount costs a face recognizer
about the same whatever the kind, and that log(cosine to the clean picture's identity) falls with its square; that is
why amounts add up as squares. Measured with a small network on identities it was not trained on, over mixtures grouped
by their strongest kind: mean cosines of 0.79 to 0.85 for severities below 1/3, 0.60 to 0.68 up to 2/3, 0.36 to 0.42
above; clean pictures have 0.86.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageFilter

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE

KINDS = ("blur", "down_sampling", "noise", "jpeg", "occlusion", "low_light")

_AMOUNTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_STRENGTHS = {  # at _AMOUNTS, linear in between
    "blur": (0.0, 3.5, 7.5, 12.0, 18.0),  # standard deviation, pixels of a 112-pixel picture
    "down_sampling": (1.0, 7.5, 14.5, 23.0, 36.0),  # pixels of the picture to one of the coarse grid
    "noise": (0.0, 0.18, 0.46, 1.0, 1.9),  # standard deviation, white is 1
    "jpeg": (95.0, 10.0, 3.0, 1.0, 1.0),  # quality as the IJG scale counts it
    "occlusion": (0.0, 0.07, 0.28, 0.58, 0.85),  # share of the face's area
    "low_light": (0.0, 5.5, 8.5, 10.2, 11.7),  # stops below the right exposure
}
_PHOTONS = 2000.0  # counted by a pixel at white and right exposure: sets the shot noise that low light brings out
# Share of JPEG coding in a mixture's length, at most: even the lowest quality leaves a face as recognizable as other
# kinds do at half of their range.
_JPEG_SHARE = 0.5
# Standard deviation of the noise that a sensor adds in low light, before its gain; white at right exposure is 1.
_READ_NOISE = 0.0008


def draw_amounts(severity: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a random mixture of the six kinds.

    Args:
        severity: in [0, 1]; 0 leaves the picture clean, 1 leaves next to nothing of the face.
        rng: picks one to three kinds, with JPEG coding as a further one in half of the mixtures, and how they share the
            severity.
    Returns:
        (6,) float64 in [0, 1], in the order of KINDS, of Euclidean length ``severity``.
    Raises:
        InputError: severity lies outside [0, 1].
    """
    if not 0 <= severity <= 1:
        raise InputError(f"severity must lie in [0, 1], got {severity}")
    jpeg = KINDS.index("jpeg")
    others = [kind for kind in range(len(KINDS)) if kind != jpeg]
    direction = np.zeros(len(KINDS))
    chosen = rng.choice(others, rng.integers(1, 4), replace=False)
    direction[chosen] = rng.uniform(0.25, 1.0, len(chosen))
    direction /= np.linalg.norm(direction)
    share = max(0.0, rng.uniform(-_JPEG_SHARE, _JPEG_SHARE))  # every second picture keeps the best quality
    direction *= np.sqrt(1 - share**2)
    direction[jpeg] = share
    return severity * direction


def strength(kind: str, amount: float) -> float:
    """Returns the strength of a kind at an amount in [0, 1], in the unit that its table states."""
    return float(np.interp(amount, _AMOUNTS, _STRENGTHS[kind]))


def degrade(picture: np.ndarray, amounts: np.ndarray, rng: np.random.Generator) -> bytes:
    """Degrades a picture and codes it as JPEG.

    Args:
        picture: (H, W, 3) uint8 RGB.
        amounts: (6,) in the order of KINDS, as :func:`draw_amounts` returns them; all zero codes the picture as it is.
        rng: places the occluder and draws the noise.
    Returns:
        A JPEG file of the same size in pixels.
    """
    blur, coarseness, noise, quality, occlusion, stops = (
        strength(kind, amount) for kind, amount in zip(KINDS, amounts)
    )
    if occlusion > 0:
        picture = _occlude(picture, occlusion, rng)
    image = Image.fromarray(picture)
    unit = image.width / FACE_SIZE
    if blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(blur * unit))
    if coarseness > 1:
        coarse = [max(1, round(side / (coarseness * unit))) for side in image.size]
        image = image.resize(coarse, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
    if noise > 0 or stops > 0:
        image = Image.fromarray(_expose(np.asarray(image), noise, stops, rng))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(quality))
    return file.getvalue()


def _expose(picture: np.ndarray, noise: float, stops: float, rng: np.random.Generator) -> np.ndarray:
    """Takes the picture again with 2^-stops of the light.

    The sensor adds noise of its own and shot noise, and a gain that makes up for three stops in four.
    """
    signal = picture * np.float32(1 / 255)
    grain = rng.standard_normal(picture.shape, dtype=np.float32)
    if stops > 0:
        variance = signal * np.float32((2.0**stops - 1) / _PHOTONS)
        variance += np.float32(noise**2 + (2.0**stops - 1) ** 2 * _READ_NOISE**2)
        grain *= np.sqrt(variance, out=variance)
    else:
        grain *= np.float32(noise)
    signal += grain
    signal *= np.float32(255 * 2.0 ** (-stops / 4))
    signal += np.float32(0.5)
    return np.clip(signal, 0, 255, out=signal).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _occlusion_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x and y from -1 to 1 as float32, and the flat indices of a quarter of the pixels on the face."""
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32), indexing="ij"
    )
    face = (x / 0.72) ** 2 + (y / 0.95) ** 2 < 1
    face[1::2], face[:, 1::2] = False, False
    return x, y, np.flatnonzero(face)


def _occlude(picture: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Covers ``share`` of the face by an object with a smooth random outline that reaches in from one side."""
    height, width = picture.shape[:2]
    x, y, face = _occlusion_grid(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    outline = np.asarray(
        Image.fromarray(rng.standard_normal((4, 4), dtype=np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    )
    level = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y + np.float32(0.35) * outline
    edge = np.sort(level.ravel()[face])[round((1 - share) * (len(face) - 1))]
    cover = np.clip((level - edge) * np.float32(width / 4) + np.float32(0.5), 0, 1)
    lightness = rng.uniform(0.05, 0.9) * (1 + np.float32(0.25 * rng.uniform()) * outline)
    color = np.float32(0.12) * rng.standard_normal((3, 1, 1), dtype=np.float32) + lightness
    color = np.clip(255 * color, 0, 255, out=color).transpose(1, 2, 0)
    return (picture + cover[..., None] * (color - picture)).astype(np.uint8)
