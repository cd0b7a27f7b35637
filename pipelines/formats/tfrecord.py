"""TFRecord files of faces, read and written without TensorFlow.

A file is a sequence of records, all numbers little-endian:

    record = length u64 | masked CRC-32C of these 8 bytes u32 | length bytes | masked CRC-32C of them u32
    masked = ((crc >> 15 | crc << 17) + 0xa282ead8) mod 2^32

The bytes are a tf.train.Example, a protobuf message {features: {feature: map of name to Feature}}, where a Feature is a
bytes_list, a float_list or an int64_list. A length decides what is read, so its checksum is always compared; that of
the bytes only on request. Sources: TensorFlow's "TFRecord and tf.train.Example" and its example.proto and
feature.proto; protobuf's "Encoding".
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, IntArray, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.crc32c import crc32c

_REPLACE = "copy or download it again"

_SIZE, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
HEADER_BYTES = _SIZE.size + _CHECKSUM.size
CHECKSUM_BYTES = _CHECKSUM.size
FRAME_BYTES = HEADER_BYTES + CHECKSUM_BYTES  # of a record, around its Example
_SCAN_BLOCK = 1 << 16  # records whose headers are checked together, while the pages that hold them are still warm
_HUGE = 1 << 62  # bytes; stands for every length from there on

# Numbers of fields: of an Example, a map, the entry of a map, a feature, a list.
_FEATURES = _ENTRY = _NAME = _BYTES_LIST = _VALUE = 1
_FEATURE = 2  # of the entry of a map
_INT64_LIST = 3  # of a feature
_VARINT, _SIZED, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; bytes of those of fixed size
_NOTHING = 0, 0  # the place of a missing field
_MOST_FIELDS = 1000  # in a message; a face has a handful of features, and an image of 32 MB could be 16 million
_IMAGE_KEYS = (b"image", b"image/encoded", b"image_raw")
_LABEL_KEYS = (b"label", b"image/class/label")
_FEATURES_TRIED = 4  # in images_in; they stand in any order
IMAGE_FEATURES, LABEL_FEATURES = (" or ".join(key.decode() for key in keys) for keys in (_IMAGE_KEYS, _LABEL_KEYS))


def write_shard(path: StrPath, images: Iterable[tuple[bytes | ByteArray, int]]) -> None:
    """Writes a shard of (image, label), atomically."""
    with atomic_output(path) as file:
        file.writelines(pack_record(image, label) for image, label in images)


def pack_record(image: bytes | ByteArray, label: int) -> bytes:
    """Returns one record as it stands in a file, with the features "image" and "label"; the label is not negative."""
    image_feature = _packed(_BYTES_LIST, _packed(_VALUE, bytes(image)))
    label_feature = _packed(_INT64_LIST, _packed(_VALUE, _packed_varint(label)))
    example = _packed(
        _FEATURES,
        b"".join(
            _packed(_ENTRY, _packed(_NAME, names[0]) + _packed(_FEATURE, feature))
            for names, feature in ((_IMAGE_KEYS, image_feature), (_LABEL_KEYS, label_feature))
        ),
    )
    return frame(example)


def frame(content: bytes) -> bytes:
    """Returns a record around any bytes."""
    size = _SIZE.pack(len(content))
    return b"".join((size, _packed_crc(size), content, _packed_crc(content)))


def example_bytes(header: bytes) -> int | None:
    """Returns the bytes of the Example behind a record's header; None where its checksum says that it is no header."""
    size = header[: _SIZE.size]
    return _SIZE.unpack(size)[0] if _packed_crc(size) == header[_SIZE.size :] else None


def is_intact(content: bytes) -> bool:
    """Tells whether the checksum behind an Example, the last CHECKSUM_BYTES of ``content``, is that of the Example."""
    return _packed_crc(content[:-CHECKSUM_BYTES]) == content[-CHECKSUM_BYTES:]


def _packed(number: int, content: bytes) -> bytes:
    return _packed_varint(number << 3 | _SIZED) + _packed_varint(len(content)) + content


def _packed_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes((*digits, value))


def _packed_crc(data: bytes) -> bytes:
    return _CHECKSUM.pack(int(_masked_crc(np.frombuffer(data, dtype=np.uint8))))


def _masked_crc(data: ByteArray) -> IntArray:
    """Returns the masked checksums of rows of bytes, (...) for (..., n)."""
    crc = crc32c(data).astype(np.int64)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _sizes(headers: ByteArray) -> IntArray:
    """Returns the lengths in (N, 12) headers of records, (N,); -1 where the checksum is wrong."""
    sizes = np.minimum(np.ascontiguousarray(headers[:, :8]).view("<u8")[:, 0], np.uint64(_HUGE)).astype(np.int64)
    return np.where(np.ascontiguousarray(headers[:, 8:]).view("<u4")[:, 0] == _masked_crc(headers[:, :8]), sizes, -1)


def scan_records(data: ByteArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Walks the records of a whole file, block after block.

    Yields:
        starts, sizes: (n,), the bytes at which records start, and the bytes of their Examples.
    Raises:
        InputError: the file is empty, truncated, damaged or something else; the message gives the byte.
    """
    if not data.size:
        raise InputError(f"the file is empty; {_REPLACE}")
    buffer, end = data.data, 0
    while end < data.size:
        block: list[int] = []
        while end + HEADER_BYTES <= data.size and len(block) < _SCAN_BLOCK:
            block.append(end)
            end += FRAME_BYTES + _SIZE.unpack_from(buffer, end)[0]
        if not block:
            raise InputError(
                f"it is truncated: the header at byte {end} has {HEADER_BYTES} bytes and the file ends at {data.size}; "
                f"{_REPLACE}"
            )
        starts = np.array(block, dtype=np.int64)
        sizes = _sizes(data[starts[:, None] + np.arange(HEADER_BYTES)])
        if sizes.min() < 0:
            raise InputError(
                f"no record starts at byte {starts[sizes.argmin()]}: compressed, damaged or no TFRecord file; "
                f"{_REPLACE}, uncompressed"
            )
        if end > data.size:
            raise InputError(
                f"it is truncated: the record at byte {starts[-1]} ends at byte {end} and the file at {data.size}; "
                f"{_REPLACE}"
            )
        yield starts, sizes


def images_in(data: ByteArray, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Finds the images of many records, at 1 us each.

    Args:
        data: (bytes,).
        starts, lengths: (B,); record b starts at byte starts[b] and lengths[b] bytes from there are at hand, of which
            it may need fewer.
    Returns:
        starts, lengths: (B,), of the images; a length of 0 where it takes parse_example to tell: the record is longer,
            of another form, or damaged.
    """
    found_starts, found_lengths = starts.copy(), np.zeros_like(lengths)
    there = np.flatnonzero(lengths >= FRAME_BYTES)
    sizes = _sizes(data[starts[there][:, None] + np.arange(HEADER_BYTES)])
    fits = (sizes >= 0) & (sizes <= lengths[there] - FRAME_BYTES)
    there, at = there[fits], starts[there][fits] + HEADER_BYTES
    message = _next_fields(data, (at, at + sizes[fits]), _FEATURES)
    for _ in range(_FEATURES_TRIED):
        if not len(there):
            break
        entry = _next_fields(data, message, _ENTRY)
        name = _next_fields(data, entry, _NAME)
        feature = _next_fields(data, (name[1], entry[1]), _FEATURE)
        start, end = _next_fields(data, _next_fields(data, feature, _BYTES_LIST), _VALUE)
        key = np.frombuffer(_IMAGE_KEYS[0], dtype=np.uint8)
        is_image = (name[1] - name[0] == len(key)) & (
            data[np.minimum(name[0][:, None] + np.arange(len(key)), data.size - 1)] == key
        ).all(axis=1)
        found_starts[there[is_image]], found_lengths[there[is_image]] = start[is_image], (end - start)[is_image]
        there, message = there[~is_image], (entry[1][~is_image], message[1][~is_image])
    return found_starts, found_lengths


def _next_fields(data: ByteArray, messages: tuple[IntArray, IntArray], number: int) -> tuple[IntArray, IntArray]:
    """Returns (starts, ends) of the contents of the fields with which messages begin; an empty place where that is no
    field of that number with bytes in it. Message b is data[messages[0][b]:messages[1][b]].
    """
    at, end = messages
    window = data[np.minimum(at[:, None] + np.arange(6), data.size - 1)]
    more = window[:, 1:] >= 128
    used = np.cumprod(more, axis=1)  # which bytes of the size are followed by another
    size = (window[:, 1:] & 127).astype(np.int64) << np.arange(0, 35, 7)
    size = size[:, 0] + (size[:, 1:] * used[:, :-1]).sum(axis=1)
    start = at + 2 + used.sum(axis=1)
    is_there = (at < end) & (window[:, 0] == (number << 3 | _SIZED)) & (used[:, -1] == 0) & (start + size <= end)
    return np.where(is_there, start, 0), np.where(is_there, start + size, 0)


def parse_example(data: memoryview, start: int, end: int) -> tuple[int, int, int | None]:
    """Finds the image and the label of a tf.train.Example.

    Args:
        data: of bytes.
        start, end: data[start:end] is the message.
    Returns:
        start, end: data[start:end] is the image file.
        label: None where there is none.
    Raises:
        InputError: it is no such message, or holds no image.
    """
    features: dict[bytes, tuple[int, int]] = {}
    for entry in _fields(data, _first(data, (start, end), _FEATURES), _ENTRY):
        name, feature = (_first(data, entry, field) for field in (_NAME, _FEATURE))
        features.setdefault(bytes(data[slice(*name)]), feature)
    image = _first_value(data, features, _IMAGE_KEYS, _BYTES_LIST)
    if image is None:
        names = ", ".join(repr(name.decode(errors="replace"))[:40] for name in [*features][:8]) or "none"
        raise InputError(
            f"it must hold an image, a bytes_list {IMAGE_FEATURES}; its features are {names}; write it again or leave "
            "it out"
        )
    place = _first_value(data, features, _LABEL_KEYS, _INT64_LIST)
    if place is None or place[0] == place[1]:
        return *image, None
    label, _ = _varint(data, *place)
    return *image, label - (label >> 63 << 64)  # two's complement


def _first_value(
    data: memoryview, features: Mapping[bytes, tuple[int, int]], names: Sequence[bytes], kind: int
) -> tuple[int, int] | None:
    """Returns (start, end) of the first value in the list of that kind under the first of the names that has one."""
    for name in names:
        value = _first(data, _first(data, features.get(name, _NOTHING), kind), _VALUE)
        if value is not _NOTHING:
            return value
    return None


def _first(data: memoryview, message: tuple[int, int], number: int) -> tuple[int, int]:
    """Returns (start, end) of the first field of that number in the message data[message[0]:message[1]]."""
    return next(_fields(data, message, number), _NOTHING)


def _fields(data: memoryview, message: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of every field of that number in the message data[message[0]:message[1]]."""
    at, end = message
    for _ in range(_MOST_FIELDS):
        if at >= end:
            return
        tag, start = _varint(data, at, end)
        kind = tag & 7
        if kind == _SIZED:
            size, start = _varint(data, start, end)
            at = start + size
        elif kind == _VARINT:
            _, at = _varint(data, start, end)
        elif kind in _FIXED:
            at = start + _FIXED[kind]
        else:
            raise InputError(f"it is no tf.train.Example, or damaged: a field has wire type {kind}; {_REPLACE}")
        if at > end:
            raise InputError(
                f"it is no tf.train.Example, or damaged: a field ends {at - end} bytes after its message; {_REPLACE}"
            )
        if tag >> 3 == number:
            yield start, at
    raise InputError(
        f"a message in it must have fewer than {_MOST_FIELDS} fields; write it again, with image and label alone"
    )


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """Returns (value, byte after it) of a number of at most 64 bits: seven a byte, the lowest first."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise InputError(f"it is no tf.train.Example, or damaged: a number does not end; {_REPLACE}")
