import io

import numpy as np
import pytest
from PIL import Image

from pipelines.images import decode_face, decode_faces
from pipelines.sources import EncodedImages

PIXELS = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def test_modes_become_rgb():
    np.testing.assert_array_equal(decode_face(png(PIXELS)), PIXELS)
    np.testing.assert_array_equal(decode_face(png(PIXELS[..., 0])), PIXELS[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(decode_face(png(np.dstack([PIXELS, PIXELS[..., 0]]))), PIXELS)


def test_exif_orientation_is_undone():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    np.testing.assert_array_equal(decode_face(png(PIXELS, exif=exif)), np.rot90(PIXELS, -1))


def test_other_sizes_are_averaged_down_whole():
    """Each pixel of a 2 x 2 enlargement is constant over the filter's core; the triangle's tails mix in an eighth of each neighbour."""
    along = np.arange(112) % 2 * 160
    face = decode_face(png(np.repeat(np.repeat(np.broadcast_to(along[:, None, None], (112, 112, 3)), 2, 0), 2, 1).astype(np.uint8)))
    assert face.shape == (112, 112, 3)
    np.testing.assert_allclose(face[1:-1], np.broadcast_to((0.75 * along + 0.25 * (160 - along))[1:-1, None, None], (110, 112, 3)), atol=1)


def test_batch_flips_and_names_the_broken_image():
    source = EncodedImages([png(PIXELS), png(PIXELS[::-1]), png(PIXELS)[:500]])
    faces = decode_faces(source, np.array([1, 0, 0]), np.array([False, True, False]))
    np.testing.assert_array_equal(faces, np.stack([PIXELS[::-1], PIXELS[:, ::-1], PIXELS]))
    with pytest.raises(ValueError, match=r"image 2 cannot be decoded: .*; replace the image or leave it out"):
        decode_faces(source, np.array([0, 2]), np.array([False, False]))
