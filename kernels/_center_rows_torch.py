"""Rows against their own class centers in plain PyTorch, a cache-sized tile at a time: lengths, 1 - cos, and the
gradients of losses w (1 - cos) with a weight w for each row. The losses against class centers share them.
"""

from collections.abc import Iterator

import torch

from scf_fast.kernels._common import slices

_TILE = 1 << 17  # elements: a gathered chunk of class centers, 512 KB, stays in the second-level cache


def gather_rows(
    features: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yields slices of rows with their features and class centers, a cache-sized tile at a time; the class centers lie
    in a buffer that the next tile overwrites.
    """
    rows = max(1, _TILE // features.shape[1])
    buffer = torch.empty(
        (min(rows, len(labels)), features.shape[1]), dtype=class_centers.dtype, device=class_centers.device
    )
    for chunk in slices(len(labels), rows):
        own = torch.index_select(class_centers, 0, labels[chunk], out=buffer[: chunk.stop - chunk.start])
        yield chunk, features[chunk].to(dtype), own.to(dtype)


def measure_rows(
    features: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns |features|, |center| and 1 - cos of each row, measured in ``dtype`` and given in float64; rows whose
    squares would underflow or overflow there are measured in float64.
    """
    norms = torch.empty((3, len(labels)), dtype=dtype, device=features.device)
    for chunk, f, c in gather_rows(features, class_centers, labels, dtype):
        _measure(f, c, norms[:, chunk])
    lengths = norms[:2]
    unsafe = ((lengths < 2.0**-40) | (lengths > 2.0**40)).any(dim=0)
    norms = norms.double()
    if dtype == torch.float32 and unsafe.any():
        (rows,) = unsafe.nonzero(as_tuple=True)
        exact = norms.new_empty(3, len(rows))
        _measure(features[rows].double(), class_centers[labels[rows]].double(), exact)
        norms[:, rows] = exact
    feature_norm, center_norm, difference = norms
    return feature_norm, center_norm, 0.5 * (difference / feature_norm).square()


def _measure(f: torch.Tensor, c: torch.Tensor, norms: torch.Tensor) -> None:
    """Fills norms, (3, rows), with |f|, |c| and |f - c |f| / |c||."""
    feature_norm, center_norm, difference = norms
    torch.linalg.vector_norm(f, dim=1, out=feature_norm)
    torch.linalg.vector_norm(c, dim=1, out=center_norm)
    scaled = torch.addcmul(f, c, (feature_norm / center_norm).unsqueeze(1), value=-1)
    torch.linalg.vector_norm(scaled, dim=1, out=difference)


def gradients_torch(
    grad: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    grad_features: torch.Tensor,
    grad_class_centers: torch.Tensor,
) -> None:
    """Fills whichever of the two gradients is not empty."""
    for chunk, f, c in gather_rows(features, class_centers, labels, coefficients.dtype):
        # One factor 1 / norm last: its square overflows in float32 where the norm is below 1e-19.
        f_inverse, c_inverse = coefficients[:2, chunk].unsqueeze(2)
        kappa, kappa_cos = (coefficients[2:, chunk] * grad.expand(len(labels))[chunk]).unsqueeze(2)
        if grad_features.numel():
            along = torch.addcmul(f * (kappa_cos * f_inverse), c, kappa * c_inverse, value=-1)
            torch.mul(along, f_inverse, out=grad_features[chunk])
        if grad_class_centers.numel():
            along = torch.addcmul(c * (kappa_cos * c_inverse), f, kappa * f_inverse, value=-1).mul_(c_inverse)
            grad_class_centers.index_add_(0, labels[chunk], along.to(grad_class_centers.dtype))
