import dataclasses

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from scf_fast.pipelines.synthetic.faces import (
    _TEXELS,
    _U_RANGE,
    _V_RANGE,
    ALIGNED_LANDMARKS,
    Face,
    Identity,
    Variation,
    _look_up,
    _Pose,
    _refine,
    render_face,
)


def _rng(*seed):
    return np.random.default_rng(seed)


def _face(number):
    rng = _rng(1, number)
    return Face(Identity.draw(rng), rng)


def _ranges(cls):
    return {f.name: f.metadata["range"] for f in dataclasses.fields(cls) if "range" in f.metadata}


def _plain(cls, **given):
    """Everything in the middle of its range."""
    return cls(**{**{name: (low + high) / 2 for name, (low, high) in _ranges(cls).items()}, **given})


GRAY = np.full((3, 4, 4), 0.5, dtype=np.float32)


@pytest.fixture(scope="module")
def faces():
    return [_face(number) for number in range(12)]


def test_an_identity_has_at_least_twenty_continuous_parameters_drawn_from_their_ranges():
    ranges = _ranges(Identity)
    assert len(ranges) >= 20 and len(ranges) == len(dataclasses.fields(Identity))
    draws = [dataclasses.asdict(Identity.draw(_rng(number))) for number in range(200)]
    for name, (low, high) in ranges.items():
        values = np.array([draw[name] for draw in draws])
        assert values.min() >= low and values.max() <= high and np.ptp(values) > 0.9 * (high - low), name


def test_each_identity_parameter_changes_the_picture():
    variation = _plain(Variation, mouth_opening=0.5, saturation=1.0, background=GRAY)
    # Short hair that leaves the ears free, and everything present that some people lack.
    base = _plain(
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
    for name, (low, high) in _ranges(Identity).items():
        pictures = [
            render_face(Face(dataclasses.replace(base, **{name: end}), _rng(0)), variation)[0].astype(int)
            for end in (low, high)
        ]
        assert np.abs(pictures[0] - pictures[1]).max() > 8, name


def test_each_variation_changes_the_picture(faces):
    base = _plain(Variation, background=GRAY)
    for name, (low, high) in _ranges(Variation).items():
        pictures = [
            render_face(faces[0], dataclasses.replace(base, **{name: end}))[0].astype(int) for end in (low, high)
        ]
        assert np.abs(pictures[0] - pictures[1]).max() > 8, name


def test_rendering_is_a_function_of_its_arguments(faces):
    variation = Variation.draw(_rng(5))
    picture, landmarks = render_face(_face(3), variation)
    again, landmarks_again = render_face(faces[3], variation)
    assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, again)
    np.testing.assert_array_equal(landmarks, landmarks_again)


def test_marks_and_strands_belong_to_the_identity():
    identity, variation = _plain(Identity), _plain(Variation, background=GRAY)
    first, second = (render_face(Face(identity, _rng(number)), variation)[0].astype(int) for number in (0, 1))
    assert np.abs(first - second).max() > 30


def test_crops_are_aligned_to_the_five_point_template(faces):
    still = {"roll": 0.0, "zoom": 1.0, "shift_x": 0.0, "shift_y": 0.0}
    for number, face in enumerate(faces):
        variation = dataclasses.replace(Variation.draw(_rng(2, number)), **still)
        landmarks = render_face(face, variation)[1]
        # The least-squares similarity from the landmarks to the template must be the identity: nothing is left to
        # align.
        x, y = landmarks.T
        system = np.concatenate(
            [np.stack([x, -y, np.ones(5), np.zeros(5)], 1), np.stack([y, x, np.zeros(5), np.ones(5)], 1)]
        )
        similarity = np.linalg.lstsq(system, ALIGNED_LANDMARKS.T.ravel(), rcond=None)[0]
        np.testing.assert_allclose(similarity, [1, 0, 0, 0], atol=1e-9)
        assert np.abs(landmarks - ALIGNED_LANDMARKS).max() < 14  # the person's own geometry, and perspective


def test_the_inverse_pose_finds_the_canonical_points_again(faces):
    """The fixed-point iteration and the coarse grid, against the forward map they invert, for the most strongly turned
    heads.
    """
    u, v = (axis.ravel() for axis in np.meshgrid(np.linspace(-20, 20, 15), np.linspace(-24, 24, 15)))
    for number, face in enumerate(faces):
        variation = dataclasses.replace(Variation.draw(_rng(3, number)), yaw=(-1) ** number * 0.34, pitch=0.2)
        pose = _Pose(face, variation)
        x, y = pose.to_pixels(u, v).T
        seen = [map_coordinates(_refine(plane), [y, x], order=1) for plane in pose.canonical_coordinates()]
        error = np.hypot(seen[0] - u, seen[1] - v)
        assert (
            error.mean() < 0.1 and np.quantile(error, 0.97) < 0.5
        )  # the worst lie on the edge of a nose, behind which the relief hides


def test_look_up_is_bilinear_and_clamped():
    rng = _rng(4)
    planes = rng.standard_normal((5, 204, 198)).astype(np.float32)
    u, v = rng.uniform(-90, 90, (2, 40, 40)).astype(np.float32)
    rows, columns = (v - _V_RANGE[0]) * _TEXELS, (u - _U_RANGE[0]) * _TEXELS
    clamped = [np.clip(np.float64(rows), 0, 202.999), np.clip(np.float64(columns), 0, 196.999)]
    expected = np.stack([map_coordinates(plane.astype(np.float64), clamped, order=1) for plane in planes])
    np.testing.assert_allclose(_look_up(planes, u, v), expected, atol=2e-4)


def test_gray_pictures_without_brightness_still_tell_people_apart():
    """Geometry alone: a nearest-neighbor search on gray, standardized face center beats chance (1 in 30) by far, and
    is not trivial.
    """
    gallery, probes = [], []
    for number in range(30):
        face = _face(number)
        for pictures, stream in ((gallery, 6), (probes, 7)):
            variation = dataclasses.replace(Variation.draw(_rng(stream, number)), yaw=0.0, pitch=0.0)
            gray = render_face(face, variation)[0][24:104, 26:86].mean(axis=2)
            pictures.append((gray - gray.mean()).ravel() / gray.std())
    similarity = np.array(probes) @ np.array(gallery).T
    rate = (similarity.argmax(axis=1) == np.arange(30)).mean()
    assert 0.3 < rate < 1.0
