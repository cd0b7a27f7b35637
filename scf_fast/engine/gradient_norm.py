"""The norm of gradients, without the overflow that the sum of their squares has in float32."""

from collections.abc import Sequence

import torch


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the Euclidean norm over all elements, 0-dim float64: finite where every element is.

    The sum of squares overflows in float32 from elements of 1.8e19 on. Only then are they divided by the largest one
    first, a tensor at a time; the usual case costs what ``torch.nn.utils.get_total_norm`` does. Waits for the device.

    Args:
        gradients: float tensors of any shapes on one device; none at all have norm 0.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norm = torch.nn.utils.get_total_norm(gradients).double()
    if norm.isfinite():
        return norm
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")).float()
    if not largest.isfinite():
        return largest.double()
    parts = [torch.linalg.vector_norm(gradient.float() / largest).double() for gradient in gradients]
    return torch.stack(parts).norm() * largest.double()
