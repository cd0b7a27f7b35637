"""Margin softmax: cross-entropy over scaled cosines, the target's cosine reduced by a margin (ArcFace, CosFace, SphereFace in one form).

    logits_ij = s cos theta_ij                              j != labels_i
    logits_ii = s psi(theta_ii),   psi(theta) = cos(m1 theta + m2) - m3      while m1 theta + m2 <= pi
                                   psi(theta) = cos(theta) - cos(theta*) - 1 - m3   beyond, theta* = (pi - m2) / m1

The second line continues psi without a jump and keeps it decreasing in theta, where the cosine alone would turn back up.
"""
import math

import torch
import torch.nn.functional as F

SIN_FLOOR = 1e-4  # sin(theta) below it counts as it: bounds the exact gradient s sin(theta + m2)/sin(theta) at theta = 0 and pi; the loss moves by < 1e-4 s


def target_cosine_with_margin(cos: torch.Tensor, margins: tuple[float, float, float]) -> torch.Tensor:
    """psi(theta) of the module's formula from cos(theta), any shape; differentiable, finite at cos = +-1."""
    m1, m2, m3 = margins
    cos = cos.clamp(-1.0, 1.0)
    if m1 == 1.0 and m2 == 0.0:
        return cos - m3
    sin = (1.0 - cos * cos).clamp_min(SIN_FLOOR**2).sqrt()
    if m1 == 1.0:
        shifted = cos * math.cos(m2) - sin * math.sin(m2)
    else:
        shifted = torch.cos(m1 * torch.atan2(sin, cos) + m2)
    turning = math.cos((math.pi - m2) / m1)
    return torch.where(cos > turning, shifted, cos - turning - 1.0) - m3


def margin_softmax_loss(embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, scale: float = 64.0,
                        margins: tuple[float, float, float] = (1.0, 0.5, 0.0), margin_gradient: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean margin-softmax loss. Source: ArcFace (Deng et al., 2019), CosFace (Wang et al., 2018), SphereFace (Liu et al., 2017).

    Plain PyTorch on every device; it holds the (B, C) logits.

    Args:
        embeddings: (B, D) float, unnormalised.
        class_centers: (C, D) float, unnormalised.
        labels: (B,) int64 in [0, C).
        scale: s, multiplies the logits.
        margins: (m1, m2, m3), m2 in radians, m3 in cosine.
        margin_gradient: ``"exact"`` is the derivative of psi, s sin(theta + m2)/sin(theta) at the target; ``"straight_through"`` passes the
            gradient s, as code that applies its margin without gradient (arcface_torch) does.
    Returns:
        (loss, correct): scalar float32 mean loss, and (B,) bool whether the nearest class center (without margin) is the own one.
    Raises:
        ValueError: unknown ``margin_gradient``, widths that differ, or margins that leave psi without its decreasing branch.
    """
    m1, m2, _ = margins
    if margin_gradient not in ("exact", "straight_through"):
        raise ValueError(f"margin_gradient must be 'exact' or 'straight_through', got {margin_gradient!r}")
    if m1 < 1.0 or not 0.0 <= m2 < math.pi:
        raise ValueError(f"margins must have m1 >= 1 and 0 <= m2 < pi, so that the target falls with the angle, got {margins}")
    if embeddings.shape[1] != class_centers.shape[1]:
        raise ValueError(f"embeddings must be (B, {class_centers.shape[1]}) to match class_centers, got {tuple(embeddings.shape)}")
    cos = F.normalize(embeddings.float()) @ F.normalize(class_centers.float()).t()
    target = cos.gather(1, labels[:, None])
    shifted = target_cosine_with_margin(target, margins)
    if margin_gradient == "straight_through":
        shifted = target + (shifted - target).detach()
    loss = F.cross_entropy(cos.scatter(1, labels[:, None], shifted) * scale, labels)
    return loss, cos.detach().argmax(1) == labels
