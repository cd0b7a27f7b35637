import io

import numpy as np
import pytest
from PIL import Image

from scf_fast.evaluation.alignment import AlignedFaces, similarity_transform
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.loading.decode import decode_face, load_face
from scf_fast.pipelines.sources.base import EncodedImages


def encode(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def turned(points, angle=0.4, scale=1.7, shift=(60, -15)):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ rotation.T + np.array(shift)


def bilinear(pixels, x, y):
    """One sample of an image that is black outside, by the definition."""
    left, top = int(np.floor(x)), int(np.floor(y))
    total = np.zeros(3)
    for row, weight_y in (top, top + 1 - y), (top + 1, y - top):
        for column, weight_x in (left, left + 1 - x), (left + 1, x - left):
            if 0 <= row < pixels.shape[0] and 0 <= column < pixels.shape[1]:
                total += weight_x * weight_y * pixels[row, column].astype(float)
    return total


def test_transform_takes_turned_landmarks_back():
    a, b = similarity_transform(turned(TEMPLATE)[None])
    np.testing.assert_allclose(a * (turned(TEMPLATE) @ [1, 1j]) + b, TEMPLATE @ [1, 1j], atol=1e-10)


def test_transform_is_the_least_squares_fit():
    """Against the normal equations for (Re a, Im a, Re b, Im b), on landmarks that no similarity takes to the
    template.
    """
    landmarks = turned(TEMPLATE) + np.random.default_rng(0).normal(size=(5, 2)) * 4
    rows = [row for x, y in landmarks for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    expected = np.linalg.lstsq(np.array(rows), TEMPLATE.ravel(), rcond=None)[0]
    a, b = similarity_transform(landmarks[None])
    np.testing.assert_allclose([a[0].real, a[0].imag, b[0].real, b[0].imag], expected, atol=1e-10)


def test_warp_against_sampling_by_hand():
    rng = np.random.default_rng(1)
    pixels = np.asarray(
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((240, 200), Image.Resampling.BICUBIC)
    )
    landmarks = turned(TEMPLATE)
    face = AlignedFaces(EncodedImages([encode(pixels)]), landmarks[None]).pixels(0)
    assert face.shape == (112, 112, 3)
    inside = 0
    for column, row in rng.integers(0, 112, (60, 2)):
        x, y = turned(np.array([column, row]))
        if 1 < x < 238 and 1 < y < 198:  # Pillow extends the outermost row of pixels by half a pixel
            inside += 1
            np.testing.assert_allclose(face[row, column], bilinear(pixels, x, y), atol=0.502)  # rounded, not cut off
        elif not (-1 < x < 240 and -1 < y < 200):
            assert not face[row, column].any()
    assert inside > 20


def test_faces_in_place_are_not_touched():
    encoded = encode(np.random.default_rng(2).integers(0, 256, (112, 112, 3), dtype=np.uint8), "JPEG")
    source = EncodedImages([encoded, encoded])
    faces = AlignedFaces(source, np.stack([TEMPLATE.round(2), TEMPLATE + 1]))
    assert faces.pixels(0) is None and faces.encoded(0).tobytes() == encoded
    np.testing.assert_array_equal(load_face(faces, 0), decode_face(encoded))
    # One pixel to the left and up; nothing is blurred.
    moved = load_face(faces, 1)
    np.testing.assert_array_equal(moved[:-1, :-1], decode_face(encoded)[1:, 1:])
    assert len(faces) == 2 and faces.name(1) == "image 1"


def test_a_larger_picture_with_landmarks_in_place_is_cut():
    pixels = np.random.default_rng(3).integers(0, 256, (150, 130, 3), dtype=np.uint8)
    face = AlignedFaces(EncodedImages([encode(pixels)]), TEMPLATE[None]).pixels(0)
    np.testing.assert_allclose(face.astype(float), pixels[:112, :112], atol=1)


@pytest.mark.parametrize("landmarks", [np.full((5, 2), 7.0), np.full((5, 2), np.nan)])
def test_landmarks_that_are_refused(landmarks):
    with pytest.raises(ValueError, match=r"not all in one point; those of 1 of 2 images are not, the first image 1"):
        AlignedFaces(EncodedImages([b"", b""]), np.stack([TEMPLATE, landmarks]))


@pytest.mark.parametrize(
    ("encoded", "reason"), [(b"no picture", "unknown format"), (encode(np.zeros((150, 150, 3), np.uint8))[:60], "")]
)
def test_broken_images_are_named(encoded, reason):
    with pytest.raises(ValueError, match=f"image 0 cannot be decoded: {reason}"):
        AlignedFaces(EncodedImages([encoded]), TEMPLATE[None]).pixels(0)
