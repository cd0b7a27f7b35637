"""The Gaussian center loss: KL divergence between a Dirac at the class center and a Gaussian around the direction of
the features ("SCF-G" of the table of Li et al., CVPR 2021). The forward pass reads its arguments once and leaves what
the backward pass needs.

    mu = features / |features|      w = class_centers[labels] / |class_centers[labels]|
    s_l^2 = exp(log_variance_l)     D = mu - w

    loss = sum_l [ D_l^2 / (2 s_l^2) + log s_l ] + (d/2) log(2 pi)
    d loss / d log_variance_l = (1 - D_l^2 / s_l^2) / 2
    d loss / d features = (g - (g . mu) mu) / |features|,  g_l = D_l / s_l^2         and likewise for the class center

With one variance s^2 = 1 / q for all dimensions, |D|^2 = 2 (1 - cos):

    loss = q (1 - cos) - (d/2) log q + (d/2) log(2 pi)              d loss / d log_variance = d/2 - q (1 - cos)

and its gradients in features and class centers are those of q (1 - cos), as the SCF loss has them with kappa = q. Mean
and class center have length one: the radius of the sphere does not enter.
"""

from typing import Literal, NamedTuple, overload

import torch

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import promoted_dtype, transformed
from scf_fast.kernels._gaussian_center_loss_torch import diagonal_gradients_torch, gaussian_center_loss_torch
from scf_fast.kernels._gaussian_center_loss_triton import launch_diagonal_gradients, launch_gaussian_center_loss
from scf_fast.kernels._loss_arguments import (
    LossOption,
    center_loss_options,
    check_center_loss,
    check_labels,
    reduce_rows,
)
from scf_fast.kernels.scf_loss import _scf_loss_backward


class GaussianTerms(NamedTuple):
    """Terms that a training run logs, (B,) each and without gradient: the cosine to the class center, and the mean over
    the dimensions of 1 / s_l^2.
    """

    cos: torch.Tensor
    precision: torch.Tensor


# ---- operators


@torch.library.custom_op("scf::gaussian_center_loss", mutates_args=())
def _gaussian_center_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    options: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss and what its backward pass needs; ``options`` are of ``LossOption``.

    loss; d loss / d log_variance, of its shape; coefficients (4, B) or, not asked for, (4, 0): 1 / |features|,
    1 / |center|, and with one variance for all dimensions q and q cos, else g . mu and -g . w, for the reduced loss;
    terms, (2, B) or (2, 0).
    """
    batch = features.shape[0]
    if (options & LossOption.DEBUG or not labels.is_cuda) and batch:
        check_labels(labels, len(class_centers))
    rows, slope, coefficients, terms = outputs = _allocate_outputs(features, log_variance, class_centers, options)
    if batch:
        fill_loss = launch_gaussian_center_loss if options & LossOption.TRITON else gaussian_center_loss_torch
        fill_loss(features, log_variance, class_centers, labels, *outputs, mean=bool(options & LossOption.MEAN))
    return reduce_rows(rows, options), slope, coefficients, terms


@_gaussian_center_loss.register_fake
def _(features, log_variance, class_centers, labels, options):
    rows, *others = _allocate_outputs(features, log_variance, class_centers, options)
    return (rows.new_empty(()) if options & (LossOption.MEAN | LossOption.SUM) else rows, *others)


def _allocate_outputs(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, options: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns uninitialized loss rows, slope, coefficients and terms."""
    batch = features.shape[0]
    dtype, device = promoted_dtype(features, log_variance, class_centers), features.device
    return (
        torch.empty(batch, dtype=dtype, device=device),
        torch.empty(log_variance.shape, dtype=dtype, device=device),
        torch.empty((4, batch if options & LossOption.COEFFICIENTS else 0), dtype=dtype, device=device),
        torch.empty((2, batch if options & LossOption.TERMS else 0), dtype=dtype, device=device),
    )


@torch.library.custom_op("scf::gaussian_center_loss_backward", mutates_args=())
def _diagonal_backward(
    grad: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    for_features: bool,
    for_class_centers: bool,
    options: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of (B, d) log variances, features and class centers, empty where not asked for."""
    batch, dim = features.shape
    grad_features = torch.empty(
        features.shape if for_features else (0, dim), dtype=features.dtype, device=features.device
    )
    grad_class_centers = class_centers.new_zeros(class_centers.shape if for_class_centers else (0, dim))
    if batch and (for_features or for_class_centers):
        fill_gradients = launch_diagonal_gradients if options & LossOption.TRITON else diagonal_gradients_torch
        fill_gradients(
            grad,
            coefficients,
            features,
            log_variance,
            class_centers,
            labels,
            grad_features,
            grad_class_centers,
            mean=bool(options & LossOption.MEAN),
        )
    return (grad.unsqueeze(-1) * slope).to(log_variance.dtype), grad_features, grad_class_centers


@_diagonal_backward.register_fake
def _(
    grad,
    slope,
    coefficients,
    features,
    log_variance,
    class_centers,
    labels,
    for_features,
    for_class_centers,
    options,
):
    dim = features.shape[1]
    return (
        torch.empty(slope.shape, dtype=log_variance.dtype, device=slope.device),
        torch.empty(features.shape if for_features else (0, dim), dtype=features.dtype, device=features.device),
        class_centers.new_empty(class_centers.shape if for_class_centers else (0, dim)),
    )


def _setup(ctx, inputs, output):
    features, log_variance, class_centers, labels, ctx.options = inputs
    _, slope, coefficients, terms = output
    ctx.mark_non_differentiable(slope, coefficients, terms)
    ctx.save_for_backward(slope, coefficients, features, log_variance, class_centers, labels)


def _backward(ctx, grad, *_):
    for_features, _, for_class_centers, *_ = ctx.needs_input_grad
    if ctx.saved_tensors[0].ndim == 2:
        gradients = _diagonal_backward(grad, *ctx.saved_tensors, for_features, for_class_centers, ctx.options)
    else:  # the loss is q (1 - cos) and what does not depend on the directions: the SCF loss with kappa = q
        triton_kernel = bool(ctx.options & LossOption.TRITON)
        gradients = _scf_loss_backward(grad, *ctx.saved_tensors, for_features, for_class_centers, triton_kernel)
    grad_log_variance, grad_features, grad_class_centers = gradients
    return (
        grad_features if for_features else None,
        grad_log_variance,
        grad_class_centers if for_class_centers else None,
        None,
        None,
    )


_gaussian_center_loss.register_autograd(_backward, setup_context=_setup)


def _transformed_loss(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, options: int
) -> torch.Tensor | tuple[torch.Tensor, GaussianTerms]:
    """Returns what ``gaussian_center_loss`` does, under a transform of ``torch.func`` or in forward mode."""
    dtype = promoted_dtype(features, log_variance, class_centers)
    rows, terms = _transforms.gaussian_center_loss_rows(features, log_variance, class_centers, labels)
    loss = reduce_rows(rows, options).to(dtype)
    if options & LossOption.TERMS:
        return loss, GaussianTerms(*(term.detach().to(dtype) for term in terms))
    return loss


# ---- public function


@overload
def gaussian_center_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
    return_terms: Literal[False] = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor: ...


@overload
def gaussian_center_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
    *,
    return_terms: Literal[True],
    backend: str = "auto",
    debug: bool = False,
) -> tuple[torch.Tensor, GaussianTerms]: ...


def gaussian_center_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GaussianTerms]:
    """Gaussian center loss ("SCF-G") of a batch, with its gradient from the same pass; the head of this module has the
    formulas and their source.

    Args:
        features: (B, d) float, embeddings before normalization; d in 2 .. 8192. Half precision is read as it is and
            computed in float32.
        log_variance: (B,) or (B, 1) float, log s^2 of all dimensions; or (B, d), one for each. Values outside -60 .. 60
            count as the nearer of the two, where the gradient still leads back.
        class_centers: (C, d) float, of any length.
        labels: (B,) int32 or int64 in [0, C). On CUDA, a label outside gives NaN in its row.
        reduction: "mean", "sum" or "none"; deterministic.
        return_terms: also return the per-sample terms to log.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
        debug: check the labels on CUDA too, which waits for the device.
    Returns:
        The loss, scalar or (B,), float32 (float64 if any argument is); with return_terms, (loss, GaussianTerms).
        In float32 and with one variance, the loss of a row is within 1e-6 of max(|loss|, q (1 - cos), d/2), and the
        gradient of log_variance within 1e-6 of the larger of q (1 - cos) and d/2. With a variance for each dimension,
        both are those of directions that differ from mu and w by up to 4e-7 in length. Differentiable once, in
        features, log_variance and class_centers; deterministic. A row of zeros has no direction, and gives NaN.
    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown option, or a backend that cannot run.
        IndexError: a label outside [0, C), where values are checked.
    """
    check_center_loss(features, "log_variance", log_variance, class_centers, labels, per_dimension=True)
    options = center_loss_options(features, class_centers, reduction, return_terms, backend, debug)
    if log_variance.shape[1:] != features.shape[1:]:
        log_variance = log_variance.reshape(-1)
    if transformed():
        return _transformed_loss(features, log_variance, class_centers, labels, options)
    loss, _, _, terms = _gaussian_center_loss(features, log_variance, class_centers, labels, options)
    return (loss, GaussianTerms(*terms.unbind(0))) if return_terms else loss
