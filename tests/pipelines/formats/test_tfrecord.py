"""The functions on bytes; tests/pipelines/sources/test_tfrecord.py has a writer of its own, and DALI's reader."""

import struct

import numpy as np
import pytest

from scf_fast.pipelines.formats.crc32c import crc32c
from scf_fast.pipelines.formats.tfrecord import (
    CHECKSUM_BYTES,
    FRAME_BYTES,
    HEADER_BYTES,
    example_bytes,
    frame,
    images_in,
    is_intact,
    pack_record,
    parse_example,
    scan_records,
    write_shard,
)

IMAGES = [b"one", b"two" * 100, b"", b"four" * 9999]
LABELS = [3, 0, 1, (1 << 31) - 1]


def as_array(content):
    return np.frombuffer(content, dtype=np.uint8)


def masked(content):
    register = int(crc32c(as_array(content)))  # test_crc32c.py has it against the definition
    return struct.pack("<I", ((register >> 15 | register << 17) + 0xA282EAD8) % (1 << 32))


def test_frame_is_the_described_one():
    size = struct.pack("<Q", 5)
    assert frame(b"bytes") == size + masked(size) + b"bytes" + masked(b"bytes")
    assert len(frame(b"")) == FRAME_BYTES


def test_example_of_two_features():
    """By hand, from example.proto and feature.proto."""
    image = b"\x0a\x05image" + b"\x12\x08" + b"\x0a\x06" + b"\x0a\x04face"
    label = b"\x0a\x05label" + b"\x12\x05" + b"\x1a\x03" + b"\x0a\x01\x07"
    features = b"\x0a" + bytes([len(image)]) + image + b"\x0a" + bytes([len(label)]) + label
    assert pack_record(b"face", 7) == frame(b"\x0a" + bytes([len(features)]) + features)


def test_records_come_back(tmp_path):
    write_shard(tmp_path / "shard", zip(IMAGES, LABELS))
    content = (tmp_path / "shard").read_bytes()
    data = as_array(content)
    ((starts, sizes),) = scan_records(data)
    places = [
        parse_example(memoryview(content), start, start + size) for start, size in zip(starts + HEADER_BYTES, sizes)
    ]
    assert [content[start:end] for start, end, _ in places] == IMAGES and [label for *_, label in places] == LABELS
    found, lengths = images_in(data, starts, sizes + FRAME_BYTES)
    assert [content[start : start + length] for start, length in zip(found, lengths)] == IMAGES
    assert images_in(data, starts, sizes + FRAME_BYTES - 1)[1].tolist() == [0] * 4


def test_damage_is_noticed():
    record = pack_record(b"face", 7)
    size = len(record) - FRAME_BYTES
    assert example_bytes(record[:HEADER_BYTES]) == size and is_intact(record[HEADER_BYTES:])
    for place in range(len(record)):
        damaged = record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :]
        if place < HEADER_BYTES:
            assert example_bytes(damaged[:HEADER_BYTES]) is None
            with pytest.raises(ValueError, match="no record starts at byte 0"):
                list(scan_records(as_array(damaged)))
        else:
            assert not is_intact(damaged[HEADER_BYTES:])
    assert is_intact(masked(b"")) and len(masked(b"")) == CHECKSUM_BYTES
    with pytest.raises(ValueError, match="the file is empty"):
        list(scan_records(as_array(b"")))
    for cut in (1, HEADER_BYTES, len(record) - 1):
        with pytest.raises(ValueError, match=f"it is truncated: the (record|header) at byte {len(record)}"):
            list(scan_records(as_array(record + record[:cut])))
