"""Shared by the losses of Gaussians around unit directions: the range of log variances."""

import math

import torch

# exp(60) is 1e26: times squared distances of up to 4, summed over dimensions and batches, it stays within float32.
LOG_VARIANCE_LIMIT = 60.0
LOG_TWO_PI = math.log(2 * math.pi)


def hold_log_variance(log_variance: torch.Tensor) -> torch.Tensor:
    """Returns log variances, those beyond the limit at the limit; NaN stays."""
    return log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
