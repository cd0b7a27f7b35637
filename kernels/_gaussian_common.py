"""Shared by the losses of Gaussians around unit directions: the range of log variances."""

import math

import torch

LOG_VARIANCE_LIMIT = 60.0  # beyond, exp(-log_variance) and its products with squares of 2^10 rows leave float32
LOG_TWO_PI = math.log(2 * math.pi)


def hold_log_variance(log_variance: torch.Tensor) -> torch.Tensor:
    """Returns log variances in float64, those beyond the limit at the limit; NaN stays."""
    return log_variance.double().clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
