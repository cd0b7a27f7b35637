"""Shared by all kernel files: the choice of implementation, argument checks that do not depend on the operator, and
helpers for rows.
"""

import math
from collections.abc import Iterator

import torch
import torch.autograd.forward_ad as forward_ad
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 8192  # widest row: a program holds one, or a row and its class center, in registers
DEFAULT_RADIUS = 64.0  # of the sphere, in the published code and in TFace


@triton.jit
def as_compute(x, FP64: tl.constexpr):
    """Converts x to the arithmetic of the kernel: float64 if asked, float32 otherwise."""
    if FP64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


# triton.jit reads TRITON_INTERPRET when a kernel is defined; reading the variable later could give another answer.
INTERPRETED = isinstance(as_compute, InterpretedFunction)


def use_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Returns whether the Triton kernel runs: ``auto`` takes it for CUDA tensors, and plain PyTorch for all others."""
    if backend == "auto":
        return tensor.is_cuda
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}')
    if backend == "triton" and not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f'backend="triton" needs a CUDA tensor, got one on {tensor.device}: use backend="auto", '
            "or set TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
        )
    return backend == "triton"


def forward_mode() -> bool:
    """Returns whether tensors may carry tangents: within ``torch.func.jvp`` or ``forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Returns whether the caller runs under a transform of ``torch.func``, or in forward mode: the operators would take
    part in neither, see ``_transforms``. Not while PyTorch compiles or exports, which need the operators.
    """
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_mode())


def refuse_repeated_forward_mode() -> None:
    """Raises NotImplementedError within a ``torch.func.jvp`` of another: PyTorch 2.13 drops the outer tangent of a
    ``torch.autograd.Function`` there, and the second derivative would be 0.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "forward mode over forward mode has no second derivative here: take torch.func.hessian, or jacfwd of jacrev"
        )


def promoted_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Returns float64 if any argument is float64, else float32: half precision is promoted."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- argument checks: none reads a value of a CUDA tensor unless asked to, which would wait for the device


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the tensor has one of ``FLOAT_DTYPES``."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: convert it with .float()"
        )


def check_range(name: str, tensor: torch.Tensor, debug: bool, at_most: float = math.inf) -> None:
    """Raises ValueError for values outside [0, at_most]; on CUDA only under ``debug``. NaN passes."""
    if tensor.is_cuda and not debug:
        return
    outside = tensor < 0
    if at_most < math.inf:
        outside |= tensor > at_most
    if outside.any():
        bound = ">= 0" if at_most == math.inf else f"in [0, {at_most:g}]"
        raise ValueError(
            f"{name} must be {bound}, got {tensor[outside][0].item():g}: clamp it, or check the code that computed it"
        )


def check_radius(radius: float) -> None:
    """Raises ValueError unless the radius of the sphere is a positive number."""
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be a positive number, got {radius!r}")


# ---- rows

_WARP_VALUES = 512  # of a row in each warp: 16 a thread
_MAX_WARPS = 16  # leaves each thread 128 registers


def row_tile(dim: int) -> tuple[int, int, int]:
    """Returns the block width, the rows per program, and the warps of a kernel that computes much per row.

    A warp has one row, or as many as give each thread one: what is computed per row is computed in every thread that
    has a part of it.
    """
    block_d = triton.next_power_of_2(dim)
    return block_d, max(1, 128 // block_d), min(_MAX_WARPS, max(1, block_d // _WARP_VALUES))


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the matrix with adjacent elements in each row, copied only if they are not; rows may be any stride apart.

    Kernels read ``row * stride + column``.
    """
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def slices(length: int, size: int) -> Iterator[slice]:
    """Cuts ``range(length)`` into slices of ``size``, the last one shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
