"""TFRecord shards: with an index of lines `name<TAB>shard<TAB>offset<TAB>label`, as TFace trains from, or with labels in the records.

A file is a row of records, all numbers little-endian:

    record = length u64 | masked CRC-32C of these 8 bytes u32 | `length` bytes | masked CRC-32C of them u32
    masked = ((crc >> 15 | crc << 17) + 0xa282ead8) mod 2^32

The bytes are a tf.train.Example, a protobuf message {features: {feature: map of name to Feature}}, where a Feature is a bytes_list, a
float_list or an int64_list. A length decides what is read, so its checksum is always looked at; that of the bytes by check(). Sources:
TensorFlow's "TFRecord and tf.train.Example" and its example.proto and feature.proto; protobuf's "Encoding".
"""
import array
import contextlib
import os
import re
import struct
from pathlib import Path

import numpy as np

from pipelines.crc32c import crc32c
from pipelines.files import atomic_output
from pipelines.image_list import read_lines, shown
from pipelines.indexed import LARGEST_LABEL, LARGEST_OFFSET, PackedImages, as_lengths, check_labels

_SIZE, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_HEADER = _SIZE.size + _CHECKSUM.size  # bytes
_AROUND = _HEADER + _CHECKSUM.size  # bytes of a record that are not its Example
_SCAN_BLOCK = 1 << 16  # records whose headers are checked together, while the pages that hold them are still warm
_HUGE = 1 << 62  # bytes; stands for every length from there on
_REPLACE = "copy or download it again"

_FEATURES = _ENTRY = _NAME = _BYTES_LIST = _VALUE = 1  # numbers of fields: of an Example, a map, its entry, a feature, a list
_FEATURE = 2  # of the entry of a map
_INT64_LIST = 3  # of a feature
_VARINT, _SIZED, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; bytes of those of fixed size
_NOTHING = 0, 0  # where a field is that is not there
_MOST_FIELDS = 1000  # in a message; a face has a handful of features, and an image of 32 MB could be 16 million
_IMAGE_KEYS = (b"image", b"image/encoded", b"image_raw")
_FEATURES_TRIED = 4  # in images_in; they stand in any order
_LABEL_KEYS = (b"label", b"image/class/label")

_READ_AT_ONCE = 1 << 15  # bytes; of a listed record only the start is known, and a face of 112 x 112 pixels rarely has more
_LISTED = re.compile(rb"[^\t\r\n]+(\t-?\d+){3}[ \t]*\r?(\n|$)")
_SNIFFED = 1 << 16  # bytes
_CHECKED = 64  # listed records looked for when a list is opened


class TFRecords(PackedImages):
    """Base of the two sources: an entry of the index is a record, or a listed one's start and as many bytes as are read for it at first."""

    def encoded(self, i):
        example = self._example(i)
        try:
            start, end, _ = parse_example(memoryview(example), 0, len(example) - _CHECKSUM.size)
        except ValueError as error:
            raise ValueError(f"{self.name(i)}: {error}") from error
        return np.frombuffer(example, dtype=np.uint8)[start:end]

    def check(self, i):
        example = self._example(i)
        if _packed_crc(example[:-_CHECKSUM.size]) != example[-_CHECKSUM.size:]:
            raise ValueError(f"{self.name(i)} differs from its checksum: it is damaged; {_REPLACE}")

    def places(self):
        """(files, offsets), (N,) int64: the number of each image's shard and the byte at which its record starts."""
        return np.repeat(np.arange(len(self._names)), np.diff(self._first)), self._offsets

    def _example(self, i):
        """The Example of record i and its checksum."""
        header = self._bytes_at(i, 0, _HEADER)
        if _packed_crc(header[:_SIZE.size]) != header[_SIZE.size:]:
            raise ValueError(f"{self.name(i)}: the checksum of its length is wrong: no record starts there, or it is damaged; {_REPLACE}")
        return self._bytes_at(i, _HEADER, _SIZE.unpack_from(header)[0] + _CHECKSUM.size)

    def _name_in_file(self, i):
        return f"record at byte {self._offsets[i]}"

    def _images_in(self, data, starts, lengths):
        return images_in(data, starts, lengths)


class TFRecordIndex(TFRecords):
    """The images of TFRecord shards whose records hold labels; made by `TFRecordIndex.open(path)`, where `path` is one `.tfrecord` or a folder
    of them.

    The image is the first value of a bytes_list "image", "image/encoded" or "image_raw", the label that of an int64_list "label" or
    "image/class/label". Images of zero bytes are skipped and counted. A `property` file beside the shards gives num_classes.
    """

    FORMAT, SUFFIX = "TFRecord", ".tfrecord"

    @classmethod
    def _scan_file(cls, path, progress):
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if os.path.getsize(path) else np.empty(0, dtype=np.uint8)
        buffer, offsets, lengths, labels, num_empty = memoryview(data), [], [], [], 0
        for starts, sizes in _records(data):
            for offset, size in zip(starts.tolist(), sizes.tolist()):
                first = offset + _HEADER
                try:
                    start, end, label = parse_example(buffer, first, first + size)
                except ValueError as error:
                    raise ValueError(f"record at byte {offset}: {error}") from error
                if label is None:
                    raise ValueError(f"record at byte {offset} must hold a label, an int64_list {_either(_LABEL_KEYS)}; where an index has the labels "
                                     "(lines of name, shard, offset and label), give that")
                if start == end:
                    num_empty += 1
                    continue
                offsets.append(offset)
                lengths.append(_AROUND + size)
                labels.append(label)
            progress(int((sizes + _AROUND).sum()))
        labels = np.array(labels, dtype=np.int64)
        check_labels(labels, lambda i: f"record at byte {offsets[i]}")
        return {"offsets": np.array(offsets, dtype=np.int64), "lengths": as_lengths(lengths), "labels": labels}, {"empty images": num_empty}


class TFRecordList(TFRecords):
    """The images that TFace's index names; made by `TFRecordList.open(list_file, root=folder)`.

    A line is a name, the number of a shard, the byte at which a record starts, and a label, a whole number from 0 on, between them tabs; the
    shard is `root/NAME/NAME-NNNNN.tfrecord`, `root` by default the folder of the list. Labels in the records do not matter. num_classes is the
    largest label + 1. Images are numbered as they lie in their shards, since neighbours there are read together. The index is made from the list
    alone, 20 bytes an image.
    """

    FORMAT = "TFRecord list"

    @classmethod
    def open(cls, path, cache_dir=None, root=None):
        source = super().open(path, cache_dir, root)
        reasons = []
        for i in np.linspace(0, len(source) - 1, num=min(_CHECKED, len(source)), dtype=np.int64).tolist():
            try:
                source._example(i)
                return source
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(f"{path} fits none of the {len(reasons)} records looked at: {reasons[0]}; give the shards that it was made with")

    def _indexed_files(self):
        base = os.fsencode(self._path.parent if self._root is None else self._root)
        names = [os.path.join(base, name) for name in self._arrays["files"].tobytes().split(b"\n")]
        for name in names:
            if not os.path.exists(name):
                raise ValueError(f"{self._path} names {os.fsdecode(name)}, and there is no such file; give the folder that its names start from")
        return [Path(os.fsdecode(name)) for name in names]

    @classmethod
    def _property_of(cls, path):
        return None

    @classmethod
    def _is_sound(cls, meta, arrays):
        names = arrays["files"].tobytes()
        return super()._is_sound(meta, arrays) and names.count(b"\n") == len(arrays["first"]) - 2 and b"\0" not in names

    @classmethod
    def _files(cls, path):
        return [path]  # what the index is made from

    @classmethod
    def _scan_file(cls, path, progress):
        names, files, offsets, labels = {}, array.array("q"), array.array("q"), array.array("q")
        for number, _, line in read_lines(path, progress):
            try:
                name, shard, offset, label = line.rstrip().split(b"\t")
                shard, offset, label = int(shard), int(offset), int(label)
                if b"\0" in name or not (0 <= shard and 0 <= offset <= LARGEST_OFFSET):
                    raise ValueError
            except ValueError:
                raise ValueError(f"line {number} must be a name, a shard, an offset and a label, whole numbers, between them tabs, got {shown(line)}") from None
            if not 0 <= label <= LARGEST_LABEL:
                raise ValueError(f"line {number} has label {label}; a label must lie in 0..{LARGEST_LABEL}")
            files.append(names.setdefault(b"%b/%b-%05d.tfrecord" % (name, name, shard), len(names)))
            offsets.append(offset)
            labels.append(label)
        files, offsets, labels = (np.array(column, dtype=np.int64) for column in (files, offsets, labels))
        order = np.lexsort((offsets, files))
        files, offsets = files[order], offsets[order]
        return {"offsets": offsets, "lengths": as_lengths(_reach(files, offsets)), "labels": labels[order],
                "files": np.frombuffer(b"\n".join(names), dtype=np.uint8), "first": np.cumsum([0, *np.bincount(files)])}, {}

    @classmethod
    def _scan(cls, path, progress):
        """One text, many shards: `first` is of those, where PackedImages would count the files that it scans."""
        try:
            return cls._scan_file(path, progress)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error


def is_tfrecord_list(path):
    """Whether a text file names TFRecords, not images: by its first line."""
    if Path(path).suffix == ".index":  # as img2tfrecord of TFace writes it, without labels; the error says what is missing
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _LISTED.match(file.read(_SNIFFED).lstrip()) is not None
    return False


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
    example = _packed(_FEATURES, b"".join(_packed(_ENTRY, _packed(_NAME, names[0]) + _packed(_FEATURE, feature))
                                          for names, feature in ((_IMAGE_KEYS, image), (_LABEL_KEYS, label))))
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


def _reach(files, offsets):
    """How many bytes to read for each listed record at first: up to where the next one of its shard starts, or _READ_AT_ONCE.

    Args:
        files, offsets: (N,) int64, in order; a record may be listed several times.
    Returns:
        (N,) int64.
    """
    first = np.flatnonzero((np.diff(files, prepend=-1) != 0) | (np.diff(offsets, prepend=-1) != 0))
    reach = np.full(len(first), _READ_AT_ONCE)
    followed = np.flatnonzero(np.diff(files[first]) == 0)
    reach[followed] = np.minimum(np.diff(offsets[first])[followed], _READ_AT_ONCE)
    return np.repeat(reach, np.diff(first, append=len(files)))


def _masked_crc(data):
    """(...) int64 for (..., n) uint8."""
    crc = crc32c(data).astype(np.int64)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _sizes(headers):
    """(N,) int64, the lengths in (N, 12) uint8 headers of records; -1 where the checksum is wrong."""
    sizes = np.minimum(np.ascontiguousarray(headers[:, :8]).view("<u8")[:, 0], np.uint64(_HUGE)).astype(np.int64)
    return np.where(np.ascontiguousarray(headers[:, 8:]).view("<u4")[:, 0] == _masked_crc(headers[:, :8]), sizes, -1)


def _records(data):
    """(starts, sizes) of the records of a file, block after block: the bytes at which they start, and of their Examples.

    Args:
        data: (bytes,) uint8 array, the whole file.
    Raises:
        ValueError: the file is empty, truncated, damaged or something else; the message gives the byte.
    """
    if not data.size:
        raise ValueError(f"the file is empty; {_REPLACE}")
    buffer, end = memoryview(data), 0
    while end < data.size:
        starts = []
        while end + _HEADER <= data.size and len(starts) < _SCAN_BLOCK:
            starts.append(end)
            end += _AROUND + _SIZE.unpack_from(buffer, end)[0]
        if not starts:
            raise ValueError(f"it is truncated: the header at byte {end} has {_HEADER} bytes and the file ends at {data.size}; {_REPLACE}")
        starts = np.array(starts, dtype=np.int64)
        sizes = _sizes(data[starts[:, None] + np.arange(_HEADER)])
        if sizes.min() < 0:
            raise ValueError(f"no record starts at byte {starts[sizes.argmin()]}: compressed, damaged or no TFRecord file; {_REPLACE}, uncompressed")
        if end > data.size:
            raise ValueError(f"it is truncated: the record at byte {starts[-1]} ends at byte {end} and the file at {data.size}; {_REPLACE}")
        yield starts, sizes


def images_in(data, starts, lengths):
    """Where the images of many records lie, at 1 us each.

    Args:
        data: (bytes,) uint8 array.
        starts, lengths: (B,) int64; record b starts at byte starts[b] and lengths[b] bytes from there are at hand, of which it may need fewer.
    Returns:
        starts, lengths: (B,) int64, of the images; a length of 0 where that takes parse_example: the record is longer, of another form, or damaged.
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
        is_image = (name[1] - name[0] == len(key)) & (data[np.minimum(name[0][:, None] + np.arange(len(key)), data.size - 1)] == key).all(axis=1)
        found_starts[there[is_image]], found_lengths[there[is_image]] = start[is_image], (end - start)[is_image]
        there, message = there[~is_image], (entry[1][~is_image], message[1][~is_image])
    return found_starts, found_lengths


def _next_fields(data, messages, number):
    """(starts, ends) of what the fields hold that the messages data[messages[0][b]:messages[1][b]] begin with; an empty place where that is no field
    of that number with bytes in it."""
    at, end = messages
    window = data[np.minimum(at[:, None] + np.arange(6), data.size - 1)]
    more = window[:, 1:] >= 128
    used = np.cumprod(more, axis=1)  # which bytes of the size are followed by another
    size = ((window[:, 1:] & 127).astype(np.int64) << np.arange(0, 35, 7))
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
        raise ValueError(f"it must hold an image, a bytes_list {_either(_IMAGE_KEYS)}; its features are {names}; write it anew or leave it out")
    label = _first_value(data, features, _LABEL_KEYS, _INT64_LIST)
    if label is None or label[0] == label[1]:
        return *image, None
    label, _ = _varint(data, *label)
    return *image, label - (label >> 63 << 64)  # two's complement


def _first_value(data, features, names, kind):
    """(start, end) of the first value in the list of that kind that the first of the names has; None where there is none."""
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
            raise ValueError(f"it is no tf.train.Example, or damaged: a field has wire type {kind}; {_REPLACE}")
        if at > end:
            raise ValueError(f"it is no tf.train.Example, or damaged: a field ends {at - end} bytes behind its message; {_REPLACE}")
        if tag >> 3 == number:
            yield start, at
    raise ValueError(f"a message in it must have fewer than {_MOST_FIELDS} fields; write it anew, with image and label alone")


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
    raise ValueError(f"it is no tf.train.Example, or damaged: a number does not end; {_REPLACE}")
