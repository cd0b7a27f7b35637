"""Names of floating-point precisions, as flags and files spell them, and the types they stand for."""

import torch

PRECISION_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns PyTorch's own name of a type, for instance ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
