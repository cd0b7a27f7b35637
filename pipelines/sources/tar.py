"""WebDataset tar shards: ``NAME.jpg`` (or ``.png`` ...) and ``NAME.cls`` or ``NAME.json`` with its label, one after the
other.
"""

import io
import json
import os
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.mapped_file import map_file
from scf_fast.pipelines.sources.image_names import (
    EMPTY_REASON,
    HIDDEN_REASON,
    IMAGE_SUFFIXES,
    is_hidden,
    is_system_folder,
    unread_reason,
)
from scf_fast.pipelines.sources.indexed import Scan, check_labels
from scf_fast.pipelines.sources.packed import PackedImages, as_lengths

_BLOCK = 512  # bytes in a tar block; a member's own header lies right before its content
_HEADER = struct.Struct("100s24x12s20xs100x8s80x155s12x")  # name, size, kind, magic, prefix of the name
_PATH_BYTES = 1 << 12
_LABEL_BYTES = 1 << 20  # a .json beside a face is small; this bounds what a made-up size can cost
_LABEL_KEYS = ("label", "cls", "class")
_REGULAR = b"0\0007"  # the kinds of members that are plain files
_MAGIC, _SPARSE_GOES_ON, _MAP_GOES_ON = 257, 482, 504  # bytes of a header, the last of a block of a sparse file's map
_LENGTH_DIGITS = 20  # of a record in a pax header, at most
_ZEROS_AT_ONCE = 1 << 20  # bytes
_UNLABELED, _WITHOUT_IMAGE = "images without label", "labels without image"
_DOTTED = "images without label, whose names have further dots, as in a.face.jpg"
_FURTHER = "images beside another one of the same name, as a.jpg beside a.png"
_SPARSE_REASON = "sparse members"
# The suffixes that matter.
_IS_IMAGE = {**{suffix[1:].encode(): True for suffix in IMAGE_SUFFIXES}, b"cls": False, b"json": False}


class TarIndex(PackedImages):
    """The images of tar shards; made by ``TarIndex.open(path)``, where ``path`` is one ``.tar`` or a folder of them.

    An image and the label of the same name up to the suffix belong together: the whole number in ``NAME.cls``, or under
    "label", "cls" or "class" in ``NAME.json``; NAME may hold dots and folders. The two may stand apart, as tar leaves
    them without ``--sort=name``, where no other members have their name. Of several images of one name in one sample,
    whose names are equal up to the first dot, the last counts. What finds no partner, further images, images of zero
    bytes, hidden members, those of kinds that are not read and sparse ones are skipped and counted; members with other
    suffixes are ignored. Archives that were joined to one file are read one after the other. Nothing is ever unpacked,
    so paths and links in a shard lead nowhere. Compressed shards are refused. A ``property`` file beside the shards
    gives ``num_classes``.
    """

    FORMAT, SUFFIX, KIND = "tar shards", ".tar", file_kinds.TAR
    RULES = 1

    def encoded(self, i: int) -> ByteArray:
        return np.frombuffer(self._stored(i), dtype=np.uint8)

    def _name_in_file(self, i: int) -> str:
        return f"member {_text(self._stored(i, before=_BLOCK)[:100].split(bytes(1))[0])}"

    @classmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        data = map_file(path)
        found = _Found(data)
        done = 0
        for number, (name, start, size) in enumerate(_members(data.data, found.skipped)):
            found.add(name, start, size)
            if number % 4096 == 0:
                progress(start - done)
                done = start
        found.finish()
        progress(data.size - done)
        labels = np.array(found.labels, dtype=np.float64)
        check_labels(labels, lambda i: f"member {_text(found.keys[i])}")
        return Scan(
            {
                "offsets": np.array(found.offsets, dtype=np.int64),
                "lengths": as_lengths(found.lengths),
                "labels": labels,
            },
            dict(+found.skipped),
        )


def _members(data: memoryview, skipped: Counter[str]) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, size) for the regular files of a tar archive, ustar, GNU or pax: data[start:start + size] is
    the content.

    tarfile would do; this is ten times as fast, and a shard has twice as many members as images.

    Args:
        skipped: gets the sparse files, whose content does not lie in one piece.
    """
    end, is_closed = 0, False
    override: dict[str, Any] = {}  # what an extended header says about the member after it: name, size, is_sparse
    length, unpack = len(data), _HEADER.unpack_from
    while end + _BLOCK <= length:
        name, size, kind, magic, prefix = unpack(data, end)
        name = name.split(b"\0", 1)[0]  # without the limit of 1 it would take as long as all the rest
        if name and magic[:5] != b"ustar":
            raise InputError(
                f"no tar member starts at byte {end}: compressed, damaged or no tar file; copy or download it again, "
                "uncompressed"
            )
        if not name:
            end, is_closed = _after_zeros(data, end), True
            continue
        is_closed = False
        size = override.pop("size", None) or _number(size, end)
        is_sparse = kind == b"S" or "is_sparse" in override
        start = end + _BLOCK
        if kind == b"S":  # more blocks of the map of a sparse file, which its header and each of them announce
            goes_on = data[end + _SPARSE_GOES_ON]
            while goes_on and start + _BLOCK <= length:
                goes_on, start = data[start + _MAP_GOES_ON], start + _BLOCK
        end = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if start + size > length:
            raise InputError(
                f"it is truncated: the member at byte {start - _BLOCK} ends at byte {start + size} and the file at "
                f"{length}; copy or download it again"
            )
        if kind == b"L":
            override["name"] = bytes(data[start : start + min(size, _PATH_BYTES)]).split(b"\0", 1)[0]
        elif kind == b"x":
            override.update(_pax(bytes(data[start : start + min(size, _LABEL_BYTES)])))
        elif is_sparse:
            skipped[_SPARSE_REASON] += 1
            override = {}
        elif kind in _REGULAR:
            if prefix[0] and magic[:6] == b"ustar\0":  # GNU keeps other things there
                name = prefix.split(b"\0", 1)[0] + b"/" + name
            if override:
                name, override = override.get("name") or name, {}
            yield name, start, size
        else:
            override = {}
    if end != length and not is_closed:
        raise InputError(f"it is truncated: {length} bytes are no whole number of blocks; copy or download it again")


def _after_zeros(data: memoryview, end: int) -> int:
    """Returns the byte at which a tar goes on after the zeros at byte ``end`` that close an archive: the next member,
    where archives were joined, or the end of the file.

    Raises:
        InputError: the header there has no name, or what follows the zeros is no member.
    """
    if any(data[end : end + _BLOCK]):
        raise InputError(f"the header at byte {end} is damaged; copy or download it again")
    at = end
    while at < len(data):
        piece = bytes(data[at : at + _ZEROS_AT_ONCE])
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        at += zeros
        if zeros < len(piece):
            break
    at -= at % _BLOCK if at < len(data) else 0
    if at < len(data) and data[at + _MAGIC : at + _MAGIC + 5] != b"ustar":
        raise InputError(
            f"the archive ends at byte {end}, and what follows at byte {at} is no tar member: a part was lost in "
            "copying, or something was appended; copy or download it again"
        )
    return at


def _number(field: bytes, at: int) -> int:
    """Parses a size: octal digits, or big-endian binary where the first bit is set."""
    try:
        return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        raise InputError(f"the header at byte {at} is damaged; copy or download it again") from None


def _pax(content: bytes) -> dict[str, Any]:
    """Returns name, size and whether the file is sparse, of a pax header: records of 'length key=value\\n'."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(content):
        digits = content[at : at + _LENGTH_DIGITS].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        if length <= len(digits):  # the end of what was read, or damaged
            break
        key, _, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if key == b"path":
            found["name"] = value
        elif key == b"size" and value.isdigit():
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            found["is_sparse"] = True
        at += length
    return found


class _Content(NamedTuple):
    """Where the content of a member lies."""

    start: int
    size: int
    suffix: bytes
    has_dots: bool  # its name has dots before that of the suffix


class _Found:
    """Pairs images with labels while a shard is scanned: those of a sample when it ends, what is left over at the end
    of the shard.
    """

    def __init__(self, data: ByteArray):
        self._data = data
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.labels: list[float] = []
        self.keys: list[bytes] = []
        self.skipped = Counter({_UNLABELED: 0, _WITHOUT_IMAGE: 0})  # in this order
        # Of the sample at hand, by name without suffix.
        self._sample: bytes | None = None
        self._images: dict[bytes, _Content] = {}
        self._label_files: dict[bytes, list[_Content]] = {}
        # What found no partner in its sample.
        self._images_apart: dict[bytes, list[_Content]] = {}
        self._labels_apart: dict[bytes, list[list[_Content]]] = {}

    def add(self, name: bytes, start: int, size: int) -> None:
        """Takes the next member."""
        folder, slash, base = name.rpartition(b"/")
        first, _, suffix = base.partition(b".")
        stem, has_dots = first, b"." in suffix
        if has_dots:
            stem, _, suffix = base.rpartition(b".")
        suffix = suffix.lower()
        is_image = _IS_IMAGE.get(suffix)
        if not first or (folder and _is_clutter(folder)):
            if not first or is_image is not None:
                self.skipped[HIDDEN_REASON] += 1
        elif is_image is None:
            if reason := unread_reason(f".{_text(suffix)}"):
                self.skipped[reason] += 1
        else:
            sample, stem = folder + slash + first, folder + slash + stem
            if sample != self._sample:
                self._finish_sample()
                self._sample = sample
            content = _Content(start, size, suffix, has_dots)
            if not is_image:
                self._label_files.setdefault(stem, []).append(content)
            else:
                if stem in self._images:
                    self.skipped[_FURTHER] += 1
                self._images[stem] = content

    def finish(self) -> None:
        """Takes note that the shard has ended."""
        self._finish_sample()
        before = len(self.offsets)
        for stem, images in self._images_apart.items():
            files = self._labels_apart.get(stem, ())
            # Of several with one name, as in shards that were joined, nobody can say which belong together.
            label = self._label(stem, files[0]) if len(images) == len(files) == 1 else None
            if label is None:
                for image in images:
                    self.skipped[_DOTTED if image.has_dots else _UNLABELED] += 1
            else:
                self._take(stem, images[0], label)
                del self._labels_apart[stem]
        for samples in self._labels_apart.values():
            # a.meta.json may be anything
            self.skipped[_WITHOUT_IMAGE] += sum(files[0].suffix == b"cls" or not files[0].has_dots for files in samples)
        if len(self.offsets) > before:
            order = np.argsort(self.offsets, kind="stable").tolist()
            for values in self.offsets, self.lengths, self.labels, self.keys:
                values[:] = [values[i] for i in order]  # type: ignore[index]  # of one list each

    def _finish_sample(self) -> None:
        """Pairs what belongs to the sample at hand."""
        for stem, image in self._images.items():
            files = self._label_files.pop(stem, None)
            label = None if files is None else self._label(stem, files)
            if label is None:
                self._images_apart.setdefault(stem, []).append(image)
            else:
                self._take(stem, image, label)
        for stem, files in self._label_files.items():
            if files[0].has_dots or self._label(stem, files) is not None:
                self._labels_apart.setdefault(stem, []).append(files)
        self._images, self._label_files = {}, {}

    def _take(self, stem: bytes, image: _Content, label: float) -> None:
        if not image.size:
            self.skipped[EMPTY_REASON] += 1
            return
        self.offsets.append(image.start)
        self.lengths.append(image.size)
        self.labels.append(label)
        self.keys.append(stem)

    def _label(self, stem: bytes, files: list[_Content]) -> float | None:
        """Returns the label of a name, the last of several; None where it has none."""
        label = None
        for start, size, suffix, _ in files:
            if size <= _LABEL_BYTES:
                found = _label_in(self._data[start : start + size].tobytes(), suffix, stem)
                label = label if found is None else found
        return label


def _is_clutter(folder: bytes) -> bool:
    """Tells whether a folder is hidden or one of a system, or lies in such a one; "." and ".." are neither."""
    parts = folder.split(b"/")
    return any(is_system_folder(part) or (is_hidden(part) and part not in (b".", b"..")) for part in parts)


def _label_in(content: bytes, suffix: bytes, key: bytes) -> float | None:
    """Returns the number in a .cls or .json member; None where a .json has none."""
    try:
        value = int(content) if suffix == b"cls" else json.loads(content)
        value = next((value[key] for key in _LABEL_KEYS if key in value), None) if isinstance(value, dict) else value
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ValueError
        return None if value is None else float(value)
    except (ValueError, RecursionError, OverflowError):
        raise InputError(
            f"member {_text(key)}.{_text(suffix)} must hold a label, a whole number, got {content[:40]!r}; correct it "
            "or leave the image out"
        ) from None


def _text(name: bytes) -> str:
    return os.fsdecode(name)


def write_shard(path: StrPath, images: Iterable[tuple[str, str, bytes | ByteArray, int]]) -> None:
    """Writes a shard of (key, suffix with dot, image, label), atomically."""
    with atomic_output(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        for key, suffix, image, label in images:
            for name, content in ((key + suffix, bytes(image)), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def shard_path(folder: StrPath, number: int) -> Path:
    """Returns the path of a shard in a folder."""
    return Path(folder) / f"shard-{number:06d}.tar"
