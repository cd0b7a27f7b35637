"""Encoded image -> RGB face by Pillow: what the PyTorch loader runs, and the definition that the DALI loader must meet."""
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FACE_SIZE = 112  # pixels, height and width of an aligned face


def decode_faces(source, indices, flips):
    """Decode a batch in the calling thread.

    Args:
        source: ImageSource.
        indices: (B,) int64, positions in the source.
        flips: (B,) bool, which faces to mirror.
    Returns:
        (B, 112, 112, 3) uint8.
    Raises:
        ValueError: an image cannot be decoded; the message names it.
    """
    faces = np.empty((len(indices), FACE_SIZE, FACE_SIZE, 3), dtype=np.uint8)
    for face, i, flip in zip(faces, indices.tolist(), flips.tolist()):
        encoded = source.encoded(i)
        try:
            face[:] = decode_face(encoded)[:, ::-1 if flip else 1]
        except (OSError, ValueError, SyntaxError) as error:
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error  # that error's text is an address
            raise ValueError(f"{source.name(i)} cannot be decoded: {reason}; replace the image or leave it out") from error
    return faces


def decode_face(encoded):
    """Decode, turn upright as EXIF says, convert to RGB, and resize whole to FACE_SIZE where the size differs (triangle filter,
    antialiased).

    Args:
        encoded: bytes-like, any format that Pillow reads.
    Returns:
        (112, 112, 3) uint8.
    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot decode it.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB")
        if image.size != (FACE_SIZE, FACE_SIZE):
            image = image.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR)
        return np.asarray(image)
