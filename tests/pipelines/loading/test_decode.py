import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loading.decode import (
    MAX_PIXELS,
    decode_face,
    load_encoded,
    load_face,
    pack_face,
    read_header,
    read_headers,
)
from scf_fast.pipelines.sources.base import LARGE_FILE, EncodedImages

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
    """Each pixel of a 2 x 2 enlargement is constant over the filter's core; the triangle's tails mix in an eighth of
    each neighbor.
    """
    along = np.arange(112) % 2 * 160
    face = decode_face(
        png(np.repeat(np.repeat(np.broadcast_to(along[:, None, None], (112, 112, 3)), 2, 0), 2, 1).astype(np.uint8))
    )
    assert face.shape == (112, 112, 3)
    np.testing.assert_allclose(
        face[1:-1], np.broadcast_to((0.75 * along + 0.25 * (160 - along))[1:-1, None, None], (110, 112, 3)), atol=1
    )


def encode(fmt, image=None, **options):
    file = io.BytesIO()
    (Image.fromarray(PIXELS) if image is None else image).save(file, fmt, **options)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


COMMON = {
    "jpeg": encode("JPEG"),
    "progressive": encode("JPEG", progressive=True),
    "gray jpeg": encode("JPEG", Image.fromarray(PIXELS).convert("L")),
    "cmyk": encode("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
    "png": encode("PNG"),
    "palette": encode("PNG", Image.fromarray(PIXELS).convert("P")),
    "webp": encode("WEBP"),
    "padded jpeg": np.append(encode("JPEG"), np.zeros(9, np.uint8)),
}
OTHERS = {
    "pgm": encode("PPM", Image.fromarray(PIXELS[..., 0])),
    "bmp": encode("BMP"),
    "gif": encode("GIF"),
    "tiff": encode("TIFF"),
    "16 bits": encode("PNG", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
    "animated": encode("WEBP", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])]),
}


@pytest.mark.parametrize("kind", [*COMMON, *OTHERS])
def test_header_says_what_pillow_says(kind):
    encoded = {**COMMON, **OTHERS}[kind]
    image = Image.open(io.BytesIO(encoded))
    assert read_header(encoded) == (image.format, 112, 112, kind in COMMON)
    source = EncodedImages([encoded])
    given, is_face_sized = load_encoded(source, 0)
    assert is_face_sized
    if kind in COMMON:
        np.testing.assert_array_equal(given, encoded)
    for ppm, is_face_sized in (load_encoded(source, 0, convert=True), *([(given, True)] if kind in OTHERS else [])):
        assert is_face_sized and ppm[:2].tobytes() == b"P6"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(ppm))), decode_face(encoded))


def check_headers(files):
    """read_headers vouches for what read_header calls common, and says the same; it may leave files to it."""
    lengths = np.array([len(file) for file in files], dtype=np.int64)
    sizes = read_headers(np.concatenate([*files, np.empty(0, np.uint8)]), np.cumsum(lengths) - lengths, lengths)
    for file, size in zip(files, sizes.tolist()):
        if size != [0, 0]:
            header = read_header(file)
            assert header.is_common and [header.height, header.width] == size
    return sizes


def test_headers_of_a_batch():
    oblong = Image.fromarray(PIXELS[:90, :70])
    files = {
        **COMMON,
        **OTHERS,
        "oblong jpeg": encode("JPEG", oblong),
        "oblong png": encode("PNG", oblong),
        "none": np.empty(0, np.uint8),
        "commented": encode("JPEG", comment=b"x" * 500),
        "restarts": encode("JPEG", restart_marker_blocks=4),
    }
    sizes = dict(zip(files, check_headers(list(files.values())).tolist()))
    assert [kind for kind in files if sizes[kind] == [0, 0]] == [
        "progressive",
        "cmyk",
        "webp",
        "padded jpeg",
        *OTHERS,
        "none",
    ]
    assert sizes["oblong jpeg"] == sizes["oblong png"] == [90, 70] and sizes["jpeg"] == sizes["commented"] == [112, 112]
    assert sizes["restarts"] == [112, 112]
    np.testing.assert_array_equal(decode_face(pack_face(PIXELS)), PIXELS)
    assert check_headers([]).shape == (0, 2)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(COMMON)), st.integers(0, 700), st.integers(0, 255), st.integers(0, 5000)),
        max_size=5,
    )
)
def test_headers_of_damaged_batches(damages):
    files = []
    for kind, place, value, cut in damages:
        file = COMMON[kind].copy()
        file[min(place, len(file) - 1)] = value
        files.append(file[: len(file) - max(0, cut - 2500)])
    check_headers(files)


def test_large_images_are_made_faces_at_once():
    """So that a batch full of them needs little memory: many pixels, or many bytes."""
    pixels = encode("PNG", Image.new("RGB", (1100, 1000), (9, 8, 7)))
    filled = np.append(encode("JPEG"), np.zeros(LARGE_FILE, np.uint8))
    source = EncodedImages([pixels, filled])
    assert read_header(pixels).is_common and (check_headers([pixels, filled]) == 0).all()
    for i in range(2):
        encoded, is_face_sized = load_encoded(source, i)
        assert encoded[:2].tobytes() == b"P6" and len(encoded) < 40_000 and is_face_sized


def test_progressive_image_of_endless_scans_is_refused():
    """Each repeats the last scan, some bytes for the file and a pass over all pixels for the decoder."""
    progressive = encode("JPEG", Image.new("RGB", (112, 112)), progressive=True).tobytes()
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    decode_face(progressive[:-2] + last * 10 + progressive[-2:])
    for function in (read_header, decode_face):
        with pytest.raises(InputError, match="at most 200 scans"):
            function(np.frombuffer(progressive[:-2] + last * 200 + progressive[-2:], np.uint8))


def test_formats_that_run_programs_are_not_tried():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(InputError, match="unknown format"):
        decode_face(postscript)


@pytest.mark.parametrize("kind", COMMON)
def test_every_truncation_is_noticed(kind):
    encoded = COMMON[kind]
    for cut in [*range(40), *range(40, len(encoded) - 12, 97)]:
        try:
            assert not read_header(encoded[:cut]).is_common
        except InputError as error:
            assert str(error)


@given(st.sampled_from(list(COMMON)), st.data())
def test_corruption_is_an_image_or_an_input_error(kind, data):
    """Whatever bytes change, one of two things happens, in little memory and time."""
    damaged = COMMON[kind].copy()
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    for function in (read_header, decode_face):
        try:
            function(damaged)
        except InputError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("kind", "place", "size"), [("png", 16, (5000).to_bytes(4, "big") * 2), ("jpeg", None, b"\xff" * 4)]
)
def test_header_of_a_huge_image_is_refused(kind, place, size):
    encoded = bytearray(COMMON[kind])
    place = place or encoded.index(b"\xff\xc0") + 5
    encoded[place : place + len(size)] = size
    if kind == "png":
        encoded[29:33] = zlib.crc32(encoded[12:29]).to_bytes(4, "big")
    for function in (read_header, decode_face):
        with pytest.raises(InputError, match=f"it must have 1 to {MAX_PIXELS} pixels and says|exceeds limit"):
            function(np.frombuffer(encoded, np.uint8))


def test_errors_name_the_image():
    source = EncodedImages([b"", b"garbage", COMMON["png"][:500]])
    for i, reason in enumerate(("it has no bytes", "unknown format", ".*truncated.*")):
        for load in (load_face, load_encoded):
            with pytest.raises(
                InputError, match=rf"^image {i} cannot be decoded: {reason}; replace the image or leave it out$"
            ):
                load(source, i)
