"""MXNet RecordIO as the face data sets (MS1M, Glint360K) ship it: ``train.rec``, ``train.idx``, ``property``.

A file is a sequence of frames, each starting on a 4-byte boundary, all numbers little-endian:

    frame   = magic u32 (0xced7230a) | cflag (3 bits), length (29 bits) in a u32 | length bytes | zeros up to 4n bytes
    payload = flag u32 | label f32 | id u64 | id2 u64 | flag labels f32 (where flag > 0) | image bytes

A payload in which the magic occurs at a multiple of 4 is cut there into several frames: cflag 1 opens, 2 continues, 3
closes, and each cut stands for the magic it replaced. cflag 0 is a whole payload. A 10 KB JPEG holds such a magic once
in about two million images, so millions of faces do contain some.

As distributed, record 0 holds [N + 1, N + 1 + identities], records 1..N are the images, and one record per identity
follows, with [its first record id, its last + 1]. The records that are not images are exactly those without bytes after
their labels; counts are not taken from record 0, because float32 cannot hold every count above 2^24.
"""

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import ByteArray, FloatArray, IntArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output, write_text
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.text import shown

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_MAX_LENGTH = (1 << 29) - 1  # bytes in one frame
_MAX_CLASSES = 1 << 31
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_REPLACE = "copy or download the file again"
_SCAN_BLOCK = 1 << 16  # records whose headers are gathered together, while the pages that hold them are still warm


class Record(NamedTuple):
    """One decoded payload."""

    record_id: int
    labels: npt.NDArray[np.float32]  # (max(flag, 1),)
    # (bytes,), empty in header and identity records; a view of the file unless the record was cut
    image: ByteArray


class ImageRecords(NamedTuple):
    """Places and labels of the N image records of a file, in file order."""

    offsets: IntArray  # (N,) bytes
    lengths: IntArray  # (N,) bytes that the whole record takes
    labels: FloatArray  # (N,) the first label of each, as stored
    num_empty: int  # records with one plain label and no image: images of zero bytes, left out


class RecordWriter:
    """Writes a ``.rec`` and its ``.idx`` (``id<TAB>offset`` lines), atomically when it closes.

    Use as a context manager. Calls follow the order of the distributed files: header, images, identities.
    """

    _rec: BinaryIO
    _idx: BinaryIO

    def __init__(self, rec_path: StrPath, idx_path: StrPath):
        self._rec_path, self._idx_path = rec_path, idx_path

    def __enter__(self) -> "RecordWriter":
        with contextlib.ExitStack() as stack:
            self._rec = stack.enter_context(atomic_output(self._rec_path))
            self._idx = stack.enter_context(atomic_output(self._idx_path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write_header_record(self, num_images: int, num_identities: int) -> None:
        """Writes record 0: where the image records (1..num_images) and the identity records after them end."""
        self._write(0, [num_images + 1, num_images + 1 + num_identities], b"")

    def write_image(self, record_id: int, label: float | Sequence[float], encoded: bytes | ByteArray) -> None:
        """Writes one image.

        Args:
            record_id: 1..N in the distributed files.
            label: a class number, or a sequence that starts with it (stored as a label array).
            encoded: the JPEG or PNG file; not empty.
        """
        if not len(encoded):
            raise ValueError(f"record {record_id}: an image record needs image bytes, got none")
        self._write(record_id, label, encoded)

    def write_identity_record(self, record_id: int, first_id: int, last_id: int) -> None:
        """Writes one identity, whose images are the records first_id..last_id, both included."""
        self._write(record_id, [first_id, last_id + 1], b"")

    def _write(self, record_id: int, label: float | Sequence[float], image: bytes | ByteArray) -> None:
        self._idx.write(f"{record_id}\t{self._rec.tell()}\n".encode())
        self._rec.write(pack_record(record_id, label, image))


def pack_record(record_id: int, label: float | Sequence[float], image: bytes | ByteArray) -> bytes:
    """Returns one record as it stands in a file, padded to a multiple of 4 bytes.

    Args:
        record_id: its number.
        label: a number, or a sequence of numbers (stored as a label array).
        image: empty for header and identity records.
    Raises:
        ValueError: it is longer than RecordIO allows.
    """
    labels = np.asarray(label, dtype="<f4")
    flag, scalar = (0, float(labels)) if labels.ndim == 0 else (labels.size, 0.0)
    payload = _HEADER.pack(flag, scalar, record_id, 0) + (labels.tobytes() if flag else b"") + bytes(image)
    if len(payload) > _MAX_LENGTH:
        raise ValueError(f"record {record_id}: RecordIO holds at most {_MAX_LENGTH} bytes a record, got {len(payload)}")
    packed: list[bytes] = []
    parts = _cut_at_magic(payload)
    for position, part in enumerate(parts):
        is_last = position == len(parts) - 1
        cflag = (_LAST if position else _WHOLE) if is_last else (_MIDDLE if position else _FIRST)
        packed += [_FRAME.pack(_MAGIC, cflag << 29 | len(part)), part]
    padding = bytes(-len(payload) % 4)  # cuts lie on multiples of 4, so the last part needs what the whole needs
    return b"".join([*packed, padding])


def _cut_at_magic(payload: bytes) -> list[bytes]:
    """Returns the parts of ``payload`` between the magics that stand at multiples of 4."""
    parts, start = [], 0
    at = payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(payload[start:at])
            start = at + 4
        at = payload.find(_MAGIC_BYTES, at + 1)
    return [*parts, payload[start:]]


def read_record(data: ByteArray, offset: int) -> Record:
    """Returns the record whose first frame starts at byte ``offset``.

    Args:
        data: the whole ``.rec``; see :func:`scf_fast.pipelines.formats.mapped_file.map_file`.
        offset: from :func:`scan_image_records` or an ``.idx`` line.
    Raises:
        InputError: no frame starts there, or the file ends inside the record.
    """
    payload, _ = _payload(data, offset)
    if payload.size < _HEADER.size:
        raise InputError(
            f"the record at byte {offset} must hold a {_HEADER.size}-byte header, got {payload.size} bytes: "
            "this RecordIO file does not hold images"
        )
    flag, label, record_id, _ = _HEADER.unpack_from(payload.data)
    image_start = _HEADER.size + 4 * flag
    if image_start > payload.size:
        raise InputError(f"the record at byte {offset} announces {flag} labels in {payload.size} bytes; {_REPLACE}")
    labels = payload[_HEADER.size : image_start].view("<f4") if flag else np.array([label], dtype=np.float32)
    return Record(record_id, labels, payload[image_start:])


def images_in(data: ByteArray, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Finds the images of many records, at 0.1 us each.

    Args:
        data: (bytes,).
        starts, lengths: (B,), record b is data[starts[b]:starts[b] + lengths[b]]; a length of 0 is no record.
    Returns:
        starts, lengths: (B,), of the images; a length of 0 where it takes read_record to tell: the record was cut, or
            is damaged.
    """
    whole = (lengths >= _FRAME.size + _HEADER.size) & (starts % 4 == 0)
    if not whole.any():
        return starts, np.zeros_like(lengths)
    words = data[: data.size // 4 * 4].view("<u4")
    magic, size, flag = words[np.where(whole, starts // 4, 0)[:, None] + np.arange(3)].T.astype(np.int64)
    before = _FRAME.size + _HEADER.size + 4 * flag
    image = _FRAME.size + size - before
    whole &= (magic == _MAGIC) & (size <= _MAX_LENGTH) & (_FRAME.size + size <= lengths) & (image > 0)
    return np.where(whole, starts + before, starts), np.where(whole, image, 0)


def _payload(data: ByteArray, offset: int) -> tuple[ByteArray, int]:
    """Returns the bytes of the record at ``offset``, a view unless it was cut, and where the next record starts."""
    cflag, start, end = _frame(data, offset)
    if cflag == _WHOLE:
        return data[start:end], end + -end % 4
    if cflag != _FIRST:
        raise InputError(
            f"byte {offset} must start a record and lies inside one: the index is of another file; delete the index"
        )
    parts = [data[start:end]]
    while cflag != _LAST:
        cflag, start, end = _frame(data, end + -end % 4)
        if cflag not in (_MIDDLE, _LAST):
            raise InputError(
                f"the record at byte {offset} was written in parts and the last part is missing; {_REPLACE}"
            )
        parts += [np.frombuffer(_MAGIC_BYTES, np.uint8), data[start:end]]
    return np.concatenate(parts), end + -end % 4


def _frame(data: ByteArray, offset: int) -> tuple[int, int, int]:
    """Returns (cflag, start, end) of the frame at ``offset``: its bytes are data[start:end]."""
    start = offset + _FRAME.size
    if start > data.size:
        raise _truncated(offset, start, data.size)
    magic, cflag_and_length = _FRAME.unpack_from(data.data, offset)
    if magic != _MAGIC:
        raise InputError(
            f"byte {offset} must start a record with magic {_MAGIC:#x}, found {magic:#x}: not RecordIO, or damaged; "
            f"{_REPLACE}"
        )
    end = start + (cflag_and_length & _MAX_LENGTH)
    if end > data.size:
        raise _truncated(offset, end, data.size)
    return cflag_and_length >> 29, start, end


def _truncated(offset: int, needed: int, size: int) -> InputError:
    return InputError(
        f"the file is truncated: the record at byte {offset} ends at byte {needed} and the file at {size}; {_REPLACE}"
    )


def scan_image_records(data: ByteArray, progress: Progress | None = None) -> ImageRecords:
    """Walks every frame of a whole ``.rec`` and picks the image records, in file order.

    Args:
        data: as for :func:`read_record`.
        progress: called with the number of bytes passed since its last call.
    Raises:
        InputError: the file is empty, truncated or not RecordIO; the message gives the byte.
    """
    if not data.size:
        raise InputError(f"the file is empty; {_REPLACE}")
    blocks, end = [], 0
    while end < data.size:
        start = end
        starts, unusual, end = _walk(data, start)
        blocks.append(_image_records(data, starts, unusual, end))
        if progress is not None:
            progress(end - start)
    offsets, lengths, labels, num_empty = zip(*blocks)
    return ImageRecords(np.concatenate(offsets), np.concatenate(lengths), np.concatenate(labels), sum(num_empty))


def whole_records(data: ByteArray) -> tuple[IntArray, int]:
    """Finds how far a file that was being written can be trusted.

    Returns:
        starts: (N,), the byte at which each record starts, up to the first that is cut off or damaged.
        end: the byte at which the last of them ends.
    """
    blocks: list[IntArray] = []
    end = 0
    try:
        while end < data.size:
            starts, unusual, following = _walk(data, end)
            if any(_payload(data, int(starts[position]))[0].size < _HEADER.size for position in unusual):
                break
            blocks.append(starts)
            end = following
    except InputError:
        pass
    singly = []  # what is left of the block that holds the damage
    with contextlib.suppress(InputError):
        while end < data.size:
            payload, following = _payload(data, end)
            if payload.size < _HEADER.size or following > data.size:
                break
            singly.append(end)
            end = following
    return np.concatenate([*blocks, np.array(singly, dtype=np.int64)]), end


def _walk(data: ByteArray, end: int) -> tuple[IntArray, list[int], int]:
    """Walks up to _SCAN_BLOCK records from byte ``end`` on; returns their starts, which of them are cut or too short,
    and where the next one starts.
    """
    buffer, size, unpack, shortest = data.data, data.size, _FRAME.unpack_from, _HEADER.size
    starts: list[int] = []
    unusual = []
    start = end
    for position in range(_SCAN_BLOCK):  # this loop is the scan of millions of records, so it knows the usual frame
        if end >= size:
            break
        start = end
        magic, length = unpack(buffer, start) if start + 8 <= size else (0, 0)
        if magic == _MAGIC and shortest <= length <= _MAX_LENGTH:  # cflag 0
            end = start + 8 + (length + 3 & ~3)
        else:
            unusual.append(position)
            _, end = _payload(data, start)  # raises where this is no record
        starts.append(start)
    if end > size:
        raise _truncated(start, end, size)
    return np.array(starts, dtype=np.int64), unusual, end


def _image_records(data: ByteArray, starts: IntArray, unusual: list[int], end: int) -> ImageRecords:
    """Picks the image records among the records at ``starts``, the last of which ends at byte ``end``."""
    labels = np.empty(len(starts))
    image_sizes = np.empty(len(starts), dtype=np.int64)
    flags = np.ones(len(starts), dtype=np.int64)
    usual = np.ones(len(starts), dtype=bool)
    usual[unusual] = False

    words = data[: data.size // 4 * 4].view("<u4")
    first = starts[usual] // 4
    flags[usual] = usual_flags = words[first + 2].astype(np.int64)
    image_sizes[usual] = words[first + 1] - np.int64(_HEADER.size) - 4 * usual_flags
    usual_labels = words[first + 3].view("<f4")
    has_array = np.flatnonzero((usual_flags > 0) & (image_sizes[usual] >= 0))
    usual_labels[has_array] = words[first[has_array] + 8].view("<f4")
    labels[usual] = usual_labels

    for position in [*unusual, *np.flatnonzero(usual & (image_sizes < 0))]:
        record = read_record(data, int(starts[position]))  # raises where the record is damaged
        labels[position], image_sizes[position] = record.labels[0], record.image.size
    is_image = image_sizes > 0
    lengths = np.diff(starts, append=end)
    return ImageRecords(
        starts[is_image], lengths[is_image], labels[is_image], int(np.count_nonzero(~is_image & (flags == 0)))
    )


def write_property(folder: StrPath, num_classes: int, height: int = 112, width: int = 112) -> None:
    """Writes the ``property`` file: one line with classes, height and width."""
    write_text(Path(folder) / "property", f"{num_classes},{height},{width}\n")


def read_num_classes(path: StrPath) -> int:
    """Returns the class count in a ``property`` file.

    Raises:
        InputError: the file holds something else.
    """
    text = read_text(path, at_most=100).strip()
    first = text.split(",")[0].strip()
    if not first.isascii() or not first.isdigit() or int(first) > _MAX_CLASSES:
        raise InputError(
            f"{path} must hold 'classes,height,width' with up to {_MAX_CLASSES} classes, got {shown(text[:60])}; write "
            "e.g. '85742,112,112'"
        )
    return int(first)
