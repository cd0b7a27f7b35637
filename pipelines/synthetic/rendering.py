"""Pictures of faces: a face and a variation in, a 112 x 112 RGB picture out.

:func:`render_face` looks the face's texture up through the pose, draws eyes, brows and mouth analytically from their
signed distances, lights the result, and lays it over a background. A pose is a rotation of the relief (u, v, z(u, v)),
so near parts move further than far ones; the picture is then aligned by the similarity transform that brings its own
five landmarks closest to the template, as real crops are.
"""

import math

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.face_template import FACE_SIZE, TEMPLATE
from scf_fast.pipelines.synthetic.faces import Face, sample_texture
from scf_fast.pipelines.synthetic.shapes import cover, enlarge, paint, palette_color, refine
from scf_fast.pipelines.synthetic.traits import Variation

# Steps of the fixed-point iteration for the inverse pose; each leaves at most 0.7 of the error on the steepest nose.
_INVERSION_STEPS = 6
_AMBIENT_FLOOR = 0.12  # a surface that faces away from the light keeps this much
_IRIS = [(74, 46, 30), (120, 84, 44), (104, 122, 72), (86, 128, 168), (140, 152, 158)]
# Pixel positions of the grid on which pose and light are found: every second pixel, and one beyond each border.
_COARSE = 2 * np.arange(-1, FACE_SIZE // 2 + 1, dtype=np.float32) + 0.5


def render_face(face: Face, variation: Variation) -> tuple[np.ndarray, np.ndarray]:
    """Renders a picture of a face.

    Returns:
        picture: (112, 112, 3) uint8 RGB.
        landmarks: (5, 2) float64, the positions (x, y) of eyes, nose tip and mouth corners in it, in pixels.
    """
    pose = _Pose(face, variation)
    coarse = pose.canonical_coordinates()
    u, v = (refine(plane) for plane in coarse)
    surface = sample_texture(face.surface, u, v)
    albedo, coverage, clear = surface[:3], surface[3], 1 - surface[4]
    _draw_eyes(albedo, face, variation, pose, u, v)
    _draw_brows(albedo, face, variation, pose, u, v, clear)
    _draw_mouth(albedo, face, variation, pose, u, v)

    shade, gloss = _light(face, variation, pose, *coarse)
    albedo *= shade
    albedo += gloss * clear
    picture = np.stack([enlarge(plane) for plane in variation.background])
    picture += coverage * (albedo - picture)
    return np.ascontiguousarray(_expose(picture, variation).transpose(1, 2, 0)), pose.landmarks


def _expose(picture: np.ndarray, variation: Variation) -> np.ndarray:
    """Turns linear colors into a camera's: exposure, white balance, saturation, 8 bits. Overwrites ``picture``."""
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
    """Rotation of a relief, followed by the similarity transform that aligns its landmarks.

    Complex numbers stand for points of the plane.
    """

    def __init__(self, face: Face, variation: Variation):
        self.face = face
        sin_y, cos_y = np.sin(variation.yaw), np.cos(variation.yaw)
        sin_p, cos_p = np.sin(variation.pitch), np.cos(variation.pitch)
        # Rows: picture x, picture y, towards the camera; columns: u, v, z.
        self.rotation = np.array(
            [[cos_y, 0, sin_y], [-sin_y * sin_p, cos_p, cos_y * sin_p], [-sin_y * cos_p, -sin_p, cos_y * cos_p]]
        )
        points = face.landmarks(variation)
        rotated = self._rotate(points[:, 0], points[:, 1])
        target = TEMPLATE @ [1, 1j]
        spread = rotated - rotated.mean()
        scale = np.vdot(spread, target) / np.vdot(spread, spread)  # least squares over rotation and scale
        jitter = variation.zoom * np.exp(1j * variation.roll)
        self.scale = scale * jitter
        center = target.mean() + complex(variation.shift_x, variation.shift_y)
        self.offset = center - self.scale * rotated.mean()
        self.landmarks = self._to_xy(self.scale * rotated + self.offset)

    def _rotate(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        z = self.face.depth(u, v)
        (xu, _, xz), (yu, yv, yz), _ = self.rotation
        return xu * u + xz * z + 1j * (yu * u + yv * v + yz * z)

    @staticmethod
    def _to_xy(points: np.ndarray) -> np.ndarray:
        return np.stack([points.real, points.imag], axis=-1)

    def to_pixels(self, u: npt.ArrayLike, v: npt.ArrayLike) -> np.ndarray:
        """Returns the (N, 2) pixels of canonical points (N,), (N,)."""
        rotated = self._rotate(np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64))
        return self._to_xy(self.scale * rotated + self.offset)

    def canonical_coordinates(self) -> np.ndarray:
        """Returns the canonical u and v that the pixels of the coarse grid see: (2, 58, 58) float32.

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

    def window(self, u: npt.ArrayLike, v: npt.ArrayLike, margin: float) -> tuple[slice, slice]:
        """Returns the rows and columns of the picture within ``margin`` pixels of the canonical points (N,), (N,)."""
        points = self.to_pixels(u, v)
        left, top = np.clip(points.min(axis=0) - margin, 0, FACE_SIZE).astype(int)
        right, bottom = np.clip(points.max(axis=0) + margin + 1, 0, FACE_SIZE).astype(int)
        return slice(top, bottom), slice(left, right)


def _light(
    face: Face, variation: Variation, pose: _Pose, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (112, 112) factors of the albedo, and highlights to add; u and v are coarse, since both are smooth."""
    normals = sample_texture(face.normals, u, v)
    azimuth, elevation, strength = variation.light_azimuth, variation.light_elevation, variation.light_strength
    in_picture = np.array(
        [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    )
    light, camera = in_picture @ pose.rotation, pose.rotation[2]  # in the frame of the face, where the normals are
    half = (light + camera) / np.linalg.norm(light + camera)

    def towards(direction: np.ndarray) -> np.ndarray:
        x, y, z = direction.astype(np.float32)
        return np.maximum(normals[0] * x + normals[1] * y + normals[2] * z, 0)

    shade = np.maximum(strength * towards(light) + (1.05 - 0.8 * strength), _AMBIENT_FLOOR)
    gloss = towards(half)
    for _ in range(4):  # the 16th power
        gloss *= gloss
    return refine(shade), refine(0.25 * strength * gloss)


def _draw_eyes(albedo: np.ndarray, face: Face, variation: Variation, pose: _Pose, u: np.ndarray, v: np.ndarray) -> None:
    i = face.identity
    reach = np.array([-1.0, 1.0]) * (i.eye_spacing + i.eye_width)
    window = pose.window(reach, [i.eye_height, i.eye_height], 8)
    layers, u, v = albedo[:, window[0], window[1]], u[window], v[window]
    inwards, down = np.abs(u) - i.eye_spacing, v - i.eye_height  # both eyes at once; positive on the outer half
    tilt_sin, tilt_cos = math.sin(i.eye_tilt), math.cos(i.eye_tilt)  # a NumPy scalar would turn the arrays into float64
    x, y = tilt_cos * inwards - tilt_sin * down, tilt_sin * inwards + tilt_cos * down
    opening = i.eye_opening * (1 - max(0.0, variation.eye_closure))
    arc = 1 - (x / i.eye_width) ** 2
    upper = -opening * arc * (1 - 0.05 * x)
    lower = i.eye_roundness * i.eye_opening * arc
    inside = cover(np.maximum(upper - y, y - lower))
    beyond = np.abs(x) - i.eye_width
    crease = np.abs(y - upper + 1.4 + 1.2 * i.eyelid_crease) - 0.25
    paint(layers, 0.55 * i.eyelid_crease * cover(np.maximum(crease, beyond)), 0.5 * face.skin)
    white = 0.92 - 0.3 * np.clip(1 - (y - upper) / 2.2, 0, 1)  # in the shade of the upper lid
    paint(layers, inside, white)
    from_pupil = np.hypot(
        inwards - 1.1 * variation.gaze_x * np.sign(u), down - 0.6 * variation.gaze_y + 0.25 * opening - 0.3
    )
    rim = np.clip(1.15 - 0.65 * np.square(np.square(from_pupil / i.iris_radius)), 0.3, 1.2)
    iris = rim * np.clip(palette_color(_IRIS, i.iris_hue) * i.iris_lightness, 0, 1)[:, None, None]
    iris *= 1 - cover(from_pupil - 0.45 * i.iris_radius)
    paint(layers, inside * cover(from_pupil - i.iris_radius), iris)
    lid = np.maximum(np.abs(y - np.minimum(upper, 0)) - 0.5 * i.lashes, beyond - 0.6)
    paint(layers, 0.9 * cover(lid), 0.18 * face.hair + 0.04)
    paint(layers, 0.3 * cover(np.maximum(np.abs(y - lower) - 0.3, beyond)), 0.4 * face.skin)
    glint = np.hypot(inwards + 0.9 * np.sign(u), down + 1.3)  # on the same side of both pupils, as one light gives it
    layers += inside * cover(glint - 0.7) * (1 - layers)


def _draw_brows(
    albedo: np.ndarray,
    face: Face,
    variation: Variation,
    pose: _Pose,
    u: np.ndarray,
    v: np.ndarray,
    clear: np.ndarray,
) -> None:
    i = face.identity
    height = i.eye_height - i.brow_height - 1.8 * variation.brow_raise
    outer = i.brow_inner_end + i.brow_length
    window = pose.window(np.array([-outer, outer]), [height, height], 9)
    along = (np.abs(u[window]) - i.brow_inner_end) / i.brow_length
    axis = height - i.brow_angle * i.brow_length * (along - 0.5) - i.brow_arch * (4 * along * (1 - along) - 0.5)
    thickness = 0.5 * i.brow_thickness * (1.15 - 0.75 * np.clip(along, 0, 1))
    ends = np.maximum(-along, along - 1) * i.brow_length
    brow = np.maximum(np.abs(v[window] - axis) - thickness, ends)
    paint(albedo[:, window[0], window[1]], i.brow_darkness * clear[window] * cover(0.7 * brow), 0.72 * face.hair)


def _draw_mouth(
    albedo: np.ndarray, face: Face, variation: Variation, pose: _Pose, u: np.ndarray, v: np.ndarray
) -> None:
    i = face.identity
    half_width, corner_v = face.mouth_corner(variation)
    gap = 6.0 * max(0.0, variation.mouth_opening)
    window = pose.window(np.array([-half_width, half_width]), [i.mouth_height, i.mouth_height + gap], 10)
    layers = albedo[:, window[0], window[1]]
    x, y = u[window] / half_width, v[window]
    arc = np.maximum(1 - x * x, 0)
    root = np.sqrt(arc)
    line = corner_v + (i.mouth_height - corner_v) * arc
    upper_edge = line - 0.35 * gap * arc
    lower_edge = line + 0.65 * gap * arc
    top = upper_edge - i.upper_lip * (0.45 * arc + 0.55 * root) * (1 - i.cupids_bow * np.exp(-((x / 0.16) ** 2)))
    bottom = lower_edge + i.lower_lip * (0.6 * arc + 0.4 * root)
    outside = (np.abs(x) - 1) * half_width
    red = np.array([0.80, 0.42, 0.40], dtype=np.float32) * (1 - 0.45 * i.skin_tone)
    color = (face.skin * 0.86 + (0.35 + 0.5 * i.lip_redness) * (red - face.skin * 0.86)) * (1 - 0.35 * i.lip_darkness)
    lips = cover(np.maximum(np.maximum(top - y, y - bottom), outside))
    lit = 1 + 0.16 * np.clip((y - lower_edge) / 2, -1, 1) - 0.12 * np.clip((y - bottom) / 2 + 1, 0, 1)
    paint(layers, 0.92 * lips, color[:, None, None] * lit)
    shadow = np.maximum(np.abs(y - line) - 0.35, outside - 0.5)
    paint(layers, 0.75 * cover(shadow), 0.34 * color)
    if gap > 0:
        inside = cover(np.maximum(np.maximum(upper_edge - y, y - lower_edge), outside + 0.5))
        paint(layers, inside, np.array([0.24, 0.07, 0.08], dtype=np.float32))
        teeth = np.maximum(y - upper_edge - min(0.45 * gap, 2.6) * root, np.abs(x) * half_width - 0.8 * half_width)
        paint(layers, inside * cover(teeth), np.array([0.94, 0.92, 0.88], dtype=np.float32))
