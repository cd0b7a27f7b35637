"""The slope that a confidence net trains by under the exact SCF loss: the loss's own, weighted so that it neither
explodes nor vanishes.

The loss has the slope kappa (A_d(kappa) - cos) in log kappa. Above the optimum it grows with kappa without end, and one
such step fills Adam's second moment for thousands of steps; below, it vanishes with kappa, and a net that is thrown
there stays. Trained by

    w(kappa) (A_d(kappa) - cos),  w(kappa) = kappa within [(d - 1) / 2, 32 (d - 1)], the nearer end outside

it is between -(d - 1) / 2 and 64 (d - 1) everywhere. The optimum is the same, whatever the scatter of the cosines: w is
a positive function of the predicted kappa alone, so E[cos | x] = A_d(kappa(x)) is where the mean slope is zero. (A
bound on the slope of each sample would move it: ``python -m bench.stage2_robustness`` has the comparison.)
"""

import math

import torch

_LOG_KAPPA_MAX = 60 * math.log(2)  # of ``scf_loss``: larger values count as this one
_LOW, _HIGH = 0.5, 32.0  # of d - 1: kappa that fits a cosine of about 0.4, and of 0.984


class _Weighted(torch.autograd.Function):
    """log kappa (B,), with a gradient of w / kappa times that of the loss."""

    @staticmethod
    def forward(ctx, log_kappa, dim):
        ctx.save_for_backward(log_kappa)
        ctx.dim = dim
        return log_kappa.view_as(log_kappa)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (log_kappa,) = ctx.saved_tensors
        own = log_kappa.float().clamp(max=_LOG_KAPPA_MAX)
        width = math.log(ctx.dim - 1)
        weight = (own.clamp(width + math.log(_LOW), width + math.log(_HIGH)) - own).exp()
        return (gradient * weight).to(gradient.dtype), None


def weight_slope(log_kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns log kappa as it is; the gradient that reaches it from the exact SCF loss becomes the bounded slope of
    this module's head, which is not the derivative of the loss.

    Args:
        log_kappa: (B,), what the loss is about to take.
        dim: d, at least 2.
    """
    return _Weighted.apply(log_kappa, dim)
