"""The normalizer of the published SCF code: SciPy's scaled Bessel function on the host, and a custom gradient.

    ive_v(kappa)   = exp(-kappa) I_v(kappa)                                            scipy.special.ive
    log I_v(kappa) ~ log(1e-6 + ive_v(kappa)) + kappa
    log C_d(kappa) ~ v log(1e-6 + kappa) - (d/2) log(2 pi) - log I_v(kappa),  v = d/2 - 1
    d ive_v/dkappa = ive_(v-1)(kappa) - ive_v(kappa) (v + kappa) / kappa               DLMF 10.29.2

Written from the formulas that the code released with Li et al., "Spherical Confidence Learning for Face Recognition"
(CVPR 2021), evaluates. Kept as there: float32, a round trip between device and host for each evaluation, and three
evaluations for a value and its gradient. Left out: its special cases for v = 0 and v = 1, which call other routines for
the same numbers.
"""

import math
from typing import Any

import scipy.special
import torch

OFFSET = 1e-6  # swamps ive_v wherever that is smaller: at v = 255 for every kappa below about 3200


class _ScaledBessel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: float, kappa: torch.Tensor) -> torch.Tensor:
        ctx.order = order
        ctx.save_for_backward(kappa)
        on_host = kappa.detach().cpu().numpy()
        return torch.from_numpy(scipy.special.ive(order, on_host, dtype=on_host.dtype)).to(kappa.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        (kappa,) = ctx.saved_tensors
        lower, same = _ScaledBessel.apply(ctx.order - 1, kappa), _ScaledBessel.apply(ctx.order, kappa)
        return None, grad * (lower - same * (ctx.order + kappa) / kappa)


def published_log_bessel_i(order: float, kappa: torch.Tensor) -> torch.Tensor:
    """Returns the published approximation of log I_order(kappa), off by hundreds at moderate kappa.

    Args:
        order: v = d/2 - 1.
        kappa: float32 or float64 tensor of at least one dimension, > 0; float32 in the published code.
    Returns:
        A tensor like kappa, differentiable in kappa.
    """
    return torch.log(OFFSET + _ScaledBessel.apply(order, kappa)) + kappa


def published_log_vmf_normalizer(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the published approximation of log C_d(kappa): its loss without the cosine and the radius; dim is d."""
    order = dim / 2 - 1
    return order * torch.log(OFFSET + kappa) - dim / 2 * math.log(2 * math.pi) - published_log_bessel_i(order, kappa)
