"""CRC-32C (Castagnoli; RFC 3720, 12.1), the checksum of TFRecord, in NumPy: the standard library has only CRC-32."""

import functools

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import ByteArray

_POLYNOMIAL = 0x82F63B78  # lowest bit first
_BLOCK = 4096  # bytes whose shares are looked up together, in a table of 4 MB
# Four bytes that turn a register of 0 into the ffffffff that it has to start from.
_PREFIX = np.frombuffer(bytes.fromhex("54641f64"), dtype=np.uint8)


def crc32c(data: ByteArray) -> npt.NDArray[np.uint32]:
    """Returns the checksums of rows of bytes.

    The register is linear over exclusive or: each byte has a share in it that depends on its place, so all shares are
    looked up at once. Zeros before the first byte leave a register of 0 as it is, so rows are padded at the front.

    Args:
        data: (..., n) uint8.
    Returns:
        (...) uint32.
    """
    size = _PREFIX.size + data.shape[-1]
    width = min(size, _BLOCK)
    padded = np.zeros((*data.shape[:-1], -(-size // width) * width), dtype=np.uint8)
    padded[..., -size : padded.shape[-1] - data.shape[-1]] = _PREFIX
    padded[..., padded.shape[-1] - data.shape[-1] :] = data
    places = np.arange(256 * (_BLOCK - width), 256 * _BLOCK, 256)
    blocks = padded.reshape(*data.shape[:-1], padded.shape[-1] // width, width)
    shares = np.bitwise_xor.reduce(_shares().take(blocks + places), axis=-1)
    register = shares[..., 0]
    for block in range(1, shares.shape[-1]):  # the register before a block acts as if it lay over its first four bytes
        before = np.asarray(register)[..., None].astype("<u4").view(np.uint8)
        register = shares[..., block] ^ np.bitwise_xor.reduce(_shares().take(before + places[:4]), axis=-1)
    return ~register


@functools.cache
def _shares() -> npt.NDArray[np.uint32]:
    """Returns (_BLOCK * 256,) registers: entry 256 place + b is the one after byte b at that place of a block and zeros
    after it.
    """
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = register >> 1 ^ np.where(register & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    shares = np.empty((_BLOCK, 256), dtype=np.uint32)
    shares[-1] = one = register
    for place in range(_BLOCK - 2, -1, -1):
        shares[place] = shares[place + 1] >> 8 ^ one[shares[place + 1] & 255]
    return shares.reshape(-1)
