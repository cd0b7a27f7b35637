"""Scoring and pooling as they are usually written: plain PyTorch on whole matrices, the published normalizer a band of
rows at a time, loops in Python.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines.eager import eager_log_vmf_normalizer
from bench.baselines.published_normalizer import published_log_vmf_normalizer

_BAND = 1 << 22  # scores


def _scores(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float,
    log_normalizer: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    dim = mu1.shape[1]
    cos = F.normalize(mu1) @ F.normalize(mu2).T
    kappa_sum = torch.sqrt(kappa1[:, None] ** 2 + kappa2**2 + 2 * kappa1[:, None] * kappa2 * cos)
    return (
        log_normalizer(kappa1, dim)[:, None]
        + log_normalizer(kappa2, dim)
        - log_normalizer(kappa_sum, dim)
        - dim * math.log(radius)
    )


def eager_similarity_matrix(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float = 64.0
) -> torch.Tensor:
    """Returns Eqn (13) of all pairs, (N, M), in the arguments' dtype for d >= 62; every step makes such a tensor."""
    return _scores(mu1, kappa1, mu2, kappa2, radius, eager_log_vmf_normalizer)


def published_similarity_matrix(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float = 64.0
) -> torch.Tensor:
    """Returns the same with the published normalizer, by SciPy on the host, a band of rows at a time. Its values
    inherit that normalizer's error.
    """
    height = max(1, _BAND // len(mu2))
    return torch.cat(
        [
            _scores(mu1[rows], kappa1[rows], mu2, kappa2, radius, published_log_vmf_normalizer)
            for rows in torch.arange(len(mu1)).split(height)
        ]
    )


def pool_by_loop(features: np.ndarray, template_ids: np.ndarray, media_ids: np.ndarray) -> np.ndarray:
    """Pools templates as IJB scripts do: the mean of each medium, summed over the template and normalized.

    Args:
        features: (N, D), already weighted.
        template_ids, media_ids: (N,).
    Returns:
        (T, D) in ascending order of template ids.
    """
    pooled = []
    for template in np.unique(template_ids):
        rows = np.flatnonzero(template_ids == template)
        media = media_ids[rows]
        total = sum(features[rows[media == medium]].mean(axis=0) for medium in np.unique(media))
        pooled.append(total / np.linalg.norm(total))
    return np.array(pooled)


def cosine_in_chunks(features: np.ndarray, first: np.ndarray, second: np.ndarray, at_once: int = 100_000) -> np.ndarray:
    """Returns the cosines (P,) of rows first[k] and second[k] of unit features (T, D), in chunks of 100,000 pairs as in
    IJB scripts.
    """
    pieces = range(0, len(first), at_once)
    return np.concatenate(
        [
            np.sum(features[first[start : start + at_once]] * features[second[start : start + at_once]], axis=-1)
            for start in pieces
        ]
    )
