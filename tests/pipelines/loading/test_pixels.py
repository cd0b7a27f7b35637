"""Images of every mode that Pillow has, through the files that hold them and both loaders; against formulas here."""

import colorsys
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from scf_fast.evaluation.alignment import AlignedFaces
from scf_fast.pipelines.convert import FORMATS, convert
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import TEMPLATE
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.loading.decode import decode_face, load_face
from scf_fast.pipelines.loading.pixels import upright_rgb
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import EncodedImages

SHARE = np.linspace(0, 1, 112 * 112).reshape(112, 112)  # of white
GRAY = np.rint(SHARE * 255).astype(np.uint8)
RGB = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (112, 112), dtype=np.uint8)


def encode(image, fmt, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, fmt, **options)
    return file.getvalue()


def tiff(values, order="<", tags=None):
    """An uncompressed TIFF by hand: (H, W) of any integer or floating-point type; more tags as {number: value}."""
    values = values.astype(values.dtype.newbyteorder(order))
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    about = {256: 112, 257: 112, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: 112, 279: values.nbytes}
    about |= {339: kind} | (tags or {})
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(about.items())]
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + values.nbytes)
    return start + values.tobytes() + directory


def png16(values, color_type):
    """A PNG of 16 bits a channel, which Pillow does not write: (H, W, channels) of integers."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 112, 112, 16, color_type, 0, 0, 0)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(maxval):
    values = np.rint(SHARE * maxval).astype(">u2")
    return b"P5 112 112 %d\n" % maxval + values.tobytes()


def levels(largest, dtype):
    return np.rint(SHARE * largest).astype(dtype) if np.dtype(dtype).kind != "f" else (SHARE * largest).astype(dtype)


DARK = np.minimum(levels(4095, np.uint16), 1000)  # of 12 bits, by what the file says
GRAYS = {
    "PNG, 16 bits": encode(levels(65535, np.uint16), "PNG"),
    "PNG, 12 bits in 16": encode(levels(4095, np.uint16), "PNG"),
    "PNG, 8 bits in 16": encode(levels(255, np.uint16), "PNG"),
    "PGM, maxval 65535": pgm(65535),
    "PGM, maxval 4095": pgm(4095),
    "TIFF, 16 bits": tiff(levels(65535, np.uint16)),
    "TIFF, 16 bits, other byte order": tiff(levels(65535, np.uint16), ">"),
    "TIFF, 10 bits in 16, other byte order": tiff(levels(1023, np.uint16), ">"),
    "TIFF, 16 bits, signed": tiff(levels(16383, np.int16)),
    "TIFF, 16 bits, white is zero": tiff(65535 - levels(65535, np.uint16), tags={262: 0}),
    "TIFF, 16 bits of int32": tiff(levels(65535, np.int32)),
    "TIFF, int32, other byte order": tiff(levels(255, np.int32), ">"),
    "TIFF, uint32": tiff(levels(2**32 - 1, np.uint32)),
    "TIFF, float 0..1": tiff(levels(1, np.float32)),
    "TIFF, float 0..1, other byte order": tiff(levels(1, np.float32), ">"),
    "TIFF, float 0..1, white is zero": tiff(1 - levels(1, np.float32), tags={262: 0}),
    "TIFF, float 0..255": tiff(levels(255, np.float32)),
    "TIFF, float, resampled": tiff((levels(1, np.float32) * 1.2 - 0.1).astype(np.float32)),
    "PFM, float 0..1": b"Pf\n112 112\n-1.0\n" + levels(1, "<f4")[::-1].tobytes(),
    "LA": encode(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), "PNG"),
    "PNG, 16 bits and alpha": png16(np.dstack([levels(65535, np.uint16), ALPHA.astype(np.uint16) * 257]), 4),
}
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
COLORS = {
    "RGBA": encode(np.dstack([RGB, ALPHA]), "PNG"),
    "RGBA, TIFF": encode(np.dstack([RGB, ALPHA]), "TIFF"),
    "palette with transparency": encode(PALETTE, "PNG", transparency=ALPHA[0].tobytes()),
    "PNG, 16 bits a color": png16(RGB.astype(np.uint16) * 257, 2),
    "TIFF, RGB": encode(RGB, "TIFF"),
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_of_any_depth_is_scaled_from_its_range(kind):
    expected = GRAY.astype(int)
    if kind == "TIFF, float, resampled":
        expected = np.rint((SHARE * 1.2 - 0.1).clip(0, 1) * 255).astype(int)
    face = decode_face(GRAYS[kind]).astype(int)
    assert (face == face[..., :1]).all()
    # Rounded twice where the file has as few levels; in 16 bits beside alpha, Pillow cuts off the low byte.
    tolerance = 1 if "8 bits" in kind or "alpha" in kind or "10 bits" in kind else 0
    exactly = (face[..., 0] == expected).mean()
    assert np.abs(face[..., 0] - expected).max() <= max(tolerance, 1) and exactly > (0.4 if tolerance else 0.98)


def test_what_a_tiff_says_of_its_bits_goes_before_what_its_values_suggest():
    packed = np.empty((112, 168), dtype=np.uint8)  # two samples in three bytes
    first, second = DARK[:, ::2].astype(int), DARK[:, 1::2].astype(int)
    packed[:, ::3], packed[:, 1::3], packed[:, 2::3] = first >> 4, (first & 15) << 4 | second >> 8, second & 255
    file = tiff(np.zeros((112, 84), np.uint16), tags={258: 12})  # of the same bytes
    file = file[:8] + packed.tobytes() + file[8 + packed.nbytes :]
    assert Image.open(io.BytesIO(file)).mode == "I;16"
    np.testing.assert_array_equal(decode_face(file)[..., 0], np.rint(DARK / 4095 * 255))
    assert decode_face(encode(DARK, "PNG")).max() > 240  # where nothing says so, 1000 is of 10 bits


@pytest.mark.parametrize("kind", COLORS)
def test_alpha_and_palettes_leave_the_color_as_it_is(kind):
    expected = np.asarray(PALETTE.convert("RGB")) if "palette" in kind else RGB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_face(COLORS[kind]), expected)


def lab_to_srgb(lightness, a, b):
    """CIE's formulas, with the white of D50, adapted to that of D65 by Bradford's matrices."""
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = bradford @ [0.9505, 1, 1.089] / (bradford @ [0.9642, 1, 0.8249])
    xyz = np.linalg.solve(bradford, gains * (bradford @ xyz))
    to_rgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.204, 1.057]])
    linear = (to_rgb @ xyz).clip(0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255


def one_color(mode, *values):
    return Image.merge(mode, [Image.new("L", (112, 112), value) for value in values])


@pytest.mark.parametrize("lab", [(50, 20, -30), (70, -40, 35), (90, 0, 0)])
def test_lab_becomes_srgb(lab):
    file = encode(one_color("LAB", round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128), "TIFF")
    assert bytes([round(lab[0] * 2.55), lab[1] % 256, lab[2] % 256]) * 5 in file  # signed, as TIFF has it
    expected = lab_to_srgb(round(lab[0] * 2.55) / 2.55, lab[1], lab[2])
    np.testing.assert_allclose(decode_face(file)[5, 5], expected, atol=2)


def test_modes_that_files_seldom_have():
    ink = one_color("CMYK", 10, 100, 200, 50)
    np.testing.assert_allclose(
        decode_face(encode(ink, "TIFF"))[0, 0], [(255 - c) * 205 / 255 for c in (10, 100, 200)], atol=1
    )
    hsv = np.asarray(upright_rgb(one_color("HSV", 140, 120, 200)))[0, 0]
    np.testing.assert_allclose(hsv, np.array(colorsys.hsv_to_rgb(140 / 255, 120 / 255, 200 / 255)) * 255, atol=2)
    ycbcr = np.asarray(upright_rgb(one_color("YCbCr", 120, 100, 160)))[0, 0]
    np.testing.assert_allclose(ycbcr, [120 + 1.402 * 32, 120 + 0.344136 * 28 - 0.714136 * 32, 120 - 1.772 * 28], atol=1)
    bits = Image.fromarray(GRAY > 100)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode_face(encode(bits, "PNG"))[..., 0], (GRAY > 100) * 255)
    for mode, color in (("LA", (150, 128)), ("RGBA", (200, 150, 100, 128))):
        premultiplied = Image.new(mode, (112, 112), color).convert({"LA": "La", "RGBA": "RGBa"}[mode])
        np.testing.assert_allclose(
            np.asarray(upright_rgb(premultiplied))[0, 0], color[0] if mode == "LA" else color[:3], atol=1
        )
    associated = np.asarray(Image.new("RGBA", (112, 112), (200, 150, 100, 128)).convert("RGBa"))
    entry = struct.pack("<HHI", 338, 3, 1)  # of the TIFF tag that says what alpha is
    file = encode(associated, "TIFF").replace(entry + b"\2", entry + b"\1")
    assert Image.open(io.BytesIO(file)).tile[0][3][0] == "RGBa"
    np.testing.assert_allclose(decode_face(file)[0, 0], [200, 150, 100], atol=1)


def test_tiff_palette_of_8_bits_where_16_are_due():
    """Some programs write 0..255; Pillow takes the high byte and gives black."""
    file = bytearray(encode(PALETTE, "TIFF"))
    colors = np.array(Image.open(io.BytesIO(file)).tag_v2[320], "<u2")
    place = bytes(file).index(colors.tobytes())
    file[place : place + colors.nbytes] = (colors // 256).tobytes()
    np.testing.assert_array_equal(decode_face(bytes(file)), np.asarray(PALETTE.convert("RGB")))


def test_deep_images_are_turned_upright_too():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[274] = 6
    for file in (
        encode(levels(65535, np.uint16), "TIFF", tiffinfo=info),
        encode(levels(1, np.float32), "TIFF", tiffinfo=info),
    ):
        assert np.abs(decode_face(file)[..., 0].astype(int) - np.rot90(GRAY, -1)).max() <= 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (tiff(np.full((112, 112), np.nan, np.float32)), "must be finite numbers"),
        (tiff(np.where(SHARE > 0.5, np.inf, 0).astype(np.float32)), "must be finite numbers"),
        (tiff((SHARE * 2 - 1).astype(np.float32)), r"go from -1 to 1; scale them"),
        (tiff(levels(4095, np.int16) - 2048), r"go from -2048 to 2047; scale them"),
        (tiff(levels(1e20, np.float32)), r"from 0 to 1e\+20"),
        (tiff(levels(1, np.float64)), "it is a TIFF image that is damaged, or of a kind that is not read here"),
        (png16(np.dstack([levels(4095, np.uint16)] * 3), 2), "colors have 16 bits and use 12 of them at most"),
    ],
)
def test_values_that_are_no_picture_are_refused(file, message):
    with pytest.raises(InputError, match=message):
        decode_face(file)


def jpeg_with(segment, content):
    """A JPEG with one more segment, right at its beginning."""
    file = encode(SMOOTH, "JPEG", quality=95)
    return file[:2] + b"\xff" + bytes([segment]) + struct.pack(">H", len(content) + 2) + content + file[2:]


def png_with(name, data):
    """A PNG with one more chunk before its pixels."""
    file = encode(SMOOTH, "PNG")
    place = file.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return file[:place] + chunk + file[place:]


def turned_by(tag_type, value):
    """EXIF data whose orientation has a type and value (4 bytes)."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01" + struct.pack("<HI", tag_type, 1) + value + bytes(4)


def ink():
    """CMYK without the marker by which Adobe says that 0 is full ink."""
    file = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG")
    place = file.index(b"\xff\xee")
    return file[:place] + file[place + 2 + struct.unpack_from(">H", file, place + 2)[0] :]


SMOOTH = np.asarray(Image.fromarray(RGB[:14, :14]).resize((112, 112), Image.Resampling.BICUBIC))
_LONG = zlib.compress(bytes(3 << 20))
# Good pixels beside data that a decoder may stumble over; all must be decoded as if it were not there.
STUMBLES = {
    "JPEG, EXIF is a web address": jpeg_with(0xE1, b"Exif\0\0http://ns.adobe.com/xap/1.0/\0<x/>"),
    "JPEG, EXIF cut off": jpeg_with(0xE1, b"Exif\0\0II*\0\x08"),
    "JPEG, EXIF leads beyond its end": jpeg_with(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "JPEG, orientation is a text": jpeg_with(0xE1, turned_by(2, b"abc\0")),
    "JPEG, orientation 9": jpeg_with(0xE1, turned_by(3, b"\x09\0\0\0")),
    "JPEG, a video behind it": encode(SMOOTH, "JPEG", quality=95) + b"\0\0\0\x18ftypmp42" + bytes(5000),
    "JPEG of two pictures": encode(
        Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)], quality=95
    ),
    "PNG, EXIF is junk": png_with(b"eXIf", b"junk"),
    "PNG, long text": png_with(b"zTXt", b"k\0\0" + _LONG),
    "PNG, long color profile": png_with(b"iCCP", b"k\0\0" + _LONG),
    "PNG, damaged text": png_with(b"iTXt", b"\xff\xfe"),
    "CMYK without Adobe's marker": ink(),
}


@pytest.mark.parametrize("kind", STUMBLES)
def test_what_stands_beside_the_pixels_does_not_matter(kind):
    error = np.abs(decode_face(STUMBLES[kind]).astype(int) - SMOOTH)
    assert error.mean() < 3 and (kind.startswith(("JPEG", "CMYK")) or error.max() == 0)


def test_orientation_of_every_format_and_number():
    exif = Image.Exif()
    turns = [None, *(np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1))]
    turns += [lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).swapaxes(0, 1), lambda x: np.rot90(x)]
    for orientation, turn in enumerate(turns[1:], 2):
        exif[274] = orientation
        np.testing.assert_array_equal(decode_face(encode(SMOOTH, "PNG", exif=exif)), turn(SMOOTH))
    np.testing.assert_array_equal(decode_face(encode(SMOOTH, "WEBP", lossless=True, exif=exif)), np.rot90(SMOOTH))


def test_both_loaders_and_alignment_give_the_same_pixels():
    pytest.importorskip("nvidia.dali")
    turned = Image.Exif()
    turned[274] = 6
    files = {
        **STUMBLES,
        "PNG, turned": encode(SMOOTH, "PNG", exif=turned),
        **GRAYS,
        **COLORS,
        "LAB": encode(one_color("LAB", 130, 30, 220), "TIFF"),
    }
    files |= {
        "CMYK": encode(one_color("CMYK", 10, 100, 200, 50), "JPEG"),
        "1": encode(Image.fromarray(GRAY > 99), "PNG"),
    }
    source = EncodedImages(list(files.values()), labels=np.arange(len(files)))
    sampler = EpochSampler(len(source), len(source), shuffle=False)
    expected = np.stack([decode_face(file) for file in files.values()]).astype(np.float32)
    for backend, workers in (("dali", 1), ("torch", 0)):
        plain = Preprocessing(horizontal_flip=False)
        with make_loader(source, sampler, plain, backend=backend, num_workers=workers, on_broken="raise") as loader:
            (batch,) = loader.batches(0)
        pixels = batch.images.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5
        error = np.abs(pixels - expected).max(axis=(1, 2, 3))
        is_jpeg = np.array([kind.startswith(("JPEG", "CMYK")) for kind in files])
        rounding = np.where(is_jpeg, 1.001, 1e-3)  # decoders of JPEG differ that much
        assert (error < rounding).all(), (backend, dict(zip(files, error.tolist())))
    moved = AlignedFaces(source, np.tile(TEMPLATE + [3, 0], (len(source), 1, 1)))
    for i in range(len(source)):
        np.testing.assert_array_equal(load_face(moved, i)[:, :-3], expected[i, :, 3:])


@pytest.mark.parametrize("to", FORMATS)
def test_converted_images_have_the_same_pixels(tmp_path, to):
    files = [GRAYS[kind] for kind in ("PNG, 12 bits in 16", "PGM, maxval 4095", "PFM, float 0..1", "TIFF, uint32")]
    files += [STUMBLES["JPEG of two pictures"], COLORS["palette with transparency"], ink()]
    convert(EncodedImages(files, labels=[0] * len(files)), tmp_path / to, to)
    written = open_source(tmp_path / to)
    for i, file in enumerate(files):
        np.testing.assert_array_equal(load_face(written, i), decode_face(file))
