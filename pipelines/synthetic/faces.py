"""Procedural faces: the relief of an identity, and the texture baked from it.

A face is stated in canonical units: one unit is one pixel of the aligned crop, u points right, v down, z towards the
camera, and the origin is the tip of an average nose. :class:`Face` bakes what an identity keeps (head, ears, nose,
hair, skin) into one texture over (u, v): albedo, coverage and surface normals. ``rendering`` looks that texture up
through a pose, and adds what moves: eyes, brows and mouth.

Everything is a pure function of its arguments. No picture of any person went into it.
"""

import numpy as np

from scf_fast.pipelines.synthetic.shapes import bump, cover, paint, palette_color, smooth_field, smooth_step
from scf_fast.pipelines.synthetic.traits import Identity, Variation

TEXELS = 1.5  # texture samples per canonical unit: keeps strands and freckles crisp through the bilinear look-up
# The canonical rectangle that the texture covers; look-ups outside are clamped to its border.
U_RANGE = (-66.0, 66.0)
V_RANGE = (-84.0, 52.0)
_SKIN = [(228, 192, 170), (214, 168, 138), (186, 132, 98), (140, 92, 66), (90, 58, 45)]
_HAIR = [(226, 192, 132), (170, 120, 70), (104, 68, 42), (58, 40, 32), (28, 24, 24)]


class Face:
    """One identity, ready to render.

    Args:
        identity: the geometry and colors.
        rng: draws the skin field, freckles, moles and hair strands, which belong to the identity as much as its
            geometry does.

    Attributes:
        skin, hair: (3,) float32 colors.
        surface: (5, rows, columns) float32 over the canonical rectangle, ``TEXELS`` samples a unit: albedo red, green
            and blue, coverage, and hair over the face.
        normals: (3, rows, columns) float32, the unit normal x, y, z of the same points.
    """

    def __init__(self, identity: Identity, rng: np.random.Generator):
        self.identity = identity
        self.skin = self._skin_color()
        self.hair = self._hair_color()
        u, v = np.broadcast_arrays(
            np.arange(*U_RANGE, 1 / TEXELS, dtype=np.float32)[None, :],
            np.arange(*V_RANGE, 1 / TEXELS, dtype=np.float32)[:, None],
        )
        self.surface = self._bake_surface(rng, u, v)
        self.normals = self._bake_normals(u, v)

    def _skin_color(self) -> np.ndarray:
        i = self.identity
        return palette_color(_SKIN, i.skin_tone) * (
            1 + i.skin_redness * np.array([0.03, -0.035, -0.05], dtype=np.float32)
        )

    def _hair_color(self) -> np.ndarray:
        i = self.identity
        color = palette_color(_HAIR, i.hair_tone) * (
            1 + max(0.0, i.hair_redness) * np.array([0.32, -0.12, -0.34], dtype=np.float32)
        )
        gray = max(0.0, i.hair_gray)
        return np.clip(color + gray * (np.float32(0.66) - color), 0.0, 1.0)

    def depth(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns the relief z(u, v) of head and nose in canonical units: continuous, bounded, defined everywhere."""
        i = self.identity
        radius2 = (u / (i.head_width + 2)) ** 2 + ((v + 12) / 62) ** 2
        return 30 * (1 - np.minimum(radius2, 1.3)) + i.nose_projection * self._nose_profile(u, v)

    def _nose_profile(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns 1 on the tip of the nose, ``nose_root`` between the eyes, 0 on the cheeks and the upper lip."""
        i = self.identity
        below = v - i.nose_tip
        along = np.where(below < 0, np.maximum(1 + below * ((1 - i.nose_root) / 22), 0), np.maximum(1 - below / 8, 0))
        return along * np.exp(-((u / (i.nose_bridge_width + 4)) ** 2))

    def landmarks(self, variation: Variation) -> np.ndarray:
        """Returns the (5, 2) canonical positions of eyes, nose tip and mouth corners, left to right in the picture."""
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
        """Returns (u, v) of the right mouth corner; the left one mirrors it."""
        i, opening = self.identity, max(0.0, variation.mouth_opening)
        u = i.mouth_width * (1 + 0.13 * variation.smile - 0.08 * opening)
        return u, i.mouth_height - i.mouth_curve - 2.4 * variation.smile

    def _head_distance(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns the approximate signed distance to the head's outline, an implicit superellipse, by its gradient."""
        i = self.identity
        low = np.maximum(v - i.cheek_height, 0) / (i.chin - i.cheek_height)
        high = np.maximum(i.cheek_height - v, 0) / (i.cheek_height + 88)
        width = i.head_width * (1 - i.temple_narrowing * smooth_step(high, 0.05, 0.7))
        level = (
            (np.abs(u) / width) ** i.jaw_squareness
            + low ** (i.jaw_squareness * 0.85)
            + high ** (1.9 * i.jaw_squareness)
        )
        # The root makes the level nearly linear across the outline, so that one gradient serves a wide band.
        level = level ** (1 / i.jaw_squareness) - 1
        slope_v, slope_u = np.gradient(level, 1 / TEXELS)
        return level / np.maximum(np.hypot(slope_u, slope_v), 0.008)

    def _bake_surface(self, rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Paints the surface from back to front. The order of the draws from ``rng`` is part of the pictures."""
        head = self._head_distance(u, v)
        face = cover(head)
        strands = self._strands(rng, u, v)
        hair_color = self.hair[:, None, None] * (1 + self.identity.hair_contrast * strands)
        outer = head - self.identity.hair_volume * (0.55 + 0.45 * smooth_step(-v, -10, 50))

        surface = np.zeros((5, *u.shape), dtype=np.float32)
        self._lay_back(surface, u, v, outer, strands, hair_color)
        _lay(surface, face, self._skin_albedo(rng, u, v))
        self._draw_nose(surface[:3], u, v)
        self._draw_beard(surface[:3], face, u, v, strands)
        self._lay_front_hair(surface, self._ragged(rng, u), u, v, outer, strands, hair_color)
        return surface

    def _lay_back(
        self,
        surface: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        outer: np.ndarray,
        strands: np.ndarray,
        hair_color: np.ndarray,
    ) -> None:
        """Paints what lies behind the head: hair, neck, ears."""
        i = self.identity
        side = np.abs(u)
        crown = np.maximum(outer, v - max(i.hair_length, i.ear_height - 6))
        fall = np.maximum(side - i.head_width - 0.9 * i.hair_volume - 0.6 * strands, v - i.hair_length - 2 * strands)
        _lay(surface, cover(np.minimum(crown, np.maximum(fall, -40 - v))), 0.72 * hair_color)
        neck = np.maximum(side - 0.58 * i.head_width - 0.12 * np.maximum(v - 40, 0), 14 - v)
        _lay(surface, cover(neck), 0.78 * self.skin)
        ear_u = (side - i.head_width - 0.35 * i.ear_protrusion) / (0.5 * i.ear_size)
        ear_v = (v - i.ear_height) / (1.25 * i.ear_size)
        _lay(surface, cover((np.hypot(ear_u, ear_v) - 1) * 0.5 * i.ear_size), 0.92 * self.skin)
        _lay(surface, 0.5 * cover((np.hypot(ear_u - 0.1, ear_v) - 0.5) * 0.5 * i.ear_size), 0.66 * self.skin)

    def _lay_front_hair(
        self,
        surface: np.ndarray,
        ragged: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        outer: np.ndarray,
        strands: np.ndarray,
        hair_color: np.ndarray,
    ) -> None:
        """Paints the hair in front: down to the hairline, and beside the face down to the sideburns."""
        i = self.identity
        from_parting = np.abs(u - i.parting)
        line = i.hairline - i.hairline_curve * (1 - (u / i.head_width) ** 2) + i.widows_peak * np.exp(-((u / 6) ** 2))
        line = line + i.fringe * smooth_step(from_parting, 0, 26) + i.fringe_raggedness * ragged
        line = np.minimum(line, i.eye_height - 9)  # the eyes stay free
        temple = i.head_width * (0.90 - 0.12 * smooth_step(-v, 20, 48))
        beside = np.maximum(temple - np.abs(u) + 0.8 * strands, v - i.sideburns)
        surface[4] = cover(np.maximum(np.minimum(v - line, beside), outer))
        _lay(surface, surface[4], hair_color * (0.86 + 0.14 * smooth_step(from_parting, 0, 7)))

    def _bake_normals(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        # The nose is flattened for the light: at full height its foot would be black under any light from above.
        flattened = self.depth(u, v) - 0.4 * self.identity.nose_projection * self._nose_profile(u, v)
        slope_v, slope_u = np.gradient(flattened + self._fine_relief(u, np.abs(u), v), np.float32(1 / TEXELS))
        towards_camera = 1 / np.sqrt(1 + slope_u**2 + slope_v**2)
        normals = np.stack([-slope_u * towards_camera, -slope_v * towards_camera, towards_camera])
        return normals.astype(np.float32)

    def _strands(self, rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns hair strands: noise across them, waving along them."""
        i = self.identity
        table = rng.standard_normal(128)
        wave = i.hair_waviness * np.sin(v * (0.16 + 0.05 * i.hair_waviness) + rng.uniform(0, 2 * np.pi))
        across = (u + wave + 0.25 * (u - i.parting) * (v + 60) / 60) / 1.7
        return np.interp(across, np.arange(-64, 64), table, period=128).astype(np.float32)

    def _ragged(self, rng: np.random.Generator, u: np.ndarray) -> np.ndarray:
        """Returns (columns,) noise along u, the raggedness of a fringe."""
        return np.interp(u[0], np.arange(-80, 81, 4.0), rng.standard_normal(41)).astype(np.float32)

    def _skin_albedo(self, rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        i, shape = self.identity, u.shape
        side = np.abs(u)
        mottle = smooth_field(rng, shape, 9)
        ruddy = smooth_field(rng, shape, 6)
        tone = 1 + 0.075 * i.mottling * mottle
        tone -= 0.22 * i.eye_socket * bump(side - i.eye_spacing, v - i.eye_height + 2, 9, 6.5)
        tone -= 0.16 * max(0.0, i.eye_bags) * bump(side - i.eye_spacing, v - i.eye_height - 6.5, 6.5, 2.2)
        fold = np.exp(-(((side - i.nose_width - 1.5 - 0.42 * (v - i.nose_tip)) / 1.3) ** 2))
        fold *= smooth_step(v - i.nose_tip, -1, 5) * smooth_step(i.mouth_height - v, -5, 3)
        tone -= 0.24 * max(0.0, i.nasolabial_fold) * fold
        wrinkle = np.square(np.maximum(np.cos(v * 1.05 + 0.004 * u * u), 0))
        tone -= 0.10 * max(0.0, i.forehead_lines) * smooth_step(-v, 30, 36) * wrinkle * wrinkle
        tone -= 0.24 * max(0.0, i.chin_cleft) * bump(u, v - i.chin + 5, 1.1, 4)
        freckles = np.maximum(smooth_field(rng, shape, 72) - 1.0, 0)
        tone -= 0.30 * max(0.0, i.freckles) * np.minimum(freckles, 0.8) * bump(side - 12, v + 3, 20, 15)
        moles = rng.uniform([-30, -36, 0.3, -0.5], [30, 34, 1.7, 0.65], (6, 4))
        for mole_u, mole_v, radius, strength in moles[moles[:, 3] > 0].tolist():  # the others are not there
            tone -= strength * cover(np.hypot(u - mole_u, v - mole_v) - radius)
        skin = self.skin[:, None, None] * tone
        red = (
            0.045 * i.mottling * ruddy
            + 0.11 * i.blush * bump(side - 21, v - 4, 10, 8)
            + 0.05 * i.blush * bump(u, v - i.nose_tip, 6, 5)
        )
        return skin * (1 + red * np.array([0.35, -1.0, -0.8], dtype=np.float32)[:, None, None])

    def _draw_nose(self, albedo: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
        i = self.identity
        side, below = np.abs(u), v - i.nose_tip
        dark = 0.42 * self.skin
        flank = (
            np.exp(-(((side - i.nose_bridge_width - 1.2) / 1.7) ** 2))
            * smooth_step(-below, -1, 8)
            * smooth_step(below, -24, -12)
        )
        paint(albedo, 0.20 * flank, dark)
        wing = np.hypot(side - i.nose_width + 2.6, (below - 2.2) * 0.85) - 3.1
        paint(
            albedo, 0.60 * cover(np.abs(wing) - 0.35) * smooth_step(side, i.nose_width - 2.4, i.nose_width - 0.6), dark
        )
        tip = np.hypot(u, (below - 1) * 1.15) - i.nose_tip_size
        paint(albedo, 0.30 * cover(np.abs(tip) - 0.4) * smooth_step(below, 1, 4), dark)
        paint(albedo, 0.22 * bump(u, below - 7.0, i.nose_width, 1.8), dark)
        nostril = np.hypot((side - 0.48 * i.nose_width) / 1.6, (below - 4.4 + 0.12 * side)) - i.nostril_size * 0.75
        paint(albedo, 0.85 * cover(nostril), 0.22 * self.skin)
        paint(albedo, 0.28 * bump(u + 0.4, below + 1.2, 1.9, 1.5), np.minimum(1.35 * self.skin + 0.05, 1))

    def _draw_beard(
        self, albedo: np.ndarray, face: np.ndarray, u: np.ndarray, v: np.ndarray, strands: np.ndarray
    ) -> None:
        i = self.identity
        side = np.abs(u)
        density = 0.75 + 0.25 * strands
        # From below the lower lip it climbs beside the mouth up to the line on the cheeks.
        line = np.maximum(i.mouth_height + 3.5 - 1.5 * np.maximum(side - i.mouth_width + 2, 0), i.beard_line)
        clear_of_lips = 1 - bump(u, v - i.mouth_height - 1, i.mouth_width * 0.95, 5.5)
        beard = max(0.0, i.beard) * face * smooth_step(v - line, 0, 7) * clear_of_lips * density
        paint(albedo, np.clip(beard, 0, 0.92), 0.8 * self.hair)
        center = 0.5 * (i.nose_tip + 6 + i.mouth_height - i.upper_lip)
        moustache = max(0.0, i.moustache) * bump(u, v - center - 0.018 * u * u, i.mouth_width * 0.85, 2.6) * density
        paint(albedo, np.clip(1.3 * moustache, 0, 0.92), 0.8 * self.hair)

    def _fine_relief(self, u: np.ndarray, side: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns the relief that only the light sees: sockets, brows, cheekbones, chin, lips, nostrils."""
        i = self.identity
        return (
            -(2.0 + 2.5 * i.eye_socket) * bump(side - i.eye_spacing, v - i.eye_height, 9, 6)
            + 2.0 * bump(side - i.eye_spacing, v - i.eye_height + i.brow_height, 12, 3.5)
            + 4.0 * i.cheekbones * bump(side - 24, v + 2, 9, 8)
            + 3.0 * bump(u, v - i.chin + 8, 10, 6)
            + 1.6 * bump(u, v - i.mouth_height - i.lower_lip, i.mouth_width * 0.8, 3.0)
            - 1.6 * bump(u, v - i.mouth_height - i.lower_lip - 4.5, i.mouth_width * 0.7, 2.5)
            + 2.2 * bump(side - i.nose_width + 2.5, v - i.nose_tip - 2.5, 3.2, 3.0)
            + 0.35 * i.nose_tip_size * bump(u, v - i.nose_tip, i.nose_tip_size, i.nose_tip_size)
        )


def _lay(surface: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    """Paints over the surface's albedo and adds to its coverage."""
    paint(surface[:3], coverage, color)
    np.maximum(surface[3], coverage, out=surface[3])


def sample_texture(planes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns bilinear samples of (K, rows, columns) planes over the canonical rectangle: (K, *u.shape) float32."""
    _, rows, columns = planes.shape
    x = np.clip((u - np.float32(U_RANGE[0])) * np.float32(TEXELS), 0, columns - 1.001).ravel()
    y = np.clip((v - np.float32(V_RANGE[0])) * np.float32(TEXELS), 0, rows - 1.001).ravel()
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
