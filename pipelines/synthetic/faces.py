"""Procedural faces: an identity and a variation in, a 112 x 112 RGB picture out.

A face is stated in canonical units: one unit is one pixel of the aligned crop, u points right, v down, z towards the
camera, and the origin is the tip of an average nose. `Face` bakes what an identity keeps (head, ears, nose, hair, skin)
into one texture over (u, v): albedo, coverage and surface normals. `render_face` looks that texture up through the
pose, draws eyes, brows and mouth analytically from their signed distances, lights the result, and lays it over a
background. Pose is a rotation of the relief (u, v, z(u, v)), so near parts move further than far ones; the picture is
then aligned by the similarity transform that brings its own five landmarks closest to the template, as real crops are.

Everything is a pure function of its arguments. No picture of any person went into it.
"""

import math
from dataclasses import dataclass, field, fields

import numpy as np
from PIL import Image

IMAGE_SIZE = 112  # pixels, both ways
# Eyes, nose tip and mouth corners of the aligned 112 x 112 crop, pixels (x, y): the five-point template of insightface.
ALIGNED_LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

_TEXELS = 1.5  # texture samples per canonical unit: keeps strands and freckles crisp through the bilinear look-up
_U_RANGE, _V_RANGE = (
    (-66.0, 66.0),
    (-84.0, 52.0),
)  # canonical rectangle the texture covers; look-ups outside are clamped to its border
_INVERSION_STEPS = (
    6  # of the fixed-point iteration for the inverse pose; each leaves at most 0.7 of the error on the steepest nose
)
_AMBIENT_FLOOR = 0.12  # a surface that faces away from the light keeps this much


def _between(low: float, high: float):
    """A field drawn uniformly from [low, high]."""
    return field(metadata={"range": (low, high)})


def _draw(cls, rng: np.random.Generator, **given):
    ranges = [f.metadata["range"] for f in fields(cls) if f.name not in given]
    values = rng.uniform(*np.array(ranges).T)
    return cls(**given, **dict(zip((f.name for f in fields(cls) if f.name not in given), values.tolist())))


@dataclass(frozen=True)
class Identity:
    """What makes a person: independent, uniform, in canonical units (pixels of the aligned crop), radians or fractions
    of 1.
    """

    head_width: float = _between(33.0, 41.0)  # half width at the cheekbones
    cheek_height: float = _between(-16.0, 2.0)  # v of the widest place
    chin: float = _between(32.0, 43.0)  # v of its lowest point
    jaw_squareness: float = _between(1.75, 3.3)  # exponent of the lower outline: pointed to square
    temple_narrowing: float = _between(0.0, 0.14)
    chin_cleft: float = _between(-0.6, 1.0)  # none below 0
    ear_size: float = _between(5.0, 9.0)
    ear_height: float = _between(-17.0, -6.0)
    ear_protrusion: float = _between(0.0, 4.5)

    eye_spacing: float = _between(14.6, 20.4)  # half the distance between the pupils
    eye_height: float = _between(-23.0, -17.5)
    eye_width: float = _between(5.6, 8.8)  # half
    eye_opening: float = _between(2.3, 4.9)  # upper lid above the eye's axis
    eye_tilt: float = _between(-0.18, 0.26)  # outer corner up
    eye_roundness: float = _between(0.35, 0.75)  # lower lid below the axis, of the opening
    eyelid_crease: float = _between(0.0, 1.0)
    eye_socket: float = _between(0.0, 1.0)  # shade around the eyes
    eye_bags: float = _between(-0.6, 1.0)
    iris_radius: float = _between(2.6, 3.7)
    iris_hue: float = _between(0.0, 1.0)  # brown, hazel, green, blue, gray
    iris_lightness: float = _between(0.75, 1.3)
    lashes: float = _between(0.5, 1.7)  # thickness of the lid line

    brow_height: float = _between(6.6, 11.6)  # above the eye
    brow_thickness: float = _between(1.3, 4.4)
    brow_angle: float = _between(-0.26, 0.30)  # outer end up
    brow_arch: float = _between(-0.4, 3.2)
    brow_length: float = _between(12.0, 19.0)
    brow_inner_end: float = _between(4.0, 9.0)  # distance from the midline
    brow_darkness: float = _between(0.45, 1.0)

    nose_tip: float = _between(-3.6, 3.6)  # v
    nose_projection: float = _between(7.0, 14.0)
    nose_bridge_width: float = _between(2.6, 5.6)
    nose_width: float = _between(6.2, 11.6)  # half, at the wings
    nose_tip_size: float = _between(3.2, 6.4)
    nostril_size: float = _between(0.9, 2.3)
    nose_root: float = _between(0.1, 0.55)  # projection between the eyes, of the tip's

    mouth_height: float = _between(17.6, 24.4)
    mouth_width: float = _between(10.2, 16.8)  # half
    upper_lip: float = _between(1.2, 4.0)
    lower_lip: float = _between(1.8, 5.4)
    cupids_bow: float = _between(0.0, 0.65)
    mouth_curve: float = _between(-1.6, 1.6)  # corners up at rest
    lip_redness: float = _between(0.0, 1.0)
    lip_darkness: float = _between(0.0, 1.0)

    cheekbones: float = _between(0.0, 1.0)
    nasolabial_fold: float = _between(-0.4, 1.0)
    forehead_lines: float = _between(-1.0, 1.0)

    skin_tone: float = _between(0.0, 1.0)  # light to dark
    skin_redness: float = _between(-1.0, 1.0)
    blush: float = _between(0.0, 1.0)
    mottling: float = _between(0.25, 1.0)  # strength of the low-frequency skin field
    freckles: float = _between(-1.6, 1.0)

    hair_tone: float = _between(0.0, 1.0)  # fair, brown, black
    hair_redness: float = _between(-0.5, 1.0)
    hair_gray: float = _between(-2.0, 0.9)
    hairline: float = _between(-64.0, -39.0)  # v over the forehead
    hairline_curve: float = _between(-3.0, 11.0)  # rise from the temples to the middle
    widows_peak: float = _between(-5.0, 7.0)
    parting: float = _between(-24.0, 24.0)  # u
    fringe: float = _between(-5.0, 13.0)  # how far hair falls on the forehead, away from the parting
    fringe_raggedness: float = _between(0.0, 3.5)
    sideburns: float = _between(-40.0, 8.0)  # v where the hair beside the face ends
    hair_volume: float = _between(1.0, 12.0)
    hair_length: float = _between(-40.0, 75.0)  # v where the hair behind the head ends
    hair_waviness: float = _between(0.0, 3.5)
    hair_contrast: float = _between(0.06, 0.26)  # light and dark strands

    beard: float = _between(-1.3, 1.0)
    moustache: float = _between(-1.3, 1.0)
    beard_line: float = _between(6.0, 26.0)  # v where the beard begins on the cheeks

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Identity":
        return _draw(cls, rng)


@dataclass(frozen=True)
class Variation:
    """What changes between two pictures of a person. Angles in radians, colors linear gains, expressions as
    fractions.
    """

    yaw: float = _between(-0.34, 0.34)
    pitch: float = _between(-0.20, 0.20)
    roll: float = _between(-0.05, 0.05)  # left over by the alignment, as are the next three
    zoom: float = _between(0.97, 1.03)
    shift_x: float = _between(-1.2, 1.2)  # pixels
    shift_y: float = _between(-1.2, 1.2)  # pixels
    mouth_opening: float = _between(-0.8, 1.0)  # closed below 0
    smile: float = _between(-0.4, 1.0)
    brow_raise: float = _between(-1.0, 1.0)
    eye_closure: float = _between(-0.15, 0.55)
    gaze_x: float = _between(-1.0, 1.0)
    gaze_y: float = _between(-0.5, 0.5)
    light_azimuth: float = _between(-1.0, 1.0)  # 0 from the camera, positive from the right of the picture
    light_elevation: float = _between(-0.25, 0.9)
    light_strength: float = _between(0.2, 0.6)  # directed part; the rest is ambient
    gain: float = _between(0.74, 1.16)
    warmth: float = _between(-0.14, 0.14)  # red against blue
    tint: float = _between(-0.06, 0.06)  # green against the others
    saturation: float = _between(0.45, 1.1)  # of the camera's colors
    background: np.ndarray = field(repr=False, compare=False)  # (3, 4, 4) float32 albedo, interpolated over the picture

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Variation":
        lightness, hue = rng.uniform(0.12, 0.88), 0.09 * rng.standard_normal((3, 1, 1))
        pattern = rng.uniform(0.0, 0.16) * rng.standard_normal((1, 4, 4)) + 0.03 * rng.standard_normal((3, 4, 4))
        background = np.clip(lightness + hue + pattern, 0.02, 1.0).astype(np.float32)
        return _draw(cls, rng, background=background)


def _palette(stops, position: float) -> np.ndarray:
    """Color at `position` in [0, 1] along equally spaced 8-bit stops, as (3,) float32 in [0, 1]."""
    stops = np.asarray(stops, dtype=np.float64) / 255
    at = np.clip(position, 0, 1) * (len(stops) - 1)
    return np.array([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], dtype=np.float32)


_SKIN = [(228, 192, 170), (214, 168, 138), (186, 132, 98), (140, 92, 66), (90, 58, 45)]
_HAIR = [(226, 192, 132), (170, 120, 70), (104, 68, 42), (58, 40, 32), (28, 24, 24)]
_IRIS = [(74, 46, 30), (120, 84, 44), (104, 122, 72), (86, 128, 168), (140, 152, 158)]


def _cover(distance):
    """Coverage of a pixel whose center lies `distance` pixels outside (positive) or inside an edge: a box filter one
    pixel wide.
    """
    return np.clip(0.5 - distance, 0.0, 1.0)


def _bump(x, y, width, height):
    """1 at the origin, exp(-1) at the ends of the half axes."""
    return np.exp(-((x / width) ** 2) - (y / height) ** 2)


def _step(x, low, high):
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _paint(layers, coverage, color):
    """Lay a color, (3,), or gray (H, W) or colored (3, H, W) planes, over (3, H, W) layers in place."""
    layers += coverage * ((color[:, None, None] if color.ndim == 1 else color) - layers)


def _enlarge(grid, shape=(IMAGE_SIZE, IMAGE_SIZE)):
    """A float32 grid interpolated to `shape`. Pillow gives the same bits with any thread count, which a matrix product
    would not.
    """
    return np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC))


def _refine(coarse):
    """(58, 58) float32 on every second pixel and beyond the border -> (112, 112)."""
    end = len(coarse) - 1
    resized = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(1, 1, end, end))
    return np.asarray(resized)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Unit-variance noise on cells x cells points, interpolated to `shape`."""
    return _enlarge(rng.standard_normal((cells, cells), dtype=np.float32), shape)


class Face:
    """One identity, ready to render.

    Args:
        identity: the geometry and colors.
        rng: draws the skin field, freckles, moles and hair strands, which belong to the identity as much as its
            geometry does.
    """

    def __init__(self, identity: Identity, rng: np.random.Generator):
        self.identity = identity
        self.skin = self._skin_color()
        self.hair = self._hair_color()
        # Over the canonical rectangle, _TEXELS samples a unit: albedo red, green, blue, coverage, hair over the face;
        # unit normal x, y, z.
        self.surface, self.normals = self._bake(rng)

    def _skin_color(self):
        i = self.identity
        return _palette(_SKIN, i.skin_tone) * (1 + i.skin_redness * np.array([0.03, -0.035, -0.05], dtype=np.float32))

    def _hair_color(self):
        i = self.identity
        color = _palette(_HAIR, i.hair_tone) * (
            1 + max(0.0, i.hair_redness) * np.array([0.32, -0.12, -0.34], dtype=np.float32)
        )
        gray = max(0.0, i.hair_gray)
        return np.clip(color + gray * (np.float32(0.66) - color), 0.0, 1.0)

    def depth(self, u, v):
        """Relief z(u, v) of head and nose in canonical units: continuous, bounded, defined everywhere."""
        i = self.identity
        radius2 = (u / (i.head_width + 2)) ** 2 + ((v + 12) / 62) ** 2
        return 30 * (1 - np.minimum(radius2, 1.3)) + i.nose_projection * self._nose_profile(u, v)

    def _nose_profile(self, u, v):
        """1 on the tip, down to `nose_root` between the eyes, 0 on the cheeks and the upper lip."""
        i = self.identity
        below = v - i.nose_tip
        along = np.where(below < 0, np.maximum(1 + below * ((1 - i.nose_root) / 22), 0), np.maximum(1 - below / 8, 0))
        return along * np.exp(-((u / (i.nose_bridge_width + 4)) ** 2))

    def landmarks(self, variation: Variation) -> np.ndarray:
        """(5, 2) canonical positions of eyes, nose tip and mouth corners, left to right in the picture."""
        i = self.identity
        corner_u, corner_v = self.mouth_corner(variation)
        return np.array(
            [
                [-i.eye_spacing, i.eye_height],
                [i.eye_spacing, i.eye_height],
                [0.0, i.nose_tip],
                [-corner_u, corner_v],
                [corner_u, corner_v],
            ]
        )

    def mouth_corner(self, variation: Variation) -> tuple[float, float]:
        i, opening = self.identity, max(0.0, variation.mouth_opening)
        return i.mouth_width * (
            1 + 0.13 * variation.smile - 0.08 * opening
        ), i.mouth_height - i.mouth_curve - 2.4 * variation.smile

    def _head_distance(self, u, v):
        """Approximate signed distance to the outline of the head, from an implicit superellipse and its gradient."""
        i = self.identity
        low = np.maximum(v - i.cheek_height, 0) / (i.chin - i.cheek_height)
        high = np.maximum(i.cheek_height - v, 0) / (i.cheek_height + 88)
        width = i.head_width * (1 - i.temple_narrowing * _step(high, 0.05, 0.7))
        level = (
            (np.abs(u) / width) ** i.jaw_squareness
            + low ** (i.jaw_squareness * 0.85)
            + high ** (1.9 * i.jaw_squareness)
        )
        # The root makes the level nearly linear across the outline, so that one gradient serves a wide band.
        level = level ** (1 / i.jaw_squareness) - 1
        slope_v, slope_u = np.gradient(level, 1 / _TEXELS)
        return level / np.maximum(np.hypot(slope_u, slope_v), 0.008)

    def _bake(self, rng):
        """((5, rows, columns), (3, rows, columns)) float32: see __init__."""
        i = self.identity
        u = np.arange(*_U_RANGE, 1 / _TEXELS, dtype=np.float32)[None, :]
        v = np.arange(*_V_RANGE, 1 / _TEXELS, dtype=np.float32)[:, None]
        u, v = np.broadcast_arrays(u, v)
        side = np.abs(u)
        head = self._head_distance(u, v)
        face = _cover(head)
        strands = self._strands(rng, u, v)
        hair_color = self.hair[:, None, None] * (1 + i.hair_contrast * strands)

        surface = np.zeros((5, *u.shape), dtype=np.float32)
        albedo, coverage, front_hair = surface[:3], surface[3], surface[4]

        def lay(cover, color):
            _paint(albedo, cover, color)
            np.maximum(coverage, cover, out=coverage)

        # Behind the head: hair, neck, ears.
        outer = head - i.hair_volume * (0.55 + 0.45 * _step(-v, -10, 50))
        crown = np.maximum(outer, v - max(i.hair_length, i.ear_height - 6))
        fall = np.maximum(side - i.head_width - 0.9 * i.hair_volume - 0.6 * strands, v - i.hair_length - 2 * strands)
        lay(_cover(np.minimum(crown, np.maximum(fall, -40 - v))), 0.72 * hair_color)
        lay(_cover(np.maximum(side - 0.58 * i.head_width - 0.12 * np.maximum(v - 40, 0), 14 - v)), 0.78 * self.skin)
        ear_u, ear_v = (
            (side - i.head_width - 0.35 * i.ear_protrusion) / (0.5 * i.ear_size),
            (v - i.ear_height) / (1.25 * i.ear_size),
        )
        lay(_cover((np.hypot(ear_u, ear_v) - 1) * 0.5 * i.ear_size), 0.92 * self.skin)
        lay(0.5 * _cover((np.hypot(ear_u - 0.1, ear_v) - 0.5) * 0.5 * i.ear_size), 0.66 * self.skin)

        lay(face, self._skin_albedo(rng, u, v))
        self._draw_nose(albedo, u, v)
        self._draw_beard(albedo, face, u, v, strands)

        # In front: hair down to the hairline, and beside the face down to the sideburns.
        from_parting = np.abs(u - i.parting)
        line = i.hairline - i.hairline_curve * (1 - (u / i.head_width) ** 2) + i.widows_peak * np.exp(-((u / 6) ** 2))
        line = line + i.fringe * _step(from_parting, 0, 26) + i.fringe_raggedness * self._ragged(rng, u)
        line = np.minimum(line, i.eye_height - 9)  # the eyes stay free
        temple = i.head_width * (0.90 - 0.12 * _step(-v, 20, 48))
        beside = np.maximum(temple - side + 0.8 * strands, v - i.sideburns)
        front_hair[:] = _cover(np.maximum(np.minimum(v - line, beside), outer))
        lay(front_hair, hair_color * (0.86 + 0.14 * _step(from_parting, 0, 7)))

        # The nose is flattened for the light: at full height its foot would be black under any light from above.
        relief = self.depth(u, v) - 0.4 * i.nose_projection * self._nose_profile(u, v) + self._fine_relief(u, side, v)
        slope_v, slope_u = np.gradient(relief, np.float32(1 / _TEXELS))
        towards_camera = 1 / np.sqrt(1 + slope_u**2 + slope_v**2)
        return surface, np.stack([-slope_u * towards_camera, -slope_v * towards_camera, towards_camera]).astype(
            np.float32
        )

    def _strands(self, rng, u, v):
        """Hair strands: noise across them, waving along them."""
        i = self.identity
        table = rng.standard_normal(128)
        wave = i.hair_waviness * np.sin(v * (0.16 + 0.05 * i.hair_waviness) + rng.uniform(0, 2 * np.pi))
        across = (u + wave + 0.25 * (u - i.parting) * (v + 60) / 60) / 1.7
        return np.interp(across, np.arange(-64, 64), table, period=128).astype(np.float32)

    def _ragged(self, rng, u):
        return np.interp(u[0], np.arange(-80, 81, 4.0), rng.standard_normal(41)).astype(np.float32)

    def _skin_albedo(self, rng, u, v):
        i, shape = self.identity, u.shape
        side = np.abs(u)
        mottle = _smooth_field(rng, shape, 9)
        ruddy = _smooth_field(rng, shape, 6)
        tone = 1 + 0.075 * i.mottling * mottle
        tone -= 0.22 * i.eye_socket * _bump(side - i.eye_spacing, v - i.eye_height + 2, 9, 6.5)
        tone -= 0.16 * max(0.0, i.eye_bags) * _bump(side - i.eye_spacing, v - i.eye_height - 6.5, 6.5, 2.2)
        fold = np.exp(-(((side - i.nose_width - 1.5 - 0.42 * (v - i.nose_tip)) / 1.3) ** 2))
        fold *= _step(v - i.nose_tip, -1, 5) * _step(i.mouth_height - v, -5, 3)
        tone -= 0.24 * max(0.0, i.nasolabial_fold) * fold
        wrinkle = np.square(np.maximum(np.cos(v * 1.05 + 0.004 * u * u), 0))
        tone -= 0.10 * max(0.0, i.forehead_lines) * _step(-v, 30, 36) * wrinkle * wrinkle
        tone -= 0.24 * max(0.0, i.chin_cleft) * _bump(u, v - i.chin + 5, 1.1, 4)
        freckles = np.maximum(_smooth_field(rng, shape, 72) - 1.0, 0)
        tone -= 0.30 * max(0.0, i.freckles) * np.minimum(freckles, 0.8) * _bump(side - 12, v + 3, 20, 15)
        moles = rng.uniform([-30, -36, 0.3, -0.5], [30, 34, 1.7, 0.65], (6, 4))
        for mole_u, mole_v, radius, strength in moles[moles[:, 3] > 0].tolist():  # the others are not there
            tone -= strength * _cover(np.hypot(u - mole_u, v - mole_v) - radius)
        skin = self.skin[:, None, None] * tone
        red = (
            0.045 * i.mottling * ruddy
            + 0.11 * i.blush * _bump(side - 21, v - 4, 10, 8)
            + 0.05 * i.blush * _bump(u, v - i.nose_tip, 6, 5)
        )
        return skin * (1 + red * np.array([0.35, -1.0, -0.8], dtype=np.float32)[:, None, None])

    def _draw_nose(self, albedo, u, v):
        i = self.identity
        side, below = np.abs(u), v - i.nose_tip
        dark = 0.42 * self.skin
        flank = (
            np.exp(-(((side - i.nose_bridge_width - 1.2) / 1.7) ** 2)) * _step(-below, -1, 8) * _step(below, -24, -12)
        )
        _paint(albedo, 0.20 * flank, dark)
        wing = np.hypot(side - i.nose_width + 2.6, (below - 2.2) * 0.85) - 3.1
        _paint(albedo, 0.60 * _cover(np.abs(wing) - 0.35) * _step(side, i.nose_width - 2.4, i.nose_width - 0.6), dark)
        tip = np.hypot(u, (below - 1) * 1.15) - i.nose_tip_size
        _paint(albedo, 0.30 * _cover(np.abs(tip) - 0.4) * _step(below, 1, 4), dark)
        _paint(albedo, 0.22 * _bump(u, below - 7.0, i.nose_width, 1.8), dark)
        nostril = np.hypot((side - 0.48 * i.nose_width) / 1.6, (below - 4.4 + 0.12 * side)) - i.nostril_size * 0.75
        _paint(albedo, 0.85 * _cover(nostril), 0.22 * self.skin)
        _paint(albedo, 0.28 * _bump(u + 0.4, below + 1.2, 1.9, 1.5), np.minimum(1.35 * self.skin + 0.05, 1))

    def _draw_beard(self, albedo, face, u, v, strands):
        i = self.identity
        side = np.abs(u)
        density = 0.75 + 0.25 * strands
        # From below the lower lip it climbs beside the mouth up to the line on the cheeks.
        line = np.maximum(i.mouth_height + 3.5 - 1.5 * np.maximum(side - i.mouth_width + 2, 0), i.beard_line)
        clear_of_lips = 1 - _bump(u, v - i.mouth_height - 1, i.mouth_width * 0.95, 5.5)
        beard = max(0.0, i.beard) * face * _step(v - line, 0, 7) * clear_of_lips * density
        _paint(albedo, np.clip(beard, 0, 0.92), 0.8 * self.hair)
        center = 0.5 * (i.nose_tip + 6 + i.mouth_height - i.upper_lip)
        moustache = max(0.0, i.moustache) * _bump(u, v - center - 0.018 * u * u, i.mouth_width * 0.85, 2.6) * density
        _paint(albedo, np.clip(1.3 * moustache, 0, 0.92), 0.8 * self.hair)

    def _fine_relief(self, u, side, v):
        i = self.identity
        return (
            -(2.0 + 2.5 * i.eye_socket) * _bump(side - i.eye_spacing, v - i.eye_height, 9, 6)
            + 2.0 * _bump(side - i.eye_spacing, v - i.eye_height + i.brow_height, 12, 3.5)
            + 4.0 * i.cheekbones * _bump(side - 24, v + 2, 9, 8)
            + 3.0 * _bump(u, v - i.chin + 8, 10, 6)
            + 1.6 * _bump(u, v - i.mouth_height - i.lower_lip, i.mouth_width * 0.8, 3.0)
            - 1.6 * _bump(u, v - i.mouth_height - i.lower_lip - 4.5, i.mouth_width * 0.7, 2.5)
            + 2.2 * _bump(side - i.nose_width + 2.5, v - i.nose_tip - 2.5, 3.2, 3.0)
            + 0.35 * i.nose_tip_size * _bump(u, v - i.nose_tip, i.nose_tip_size, i.nose_tip_size)
        )


_COARSE = (
    2 * np.arange(-1, IMAGE_SIZE // 2 + 1, dtype=np.float32) + 0.5
)  # pixel positions of the grid on which pose and light are found


def render_face(face: Face, variation: Variation) -> tuple[np.ndarray, np.ndarray]:
    """Picture of a face.

    Returns:
        (112, 112, 3) uint8 RGB, and the (5, 2) float64 positions of eyes, nose tip and mouth corners in it, pixels (x,
        y).
    """
    pose = _Pose(face, variation)
    coarse = pose.canonical_coordinates()
    u, v = (_refine(plane) for plane in coarse)
    surface = _look_up(face.surface, u, v)
    albedo, coverage, clear = surface[:3], surface[3], 1 - surface[4]
    _draw_eyes(albedo, face, variation, pose, u, v)
    _draw_brows(albedo, face, variation, pose, u, v, clear)
    _draw_mouth(albedo, face, variation, pose, u, v)

    shade, gloss = _light(face, variation, pose, *coarse)
    albedo *= shade
    albedo += gloss * clear
    picture = np.stack([_enlarge(plane) for plane in variation.background])
    picture += coverage * (albedo - picture)
    return np.ascontiguousarray(_expose(picture, variation).transpose(1, 2, 0)), pose.landmarks


def _expose(picture, variation):
    """What a camera makes of linear colors: exposure, white balance, saturation, 8 bits."""
    gains = variation.gain * np.array([1 + variation.warmth, 1 + variation.tint, 1 - variation.warmth])
    picture *= (255 * gains).astype(np.float32)[:, None, None]
    gray = picture[0] + picture[1]
    gray += picture[2]
    gray *= np.float32((1 - variation.saturation) / 3)
    gray += np.float32(0.5)
    picture *= np.float32(variation.saturation)
    picture += gray
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)


class _Pose:
    """Rotation of the relief and the similarity that aligns its landmarks; complex numbers stand for points of the
    plane.
    """

    def __init__(self, face: Face, variation: Variation):
        self.face = face
        sin_y, cos_y, sin_p, cos_p = (
            np.sin(variation.yaw),
            np.cos(variation.yaw),
            np.sin(variation.pitch),
            np.cos(variation.pitch),
        )
        # Rows: picture x, picture y, towards the camera; columns: u, v, z.
        self.rotation = np.array(
            [[cos_y, 0, sin_y], [-sin_y * sin_p, cos_p, cos_y * sin_p], [-sin_y * cos_p, -sin_p, cos_y * cos_p]]
        )
        points = face.landmarks(variation)
        rotated = self._rotate(points[:, 0], points[:, 1])
        target = ALIGNED_LANDMARKS @ [1, 1j]
        spread = rotated - rotated.mean()
        scale = np.vdot(spread, target) / np.vdot(spread, spread)  # least squares over rotation and scale
        jitter = variation.zoom * np.exp(1j * variation.roll)
        self.scale = scale * jitter
        center = target.mean() + complex(variation.shift_x, variation.shift_y)
        self.offset = center - self.scale * rotated.mean()
        self.landmarks = self._to_xy(self.scale * rotated + self.offset)

    def _rotate(self, u, v):
        z = self.face.depth(u, v)
        (xu, _, xz), (yu, yv, yz), _ = self.rotation
        return xu * u + xz * z + 1j * (yu * u + yv * v + yz * z)

    @staticmethod
    def _to_xy(points):
        return np.stack([points.real, points.imag], axis=-1)

    def to_pixels(self, u, v) -> np.ndarray:
        """Canonical points (N,), (N,) -> (N, 2) pixels."""
        return self._to_xy(
            self.scale * self._rotate(np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)) + self.offset
        )

    def canonical_coordinates(self):
        """Canonical u and v seen by each second pixel, on a grid with one more point on each side: (2, 58, 58) float32.

        The fixed-point iteration converges while the slope of the relief times the tangent of the angle stays below 1.
        """
        inverse = 1 / self.scale
        start = -self.offset * inverse
        column, row = _COARSE[None, :], _COARSE[:, None]
        x = np.float32(inverse.real) * column - np.float32(inverse.imag) * row + np.float32(start.real)
        y = np.float32(inverse.imag) * column + np.float32(inverse.real) * row + np.float32(start.imag)
        (xu, _, xz), (yu, yv, yz), _ = self.rotation.astype(np.float32)
        u, v = x / xu, y / yv
        for _ in range(_INVERSION_STEPS):
            z = self.face.depth(u, v)
            u = (x - xz * z) / xu
            v = (y - yu * u - yz * z) / yv
        return np.stack([u, v])

    def window(self, u, v, margin: float) -> tuple[slice, slice]:
        """Rows and columns that hold the canonical points (N,), (N,) and `margin` pixels around them, cut to the
        picture.
        """
        points = self.to_pixels(u, v)
        left, top = np.clip(points.min(axis=0) - margin, 0, IMAGE_SIZE).astype(int)
        right, bottom = np.clip(points.max(axis=0) + margin + 1, 0, IMAGE_SIZE).astype(int)
        return slice(top, bottom), slice(left, right)


def _look_up(planes, u, v):
    """Bilinear samples of (K, rows, columns) over the canonical rectangle at u, v: (K, *u.shape) float32."""
    _, rows, columns = planes.shape
    x = np.clip((u - np.float32(_U_RANGE[0])) * np.float32(_TEXELS), 0, columns - 1.001).ravel()
    y = np.clip((v - np.float32(_V_RANGE[0])) * np.float32(_TEXELS), 0, rows - 1.001).ravel()
    left, top = x.astype(np.intp), y.astype(np.intp)
    x -= left
    y -= top
    corner = top * columns + left
    flat = planes.reshape(len(planes), -1)
    upper, lower, right = flat.take(corner, axis=1), flat.take(corner + columns, axis=1), flat.take(corner + 1, axis=1)
    right -= upper
    right *= x
    upper += right
    right = flat.take(corner + (columns + 1), axis=1)
    right -= lower
    right *= x
    lower += right
    lower -= upper
    lower *= y
    upper += lower
    return upper.reshape(len(planes), *u.shape)


def _light(face, variation, pose, u, v):
    """(112, 112) factors of the albedo, and highlights to add; u and v are coarse, since both are smooth."""
    normals = _look_up(face.normals, u, v)
    azimuth, elevation, strength = variation.light_azimuth, variation.light_elevation, variation.light_strength
    in_picture = np.array(
        [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    )
    light, camera = in_picture @ pose.rotation, pose.rotation[2]  # in the frame of the face, where the normals are
    half = (light + camera) / np.linalg.norm(light + camera)

    def towards(direction):
        x, y, z = direction.astype(np.float32)
        return np.maximum(normals[0] * x + normals[1] * y + normals[2] * z, 0)

    shade = np.maximum(strength * towards(light) + (1.05 - 0.8 * strength), _AMBIENT_FLOOR)
    gloss = towards(half)
    for _ in range(4):  # the 16th power
        gloss *= gloss
    return _refine(shade), _refine(0.25 * strength * gloss)


def _draw_eyes(albedo, face, variation, pose, u, v):
    i = face.identity
    reach = np.array([-1.0, 1.0]) * (i.eye_spacing + i.eye_width)
    window = pose.window(reach, [i.eye_height, i.eye_height], 8)
    layers, u, v = albedo[(slice(None), *window)], u[window], v[window]
    inwards, down = np.abs(u) - i.eye_spacing, v - i.eye_height  # both eyes at once; positive on the outer half
    tilt_sin, tilt_cos = math.sin(i.eye_tilt), math.cos(i.eye_tilt)  # a NumPy scalar would turn the arrays into float64
    x, y = tilt_cos * inwards - tilt_sin * down, tilt_sin * inwards + tilt_cos * down
    opening = i.eye_opening * (1 - max(0.0, variation.eye_closure))
    arc = 1 - (x / i.eye_width) ** 2
    upper = -opening * arc * (1 - 0.05 * x)
    lower = i.eye_roundness * i.eye_opening * arc
    inside = _cover(np.maximum(upper - y, y - lower))
    beyond = np.abs(x) - i.eye_width
    crease = np.abs(y - upper + 1.4 + 1.2 * i.eyelid_crease) - 0.25
    _paint(layers, 0.55 * i.eyelid_crease * _cover(np.maximum(crease, beyond)), 0.5 * face.skin)
    white = 0.92 - 0.3 * np.clip(1 - (y - upper) / 2.2, 0, 1)  # in the shade of the upper lid
    _paint(layers, inside, white)
    from_pupil = np.hypot(
        inwards - 1.1 * variation.gaze_x * np.sign(u), down - 0.6 * variation.gaze_y + 0.25 * opening - 0.3
    )
    rim = np.clip(1.15 - 0.65 * np.square(np.square(from_pupil / i.iris_radius)), 0.3, 1.2)
    iris = rim * np.clip(_palette(_IRIS, i.iris_hue) * i.iris_lightness, 0, 1)[:, None, None]
    iris *= 1 - _cover(from_pupil - 0.45 * i.iris_radius)
    _paint(layers, inside * _cover(from_pupil - i.iris_radius), iris)
    lid = np.maximum(np.abs(y - np.minimum(upper, 0)) - 0.5 * i.lashes, beyond - 0.6)
    _paint(layers, 0.9 * _cover(lid), 0.18 * face.hair + 0.04)
    _paint(layers, 0.3 * _cover(np.maximum(np.abs(y - lower) - 0.3, beyond)), 0.4 * face.skin)
    glint = np.hypot(inwards + 0.9 * np.sign(u), down + 1.3)  # on the same side of both pupils, as one light gives it
    layers += inside * _cover(glint - 0.7) * (1 - layers)


def _draw_brows(albedo, face, variation, pose, u, v, clear):
    i = face.identity
    height = i.eye_height - i.brow_height - 1.8 * variation.brow_raise
    outer = i.brow_inner_end + i.brow_length
    window = pose.window(np.array([-outer, outer]), [height, height], 9)
    along = (np.abs(u[window]) - i.brow_inner_end) / i.brow_length
    axis = height - i.brow_angle * i.brow_length * (along - 0.5) - i.brow_arch * (4 * along * (1 - along) - 0.5)
    thickness = 0.5 * i.brow_thickness * (1.15 - 0.75 * np.clip(along, 0, 1))
    ends = np.maximum(-along, along - 1) * i.brow_length
    brow = np.maximum(np.abs(v[window] - axis) - thickness, ends)
    _paint(albedo[(slice(None), *window)], i.brow_darkness * clear[window] * _cover(0.7 * brow), 0.72 * face.hair)


def _draw_mouth(albedo, face, variation, pose, u, v):
    i = face.identity
    half_width, corner_v = face.mouth_corner(variation)
    gap = 6.0 * max(0.0, variation.mouth_opening)
    window = pose.window(np.array([-half_width, half_width]), [i.mouth_height, i.mouth_height + gap], 10)
    layers = albedo[(slice(None), *window)]
    x, y = u[window] / half_width, v[window]
    arc = np.maximum(1 - x * x, 0)
    root = np.sqrt(arc)
    line = corner_v + (i.mouth_height - corner_v) * arc
    upper_edge = line - 0.35 * gap * arc
    lower_edge = line + 0.65 * gap * arc
    top = upper_edge - i.upper_lip * (0.45 * arc + 0.55 * root) * (1 - i.cupids_bow * np.exp(-((x / 0.16) ** 2)))
    bottom = lower_edge + i.lower_lip * (0.6 * arc + 0.4 * root)
    outside = (np.abs(x) - 1) * half_width
    red = np.float32([0.80, 0.42, 0.40]) * (1 - 0.45 * i.skin_tone)
    color = (face.skin * 0.86 + (0.35 + 0.5 * i.lip_redness) * (red - face.skin * 0.86)) * (1 - 0.35 * i.lip_darkness)
    lips = _cover(np.maximum(np.maximum(top - y, y - bottom), outside))
    lit = 1 + 0.16 * np.clip((y - lower_edge) / 2, -1, 1) - 0.12 * np.clip((y - bottom) / 2 + 1, 0, 1)
    _paint(layers, 0.92 * lips, color[:, None, None] * lit)
    shadow = np.maximum(np.abs(y - line) - 0.35, outside - 0.5)
    _paint(layers, 0.75 * _cover(shadow), 0.34 * color)
    if gap > 0:
        inside = _cover(np.maximum(np.maximum(upper_edge - y, y - lower_edge), outside + 0.5))
        _paint(layers, inside, np.float32([0.24, 0.07, 0.08]))
        teeth = np.maximum(y - upper_edge - min(0.45 * gap, 2.6) * root, np.abs(x) * half_width - 0.8 * half_width)
        _paint(layers, inside * _cover(teeth), np.float32([0.94, 0.92, 0.88]))
