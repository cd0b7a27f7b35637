"""Mutual likelihood of two Gaussian faces: the PFE similarity of two images.

    v_l   = s1_l^2 + s2_l^2,   mu1 and mu2 of length one
    score = -1/2 sum_l [(mu1_l - mu2_l)^2 / v_l + log v_l] - (d/2) log(2 pi)     (Shi and Jain, ICCV 2019, Eqn (3))
          = -(1 - cos) / v - (d/2) log(2 pi v)                  for one variance in all dimensions (a scalar variance)

It is the log density at 0 of the difference of two independent points, one drawn from each face. With
e_l = (mu1_l - mu2_l) / v_l, the derivatives before mu is normalized are

    d score / d mu1_l = -e_l        d score / d log s1_l^2 = s1_l^2 / 2 (e_l^2 - 1 / v_l)

and those of a scalar variance are sums of the latter. As for ``vmf_similarity``, pairs are computed in float64 whatever
their type. ``mutual_likelihood_tiles`` compares all pairs of two sets.
"""

import torch

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import transformed
from scf_fast.kernels._gaussian_common import check_gaussian_faces, gaussian_constant, unit


def _mutual_likelihood_torch(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """Returns the score of each pair in float64; the CPU path."""
    dim = mu1.shape[1]
    square = (unit(mu1) - unit(mu2)).square()
    log_v = torch.logaddexp(log_variance1.double(), log_variance2.double())
    if log_v.ndim == 1:
        terms = square.sum(dim=1) * torch.exp(-log_v) + dim * log_v
    else:
        terms = (square * torch.exp(-log_v) + log_v).sum(dim=1)
    return gaussian_constant(dim) - terms / 2


@torch.library.custom_op("scf::mutual_likelihood", mutates_args=())
def _mutual_likelihood(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _mutual_likelihood_torch(mu1, log_variance1, mu2, log_variance2).to(dtype)


@_mutual_likelihood.register_fake
def _(mu1, log_variance1, mu2, log_variance2, dtype):
    return torch.empty(mu1.shape[0], dtype=dtype, device=mu1.device)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad):
    mu1, log_variance1, mu2, log_variance2 = (tensor.double() for tensor in ctx.saved_tensors)
    grad = grad.double()[:, None]
    log_v = torch.logaddexp(log_variance1, log_variance2)
    scalar = log_v.ndim == 1
    if scalar:
        log_v = log_v[:, None]
    difference = unit(mu1) - unit(mu2)
    scaled = difference * torch.exp(-log_v)
    gradients = []
    for mu, log_variance, towards in (mu1, log_variance1, -grad * scaled), (mu2, log_variance2, grad * scaled):
        direction = unit(mu)
        along = (towards * direction).sum(dim=1, keepdim=True)
        share = torch.exp((log_variance[:, None] if scalar else log_variance) - log_v)  # s^2 / v, at most 1
        by_variance = 0.5 * grad * share * (difference * scaled - 1)
        gradients.append((towards - along * direction) / torch.linalg.vector_norm(mu, dim=1, keepdim=True))
        gradients.append(by_variance.sum(dim=1) if scalar else by_variance)
    return (*(gradient.to(saved.dtype) for gradient, saved in zip(gradients, ctx.saved_tensors)), None)


_mutual_likelihood.register_autograd(_backward, setup_context=_setup)


def mutual_likelihood(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """Mutual likelihood score of each pair of Gaussian faces, larger for more similar ones. Source: Eqn (3), Shi and
    Jain, ICCV 2019.

    Args:
        mu1, mu2: (P, D) floating point directions, D in 2 .. 8192; any positive length, since each row is normalized
            here in float64.
        log_variance1, log_variance2: floating point log sigma^2, both (P,), one variance in all dimensions, or both
            (P, D).
    Returns:
        (P,) log likelihood (nats), computed in float64 and rounded to the inputs' promoted dtype (at least float32:
        pass float64 to keep close scores apart). NaN where an input is or a direction is zero. Differentiable twice.
        Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    dtype = check_gaussian_faces(mu1, log_variance1, mu2, log_variance2)
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"mu1 and mu2 must have one shape, got {tuple(mu1.shape)} and {tuple(mu2.shape)}; "
            "mutual_likelihood_matrix compares all pairs"
        )
    if transformed():
        return _transforms.mutual_likelihood(mu1, log_variance1, mu2, log_variance2).to(dtype)
    return _mutual_likelihood(mu1, log_variance1, mu2, log_variance2, dtype)


@torch.no_grad()
def mutual_likelihood_from_cosine(
    cosine: torch.Tensor, log_variance1: torch.Tensor, log_variance2: torch.Tensor, dim: int
) -> torch.Tensor:
    """Mutual likelihood score of pairs of scalar variance whose cosine is known already. Source: Eqn (3), Shi and Jain,
    ICCV 2019.

    Args:
        cosine: floating point cosines of any shape.
        log_variance1, log_variance2: floating point log sigma^2 whose shapes broadcast to that of cosine.
        dim: D >= 2 of the directions.
    Returns:
        float64 log likelihood (nats) of cosine's shape, to the accuracy of 1 - cosine, whose error is divided by v.
        Carries no gradient. Deterministic.
    Raises:
        ValueError: dim < 2.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")
    log_v = torch.logaddexp(log_variance1.double(), log_variance2.double())
    return (cosine.double() - 1) * torch.exp(-log_v) - dim / 2 * log_v + gaussian_constant(dim)
