import json
import math
import os
import re
import struct
import zlib

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output

_ARRAYS = b"face arrays 1\n  "  # 16 bytes: format and version
_PREFIX = struct.Struct("<16sIIQ")  # what it is, CRC-32 of the header, CRC-32 of the arrays, bytes of the header
_ALIGN = 64
_NUMBERS = re.compile("[<>|][biuf][1248]")


def write_arrays(path, meta, arrays):
    """Write named arrays and a description into one file, atomically.

    Args:
        path: str or Path.
        meta: dict that JSON can hold.
        arrays: dict of name to NumPy array of numbers.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    places, end, checksum = {}, 0, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, list(array.shape), end]
        end += -(-array.nbytes // _ALIGN) * _ALIGN
        checksum = zlib.crc32(bytes(-array.nbytes % _ALIGN), zlib.crc32(_as_bytes(array), checksum))
    header = json.dumps({"meta": meta, "arrays": places, "size": end}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    with atomic_output(path) as file:
        file.write(_PREFIX.pack(_ARRAYS, zlib.crc32(header), checksum, len(header)) + header)
        for array in arrays.values():
            file.write(_as_bytes(array))
            file.write(bytes(-array.nbytes % _ALIGN))


def map_arrays(path, check=True):
    """What write_arrays wrote, mapped and not read: processes share its pages.

    Args:
        path: str or Path.
        check: compare the checksum, which reads the file once (1 GB/s and more).
    Returns:
        (meta, arrays), the arrays read-only.
    Raises:
        ValueError: the file is damaged or of another format.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        try:
            kind, header_checksum, checksum, header_size = _PREFIX.unpack(prefix)
            if kind != _ARRAYS or header_size > os.fstat(file.fileno()).st_size:
                raise ValueError
            header = file.read(header_size)
            if zlib.crc32(header) != header_checksum:
                raise ValueError
        except (struct.error, ValueError):
            raise InputError(f"{path} is no file of arrays, or damaged; delete it") from None
    body = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))[_PREFIX.size + header_size :]
    try:  # the checksums tell accidents, not intent
        header = json.loads(header)
        meta, arrays = header["meta"], {name: _placed(body, *place) for name, place in header["arrays"].items()}
        intact = body.size == header["size"] and (not check or zlib.crc32(body) == checksum)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged; delete it")
    return meta, arrays


def _placed(body, dtype, shape, start):
    """The array that lies at byte `start` of `body`."""
    if not _NUMBERS.fullmatch(dtype):  # before NumPy sees it, to whom a type can be a program
        raise ValueError
    end = start + np.dtype(dtype).itemsize * math.prod(shape)
    if min(shape, default=1) < 0 or not 0 <= start <= end <= body.size:
        raise ValueError
    return body[start:end].view(dtype).reshape(shape)


def _as_bytes(array):
    return array.reshape(-1).view(np.uint8).data if array.size else b""
