"""Fused Triton kernels, each with a PyTorch twin. CUDA tensors run Triton, all others PyTorch; the argument ``backend``
forces one of them.
"""

from scf_fast.kernels.gaussian_center_loss import GaussianTerms, gaussian_center_loss
from scf_fast.kernels.log_bessel import (
    inverse_mean_resultant_length,
    log_bessel_i,
    log_vmf_normalizer,
    mean_resultant_length,
    psi_and_ratio,
)
from scf_fast.kernels.margin_softmax import (
    MarginSoftmaxStatistics,
    check_margin_softmax,
    margin_softmax_gradients,
    margin_softmax_loss,
    margin_softmax_rows,
    margin_softmax_statistics,
    mean_over_labeled,
    target_cosine_with_margin,
)
from scf_fast.kernels.pair_likelihood_loss import PairTerms, pair_likelihood_loss
from scf_fast.kernels.scf_loss import SCFTerms, scf_loss
from scf_fast.kernels.template_pooling import pool_templates
from scf_fast.kernels.vmf_similarity import neutral_radius, vmf_similarity, vmf_similarity_from_cosine
from scf_fast.kernels.vmf_similarity_tiles import (
    vmf_similarity_histogram,
    vmf_similarity_matrix,
    vmf_similarity_top_k,
)

__all__ = [
    "GaussianTerms",
    "MarginSoftmaxStatistics",
    "PairTerms",
    "SCFTerms",
    "check_margin_softmax",
    "gaussian_center_loss",
    "inverse_mean_resultant_length",
    "log_bessel_i",
    "log_vmf_normalizer",
    "margin_softmax_gradients",
    "margin_softmax_loss",
    "margin_softmax_rows",
    "margin_softmax_statistics",
    "mean_over_labeled",
    "mean_resultant_length",
    "neutral_radius",
    "pair_likelihood_loss",
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

if __name__ == "kernels":  # found in a checkout's top folder, under the name of another project's package
    from scf_fast.checkout_names import hand_over

    hand_over(__name__)
