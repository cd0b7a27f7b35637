"""The model of what instructions allow, against figures worked out by hand."""

import pytest

from bench.measuring.chips import CHIPS, occupancy

H200, _, A100, RTX_4090 = CHIPS


def test_issue_sets_the_pace_of_mixed_instructions():
    # 163 instructions for 12 bytes; 132 x 4 warps a clock of 1.98 GHz against 4.32 TB/s.
    seconds = H200.seconds({"fp32": 134.0, "integer": 23.0, "mufu": 5.0, "memory": 1.0})
    assert seconds == pytest.approx(163 / (132 * 128 * 1.98e9))
    assert 12 / H200.copy_bytes_per_second / seconds == pytest.approx(0.570, abs=1e-3)


def test_the_slowest_class_sets_the_pace_of_the_others():
    assert A100.seconds({"fp32": 100.0}) == pytest.approx(100 / (108 * 64 * 1.41e9))
    assert RTX_4090.seconds({"fp32": 100.0, "fp64": 100.0}) == pytest.approx(100 / (128 * 2 * 2.52e9))
    assert H200.seconds({"mufu": 16.0, "memory": 1.0}) == pytest.approx(1 / (132 * 1.98e9))


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "num_warps", "share"),
    [
        (90, 32, 0, 4, 1.0),  # 16 programs of 4 warps
        (90, 64, 0, 4, 0.5),  # registers: 8 programs
        (90, 65, 0, 4, 7 / 16),  # 72 are allocated
        (80, 255, 0, 8, 8 / 64),
        (90, 184, 98304, 8, 8 / 64),
        (89, 32, 60 * 1024, 8, 8 / 48),  # shared memory: one program
        (86, 16, 0, 1, 16 / 48),  # no more programs than 16
    ],
)
def test_occupancy(architecture, registers, shared, num_warps, share):
    assert occupancy(architecture, registers, shared, num_warps) == pytest.approx(share)
