"""What every kernel file needs: which implementation runs, and the checks that read no values."""

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def as_compute(x, FP64: tl.constexpr):
    """x in the arithmetic of the kernel: float64 when asked, float32 otherwise."""
    if FP64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


# triton.jit decides by TRITON_INTERPRET when a kernel is defined; reading the variable later could say something else.
INTERPRETED = isinstance(as_compute, InterpretedFunction)


def use_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel runs: `auto` takes it for CUDA tensors, and plain PyTorch for all others."""
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


def check_floating(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: convert it with .float()"
        )


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any argument is, else float32: half precision is promoted."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_range(name: str, tensor: torch.Tensor, debug: bool, at_most: float = math.inf) -> None:
    """Raises for values outside [0, at_most]. On CUDA that would wait for the device, so only `debug` does it there.
    NaN goes through.
    """
    if tensor.is_cuda and not debug:
        return
    outside = tensor < 0
    if at_most < math.inf:
        outside |= tensor > at_most
    if outside.any():
        bound = ">= 0" if at_most == math.inf else f"in [0, {at_most:g}]"
        raise ValueError(
            f"{name} must be {bound}, got {tensor[outside][0].item():g}: clamp it, or find where it comes from"
        )
