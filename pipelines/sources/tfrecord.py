"""TFRecord shards as a source: with labels in the records, or with an index as TFace trains from.

A line of such an index is ``name<TAB>shard<TAB>offset<TAB>label``.
"""

import array
import codecs
import contextlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, IntArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.mapped_file import map_file
from scf_fast.pipelines.formats.text_file import read_lines
from scf_fast.pipelines.formats.tfrecord import (
    CHECKSUM_BYTES,
    FRAME_BYTES,
    HEADER_BYTES,
    LABEL_FEATURES,
    example_bytes,
    images_in,
    is_intact,
    parse_example,
    scan_records,
)
from scf_fast.pipelines.sources.base import spread_evenly
from scf_fast.pipelines.sources.digest import fingerprint_of_text
from scf_fast.pipelines.sources.indexed import LARGEST_LABEL, Arrays, Scan, check_labels
from scf_fast.pipelines.sources.packed import LARGEST_OFFSET, PackedImages, as_lengths
from scf_fast.pipelines.text import shown

_READ_AT_ONCE = 1 << 15  # bytes; of a listed record only the start is known, and a 112 x 112 face rarely has more
_LISTED = re.compile(rb"[^\t\r\n]+(\t-?\d+){3}[ \t]*\r?(\n|$)")
_SNIFFED = 1 << 16  # bytes
_CHECKED = 64  # listed records looked for when a list is opened


class TFRecords(PackedImages):
    """Base of both sources. An entry of the index is a record; or, of a listed record, its start and as many bytes as
    are read for it at first.
    """

    def encoded(self, i: int) -> ByteArray:
        example = self._example(i)
        try:
            start, end, _ = parse_example(memoryview(example), 0, len(example) - CHECKSUM_BYTES)
        except InputError as error:
            raise InputError(f"{self.name(i)}: {error}") from error
        return np.frombuffer(example, dtype=np.uint8)[start:end]

    def check(self, i: int) -> None:
        if not is_intact(self._example(i)):
            raise InputError(f"{self.name(i)} differs from its checksum: it is damaged; copy or download it again")

    def places(self) -> tuple[IntArray, IntArray]:
        """Returns (files, offsets), (N,) each: the number of an image's shard, and the byte at which its record
        starts.
        """
        return np.repeat(np.arange(len(self._names)), np.diff(self._first)), self._offsets

    def _example(self, i: int) -> bytes:
        """Reads the Example of record i and its checksum."""
        size = example_bytes(self._bytes_at(i, 0, HEADER_BYTES))
        if size is None:
            raise InputError(
                f"{self.name(i)}: the checksum of its length is wrong: no record starts there, or it is damaged; copy "
                "or download it again"
            )
        return self._bytes_at(i, HEADER_BYTES, size + CHECKSUM_BYTES)

    def _name_in_file(self, i: int) -> str:
        return f"record at byte {self._offsets[i]}"

    def _images_in(self, data: ByteArray, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        return images_in(data, starts, lengths)


class TFRecordIndex(TFRecords):
    """The images of TFRecord shards whose records hold labels; made by ``TFRecordIndex.open(path)``, where ``path`` is
    one ``.tfrecord`` or a folder of them.

    The image is the first value of a bytes_list "image", "image/encoded" or "image_raw", the label that of an
    int64_list "label" or "image/class/label". Images of zero bytes are skipped and counted. A ``property`` file beside
    the shards gives ``num_classes``.
    """

    FORMAT, SUFFIX, KIND = "TFRecord", ".tfrecord", file_kinds.TFRECORD

    @classmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        data = map_file(path)
        buffer, num_empty = data.data, 0
        offsets: list[int] = []
        lengths: list[int] = []
        labels: list[int] = []
        for starts, sizes in scan_records(data):
            for offset, size in zip(starts.tolist(), sizes.tolist()):
                first = offset + HEADER_BYTES
                try:
                    start, end, label = parse_example(buffer, first, first + size)
                except InputError as error:
                    raise InputError(f"record at byte {offset}: {error}") from error
                if label is None:
                    raise InputError(
                        f"record at byte {offset} must hold a label, an int64_list {LABEL_FEATURES}; where an index "
                        "has the labels (lines of name, shard, offset and label), give that"
                    )
                if start == end:
                    num_empty += 1
                    continue
                offsets.append(offset)
                lengths.append(FRAME_BYTES + size)
                labels.append(label)
            progress(int((sizes + FRAME_BYTES).sum()))
        arrays: Arrays = {
            "offsets": np.array(offsets, dtype=np.int64),
            "lengths": as_lengths(lengths),
            "labels": np.array(labels, dtype=np.int64),
        }
        check_labels(arrays["labels"], lambda i: f"record at byte {offsets[i]}")
        return Scan(arrays, {"empty images": num_empty})


class TFRecordList(TFRecords):
    """The images that TFace's index names; made by ``TFRecordList.open(list_file, root=folder)``.

    A line is a name, the number of a shard, the byte at which a record starts, and a label, a whole number from 0 on,
    separated by tabs; the shard is ``root/NAME/NAME-NNNNN.tfrecord``, with ``root`` by default the folder of the list.
    Labels in the records do not matter. ``num_classes`` is the largest label + 1. Images are numbered as they lie in
    their shards, since neighbors there are read together. The index is made from the list alone, 20 bytes an image.
    """

    FORMAT = "TFRecord list"

    @classmethod
    def open(cls, path: StrPath, cache_dir: StrPath | None = None, root: StrPath | None = None) -> "TFRecordList":
        source = super().open(path, cache_dir, root)
        reasons = []
        for i in spread_evenly(len(source), _CHECKED):
            try:
                source._example(i)
                return source
            except InputError as error:
                reasons.append(str(error))
        raise InputError(
            f"{path} fits none of the {len(reasons)} records looked at: {reasons[0]}; give the shards that it was "
            "made with"
        )

    def _indexed_files(self) -> list[Path]:
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
    def _property_of(cls, path: Path) -> Path | None:
        return None

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        names = arrays["files"].tobytes()
        return super()._is_sound(meta, arrays) and names.count(b"\n") == len(arrays["first"]) - 2 and b"\0" not in names

    @classmethod
    def _files(cls, path: Path) -> list[Path]:
        return [path]  # the list, from which the index is made

    @classmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        return fingerprint_of_text(path)

    @classmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        names: dict[bytes, int] = {}
        file_column, offset_column, label_column = (array.array("q") for _ in range(3))
        for number, _, line in read_lines(path, progress):
            try:
                name, *numbers = line.rstrip().split(b"\t")
                shard, offset, label = map(int, numbers)
                if b"\0" in name or not (0 <= shard and 0 <= offset <= LARGEST_OFFSET):
                    raise ValueError
            except ValueError:  # of int(), and of too few or too many parts
                raise InputError(
                    f"line {number} must be a name, a shard, an offset and a label, whole numbers, separated by tabs, "
                    f"got {shown(line.strip(), 80)}"
                ) from None
            if not 0 <= label <= LARGEST_LABEL:
                raise InputError(f"line {number} has label {label}; a label must lie in 0..{LARGEST_LABEL}")
            file_column.append(names.setdefault(b"%b/%b-%05d.tfrecord" % (name, name, shard), len(names)))
            offset_column.append(offset)
            label_column.append(label)
        files, offsets, labels = (
            np.array(column, dtype=np.int64) for column in (file_column, offset_column, label_column)
        )
        order = np.lexsort((offsets, files))
        files, offsets = files[order], offsets[order]
        arrays: Arrays = {
            "offsets": offsets,
            "lengths": as_lengths(_reach(files, offsets)),
            "labels": labels[order],
            "files": np.frombuffer(b"\n".join(names), dtype=np.uint8),
            "first": np.cumsum([0, *np.bincount(files)]),
        }
        return Scan(arrays, {})

    @classmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        """Scans the list, one text of many shards: ``first`` counts those, not the files that are scanned."""
        try:
            return cls._scan_file(path, progress)
        except InputError as error:
            raise InputError(f"{path} {error}") from error


def is_tfrecord_list(path: Path) -> bool:
    """Tells by its first line whether a text file names TFRecords, not images."""
    if path.suffix == ".index":  # as img2tfrecord of TFace writes it, without labels; the error says what is missing
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _LISTED.match(file.read(_SNIFFED).removeprefix(codecs.BOM_UTF8).lstrip()) is not None
    return False


def _reach(files: IntArray, offsets: IntArray) -> IntArray:
    """Bytes to read for each listed record at first: up to where the next one of its shard starts, or _READ_AT_ONCE.

    Args:
        files, offsets: (N,), in order; a record may be listed several times.
    """
    first = np.flatnonzero((np.diff(files, prepend=-1) != 0) | (np.diff(offsets, prepend=-1) != 0))
    reach = np.full(len(first), _READ_AT_ONCE)
    followed = np.flatnonzero(np.diff(files[first]) == 0)
    reach[followed] = np.minimum(np.diff(offsets[first])[followed], _READ_AT_ONCE)
    return np.repeat(reach, np.diff(first, append=len(files)))
