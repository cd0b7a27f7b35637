"""Fused Triton kernels, each with a PyTorch twin: CUDA tensors run Triton, all others PyTorch, and `backend` insists on either."""

from .log_bessel import inverse_mean_resultant_length, log_bessel_i, log_vmf_normalizer, mean_resultant_length, psi_and_ratio
from .margin_softmax import margin_softmax_loss
from .scf_loss import SCFTerms, scf_loss
from .template_pooling import pool_templates
from .vmf_similarity import vmf_similarity, vmf_similarity_matrix

__all__ = [
    "SCFTerms",
    "inverse_mean_resultant_length",
    "log_bessel_i",
    "log_vmf_normalizer",
    "margin_softmax_loss",
    "mean_resultant_length",
    "pool_templates",
    "psi_and_ratio",
    "scf_loss",
    "vmf_similarity",
    "vmf_similarity_matrix",
]
