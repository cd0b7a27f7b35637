"""Margin softmax over dense logits, composed operation by operation as in the training code released with ArcFace.

    cos = normalize(embeddings) normalize(class_centers)^T          (B, C)
    cos[i, labels_i] <- cos(theta + m2) - m3, without gradient      so the gradient at the target is s
    loss = cross_entropy(s cos, labels)

Written from these formulas. Matrix products run in ``compute_dtype``, as under that code's autocast; logits and loss
are float32.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def dense_margin_softmax_loss(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 64.0,
    margins: Sequence[float] = (1.0, 0.5, 0.0),
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns the mean loss, a scalar differentiable in embeddings and class centers.

    Args:
        embeddings: (B, D) float.
        class_centers: (C, D) float.
        labels: (B,) int64 in [0, C).
        scale: s.
        margins: (1, m2, m3).
        compute_dtype: dtype of the matrix products; None keeps that of the inputs.
    """
    dtype = compute_dtype or embeddings.dtype
    cos = F.linear(F.normalize(embeddings).to(dtype), F.normalize(class_centers).to(dtype)).clamp(-1, 1)
    cos = cos.to(torch.promote_types(cos.dtype, torch.float32))
    rows = torch.arange(len(labels), device=labels.device)
    with torch.no_grad():
        theta = cos[rows, labels].acos()
        target = torch.cos((theta + margins[1]).clamp_max(math.pi)) - margins[2]
        shift = torch.zeros_like(cos).index_put_((rows, labels), target - cos[rows, labels])
    return F.cross_entropy((cos + shift) * scale, labels)


compiled_dense_margin_softmax_loss = torch.compile(dense_margin_softmax_loss, dynamic=False, fullgraph=True)
