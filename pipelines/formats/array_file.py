"""Files of named NumPy arrays that processes share by mapping them into memory.

    prefix | JSON header | arrays, each at a multiple of 64 bytes

The prefix holds checksums of the header and of the arrays. They find accidents, not intent: whatever the header says is
checked against the file before an array is made of it.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import ByteArray, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.mapped_file import map_file

_MAGIC = b"face arrays 1\n  "  # 16 bytes: format and version
_PREFIX = struct.Struct("<16sIIQ")  # magic, CRC-32 of the header, CRC-32 of the arrays, bytes of the header
_ALIGN = 64
_NUMBERS = re.compile("[<>|][biuf][1248]")

Array = npt.NDArray[Any]


def write_arrays(path: StrPath, meta: Mapping[str, Any], arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Writes named arrays of numbers and a description that JSON can hold into one file, atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    places: dict[str, list[Any]] = {}
    end = checksum = 0
    for name, array in contiguous.items():
        places[name] = [array.dtype.str, list(array.shape), end]
        end += -(-array.nbytes // _ALIGN) * _ALIGN
        checksum = zlib.crc32(bytes(-array.nbytes % _ALIGN), zlib.crc32(_bytes_of(array), checksum))
    header = json.dumps({"meta": meta, "arrays": places, "size": end}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    with atomic_output(path) as file:
        file.write(_PREFIX.pack(_MAGIC, zlib.crc32(header), checksum, len(header)) + header)
        for array in contiguous.values():
            file.write(_bytes_of(array))
            file.write(bytes(-array.nbytes % _ALIGN))


def map_arrays(path: StrPath, check: bool = True) -> tuple[dict[str, Any], dict[str, Array]]:
    """Maps what :func:`write_arrays` wrote, without reading it: processes share its pages.

    Args:
        path: the file.
        check: compare the checksum of the arrays, which reads the file once (1 GB/s and more).
    Returns:
        meta: as written, or any other JSON value where somebody else made the file.
        arrays: by name, read-only.
    Raises:
        InputError: the file is damaged or of another format.
        OSError: it cannot be read.
    """
    header, checksum, start = _read_header(path)
    body = map_file(path)[start:]
    try:
        about = json.loads(header)
        meta, arrays = about["meta"], {name: _array_at(body, *place) for name, place in about["arrays"].items()}
        is_intact = body.size == about["size"] and (not check or zlib.crc32(body.data) == checksum)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        is_intact = False  # the header can be any JSON
    if not is_intact:
        raise InputError(f"{path} is damaged; delete it")
    return meta, arrays


def _read_header(path: StrPath) -> tuple[bytes, int, int]:
    """Returns (header, checksum of the arrays, byte at which they start)."""
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) == _PREFIX.size:
            magic, header_checksum, checksum, size = _PREFIX.unpack(prefix)
            if magic == _MAGIC and size <= os.fstat(file.fileno()).st_size:
                header = file.read(size)
                if zlib.crc32(header) == header_checksum:
                    return header, checksum, _PREFIX.size + size
    raise InputError(f"{path} is no file of arrays, or damaged; delete it")


def _array_at(body: ByteArray, dtype: str, shape: list[int], start: int) -> Array:
    """Returns the array that starts at a byte of ``body``; raises ValueError or TypeError where there can be none."""
    if not _NUMBERS.fullmatch(dtype):  # before NumPy sees it: a dtype's text can run code
        raise ValueError(f"dtype {dtype}")
    end = start + np.dtype(dtype).itemsize * math.prod(shape)
    if min(shape, default=1) < 0 or not 0 <= start <= end <= body.size:
        raise ValueError(f"an array of shape {shape} at byte {start}")
    return body[start:end].view(dtype).reshape(shape)


def _bytes_of(array: Array) -> memoryview | bytes:
    return array.reshape(-1).view(np.uint8).data if array.size else b""
