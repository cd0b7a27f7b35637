"""RFC 3720's examples, and one bit at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.formats.crc32c import crc32c


def bit_by_bit(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def checksum(data):
    return int(crc32c(np.frombuffer(data, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # appendix B.4, whose bytes stand in the order of transmission; and the usual check value
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (
            bytes.fromhex(
                "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 "
                "00000000"
            ),
            0xD9963A56,
        ),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_known_values(data, expected):
    assert checksum(data) == expected


@given(st.binary(max_size=100))
def test_against_the_definition(data):
    assert checksum(data) == bit_by_bit(data)


def test_several_blocks_and_rows():
    rows = np.random.default_rng(0).integers(0, 256, (3, 9000), dtype=np.uint8)
    for size in (4091, 4092, 4093, 8188, 8189, 9000):
        assert crc32c(rows[:, :size]).tolist() == [bit_by_bit(row[:size].tobytes()) for row in rows]
    assert (
        crc32c(rows[0]).shape == ()
        and crc32c(rows[:0, :8]).shape == (0,)
        and crc32c(rows[:, :8].reshape(3, 1, 8)).shape == (3, 1)
    )
