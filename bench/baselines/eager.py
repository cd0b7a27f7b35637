"""The exact formulas in plain PyTorch, differentiated by autograd, as a careful user would write them in ten lines.

    log I_v(kappa) = s - v asinh(v / kappa) - 1/2 log(2 pi s) + log sum_k U_k(t) / v^k
    s = sqrt(v^2 + kappa^2),    t = v / s
    log C_d(kappa) = v log kappa - (d/2) log(2 pi) - log I_v(kappa)
    loss = -kappa cos - log C_d(kappa) + d log r

The uniform expansion of DLMF 10.41.3 with U_1 to U_3 of DLMF 10.41.10; v asinh(v / kappa) is its v log((v + s) /
kappa). Good to about 1/v^4: for orders of 30 and more.
"""

import math

import torch
import torch.nn.functional as F


def eager_log_bessel_i(order: float, kappa: torch.Tensor) -> torch.Tensor:
    """Returns log I_order(kappa) for an order of 30 or more and a float tensor kappa > 0; differentiable in kappa."""
    s = torch.sqrt(order**2 + kappa**2)
    t = order / s
    t2 = t**2
    u1 = t * (3 - 5 * t2) / 24
    u2 = t2 * (81 + t2 * (-462 + 385 * t2)) / 1152
    u3 = t * t2 * (30375 + t2 * (-369603 + t2 * (765765 - 425425 * t2))) / 414720
    series = u1 / order + u2 / order**2 + u3 / order**3
    return s - order * torch.asinh(order / kappa) - 0.5 * torch.log(2 * math.pi * s) + torch.log1p(series)


def eager_log_vmf_normalizer(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns log C_d(kappa) for dim >= 62; differentiable in kappa."""
    order = dim / 2 - 1
    return order * torch.log(kappa) - dim / 2 * math.log(2 * math.pi) - eager_log_bessel_i(order, kappa)


def eager_scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
) -> torch.Tensor:
    """Returns the exact SCF loss of each sample, (B,).

    Args:
        features: (B, d) float.
        log_kappa: (B,) float.
        class_centers: (C, d) float, rows of any length.
        labels: (B,) int64 in [0, C).
    """
    dim = features.shape[1]
    kappa = torch.exp(log_kappa)
    cos = (F.normalize(features, dim=1) * F.normalize(class_centers[labels], dim=1)).sum(dim=1)
    return -kappa * cos - eager_log_vmf_normalizer(kappa, dim) + dim * math.log(radius)
