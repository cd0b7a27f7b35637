import dataclasses
import functools

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.synthetic.faces import Face
from scf_fast.pipelines.synthetic.rendering import _Pose, render_face
from scf_fast.pipelines.synthetic.shapes import refine
from scf_fast.pipelines.synthetic.traits import Identity, Variation

GRAY = np.full((3, 4, 4), 0.5, dtype=np.float32)


def _rng(*seed):
    return np.random.default_rng(seed)


def _new_face(number):
    rng = _rng(1, number)
    return Face(Identity.draw(rng), rng)


_face = functools.cache(_new_face)


@pytest.fixture(scope="module")
def faces():
    return [_face(number) for number in range(12)]


def test_each_variation_changes_the_picture(faces, average, trait_ranges):
    base = average(Variation, background=GRAY)
    for name, (low, high) in trait_ranges(Variation).items():
        pictures = [
            render_face(faces[0], dataclasses.replace(base, **{name: end}))[0].astype(int) for end in (low, high)
        ]
        assert np.abs(pictures[0] - pictures[1]).max() > 8, name


def test_rendering_is_a_function_of_its_arguments(faces):
    variation = Variation.draw(_rng(5))
    picture, landmarks = render_face(_new_face(3), variation)
    again, landmarks_again = render_face(faces[3], variation)
    assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, again)
    np.testing.assert_array_equal(landmarks, landmarks_again)


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
        similarity = np.linalg.lstsq(system, TEMPLATE.T.ravel(), rcond=None)[0]
        np.testing.assert_allclose(similarity, [1, 0, 0, 0], atol=1e-9)
        assert np.abs(landmarks - TEMPLATE).max() < 14  # the person's own geometry, and perspective


def test_the_inverse_pose_finds_the_canonical_points_again(faces):
    """The fixed-point iteration on the coarse grid inverts the forward map, also for the most strongly turned heads."""
    u, v = (axis.ravel() for axis in np.meshgrid(np.linspace(-20, 20, 15), np.linspace(-24, 24, 15)))
    for number, face in enumerate(faces):
        variation = dataclasses.replace(Variation.draw(_rng(3, number)), yaw=(-1) ** number * 0.34, pitch=0.2)
        pose = _Pose(face, variation)
        x, y = pose.to_pixels(u, v).T
        seen = [map_coordinates(refine(plane), [y, x], order=1) for plane in pose.canonical_coordinates()]
        error = np.hypot(seen[0] - u, seen[1] - v)
        # The worst lie on the edge of a nose, behind which the relief hides.
        assert error.mean() < 0.1 and np.quantile(error, 0.97) < 0.5


def test_gray_pictures_without_brightness_still_tell_people_apart():
    """By geometry alone, a nearest-neighbor search on gray, standardized face centers beats chance (1 in 30) by far.

    It is not trivial either.
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
