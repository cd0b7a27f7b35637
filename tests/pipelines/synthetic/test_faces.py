import dataclasses

import numpy as np
from scipy.ndimage import map_coordinates

from scf_fast.pipelines.synthetic.faces import TEXELS, U_RANGE, V_RANGE, Face, sample_texture
from scf_fast.pipelines.synthetic.rendering import render_face
from scf_fast.pipelines.synthetic.traits import Identity, Variation

GRAY = np.full((3, 4, 4), 0.5, dtype=np.float32)


def _rng(*seed):
    return np.random.default_rng(seed)


def test_each_identity_parameter_changes_the_picture(average, trait_ranges):
    variation = average(Variation, mouth_opening=0.5, saturation=1.0, background=GRAY)
    # Short hair that leaves the ears free, and everything present that some people lack.
    base = average(
        Identity,
        hair_length=-40.0,
        sideburns=-40.0,
        beard=0.5,
        moustache=0.5,
        beard_line=12.0,
        hair_gray=0.3,
        freckles=0.8,
        fringe=8.0,
    )
    picture = render_face(Face(base, _rng(0)), variation)[0].astype(int)
    for name, ends in trait_ranges(Identity).items():
        far_end = max(reversed(ends), key=lambda end, name=name: abs(end - getattr(base, name)))
        other = render_face(Face(dataclasses.replace(base, **{name: far_end}), _rng(0)), variation)[0].astype(int)
        assert np.abs(picture - other).max() > 5, name  # half of the range, or a little more


def test_marks_and_strands_belong_to_the_identity(average):
    identity, variation = average(Identity), average(Variation, background=GRAY)
    first, second = (render_face(Face(identity, _rng(number)), variation)[0].astype(int) for number in (0, 1))
    assert np.abs(first - second).max() > 30


def test_look_up_is_bilinear_and_clamped():
    rng = _rng(4)
    planes = rng.standard_normal((5, 204, 198)).astype(np.float32)
    u, v = rng.uniform(-90, 90, (2, 40, 40)).astype(np.float32)
    rows, columns = (v - V_RANGE[0]) * TEXELS, (u - U_RANGE[0]) * TEXELS
    clamped = [np.clip(np.float64(rows), 0, 202.999), np.clip(np.float64(columns), 0, 196.999)]
    expected = np.stack([map_coordinates(plane.astype(np.float64), clamped, order=1) for plane in planes])
    np.testing.assert_allclose(sample_texture(planes, u, v), expected, atol=2e-4)
