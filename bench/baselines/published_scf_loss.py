"""The published SCF loss, composed operation by operation as in its training step.

    mu = features / |features|                        w = class_centers[labels]
    log kappa = log(1e-6 + exp(log_kappa))            cos = <mu, w> / r
    l1 = -kappa cos      l2 = -(d/2 - 1) log(1e-6 + kappa)      l3 = log(1e-6 + ive_(d/2-1)(kappa)) + kappa
    loss = l1 + l2 + l3 + (d/2) log(2 pi) + d log r

Written from the formulas that the code released with Li et al., "Spherical Confidence Learning for Face Recognition"
(CVPR 2021), evaluates: the clamp of log kappa is its confidence net's, the rest its loss and its training loop.
"""

import math
from typing import NamedTuple

import torch

from bench.baselines.published_normalizer import OFFSET, published_log_bessel_i


class PublishedLoss(NamedTuple):
    """The loss of each sample and the three terms that the published code logs, each (B,)."""

    loss: torch.Tensor
    l1: torch.Tensor
    l2: torch.Tensor
    l3: torch.Tensor


def published_scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
) -> PublishedLoss:
    """Returns the published loss of each sample, differentiable in features and log_kappa.

    Args:
        features: (B, d) float, the backbone's output before normalization.
        log_kappa: (B,) float, the confidence net's last linear output.
        class_centers: (C, d) float, rows of length radius: the published code scales them once, on load.
        labels: (B,) int64 in [0, C).
    """
    dim = features.shape[1]
    mu = features / torch.norm(features, dim=1, keepdim=True)
    kappa = torch.exp(torch.log(OFFSET + torch.exp(log_kappa)))
    cos = torch.sum(mu * class_centers[labels, :], dim=1) / radius
    l1 = -kappa * cos
    l2 = -(dim / 2 - 1) * torch.log(OFFSET + kappa)
    l3 = published_log_bessel_i(dim / 2 - 1, kappa)
    return PublishedLoss(l1 + l2 + l3 + dim / 2 * math.log(2 * math.pi) + dim * math.log(radius), l1, l2, l3)
