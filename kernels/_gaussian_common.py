"""Shared by the losses and scores of Gaussians around unit directions: argument checks, constants, log variances."""

import math

import torch

from scf_fast.kernels._common import MAX_DIM, check_floating, promoted_dtype

# exp(60) is 1e26: times squared distances of up to 4, summed over dimensions and batches, it stays within float32.
LOG_VARIANCE_LIMIT = 60.0
LOG_TWO_PI = math.log(2 * math.pi)


def check_gaussian_faces(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.dtype:
    """Checks the arguments that all public functions share, and returns the type of their results."""
    tensors = {"mu1": mu1, "log_variance1": log_variance1, "mu2": mu2, "log_variance2": log_variance2}
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    if mu1.ndim != 2 or mu2.ndim != 2 or mu1.shape[1] != mu2.shape[1] or not 2 <= mu1.shape[1] <= MAX_DIM:
        raise ValueError(
            f"mu1 and mu2 must be (N, D) and (M, D) with D in 2 .. {MAX_DIM}, got {tuple(mu1.shape)} and "
            f"{tuple(mu2.shape)}"
        )
    for index, mu, log_variance in (1, mu1, log_variance1), (2, mu2, log_variance2):
        if log_variance.shape not in (mu.shape[:1], mu.shape):
            raise ValueError(
                f"log_variance{index} must be ({len(mu)},), one per row of mu{index}, or {tuple(mu.shape)}, one per "
                f"dimension, got {tuple(log_variance.shape)}"
            )
    if log_variance1.ndim != log_variance2.ndim:
        raise ValueError(
            "log_variance1 and log_variance2 must both have one value per row or both one per dimension, got "
            f"{tuple(log_variance1.shape)} and {tuple(log_variance2.shape)}; repeat the former with "
            "log_variance[:, None].expand(-1, D)"
        )
    return promoted_dtype(*tensors.values())


def unit(mu: torch.Tensor) -> torch.Tensor:
    """Returns the unit rows of directions in float64; NaN for a zero row."""
    mu = mu.double()
    return mu / torch.linalg.vector_norm(mu, dim=1, keepdim=True)


def gaussian_constant(dim: int) -> float:
    """Returns the part of a score that depends on neither face: log of the standard normal density at its mean."""
    return -dim / 2 * math.log(2 * math.pi)


def hold_log_variance(log_variance: torch.Tensor) -> torch.Tensor:
    """Returns log variances, those beyond the limit at the limit; NaN stays."""
    return log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
