"""The one rule by which stored pixels of any kind become 8-bit RGB; docs/data.md states it for users.

Colors are taken to RGB by Pillow's own conversions, LAB from D50 to sRGB; alpha is dropped, after it was divided out
where the colors are stored multiplied by it. Gray values of more than 8 bits are scaled from their range:

    gray = round(255 (value or, where white is zero, range - value) / range), cut to 0..255

The range is what the file states (maxval of a PGM, 12 bits a sample in a TIFF), or else the smallest of 8, 10, 12, 14,
16, 20, 24 and 32 bits that holds the largest value: sensors of 10 to 14 bits are commonly stored in 16 without a word
about it. For floating-point numbers 0..1 is tried first, and may be passed by half, as resampling does.
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scf_fast.pipelines.errors import InputError

_INTEGER_RANGES = tuple((1 << bits) - 1 for bits in (8, 10, 12, 14, 16, 20, 24, 32))
_FLOAT_RANGES = (1, *_INTEGER_RANGES)
_OVERSHOOT = 1.5  # of a floating-point range
_UNDERSHOOT = -0.25  # of any range: resampling goes that far below 0, and numbers around 0 are no picture
_DEEP = ("I", "F")  # the modes, up to a ";", whose values have more than 8 bits
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Of the high bytes of colors of 16 bits, which are all that Pillow gives: at most 12 bits were used.
_DARKEST_WHITE = 15
_BITS_PER_SAMPLE, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT = 258, 262, 320, 339  # TIFF tags
_ORIENTATION = 0x0112  # EXIF tag
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Stored(NamedTuple):
    """What a file says about its pixels that Pillow's image no longer says once it is decoded."""

    range: int | None = None  # the value of white; None where the file does not say
    is_inverted: bool = False  # 0 is white
    is_unsigned: bool = False  # 32 bits that Pillow reads as signed
    has_deep_colors: bool = False  # 16 bits a channel, of which Pillow gives the high byte
    # RGBRGB..., where the file has 8 bits of a color that should have 16, and Pillow gives the high byte: black
    palette: bytes | None = None

    @classmethod
    def of(cls, image: Image.Image) -> "_Stored":
        """Reads it from an image that is open and not decoded yet."""
        mode = image.mode.partition(";")[0]
        tags = getattr(image, "tag_v2", None) or {}
        if mode not in _DEEP:
            tiles: Any = getattr(image, "tile", ())  # of an image that is in memory already there are none
            colors = np.array(tags.get(_COLOR_MAP, ()) if mode in ("P", "PA") else ())
            return cls(
                has_deep_colors=bool(tiles) and ";16" in str(tiles[0][3]),  # their raw mode is in there
                palette=colors.reshape(3, -1).T.astype(np.uint8).tobytes() if 0 < colors.max(initial=0) < 256 else None,
            )
        if image.format == "PPM" and mode == "I":  # Pillow has scaled it from its maxval
            return cls(range=65535)
        if image.format != "TIFF":
            return cls()
        bits = tags.get(_BITS_PER_SAMPLE, (1,))[0]
        return cls(
            range=(1 << bits) - 1 if 8 < bits < 16 else None,
            is_inverted=tags.get(_PHOTOMETRIC) == 0,
            is_unsigned=bits == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1,
        )


def upright_rgb(opened: Image.Image) -> Image.Image:
    """Decodes an image that Pillow has opened: 8-bit RGB, upright as EXIF says.

    Raises:
        InputError: its values are no picture: not finite, negative, or black for lack of bits; and whatever Pillow
            raises for a damaged file.
    """
    stored = _Stored.of(opened)
    turn = _TO_UPRIGHT.get(_orientation(opened))
    image = opened if turn is None else opened.transpose(turn)
    if image.mode.partition(";")[0] in _DEEP:
        return Image.fromarray(_scaled(np.asarray(image), stored)).convert("RGB")
    image.load()
    if stored.palette is not None:
        image.putpalette(stored.palette)
    image.info.pop("transparency", None)  # alpha is dropped, and Pillow would warn of it
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    image = image if image.mode == "RGB" else image.convert("RGB")
    if stored.has_deep_colors and np.asarray(image).max() <= _DARKEST_WHITE:
        raise InputError(
            "its colors have 16 bits and use 12 of them at most, so that little is left in 8 bits; scale them to the "
            "full range"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the orientation in an image's EXIF data; 1, upright, where there is none, or none that can be read: that
    is no reason to refuse the pixels.
    """
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises nearly anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def _scaled(values: np.ndarray, stored: _Stored) -> np.ndarray:
    """Returns (H, W) gray values as uint8."""
    is_float = values.dtype.kind == "f"
    values = values.view(np.uint32) if stored.is_unsigned and values.dtype == np.int32 else values
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite([lowest, highest]).all():  # min and max pass on a NaN
        raise InputError("its pixels must be finite numbers, and are not")
    ranges = _FLOAT_RANGES if is_float else _INTEGER_RANGES
    most = _OVERSHOOT if is_float else 1
    white = stored.range or next((white for white in ranges if highest <= most * white), None)
    if white is None or lowest < _UNDERSHOOT * white:
        raise InputError(
            f"its pixels must lie in 0..1 or in 0..2^bits - 1, and go from {lowest:g} to {highest:g}; scale them"
        )
    shares = values.astype(np.float32) / np.float32(white)
    shares = 1 - shares if stored.is_inverted else shares
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
