"""The least time that a piece of work can take on a machine: bytes and FLOP counted from shapes, over measured rates.

    floor = max(bytes / copy bandwidth, FLOP / matrix rate of the type, one launch)

Bytes are those that any implementation must read or write once, however it is fused. FLOP are those of matrix products
and convolutions; a multiplication and an addition count as two. Nothing here promises that the floor can be reached.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.measuring.timing import sampled_seconds
from scf_fast.networks.flops import network_counts

FLOAT = 4  # bytes of a float32
# For each parameter: its gradient read, its weight and optimizer states (Adam two, SGD one) read and written.
ADAM_BYTES, SGD_BYTES = 7 * FLOAT, 5 * FLOAT


def _matrix_product(
    size: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Callable[[], torch.Tensor], int]:
    """Returns a product of square matrices and its FLOP: of ``size`` rows, or a quarter of them where that many would
    take seconds a call, as bf16 does on a CPU without instructions for it (8 s for 1024 rows at 0.27 GFLOP/s).
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    few = size // 4
    quarter = functools.partial(torch.mm, left[:few, :few].contiguous(), right[:few, :few].contiguous())
    quarter()  # whatever the first call sets up
    began = time.perf_counter()
    quarter()
    if torch.device(device).type == "cpu" and time.perf_counter() - began > 1 / 64:
        return quarter, 2 * few**3
    return functools.partial(torch.mm, left, right), 2 * size**3


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device, each the best of several calls, since a floor allows for no disturbance."""

    copy_bytes_per_second: float  # read and written
    flops_per_second: dict[str, float]  # of one large matrix product, by dtype
    launch_seconds: float  # of the smallest operation, including the wait for it

    @classmethod
    def measure(cls, device: torch.device | str, small: bool = False) -> "Machine":
        """Measures the rates of ``device``; ``small`` is a quick try-out whose figures mean nothing."""
        on_gpu = torch.device(device).type == "cuda"
        source = torch.rand(2**16 if small else 2**28 if on_gpu else 2**25, device=device)
        target = torch.empty_like(source)
        one = torch.zeros(1, device=device)
        budget = 0.01 if small else 1.0

        def fastest(call: Callable[[], torch.Tensor]) -> float:
            return min(sampled_seconds(call, [()], device, budget))

        rates = {}
        for dtype in (torch.bfloat16, torch.float32):
            call, flop = _matrix_product(64 if small else 8192 if on_gpu else 1024, dtype, device)
            rates[str(dtype).removeprefix("torch.")] = flop / fastest(call)
        copy_seconds = fastest(lambda: target.copy_(source))
        return cls(2 * source.nbytes / copy_seconds, rates, fastest(lambda: one.add_(1)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do."""

    nbytes: float = 0.0
    flop: float = 0.0
    dtype: str = "float32"  # of the matrix products

    def floor(self, machine: Machine) -> tuple[float, str]:
        """Returns (seconds, bound), the bound being "memory", "compute" or "launch"."""
        bounds = {
            "memory": self.nbytes / machine.copy_bytes_per_second,
            "compute": self.flop / machine.flops_per_second[self.dtype],
            "launch": machine.launch_seconds,
        }
        bound = max(bounds, key=bounds.__getitem__)
        return bounds[bound], bound

    def __add__(self, other: "Work") -> "Work":
        return Work(self.nbytes + other.nbytes, self.flop + other.flop, self.dtype)


def log_bessel(size: int, backward: bool) -> Work:
    """Forward: kappa read, value and derivative written. Backward: gradient and derivative read, gradient written."""
    return Work(nbytes=(6 if backward else 3) * FLOAT * size)


def scf_loss(batch: int, dim: int, finetune: bool) -> Work:
    """Features and the samples' own class centers read; with ``finetune`` the features' gradient written."""
    return Work(nbytes=(3 if finetune else 2) * FLOAT * batch * dim)


def objective(batch: int, dim: int, of_pairs: bool, diagonal: bool) -> Work:
    """Features read, and class centers unless the loss is that of pairs; with a variance for each dimension, these read
    and their gradient written.
    """
    return Work(nbytes=(1 + (not of_pairs) + 2 * diagonal) * FLOAT * batch * dim)


def margin_softmax(batch: int, classes: int, dim: int, dtype: str) -> Work:
    """Four products: the cosines, the cosines again for the gradient, and one for each of the two gradients. Class
    centers read twice, their gradient written.
    """
    return Work(nbytes=3 * FLOAT * classes * dim, flop=4 * 2 * batch * classes * dim, dtype=dtype)


def similarity_matrix(rows: int, columns: int, dim: int, dtype: str = "float32", stored: bool = True) -> Work:
    """All cosines; with ``stored`` the scores are written once."""
    return Work(
        nbytes=FLOAT * (rows * columns * stored + dim * (rows + columns)), flop=2 * rows * columns * dim, dtype=dtype
    )


def pooling(images: int, dim: int) -> Work:
    """Every image's embedding is read."""
    return Work(nbytes=FLOAT * images * dim)


def stage1_step(network: str, batch: int, classes: int, dtype: str, z_dim: int = 512) -> Work:
    """Backbone forward and twice that backward, SGD on it, and the margin softmax with SGD on the class centers."""
    flop, parameters, _, _ = network_counts(network, None, z_dim)
    head = margin_softmax(batch, classes, z_dim, dtype)
    return head + Work(SGD_BYTES * (parameters + classes * z_dim), 3 * flop * batch)


def stage2_step(network: str, confidence_net: str, batch: int, dtype: str, cached: bool = False) -> Work:
    """Frozen backbone forward (unless its features are ``cached``), confidence net forward and twice that backward, and
    Adam.
    """
    flop, _, head_flop, parameters = network_counts(network, confidence_net)
    return Work(ADAM_BYTES * parameters, (3 * head_flop + (0 if cached else flop)) * batch, dtype)
