"""The Gaussian center loss in plain PyTorch: the path of CPU tensors. ``gaussian_center_loss`` has the formulas and the
operators.
"""

import torch

from scf_fast.kernels._center_rows_torch import gather_rows, measure_rows
from scf_fast.kernels._gaussian_common import LOG_TWO_PI, hold_log_variance


def gaussian_center_loss_torch(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    *,
    mean: bool,
) -> None:
    """Fills loss and slope to the accuracy of their dtype, and coefficients and terms unless they are empty."""
    fill = _diagonal_loss if log_variance.ndim == 2 else _scalar_loss
    fill(features, log_variance, class_centers, labels, loss, slope, coefficients, terms, len(labels) if mean else 1)


def _scalar_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    share: int,
) -> None:
    feature_norm, center_norm, one_minus_cos = measure_rows(features, class_centers, labels, loss.dtype)
    half_dim = features.shape[1] / 2
    log_variance = hold_log_variance(log_variance)
    precision = torch.exp(-log_variance)
    pull = precision * one_minus_cos
    torch.add(pull, half_dim * (log_variance + LOG_TWO_PI), out=loss)
    torch.div(half_dim - pull, share, out=slope)
    cos = 1 - one_minus_cos
    if coefficients.numel():
        weight = precision / share
        coefficients.copy_(torch.stack((1 / feature_norm, 1 / center_norm, weight, weight * cos)))
    if terms.numel():
        terms.copy_(torch.stack((cos, precision)))


def _diagonal_loss(
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    share: int,
) -> None:
    constant = features.shape[1] / 2 * LOG_TWO_PI
    for chunk, f, c in gather_rows(features, class_centers, labels, torch.float64):
        f_inverse, c_inverse = (1 / torch.linalg.vector_norm(x, dim=1) for x in (f, c))
        mu, center = f * f_inverse[:, None], c * c_inverse[:, None]
        log_variances = hold_log_variance(log_variance[chunk])
        precision = torch.exp(-log_variances)
        difference = mu - center
        pull = precision * difference
        square = pull * difference
        loss[chunk] = (square.sum(dim=1) + log_variances.sum(dim=1)) / 2 + constant
        slope[chunk] = torch.rsub(square, 1).mul_(0.5 / share)
        if coefficients.numel():
            along = (pull * mu).sum(dim=1) / share, -(pull * center).sum(dim=1) / share
            coefficients[:, chunk] = torch.stack((f_inverse, c_inverse, *along)).to(coefficients.dtype)
        if terms.numel():
            terms[0, chunk] = 1 - difference.square_().sum(dim=1) / 2
            terms[1, chunk] = precision.mean(dim=1)


def diagonal_gradients_torch(
    grad: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    log_variance: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    grad_features: torch.Tensor,
    grad_class_centers: torch.Tensor,
    *,
    mean: bool,
) -> None:
    """Fills whichever of the two gradients is not empty."""
    grad = grad.double().expand(len(labels))
    share = len(labels) if mean else 1
    for chunk, f, c in gather_rows(features, class_centers, labels, torch.float64):
        f_inverse, c_inverse, along_f, along_c = coefficients[:, chunk].double().unsqueeze(2)
        weight = grad[chunk, None]
        mu, center = f * f_inverse, c * c_inverse
        pull = torch.exp(-hold_log_variance(log_variance[chunk])) * (mu - center) / share
        if grad_features.numel():
            grad_features[chunk] = ((pull - along_f * mu) * (weight * f_inverse)).to(grad_features.dtype)
        if grad_class_centers.numel():
            of_centers = (pull + along_c * center) * (-weight * c_inverse)
            grad_class_centers.index_add_(0, labels[chunk], of_centers.to(grad_class_centers.dtype))
