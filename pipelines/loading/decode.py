"""Decoding of images to RGB faces by Pillow: the decoder of the PyTorch loader, and the definition of DALI's."""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.formats.file_kinds import BINARY, IMAGES, TEXT, recognize_bytes
from scf_fast.pipelines.loading.pixels import upright_rgb
from scf_fast.pipelines.sources.base import LARGE_FILE, ImageSource

MAX_PIXELS = 1 << 24  # a header that announces more is refused before memory is set aside for it: 48 MB an image
# The only readers that Pillow may try: files are not trusted, and other readers start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
# A batch could be full of images as large as this or of LARGE_FILE bytes: each is made a face as soon as it is read.
_LARGE_PIXELS = 1 << 20
_TAIL = 1 << 10  # bytes at the end of a file in which its end mark is looked for
# Scans of a progressive JPEG: encoders write some 10, and each, of a few bytes, can cost the decoder a pass over all
# pixels.
_MAX_SCANS = 200
_MAX_SEGMENTS = 16  # of a JPEG before its frame header, for read_headers
_FRAME, _TABLE = 1, 2
# The kinds of JPEG markers: those of a sequential, Huffman coded frame, and those that may stand before it.
_MARKERS = np.zeros(256, dtype=np.uint8)
_MARKERS[[0xC0, 0xC1]] = _FRAME
_MARKERS[[0xC4, 0xDB, 0xDD, *range(0xE0, 0xFF)]] = _TABLE
_CHANNELS = np.isin(np.arange(256), (1, 3))  # gray; YCbCr or RGB
_INK = 4  # channels of CMYK
_ADOBE, _ADOBE_MARKER = 0xEE, b"Adobe"  # what says that 0 is full ink, which Pillow takes for granted and others do not
_PPM_HEADER = b"P6 %d %d 255\n" % (FACE_SIZE, FACE_SIZE)  # of the file that pack_face makes
_JPEG_END, _PNG_START, _PNG_END = b"\xff\xd9", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_RECOGNIZED = 1 << 12  # bytes of a file that is no image, by which it is told what it is
BLACK_FACE = np.zeros((FACE_SIZE, FACE_SIZE, 3), dtype=np.uint8)
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_Result = TypeVar("_Result")


class Header(NamedTuple):
    """Format and size from the first bytes of an image, and a look at its last ones."""

    format: str  # as Pillow names it
    height: int  # pixels
    width: int
    # Complete, and of a kind that every decoder reads the same way: JPEG, PNG or WebP with 8 bits a channel.
    is_common: bool


def decode_face(encoded: bytes | np.ndarray) -> np.ndarray:
    """Decodes an image: upright as EXIF says, in RGB, resized whole to FACE_SIZE where the size differs.

    Pixels of any kind become 8-bit RGB by the rule of :mod:`scf_fast.pipelines.loading.pixels`. Resizing averages
    (triangle filter, antialiased).

    Args:
        encoded: a JPEG, PNG, WebP, BMP, PPM/PGM, TIFF or GIF file; (bytes,) uint8 where it is an array.
    Returns:
        (112, 112, 3) uint8.
    Raises:
        InputError: Pillow cannot decode it, or read_header refuses it.
    """
    image = decode_rgb(np.frombuffer(encoded, dtype=np.uint8))
    if image.size != (FACE_SIZE, FACE_SIZE):
        image = image.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_rgb(encoded: np.ndarray) -> Image.Image:
    """Decodes an untrusted image file, (bytes,) uint8, to 8-bit RGB in its own size, upright as EXIF says.

    Raises:
        InputError: as decode_face.
    """
    try:
        try:
            return _checked_rgb(encoded)
        except ValueError as error:
            if isinstance(error, InputError) or encoded[:8].tobytes() != _PNG_START:
                raise
            return _checked_rgb(_without_texts(encoded))  # Pillow refuses a PNG for long ones, other decoders do not
    except Exception as error:
        raise _undecodable(error, encoded) from error


def _checked_rgb(encoded: np.ndarray) -> Image.Image:
    read_header(encoded)
    with _open(encoded) as opened:
        return upright_rgb(opened)


def _without_texts(png: np.ndarray) -> np.ndarray:
    """Returns a PNG file without texts and color profile, which decide nothing about the pixels here."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        size, name = struct.unpack_from(">I4s", png.data, at)
        end = at + 12 + size
        if name not in _PNG_TEXTS:
            kept.append(png[at:end])
        at = end
    return np.concatenate(kept)


def _undecodable(error: Exception, encoded: np.ndarray) -> InputError:
    """Returns the reason why Pillow, or read_header, could not read an image.

    For Pillow any exception is one: a damaged file raises OSError, SyntaxError, struct.error, zlib.error and others.
    """
    if isinstance(error, UnidentifiedImageError):  # its text is the address of an object
        if not len(encoded):
            return InputError("it has no bytes")
        kind = recognize_bytes(encoded[:_RECOGNIZED].tobytes(), size=len(encoded))
        if kind in (TEXT, BINARY):
            return InputError("unknown format")
        if kind in IMAGES:  # a TIFF of 64-bit numbers, for instance
            return InputError(f"it is {kind.name} that is damaged, or of a kind that is not read here")
        return InputError(f"it is {kind.name}, which is not read here")
    return InputError(str(error) or type(error).__name__)


def load_face(source: ImageSource, i: int) -> np.ndarray:
    """Returns face i of a source: the source's own pixels, or the image file decoded by :func:`decode_face`.

    Raises:
        InputError: it cannot be read or decoded; the message names it.
    """
    pixels = source.pixels(i)
    return with_name(source, i, decode_face, source.encoded(i)) if pixels is None else pixels


def load_encoded(
    source: ImageSource, i: int, convert: bool = False, encoded: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """Loads image i in a form that every decoder reads the same way.

    That is the stored file where it is JPEG, PNG or WebP, complete and not large; else a PPM file of the pixels
    that :func:`load_face` returns.

    Args:
        source: the images.
        i: position in the source.
        convert: make it a PPM file in any case.
        encoded: source.encoded(i), where the caller has it already.
    Returns:
        encoded: (bytes,) uint8.
        is_face_sized: whether it has 112 x 112 pixels.
    Raises:
        InputError: it cannot be read or decoded; the message names it. Damage inside a complete file is left to the
            decoder to find.
    """
    if encoded is None:
        pixels = source.pixels(i)
        if pixels is not None:
            return pack_face(pixels), True
        encoded = source.encoded(i)
    if not convert:
        header = with_name(source, i, read_header, encoded)
        if header.is_common and header.height * header.width <= _LARGE_PIXELS and len(encoded) <= LARGE_FILE:
            return encoded, (header.height, header.width) == (FACE_SIZE, FACE_SIZE)
    face = with_name(source, i, decode_face, encoded)
    return pack_face(face), True


def pack_face(face: np.ndarray) -> np.ndarray:
    """Encodes a face without loss, as a PPM file: (112, 112, 3) uint8 to (bytes,) uint8."""
    return np.frombuffer(_PPM_HEADER + face.tobytes(), dtype=np.uint8)


def is_packed(encoded: np.ndarray) -> bool:
    """Tells whether an image that :func:`load_encoded` returned is a file that :func:`pack_face` made."""
    return encoded[: len(_PPM_HEADER)].tobytes() == _PPM_HEADER


def with_name(source: ImageSource, i: int, function: Callable[[np.ndarray], _Result], encoded: np.ndarray) -> _Result:
    """Calls function(encoded), which decodes image i of a source; its InputError gets the image's name."""
    try:
        return function(encoded)
    except InputError as error:
        raise InputError(f"{source.name(i)} cannot be decoded: {error}; replace the image or leave it out") from error


def read_header(encoded: np.ndarray) -> Header:
    """Reads format and size of an image, (bytes,) uint8, from its header alone: 2 us for a JPEG or PNG.

    Raises:
        InputError: it is no image of a known format, has more than MAX_PIXELS pixels, or would take a decoder minutes.
    """
    data, start = encoded.data, encoded[:16].tobytes()
    try:
        if start[:2] == b"\xff\xd8":
            header = _jpeg_header(data)
        elif start[:8] == _PNG_START:
            width, height, depth = struct.unpack_from(">IIB", data, 16)
            header = Header("PNG", height, width, depth <= 8 and b"IEND" in bytes(data[-_TAIL:]))
        else:
            header = _other_header(encoded, start)
    except (struct.error, IndexError):
        raise InputError("its header is cut off") from None
    _check_size(header.width, header.height)
    return header


def read_headers(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Reads the sizes of many images at once: 0.5 us each in batches of 256.

    Args:
        data: (bytes,) uint8 array that holds the image files.
        starts, lengths: (B,) int64, file b is data[starts[b]:starts[b] + lengths[b]]; a length of 0 is no file.
    Returns:
        (B, 2) int64, height and width of the files that are JPEG (sequential) or PNG, common in the sense of
        read_header, and not large; (0, 0) for those that only load_encoded can judge.
    """
    sizes = np.zeros((len(starts), 2), dtype=np.int64)
    # No image has less than 64 bytes, and what is read below without a look at the end lies within them.
    rows = np.flatnonzero((lengths >= 64) & (lengths <= LARGE_FILE))
    ends = starts + lengths
    first = _bytes_at(data, starts[rows], 33)
    png = rows[(first[:, :8] == np.frombuffer(_PNG_START, np.uint8)).all(axis=1) & (first[:, 24] <= 8)]
    png = png[(_bytes_at(data, ends[png] - 8, 8) == np.frombuffer(_PNG_END, np.uint8)).all(axis=1)]
    sizes[png] = _big_endian(_bytes_at(data, starts[png] + 16, 8).reshape(-1, 2, 4))[:, ::-1]

    jpeg = rows[(first[:, 0] == 0xFF) & (first[:, 1] == 0xD8)]
    jpeg = jpeg[(_bytes_at(data, ends[jpeg] - 2, 2) == np.frombuffer(_JPEG_END, np.uint8)).all(axis=1)]
    at = starts[jpeg] + 2
    for _ in range(_MAX_SEGMENTS):
        inside = at + 10 <= ends[jpeg]
        jpeg, at = jpeg[inside], at[inside]
        if not len(jpeg):
            break
        segment = _bytes_at(data, at, 10)
        marker = np.where(segment[:, 0] == 0xFF, segment[:, 1], 0)
        is_frame = (_MARKERS[marker] == _FRAME) & (segment[:, 4] == 8) & _CHANNELS[segment[:, 9]]
        sizes[jpeg[is_frame]] = _big_endian(segment[is_frame, 5:9].reshape(-1, 2, 2))
        goes_on = _MARKERS[marker] == _TABLE
        jpeg, at = jpeg[goes_on], at[goes_on] + 2 + _big_endian(segment[goes_on, 2:4])
    area = sizes.prod(axis=1)
    sizes[(area <= 0) | (area > _LARGE_PIXELS)] = 0  # below 0 where int64 cannot hold it
    return sizes


def _bytes_at(data: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Returns (B, count) uint8, the bytes from each start on."""
    return data[starts[:, None] + np.arange(count)]


def _big_endian(digits: np.ndarray) -> np.ndarray:
    """Returns the (...) int64 numbers of (..., n) uint8 digits."""
    return digits.astype(np.int64) @ (1 << 8 * np.arange(digits.shape[-1] - 1, -1, -1))


def _jpeg_header(data: memoryview) -> Header:
    at, is_adobe = 2, False
    while True:
        if data[at] != 0xFF:
            raise InputError("its header is damaged")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header; those three hold tables
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if marker not in (0xC0, 0xC1) and bytes(data).count(b"\xff\xda") > _MAX_SCANS:
                raise InputError(f"it must have at most {_MAX_SCANS} scans")
            is_huffman_coded = marker <= 0xC2  # sequential or progressive
            is_common = is_huffman_coded and precision == 8
            is_common = is_common and (bool(_CHANNELS[channels]) or (channels == _INK and is_adobe))
            return Header("JPEG", height, width, is_common and bytes(data[-_TAIL:]).rfind(_JPEG_END) >= 0)
        if marker == 0xFF:  # filling
            at += 1
        elif marker in (0xD9, 0xDA):
            raise InputError("its header has no size")
        else:
            is_adobe = is_adobe or (marker == _ADOBE and data[at + 4 : at + 9] == _ADOBE_MARKER)
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _other_header(encoded: np.ndarray, start: bytes) -> Header:
    try:
        with _open(encoded) as image:
            is_common = (
                image.format == "WEBP"
                and not getattr(image, "is_animated", False)
                and (len(encoded) >= 8 + struct.unpack_from("<I", start, 4)[0])
            )
            return Header(image.format, image.height, image.width, is_common)
    except Exception as error:
        raise _undecodable(error, encoded) from error


def _open(encoded: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(encoded.data), formats=_FORMATS)


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"it must have 1 to {MAX_PIXELS} pixels and says {width} x {height}")
