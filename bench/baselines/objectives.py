"""The other losses of the published table in plain PyTorch, as a careful user would write them: differentiated by
autograd, float32, and also through torch.compile.

Rows of a batch for pairs come in groups of ``GROUP`` rows of one person, as PFE's sampler deals them, so that pairs are
slices of a (people, GROUP, d) tensor and no list of pairs is gathered. The fused loss knows nothing of the groups.
"""

import math

import torch
import torch.nn.functional as F

from bench.baselines.eager import eager_log_vmf_normalizer

GROUP = 4


def eager_gaussian_center_loss(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Returns the mean Gaussian center loss; log_variance is (B,)."""
    dim = features.shape[1]
    cos = (F.normalize(features, dim=1) * F.normalize(class_centers[labels], dim=1)).sum(dim=1)
    loss = torch.exp(-log_variance) * (1 - cos) + dim / 2 * (log_variance + math.log(2 * math.pi))
    return loss.mean()


def _pairs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first and the second row of each pair, (people, pairs, ...)."""
    groups = rows.unflatten(0, (-1, GROUP))
    first, second = torch.triu_indices(GROUP, GROUP, 1, device=rows.device)
    return groups[:, first], groups[:, second]


def eager_pair_likelihood_loss(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Returns the mean negative mutual likelihood score of all pairs; log_variance is (B,) or (B, d). Class centers and
    labels are there for the common signature.
    """
    dim = features.shape[1]
    mu1, mu2 = _pairs(F.normalize(features, dim=1))
    variance1, variance2 = _pairs(torch.exp(log_variance))
    variance = variance1 + variance2
    square = (mu1 - mu2) ** 2
    if variance.ndim == 2:
        score = square.sum(dim=-1) / variance + dim * torch.log(variance)
    else:
        score = (square / variance + torch.log(variance)).sum(dim=-1)
    return score.mean() / 2 + dim / 2 * math.log(2 * math.pi)


def eager_vmf_pair_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
) -> torch.Tensor:
    """Returns the mean negative score, Eqn (13), of all pairs; log_kappa is (B,)."""
    dim = features.shape[1]
    mu1, mu2 = _pairs(F.normalize(features, dim=1))
    kappa1, kappa2 = _pairs(torch.exp(log_kappa))
    length = (kappa1[..., None] * mu1 + kappa2[..., None] * mu2).norm(dim=-1)
    log_c1, log_c2, log_c = (eager_log_vmf_normalizer(kappa, dim) for kappa in (kappa1, kappa2, length))
    return (log_c - log_c1 - log_c2).mean() + dim * math.log(radius)


# As in ``compiled``: each size is compiled for itself.
compiled_gaussian_center_loss = torch.compile(eager_gaussian_center_loss, dynamic=False, fullgraph=True)
compiled_pair_likelihood_loss = torch.compile(eager_pair_likelihood_loss, dynamic=False, fullgraph=True)
compiled_vmf_pair_loss = torch.compile(eager_vmf_pair_loss, dynamic=False, fullgraph=True)
