"""Encoded image -> RGB face by Pillow: what the PyTorch loader runs, and the definition that the DALI loader must meet."""
import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FACE_SIZE = 112  # pixels, height and width of an aligned face
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 24  # a header that announces more is refused before memory is set aside for it: 48 MB an image
_TAIL = 1 << 10  # bytes at the end of a file in which its end mark is looked for


class Header(NamedTuple):
    """What the first bytes of an image say, and whether the last ones are there."""

    format: str  # as Pillow names it
    height: int  # pixels
    width: int
    is_common: bool  # complete, of a kind that every decoder reads alike: JPEG, PNG or WebP with 8 bits a channel


def decode_face(encoded):
    """Decode, turn upright as EXIF says, convert to RGB, and resize whole to FACE_SIZE where the size differs (triangle filter,
    antialiased).

    Args:
        encoded: bytes-like, any format that Pillow reads.
    Returns:
        (112, 112, 3) uint8.
    Raises:
        ValueError: Pillow cannot decode it, or it has more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_size(*image.size)
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            image = image.convert("RGB")
            if image.size != (FACE_SIZE, FACE_SIZE):
                image = image.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except UnidentifiedImageError:  # its text is the address of an object
        raise ValueError("unknown format" if len(encoded) else "it has no bytes") from None
    except Exception as error:  # a damaged file raises nearly anything: OSError, SyntaxError, struct.error, zlib.error ...
        raise ValueError(str(error) or type(error).__name__) from error


def load_face(source, i):
    """decode_face of image i of a source.

    Raises:
        ValueError: it cannot be read or decoded; the message names it.
    """
    return _named(source, i, decode_face, source.encoded(i))


def load_encoded(source, i, convert=False):
    """Image i of a source as every decoder reads it: as it is stored where that is JPEG, PNG or WebP and complete, else as a PPM file
    of what decode_face makes of it.

    Args:
        source: ImageSource.
        i: int.
        convert: make it a PPM file in any case.
    Returns:
        (bytes,) uint8.
    Raises:
        ValueError: it cannot be read or decoded; the message names it. Damage inside a complete file is left to the decoder to find.
    """
    encoded = source.encoded(i)
    if not convert and _named(source, i, read_header, encoded).is_common:
        return encoded
    face = _named(source, i, decode_face, encoded)
    return np.frombuffer(b"P6 %d %d 255\n" % (FACE_SIZE, FACE_SIZE) + face.tobytes(), dtype=np.uint8)


def _named(source, i, function, encoded):
    try:
        return function(encoded)
    except ValueError as error:
        raise ValueError(f"{source.name(i)} cannot be decoded: {error}; replace the image or leave it out") from error


def read_header(encoded):
    """Format and size of an image from its header alone: 2 us for a JPEG or PNG.

    Args:
        encoded: (bytes,) uint8 array.
    Returns:
        Header.
    Raises:
        ValueError: it is no image, or has more than MAX_PIXELS pixels.
    """
    data, start = memoryview(encoded), encoded[:16].tobytes()
    try:
        if start[:2] == b"\xff\xd8":
            header = _jpeg_header(data)
        elif start[:8] == b"\x89PNG\r\n\x1a\n":
            width, height, depth = struct.unpack_from(">IIB", data, 16)
            header = Header("PNG", height, width, depth <= 8 and b"IEND" in bytes(data[-_TAIL:]))
        else:
            header = _other_header(encoded, start)
    except (struct.error, IndexError):
        raise ValueError("its header is cut off") from None
    _check_size(header.width, header.height)
    return header


def _jpeg_header(data):
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("its header is damaged")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header; those three hold tables
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            is_common = marker <= 0xC2 and precision == 8 and channels in (1, 3, 4)  # Huffman coded, sequential or progressive
            return Header("JPEG", height, width, is_common and bytes(data[-_TAIL:]).rfind(b"\xff\xd9") >= 0)
        if marker == 0xFF:  # filling
            at += 1
        elif marker in (0xD9, 0xDA):
            raise ValueError("its header has no size")
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _other_header(encoded, start):
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            is_common = image.format == "WEBP" and not getattr(image, "is_animated", False) and (
                len(encoded) >= 8 + struct.unpack_from("<I", start, 4)[0])
            return Header(image.format, image.height, image.width, is_common)
    except UnidentifiedImageError:
        raise ValueError("unknown format" if len(encoded) else "it has no bytes") from None
    except Exception as error:  # as in decode_face
        raise ValueError(str(error) or type(error).__name__) from error


def _check_size(width, height):
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it must have 1 to {MAX_PIXELS} pixels and says {width} x {height}")
