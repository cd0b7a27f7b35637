"""Losses of other projects, called from their own packages where those are installed; no code of theirs is copied here.

    cut_cross_entropy   linear_cross_entropy of the package cut-cross-entropy
    liger               LigerFusedLinearCrossEntropyLoss of the package liger-kernel
    arcface_torch       CombinedMarginLoss of insightface's recognition/arcface_torch; its folder must be on PYTHONPATH

The first two are made for language models: they use rows as given, so they get unit rows, and they know no margin.
arcface_torch's margin is applied between dense logits, made the way that project makes them, and PyTorch's
cross-entropy; on several ranks that project computes the same.
"""

import importlib.util

import torch
import torch.nn.functional as F

_MODULES = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel", "arcface_torch": "partial_fc_v2"}


def problem(name: str, device: torch.device | str) -> str | None:
    """Returns why a peer cannot be timed on the device; None where it can be, or where ``name`` is not a peer."""
    if name not in _MODULES:
        return None
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"the module {_MODULES[name]} is not installed"
    if name != "arcface_torch" and torch.device(device).type != "cuda":
        return f"{name} runs on GPUs only"
    return None


def cut_cross_entropy_loss(
    embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns the mean loss of unit rows (B, D) and (C, D) in bf16 for labels (B,) int64; no margin."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(scale * embeddings, class_centers, labels)


def liger_loss(
    embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns the same by Liger."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(class_centers, scale * embeddings, labels)


def arcface_torch_loss(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    compute_dtype: torch.dtype,
    margins: tuple[float, float, float] = (1.0, 0.5, 0.0),
) -> torch.Tensor:
    """Returns the mean loss of dense float32 logits with arcface_torch's margin; arguments as for
    ``dense_margin_softmax_loss``.
    """
    from losses import CombinedMarginLoss

    logits = (
        F.linear(F.normalize(embeddings).to(compute_dtype), F.normalize(class_centers).to(compute_dtype))
        .float()
        .clamp(-1, 1)
    )
    return F.cross_entropy(CombinedMarginLoss(scale, *margins)(logits, labels), labels)
