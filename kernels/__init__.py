"""Fused Triton kernels, each with a PyTorch twin: CUDA tensors run Triton, all others PyTorch, and `backend` insists on either."""

from .log_bessel import inverse_mean_resultant_length, log_bessel_i, log_vmf_normalizer, mean_resultant_length, psi_and_ratio
from .scf_loss import SCFTerms, scf_loss

__all__ = [
    "SCFTerms",
    "inverse_mean_resultant_length",
    "log_bessel_i",
    "log_vmf_normalizer",
    "mean_resultant_length",
    "psi_and_ratio",
    "scf_loss",
]
