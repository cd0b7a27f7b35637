"""Names of floating-point precisions, as flags and files spell them, and the types they stand for."""

import torch

from scf_fast.errors import InputError

PRECISION_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns PyTorch's own name of a type, for instance ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def has_bf16(device: torch.device) -> bool:
    """Tells whether a GPU multiplies in bfloat16. Those before sm_80 emulate it, slower than float32."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check_precision(precision: str, device: torch.device) -> None:
    """Checks that a device has the precision that was asked for.

    Raises:
        InputError: it is ``"bf16"``, and the device a GPU that would emulate it.
    """
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise InputError(
            "--precision bf16 needs a GPU of compute capability 8.0 or higher, got a "
            f"{torch.cuda.get_device_name(device)} with {major}.{minor}, which would emulate it slower than float32; "
            "take --precision fp16 or fp32"
        )
