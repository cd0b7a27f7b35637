"""Traits of drawn faces: what makes a person, and what changes from one picture of a person to the next."""

from dataclasses import dataclass, field, fields

import numpy as np


def _between(low: float, high: float) -> float:
    """Declares a field that is drawn uniformly from [low, high]."""
    return field(metadata={"range": (low, high)})


def _draw_values(cls: "type[Identity] | type[Variation]", rng: np.random.Generator) -> dict[str, float]:
    """Draws every field declared by :func:`_between`, in the order of declaration."""
    drawn = [f for f in fields(cls) if "range" in f.metadata]
    values = rng.uniform(*np.array([f.metadata["range"] for f in drawn]).T)
    return dict(zip((f.name for f in drawn), values.tolist()))


@dataclass(frozen=True)
class Identity:
    """The traits of one person, drawn independently and uniformly.

    Lengths are in canonical units (pixels of the aligned crop), angles in radians, the rest are fractions of 1.
    """

    head_width: float = _between(33.0, 41.0)  # half width at the cheekbones
    cheek_height: float = _between(-16.0, 2.0)  # v of the widest place
    chin: float = _between(32.0, 43.0)  # v of its lowest point
    jaw_squareness: float = _between(1.75, 3.3)  # exponent of the lower outline: pointed to square
    temple_narrowing: float = _between(0.0, 0.14)
    chin_cleft: float = _between(-0.6, 1.0)  # absent below 0
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
        """Draws a person."""
        return cls(**_draw_values(cls, rng))


@dataclass(frozen=True, kw_only=True)
class Variation:
    """The differences between two pictures of a person.

    Angles are in radians, colors are linear gains, expressions are fractions of 1.
    """

    yaw: float = _between(-0.34, 0.34)
    pitch: float = _between(-0.20, 0.20)
    roll: float = _between(-0.05, 0.05)  # what the alignment leaves, as are the next three
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
        """Draws a pose, an expression, a light, a camera and a background."""
        lightness, hue = rng.uniform(0.12, 0.88), 0.09 * rng.standard_normal((3, 1, 1))
        pattern = rng.uniform(0.0, 0.16) * rng.standard_normal((1, 4, 4)) + 0.03 * rng.standard_normal((3, 4, 4))
        background = np.clip(lightness + hue + pattern, 0.02, 1.0).astype(np.float32)
        return cls(background=background, **_draw_values(cls, rng))
