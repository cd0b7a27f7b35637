"""What GPUs can do by their data sheets, and the share of it that a kernel's instructions leave.

The model is optimistic: every scheduler issues one warp's instruction in every clock, nothing waits, copies, products
and all other instructions overlap. A kernel cannot do better than what it says; how much less it does, only the GPU
tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_WARP = 32
_SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of one warp a clock
_COPY_SHARE = 0.9  # of the memory's rate that a large copy reaches: 4.3 of 4.8 TB/s measured on an H200


@dataclass(frozen=True)
class Chip:
    """One GPU by its data sheet.

    Attributes:
        lanes: results a clock and multiprocessor by class of instructions, as in the CUDA C++ Programming Guide's table
            of arithmetic throughput; a class that is missing is bound by issue alone.
        flops_per_second: dense, of the tensor cores, accumulated in float32.
    """

    name: str
    architecture: int
    multiprocessors: int
    clock: float  # Hz, boost
    memory_bytes_per_second: float
    lanes: Mapping[str, int]
    flops_per_second: Mapping[str, float]

    @property
    def copy_bytes_per_second(self) -> float:
        return _COPY_SHARE * self.memory_bytes_per_second

    def seconds(self, classes: Mapping[str, float]) -> float:
        """Returns the least time of a thread's instructions, spread over the whole GPU: by issue, or by the slowest
        class.
        """
        issue = sum(classes.values()) / (_SCHEDULERS * _WARP)
        slowest = max((classes.get(name, 0.0) / lanes for name, lanes in self.lanes.items()), default=0.0)
        return max(issue, slowest) / (self.multiprocessors * self.clock)


_HOPPER = {"fp32": 128, "integer": 64, "mufu": 16, "fp64": 64}
_HOPPER_FLOPS = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}
CHIPS = (
    Chip("H200", 90, 132, 1.98e9, 4.8e12, _HOPPER, _HOPPER_FLOPS),
    Chip("H100", 90, 132, 1.98e9, 3.35e12, _HOPPER, _HOPPER_FLOPS),
    Chip(
        "A100",
        80,
        108,
        1.41e9,
        2.04e12,
        {"fp32": 64, "integer": 64, "mufu": 16, "fp64": 32},
        {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    ),
    Chip(
        "RTX 4090",
        89,
        128,
        2.52e9,
        1.008e12,
        {"fp32": 128, "integer": 64, "mufu": 16, "fp64": 2},
        {"bfloat16": 165e12, "tf32": 82.6e12, "float32": 82.6e12},
    ),
)


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds: (warps, programs, bytes of shared memory), 64 K registers in all of them."""

    warps: int
    programs: int
    shared: int


_KIB = 1024
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * _KIB),
    86: Multiprocessor(48, 16, 100 * _KIB),
    89: Multiprocessor(48, 24, 100 * _KIB),
    90: Multiprocessor(64, 32, 228 * _KIB),
    100: Multiprocessor(64, 32, 228 * _KIB),
    120: Multiprocessor(48, 24, 100 * _KIB),
}
"""{architecture: its limits}, of the architectures that the documents name"""
_REGISTERS, _REGISTER_UNIT = 65536, 8  # of a multiprocessor; allocated for a thread at a time
_RESERVED_SHARED = 1024  # bytes a program, by the system


def occupancy(architecture: int, registers: int, shared: int, num_warps: int) -> float:
    """Returns the share of a multiprocessor's warps that can be resident at once."""
    limits = MULTIPROCESSORS[architecture]
    allocated = -(-registers // _REGISTER_UNIT) * _REGISTER_UNIT
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        _REGISTERS // (allocated * _WARP) // num_warps,
        limits.shared // (shared + _RESERVED_SHARED),
    )
    return programs * num_warps / limits.warps
