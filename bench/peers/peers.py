"""Other projects' own code, where it can be imported; nothing of it is here.

    cut_cross_entropy    linear_cross_entropy of the package cut-cross-entropy
    liger                LigerFusedLinearCrossEntropyLoss of the package liger-kernel
    arcface_torch        CombinedMarginLoss of insightface's recognition/arcface_torch, whose folder must be on PYTHONPATH

The first two are made for language models: they take rows as they come, so they get unit rows, and know no margin.
arcface_torch's margin goes between its own way to make logits, all of them, and PyTorch's cross-entropy; spread over
ranks, it computes the same.
"""

import importlib.util

import torch
import torch.nn.functional as F

_MODULES = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel", "arcface_torch": "partial_fc_v2"}


def problem(name, device):
    """Why a peer cannot be timed on the device, None where it can or where ``name`` is none of them."""
    if name not in _MODULES:
        return None
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"the module {_MODULES[name]} is not installed"
    if name != "arcface_torch" and torch.device(device).type != "cuda":
        return f"{name} runs on GPUs only"
    return None


def cut_cross_entropy_loss(embeddings, class_centers, labels, scale):
    """Mean loss of unit rows (B, D) and (C, D), bf16, labels (B,) int64; no margin."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(scale * embeddings, class_centers, labels)


def liger_loss(embeddings, class_centers, labels, scale):
    """The same by Liger."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(class_centers, scale * embeddings, labels)


def arcface_torch_loss(embeddings, class_centers, labels, scale, compute_dtype, margins=(1.0, 0.5, 0.0)):
    """Mean loss with all logits in float32, their margin by arcface_torch; arguments as `dense_margin_softmax_loss`."""
    from losses import CombinedMarginLoss

    logits = (
        F.linear(F.normalize(embeddings).to(compute_dtype), F.normalize(class_centers).to(compute_dtype))
        .float()
        .clamp(-1, 1)
    )
    return F.cross_entropy(CombinedMarginLoss(scale, *margins)(logits, labels), labels)
