"""Files as arrays of bytes, without reading them first."""

import os

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, StrPath


def map_file(path: StrPath) -> ByteArray:
    """Returns the bytes of a file, (n,) read-only, mapped into memory; a plain array, which slices twice as fast as
    ``np.memmap``.

    Where the disk goes away under the map, the system ends the process: read images with ``os.pread`` instead.
    """
    if not os.path.getsize(path):
        return np.empty(0, dtype=np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
