"""Scoring and pooling as they are usually written: plain PyTorch with whole matrices, the published normalizer band by
band, loops in Python.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines.eager import eager_log_vmf_normalizer
from bench.baselines.published_normalizer import published_log_vmf_normalizer

_BAND = 1 << 22  # scores


def _scores(mu1, kappa1, mu2, kappa2, radius, log_normalizer):
    dim = mu1.shape[1]
    cos = F.normalize(mu1) @ F.normalize(mu2).T
    kappa_sum = torch.sqrt(kappa1[:, None] ** 2 + kappa2**2 + 2 * kappa1[:, None] * kappa2 * cos)
    return (
        log_normalizer(kappa1, dim)[:, None]
        + log_normalizer(kappa2, dim)
        - log_normalizer(kappa_sum, dim)
        - dim * math.log(radius)
    )


def eager_similarity_matrix(mu1, kappa1, mu2, kappa2, radius=64.0):
    """Eqn (13) of all pairs, (N, M), in the arguments' dtype, every step a tensor of that size; dim >= 62."""
    return _scores(mu1, kappa1, mu2, kappa2, radius, eager_log_vmf_normalizer)


def published_similarity_matrix(mu1, kappa1, mu2, kappa2, radius=64.0):
    """The same with the published normalizer, on the host by SciPy, a band of rows at a time. Its values are off as
    that normalizer is.
    """
    height = max(1, _BAND // len(mu2))
    return torch.cat(
        [
            _scores(mu1[rows], kappa1[rows], mu2, kappa2, radius, published_log_vmf_normalizer)
            for rows in torch.arange(len(mu1)).split(height)
        ]
    )


def pool_by_loop(features, template_ids, media_ids):
    """Templates as IJB scripts pool them: for each template the mean of each medium, summed and normalized; (T, D) in
    ascending order of ids.

    Args:
        features: (N, D) NumPy, weighted already.
        template_ids, media_ids: (N,) NumPy.
    """
    pooled = []
    for template in np.unique(template_ids):
        rows = np.flatnonzero(template_ids == template)
        media = media_ids[rows]
        total = sum(features[rows[media == medium]].mean(axis=0) for medium in np.unique(media))
        pooled.append(total / np.linalg.norm(total))
    return np.array(pooled)


def cosine_in_chunks(features, first, second, at_once=100_000):
    """Cosines (P,) of rows first[k] and second[k] of unit features (T, D), NumPy, in pieces of 100,000 pairs as IJB
    scripts take them.
    """
    pieces = range(0, len(first), at_once)
    return np.concatenate(
        [
            np.sum(features[first[start : start + at_once]] * features[second[start : start + at_once]], axis=-1)
            for start in pieces
        ]
    )
