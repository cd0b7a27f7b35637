"""The SCF loss in plain PyTorch: the path of CPU tensors. ``scf_loss`` has the formulas and the operators."""

import torch

from scf_fast.kernels._center_rows_torch import measure_rows
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels.debye import debye_torch


def scf_loss_torch(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    terms: torch.Tensor,
    *,
    plan: DebyePlan,
    constant: float,
    epsilon: float,
    published: bool,
    mean: bool,
) -> None:
    """Fills loss and slope to the accuracy of their dtype, and coefficients and terms unless they are empty."""
    dtype = loss.dtype
    feature_norm, center_norm, one_minus_cos = measure_rows(features, class_centers, labels, dtype)
    order = plan.order[0]
    log_kappa = log_kappa.double().clamp(max=plan.log_kappa_max)
    growth = log_kappa.exp()  # d kappa / d log_kappa
    kappa = growth + epsilon if published else growth
    bessel = debye_torch(kappa, plan, with_power=published)
    phi = (bessel.psi - kappa) + bessel.psi_tail
    if published:
        scaled_bessel = phi.exp()
        floored_bessel = scaled_bessel + epsilon
        floored_kappa = kappa + epsilon
        l2, log_floored_bessel = -order * floored_kappa.log(), floored_bessel.log()
        torch.add(kappa * one_minus_cos + l2, log_floored_bessel + constant, out=loss)
        slopes = growth * (
            one_minus_cos - order / floored_kappa + scaled_bessel / floored_bessel * (order / kappa - bessel.complement)
        )
    else:
        torch.add(kappa * one_minus_cos, phi, out=loss)
        slopes = kappa * (one_minus_cos - bessel.complement)
    share = len(labels) if mean else 1
    torch.div(slopes, share, out=slope)
    if coefficients.numel() or terms.numel():
        cos = 1 - one_minus_cos
        pull = kappa * cos
    if coefficients.numel():
        rows = 1 / feature_norm, 1 / center_norm, kappa / share, pull / share
        coefficients.copy_(torch.stack(rows))
    if terms.numel():
        l2 = l2 if published else -order * log_kappa
        l3 = log_floored_bessel + kappa if published else phi - constant + kappa - l2
        torch.stack((cos, kappa, -pull, l2, l3), out=terms)
