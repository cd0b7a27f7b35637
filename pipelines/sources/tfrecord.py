"""TFRecord shards: with an index of lines `name<TAB>shard<TAB>offset<TAB>label`, as TFace trains from, or with labels
in the records.

A file is a row of records, all numbers little-endian:

    record = length u64 | masked CRC-32C of these 8 bytes u32 | `length` bytes | masked CRC-32C of them u32
    masked = ((crc >> 15 | crc << 17) + 0xa282ead8) mod 2^32

The bytes are a tf.train.Example, a protobuf message {features: {feature: map of name to Feature}}, where a Feature is a
bytes_list, a float_list or an int64_list. A length decides what is read, so its checksum is always looked at; that of
the bytes by check(). Sources: TensorFlow's "TFRecord and tf.train.Example" and its example.proto and feature.proto;
protobuf's "Encoding".
"""

import array
import contextlib
import os
import re
from pathlib import Path

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.tfrecord import (
    _AROUND,
    _CHECKSUM,
    _HEADER,
    _LABEL_KEYS,
    _REPLACE,
    _SIZE,
    _either,
    _packed_crc,
    _records,
    images_in,
    parse_example,
)
from scf_fast.pipelines.sources.image_list import read_lines, shown
from scf_fast.pipelines.sources.indexed import LARGEST_LABEL, LARGEST_OFFSET, PackedImages, as_lengths, check_labels

_READ_AT_ONCE = (
    1 << 15
)  # bytes; of a listed record only the start is known, and a face of 112 x 112 pixels rarely has more
_LISTED = re.compile(rb"[^\t\r\n]+(\t-?\d+){3}[ \t]*\r?(\n|$)")
_SNIFFED = 1 << 16  # bytes
_CHECKED = 64  # listed records looked for when a list is opened


class TFRecords(PackedImages):
    """Base of the two sources: an entry of the index is a record, or a listed one's start and as many bytes as are read
    for it at first.
    """

    def encoded(self, i):
        example = self._example(i)
        try:
            start, end, _ = parse_example(memoryview(example), 0, len(example) - _CHECKSUM.size)
        except ValueError as error:
            raise InputError(f"{self.name(i)}: {error}") from error
        return np.frombuffer(example, dtype=np.uint8)[start:end]

    def check(self, i):
        example = self._example(i)
        if _packed_crc(example[: -_CHECKSUM.size]) != example[-_CHECKSUM.size :]:
            raise InputError(f"{self.name(i)} differs from its checksum: it is damaged; {_REPLACE}")

    def places(self):
        """(files, offsets), (N,) int64: the number of each image's shard and the byte at which its record starts."""
        return np.repeat(np.arange(len(self._names)), np.diff(self._first)), self._offsets

    def _example(self, i):
        """The Example of record i and its checksum."""
        header = self._bytes_at(i, 0, _HEADER)
        if _packed_crc(header[: _SIZE.size]) != header[_SIZE.size :]:
            raise InputError(
                f"{self.name(i)}: the checksum of its length is wrong: no record starts there, or it is damaged; "
                f"{_REPLACE}"
            )
        return self._bytes_at(i, _HEADER, _SIZE.unpack_from(header)[0] + _CHECKSUM.size)

    def _name_in_file(self, i):
        return f"record at byte {self._offsets[i]}"

    def _images_in(self, data, starts, lengths):
        return images_in(data, starts, lengths)


class TFRecordIndex(TFRecords):
    """The images of TFRecord shards whose records hold labels; made by `TFRecordIndex.open(path)`, where `path` is one
    `.tfrecord` or a folder of them.

    The image is the first value of a bytes_list "image", "image/encoded" or "image_raw", the label that of an
    int64_list "label" or "image/class/label". Images of zero bytes are skipped and counted. A `property` file beside
    the shards gives num_classes.
    """

    FORMAT, SUFFIX = "TFRecord", ".tfrecord"

    @classmethod
    def _scan_file(cls, path, progress):
        data = (
            np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            if os.path.getsize(path)
            else np.empty(0, dtype=np.uint8)
        )
        buffer, offsets, lengths, labels, num_empty = memoryview(data), [], [], [], 0
        for starts, sizes in _records(data):
            for offset, size in zip(starts.tolist(), sizes.tolist()):
                first = offset + _HEADER
                try:
                    start, end, label = parse_example(buffer, first, first + size)
                except ValueError as error:
                    raise InputError(f"record at byte {offset}: {error}") from error
                if label is None:
                    raise InputError(
                        f"record at byte {offset} must hold a label, an int64_list {_either(_LABEL_KEYS)}; where an "
                        "index has the labels "
                        "(lines of name, shard, offset and label), give that"
                    )
                if start == end:
                    num_empty += 1
                    continue
                offsets.append(offset)
                lengths.append(_AROUND + size)
                labels.append(label)
            progress(int((sizes + _AROUND).sum()))
        labels = np.array(labels, dtype=np.int64)
        check_labels(labels, lambda i: f"record at byte {offsets[i]}")
        return {"offsets": np.array(offsets, dtype=np.int64), "lengths": as_lengths(lengths), "labels": labels}, {
            "empty images": num_empty
        }


class TFRecordList(TFRecords):
    """The images that TFace's index names; made by `TFRecordList.open(list_file, root=folder)`.

    A line is a name, the number of a shard, the byte at which a record starts, and a label, a whole number from 0 on,
    between them tabs; the shard is `root/NAME/NAME-NNNNN.tfrecord`, `root` by default the folder of the list. Labels in
    the records do not matter. num_classes is the largest label + 1. Images are numbered as they lie in their shards,
    since neighbors there are read together. The index is made from the list alone, 20 bytes an image.
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
        raise InputError(
            f"{path} fits none of the {len(reasons)} records looked at: {reasons[0]}; give the shards that it was "
            "made with"
        )

    def _indexed_files(self):
        base = os.fsencode(self._path.parent if self._root is None else self._root)
        names = [os.path.join(base, name) for name in self._arrays["files"].tobytes().split(b"\n")]
        for name in names:
            if not os.path.exists(name):
                raise InputError(
                    f"{self._path} names {os.fsdecode(name)}, and there is no such file; give the folder that its "
                    "names start from"
                )
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
                raise InputError(
                    f"line {number} must be a name, a shard, an offset and a label, whole numbers, between them tabs, "
                    f"got {shown(line)}"
                ) from None
            if not 0 <= label <= LARGEST_LABEL:
                raise InputError(f"line {number} has label {label}; a label must lie in 0..{LARGEST_LABEL}")
            files.append(names.setdefault(b"%b/%b-%05d.tfrecord" % (name, name, shard), len(names)))
            offsets.append(offset)
            labels.append(label)
        files, offsets, labels = (np.array(column, dtype=np.int64) for column in (files, offsets, labels))
        order = np.lexsort((offsets, files))
        files, offsets = files[order], offsets[order]
        return {
            "offsets": offsets,
            "lengths": as_lengths(_reach(files, offsets)),
            "labels": labels[order],
            "files": np.frombuffer(b"\n".join(names), dtype=np.uint8),
            "first": np.cumsum([0, *np.bincount(files)]),
        }, {}

    @classmethod
    def _scan(cls, path, progress):
        """One text, many shards: `first` is of those, where PackedImages would count the files that it scans."""
        try:
            return cls._scan_file(path, progress)
        except ValueError as error:
            raise InputError(f"{path} {error}") from error


def is_tfrecord_list(path):
    """Whether a text file names TFRecords, not images: by its first line."""
    if (
        Path(path).suffix == ".index"
    ):  # as img2tfrecord of TFace writes it, without labels; the error says what is missing
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _LISTED.match(file.read(_SNIFFED).lstrip()) is not None
    return False


def _reach(files, offsets):
    """How many bytes to read for each listed record at first: up to where the next one of its shard starts, or
    _READ_AT_ONCE.

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
