"""The least time a piece of work can take on a machine: bytes and floating-point operations counted from shapes, over
measured rates.

    floor = max(bytes / copy bandwidth, FLOP / matrix rate of the type, one launch)

Bytes are those that any implementation must read or write once, however it is fused; FLOP are those of matrix products
and convolutions, a multiplication and an addition counted as two. Nothing here is a promise that the floor can be
reached.
"""

import functools
from dataclasses import asdict, dataclass

import torch

from bench.measuring.timing import sampled_seconds
from scf_fast.networks.flops import network_counts

FLOAT = 4  # bytes of a float32
ADAM_BYTES, SGD_BYTES = (
    7 * FLOAT,
    5 * FLOAT,
)  # a parameter's gradient read, weight and states (two, one) read and written


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device, the best of several calls: a floor is where nothing disturbs."""

    copy_bytes_per_second: float  # read and written
    flops_per_second: dict[str, float]  # of one large matrix product, by type
    launch_seconds: float  # of the smallest operation, waited for

    @classmethod
    def measure(cls, device, small=False):
        """Take the rates of ``device``; ``small`` for a try-out, its figures mean nothing."""
        on_gpu = torch.device(device).type == "cuda"
        source = torch.rand(2**16 if small else 2**28 if on_gpu else 2**25, device=device)
        target = torch.empty_like(source)
        size = 64 if small else 8192 if on_gpu else 1024
        calls = {"copy": lambda: target.copy_(source)}
        for dtype in (torch.bfloat16, torch.float32):
            left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            calls[str(dtype).removeprefix("torch.")] = functools.partial(torch.mm, left, right)
        one = torch.zeros(1, device=device)
        calls["launch"] = lambda: one.add_(1)
        seconds = {
            name: min(sampled_seconds(call, [()], device, budget=0.01 if small else 1.0))
            for name, call in calls.items()
        }
        rates = {dtype: 2 * size**3 / seconds[dtype] for dtype in ("bfloat16", "float32")}
        return cls(2 * source.nbytes / seconds["copy"], rates, seconds["launch"])

    def as_dict(self):
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What must be done at least."""

    nbytes: float = 0.0
    flop: float = 0.0
    dtype: str = "float32"  # of the matrix products

    def floor(self, machine):
        """(seconds, what bounds them: "memory", "compute" or "launch")."""
        bounds = {
            "memory": self.nbytes / machine.copy_bytes_per_second,
            "compute": self.flop / machine.flops_per_second[self.dtype],
            "launch": machine.launch_seconds,
        }
        bound = max(bounds, key=bounds.get)
        return bounds[bound], bound

    def __add__(self, other):
        return Work(self.nbytes + other.nbytes, self.flop + other.flop, self.dtype)


def log_bessel(size, backward):
    """kappa read, value and derivative written; going back, gradient and derivative read, gradient written."""
    return Work(nbytes=(6 if backward else 3) * FLOAT * size)


def scf_loss(batch, dim, finetune):
    """Features and own class centers read; with ``finetune`` the features' gradient written."""
    return Work(nbytes=(3 if finetune else 2) * FLOAT * batch * dim)


def margin_softmax(batch, classes, dim, dtype):
    """Four products: cosines, and again for the gradient, and one for each gradient. Class centers read twice, their
    gradient written.
    """
    return Work(nbytes=3 * FLOAT * classes * dim, flop=4 * 2 * batch * classes * dim, dtype=dtype)


def similarity_matrix(rows, columns, dim, dtype="float32", stored=True):
    """All cosines; the scores written once where they are ``stored``."""
    return Work(
        nbytes=FLOAT * (rows * columns * stored + dim * (rows + columns)), flop=2 * rows * columns * dim, dtype=dtype
    )


def pooling(images, dim):
    """Every image's embedding read."""
    return Work(nbytes=FLOAT * images * dim)


def stage1_step(network, batch, classes, dtype, z_dim=512):
    """Backbone forward and twice that backward, SGD on it, and the margin softmax with SGD on the class centers."""
    flop, parameters, _, _ = network_counts(network, None, z_dim)
    head = margin_softmax(batch, classes, z_dim, dtype)
    return head + Work(SGD_BYTES * (parameters + classes * z_dim), 3 * flop * batch)


def stage2_step(network, confidence_net, batch, dtype, cached=False):
    """Frozen backbone forward (not where its features are ``cached``), confidence net forward and twice that backward,
    Adam.
    """
    flop, _, head_flop, parameters = network_counts(network, confidence_net)
    return Work(ADAM_BYTES * parameters, (3 * head_flop + (0 if cached else flop)) * batch, dtype)
