"""WebDataset tar shards: ``KEY.jpg`` (or ``.png`` ...) and ``KEY.cls`` or ``KEY.json`` with its label, one after the
other.
"""

import io
import json
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.mapped_file import map_file
from scf_fast.pipelines.sources.base import IMAGE_SUFFIXES
from scf_fast.pipelines.sources.indexed import Scan, check_labels
from scf_fast.pipelines.sources.packed import PackedImages, as_lengths

_BLOCK = 512  # bytes in a tar block; a member's own header lies right before its content
_HEADER = struct.Struct("100s24x12s20xs100x8s80x155s12x")  # name, size, kind, magic, prefix of the name
_PATH_BYTES = 1 << 12
_LABEL_BYTES = 1 << 20  # a .json beside a face is small; this bounds what a made-up size can cost
_LABEL_KEYS = ("label", "cls", "class")
# The suffixes that matter.
_IS_IMAGE = {**{suffix[1:].encode(): True for suffix in IMAGE_SUFFIXES}, b"cls": False, b"json": False}


class TarIndex(PackedImages):
    """The images of tar shards; made by ``TarIndex.open(path)``, where ``path`` is one ``.tar`` or a folder of them.

    A member's key is its path up to the first dot of its name. The label is the whole number in ``KEY.cls``, or under
    "label", "cls" or "class" in ``KEY.json``. Members of one key stand together, as WebDataset requires. An image
    without label, a label without image, and an image of zero bytes are skipped and counted; members of other kinds are
    ignored. Nothing is ever unpacked, so paths and links in a shard lead nowhere. Compressed shards are refused. A
    ``property`` file beside the shards gives ``num_classes``.
    """

    FORMAT, SUFFIX, KIND = "tar shards", ".tar", file_kinds.TAR

    def encoded(self, i: int) -> ByteArray:
        return np.frombuffer(self._stored(i), dtype=np.uint8)

    def _name_in_file(self, i: int) -> str:
        return f"member {self._stored(i, before=_BLOCK)[:100].split(bytes(1))[0].decode(errors='replace')}"

    @classmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        data = map_file(path)
        found = _Found(data)
        done = 0
        for number, (name, start, size) in enumerate(_members(data.data)):
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
            found.skipped,
        )


def _members(data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, size) for the regular files of a tar archive, ustar, GNU or pax: data[start:start + size] is
    the content.

    tarfile would do; this is ten times as fast, and a shard has twice as many members as images.
    """
    end = 0
    override: dict[str, Any] = {}  # what an extended header says about the member after it: name, size
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
            if any(data[end : end + _BLOCK]):
                raise InputError(f"the header at byte {end} is damaged; copy or download it again")
            return  # the two blocks of zeros that close an archive
        size = override.pop("size", None) or _number(size, end)
        start, end = end + _BLOCK, end + _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if start + size > length:
            raise InputError(
                f"it is truncated: the member at byte {start - _BLOCK} ends at byte {start + size} and the file at "
                f"{length}; copy or download it again"
            )
        if kind == b"L":
            override["name"] = bytes(data[start : start + min(size, _PATH_BYTES)]).split(b"\0", 1)[0]
        elif kind == b"x":
            override.update(_pax(bytes(data[start : start + min(size, _LABEL_BYTES)])))
        elif kind in b"0\0":
            if prefix[0] and magic[:6] == b"ustar\0":  # GNU keeps other things there
                name = prefix.split(b"\0", 1)[0] + b"/" + name
            if override:
                name, override = override.get("name") or name, {}
            yield name, start, size
        else:
            override = {}
    if end != length:
        raise InputError(f"it is truncated: {length} bytes are no whole number of blocks; copy or download it again")


def _number(field: bytes, at: int) -> int:
    """Parses a size: octal digits, or big-endian binary where the first bit is set."""
    try:
        return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        raise InputError(f"the header at byte {at} is damaged; copy or download it again") from None


def _pax(content: bytes) -> dict[str, Any]:
    """Returns name and size in a pax header, lines of 'length key=value\\n'."""
    found: dict[str, Any] = {}
    for line in content.split(b"\n"):
        key, _, value = line.partition(b" ")[2].partition(b"=")
        if key == b"path":
            found["name"] = value
        elif key == b"size" and value.isdigit():
            found["size"] = int(value)
    return found


class _Found:
    """Pairs images with labels while a shard is scanned."""

    def __init__(self, data: ByteArray):
        self._data = data
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.labels: list[float] = []
        self.keys: list[bytes] = []
        self.skipped = {"images without label": 0, "labels without image": 0, "empty images": 0}
        self._forget()

    def _forget(self) -> None:
        self._key: bytes | None = None
        self._image: tuple[int, int] | None = None  # start, size
        self._label: float | None = None

    def add(self, name: bytes, start: int, size: int) -> None:
        """Takes the next member."""
        key, _, suffix = name.partition(b".")
        if b"/" in suffix:  # a dot in the name of a folder
            folder, _, name = name.rpartition(b"/")
            key, _, suffix = name.partition(b".")
            key = folder + b"/" + key
        suffix = suffix.lower()
        is_image = _IS_IMAGE.get(suffix)
        if is_image is None:
            return
        if key != self._key:
            self.finish()
            self._key = key
        if is_image:
            self._image = start, size
        elif size <= _LABEL_BYTES:
            label = _label_in(self._data[start : start + size].tobytes(), suffix, key)
            self._label = self._label if label is None else label

    def finish(self) -> None:
        """Takes note that the members of one key are complete."""
        if self._image is None:
            self.skipped["labels without image"] += self._label is not None
        elif self._label is None:
            self.skipped["images without label"] += 1
        elif not self._image[1]:
            self.skipped["empty images"] += 1
        else:
            self.offsets.append(self._image[0])
            self.lengths.append(self._image[1])
            self.labels.append(self._label)
            self.keys.append(self._key or b"")
        self._forget()


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
    return name.decode(errors="replace")


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
