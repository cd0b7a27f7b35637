import struct

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.crc32c import crc32c

_REPLACE = "copy or download it again"

_SIZE, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEADER = _SIZE.size + _CHECKSUM.size  # bytes
_AROUND = _HEADER + _CHECKSUM.size  # bytes of a record that are not its Example
_SCAN_BLOCK = 1 << 16  # records whose headers are checked together, while the pages that hold them are still warm
_HUGE = 1 << 62  # bytes; stands for every length from there on

_FEATURES = _ENTRY = _NAME = _BYTES_LIST = _VALUE = (
    1  # numbers of fields: of an Example, a map, its entry, a feature, a list
)
_FEATURE = 2  # of the entry of a map
_INT64_LIST = 3  # of a feature
_VARINT, _SIZED, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; bytes of those of fixed size
_NOTHING = 0, 0  # where a field is that is not there
_MOST_FIELDS = 1000  # in a message; a face has a handful of features, and an image of 32 MB could be 16 million
_IMAGE_KEYS = (b"image", b"image/encoded", b"image_raw")
_FEATURES_TRIED = 4  # in images_in; they stand in any order
_LABEL_KEYS = (b"label", b"image/class/label")


def write_shard(path, images):
    """Write a shard, complete or not at all.

    Args:
        path: str or Path.
        images: iterable of (bytes-like image, int label).
    """
    with atomic_output(path) as file:
        file.writelines(pack_record(image, label) for image, label in images)


def pack_record(image, label):
    """One record as it stands in a file, with the features "image" and "label".

    Args:
        image: bytes-like.
        label: int >= 0.
    Returns:
        bytes.
    """
    image = _packed(_BYTES_LIST, _packed(_VALUE, bytes(image)))
    label = _packed(_INT64_LIST, _packed(_VALUE, _packed_varint(label)))
    example = _packed(
        _FEATURES,
        b"".join(
            _packed(_ENTRY, _packed(_NAME, names[0]) + _packed(_FEATURE, feature))
            for names, feature in ((_IMAGE_KEYS, image), (_LABEL_KEYS, label))
        ),
    )
    return frame(example)


def frame(content):
    """A record, as bytes, around any bytes."""
    size = _SIZE.pack(len(content))
    return b"".join((size, _packed_crc(size), content, _packed_crc(content)))


def _packed(number, content):
    return _packed_varint(number << 3 | _SIZED) + _packed_varint(len(content)) + content


def _packed_varint(value):
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes((*digits, value))


def _packed_crc(data):
    return _CHECKSUM.pack(int(_masked_crc(np.frombuffer(data, dtype=np.uint8))))


def _masked_crc(data):
    """(...) int64 for (..., n) uint8."""
    crc = crc32c(data).astype(np.int64)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _sizes(headers):
    """(N,) int64, the lengths in (N, 12) uint8 headers of records; -1 where the checksum is wrong."""
    sizes = np.minimum(np.ascontiguousarray(headers[:, :8]).view("<u8")[:, 0], np.uint64(_HUGE)).astype(np.int64)
    return np.where(np.ascontiguousarray(headers[:, 8:]).view("<u4")[:, 0] == _masked_crc(headers[:, :8]), sizes, -1)


def _records(data):
    """(starts, sizes) of the records of a file, block after block: the bytes at which they start, and of their
    Examples.

    Args:
        data: (bytes,) uint8 array, the whole file.
    Raises:
        ValueError: the file is empty, truncated, damaged or something else; the message gives the byte.
    """
    if not data.size:
        raise InputError(f"the file is empty; {_REPLACE}")
    buffer, end = memoryview(data), 0
    while end < data.size:
        starts = []
        while end + _HEADER <= data.size and len(starts) < _SCAN_BLOCK:
            starts.append(end)
            end += _AROUND + _SIZE.unpack_from(buffer, end)[0]
        if not starts:
            raise InputError(
                f"it is truncated: the header at byte {end} has {_HEADER} bytes and the file ends at {data.size}; "
                f"{_REPLACE}"
            )
        starts = np.array(starts, dtype=np.int64)
        sizes = _sizes(data[starts[:, None] + np.arange(_HEADER)])
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


def images_in(data, starts, lengths):
    """Where the images of many records lie, at 1 us each.

    Args:
        data: (bytes,) uint8 array.
        starts, lengths: (B,) int64; record b starts at byte starts[b] and lengths[b] bytes from there are at hand, of
            which it may need fewer.
    Returns:
        starts, lengths: (B,) int64, of the images; a length of 0 where that takes parse_example: the record is longer,
            of another form, or damaged.
    """
    found_starts, found_lengths = starts.copy(), np.zeros_like(lengths)
    there = np.flatnonzero(lengths >= _AROUND)
    sizes = _sizes(data[starts[there][:, None] + np.arange(_HEADER)])
    fits = (sizes >= 0) & (sizes <= lengths[there] - _AROUND)
    there, at = there[fits], starts[there][fits] + _HEADER
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


def _next_fields(data, messages, number):
    """(starts, ends) of what the fields hold that the messages data[messages[0][b]:messages[1][b]] begin with; an empty
    place where that is no field of that number with bytes in it.
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


def parse_example(data, start, end):
    """The image and the label of a tf.train.Example.

    Args:
        data: memoryview of bytes.
        start, end: int; data[start:end] is the message.
    Returns:
        start, end: int; data[start:end] is the image file, as data is.
        label: int, None where there is none.
    Raises:
        ValueError: it is no such message, or holds no image.
    """
    features = {}
    for entry in _fields(data, _first(data, (start, end), _FEATURES), _ENTRY):
        name, feature = (_first(data, entry, field) for field in (_NAME, _FEATURE))
        features.setdefault(bytes(data[slice(*name)]), feature)
    image = _first_value(data, features, _IMAGE_KEYS, _BYTES_LIST)
    if image is None:
        names = ", ".join(repr(name.decode(errors="replace"))[:40] for name in [*features][:8]) or "none"
        raise InputError(
            f"it must hold an image, a bytes_list {_either(_IMAGE_KEYS)}; its features are {names}; write it anew or "
            "leave it out"
        )
    label = _first_value(data, features, _LABEL_KEYS, _INT64_LIST)
    if label is None or label[0] == label[1]:
        return *image, None
    label, _ = _varint(data, *label)
    return *image, label - (label >> 63 << 64)  # two's complement


def _first_value(data, features, names, kind):
    """(start, end) of the first value in the list of that kind that the first of the names has; None where there is
    none.
    """
    for name in names:
        value = _first(data, _first(data, features.get(name, _NOTHING), kind), _VALUE)
        if value is not _NOTHING:
            return value
    return None


def _first(data, message, number):
    """(start, end) of the first field of that number in the message data[message[0]:message[1]]."""
    return next(_fields(data, message, number), _NOTHING)


def _fields(data, message, number):
    """(start, end) of all of them."""
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
                f"it is no tf.train.Example, or damaged: a field ends {at - end} bytes behind its message; {_REPLACE}"
            )
        if tag >> 3 == number:
            yield start, at
    raise InputError(
        f"a message in it must have fewer than {_MOST_FIELDS} fields; write it anew, with image and label alone"
    )


def _either(names):
    return " or ".join(name.decode() for name in names)


def _varint(data, at, end):
    """(value, where it ends): seven bits a byte, the lowest first, 64 at most."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise InputError(f"it is no tf.train.Example, or damaged: a number does not end; {_REPLACE}")
