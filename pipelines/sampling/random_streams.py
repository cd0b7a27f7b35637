"""Random numbers as a hash: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), the same for every version and platform.

NumPy promises no stable stream for Generator.permutation; and a hash of the image's number needs no state to resume
from.
"""

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import IntArray

# Odd, so number -> number * _GOLDEN + key -> mix is one-to-one on 64 bits: sort keys never tie.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_BLOCK = 1 << 15  # numbers hashed together: 256 KB, so the passes of the hash stay in cache


def splitmix64(key: int, values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Returns SplitMix64's output ``values`` steps after state ``key``, (N,) for (N,)."""
    z = values.astype(np.uint64)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def stream_key(*words: int) -> int:
    """Returns the key of an independent stream for each tuple of integers of one length."""
    key = 0
    for word in words:
        key = int(splitmix64(key, np.array([word & _MASK], dtype=np.uint64))[0])
    return key


def permutation(key: int, count: int) -> IntArray:
    """Returns the numbers below ``count`` in random order."""
    hashes = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        hashes[start:stop] = splitmix64(key, np.arange(start, stop))
    return np.argsort(hashes)
