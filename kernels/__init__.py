"""Fused Triton kernels, each with a PyTorch twin: CUDA tensors run Triton, all others PyTorch, and `backend` insists on either."""

from .log_bessel import inverse_mean_resultant_length, log_bessel_i, log_vmf_normalizer, mean_resultant_length, psi_and_ratio
from .margin_softmax import (
    MarginSoftmaxStatistics,
    check_margin_softmax,
    margin_softmax_gradients,
    margin_softmax_loss,
    margin_softmax_rows,
    margin_softmax_statistics,
    mean_over_labelled,
    target_cosine_with_margin,
)
from .scf_loss import SCFTerms, scf_loss
from .template_pooling import pool_templates
from .vmf_similarity import (
    neutral_radius,
    vmf_similarity,
    vmf_similarity_from_cosine,
    vmf_similarity_histogram,
    vmf_similarity_matrix,
    vmf_similarity_top_k,
)

__all__ = [
    "MarginSoftmaxStatistics",
    "SCFTerms",
    "check_margin_softmax",
    "inverse_mean_resultant_length",
    "log_bessel_i",
    "log_vmf_normalizer",
    "margin_softmax_gradients",
    "margin_softmax_loss",
    "margin_softmax_rows",
    "margin_softmax_statistics",
    "mean_over_labelled",
    "mean_resultant_length",
    "neutral_radius",
    "pool_templates",
    "psi_and_ratio",
    "scf_loss",
    "target_cosine_with_margin",
    "vmf_similarity",
    "vmf_similarity_from_cosine",
    "vmf_similarity_histogram",
    "vmf_similarity_matrix",
    "vmf_similarity_top_k",
]
