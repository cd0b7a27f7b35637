"""The pair likelihood loss: mean negative log likelihood, over all pairs of images of one person in a batch, that both
show the same face. It needs no class centers. ("PFE-G" and "PFE-v" of the table of Li et al., CVPR 2021.)

    u = features / |features|

Gaussian, v_l = s1_l^2 + s2_l^2, s_l^2 = exp(parameter_l): minus the mutual likelihood score of Shi and Jain, ICCV 2019,
Eqn (3). With one variance for all dimensions, |u1 - u2|^2 = 2 (1 - cos).

    loss = 1/2 sum_l [ (u1_l - u2_l)^2 / v_l + log v_l ] + (d/2) log(2 pi)
    d loss / d parameter1_l = s1_l^2 / v_l (1 - (u1_l - u2_l)^2 / v_l) / 2
    d loss / d u1_l         = (u1_l - u2_l) / v_l

Von Mises-Fisher, kappa = exp(parameter): minus the score of Li et al., CVPR 2021, Eqn (13), as ``vmf_similarity`` has
it, with p(kappa) = psi(kappa) - kappa, K = kappa1 + kappa2 and kt^2 = (kappa1 - kappa2)^2 + 2 kappa1 kappa2 (1 + cos):

    loss = psi(kappa1) + psi(kappa2) - psi(kt) + (d/2) log(2 pi) + d log r
         = p(kappa1) + p(kappa2) - p(kt) + (K - kt) + (d/2) log(2 pi) + d log r
    d loss / d parameter1 = kappa1 [(1 - A(kt)) a + (1 - a) - (1 - A(kappa1))]
    d loss / d u1         = A(kt) kappa1 kappa2 / kt (u1 - u2), along the sphere

    K - kt = 2 kappa1 kappa2 (1 - cos) / (kt + K)
    1 - a  = kappa2 (1 - cos) (kt + kappa2 - kappa1) / (kt (kt + K)),    a = u1 . (kappa1 u1 + kappa2 u2) / kt

in which nothing cancels. Each row sums over its own pairs: half of their loss, and its own gradients. That computes
every pair twice and needs neither atomics nor a second pass over the pairs: the backward pass is a product.
"""

from typing import Literal, NamedTuple, overload

import torch

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import DEFAULT_RADIUS, check_radius, promoted_dtype, transformed
from scf_fast.kernels._loss_arguments import LossOption, check_rows, loss_options
from scf_fast.kernels._pair_likelihood_loss_torch import PairOutputs, pair_likelihood_torch
from scf_fast.kernels._pair_likelihood_loss_triton import launch_pair_likelihood
from scf_fast.kernels.scf_loss import _loss_plan


class PairTerms(NamedTuple):
    """Terms that a training run logs, without gradient.

    Attributes:
        cos: (B,) mean cosine of the pairs that a row is in; 0 for a row in none.
        confidence: (B,) kappa, or the mean over the dimensions of 1 / s_l^2.
        pairs: 0-dim int64, their number.
    """

    cos: torch.Tensor
    confidence: torch.Tensor
    pairs: torch.Tensor


# ---- operators


@torch.library.custom_op("scf::pair_likelihood_loss", mutates_args=())
def _pair_likelihood_loss(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, radius: float, options: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss and what its backward pass needs; ``options`` are of ``LossOption``.

    loss; the gradients of the sum over all pairs in the parameter and in the features (with COEFFICIENTS; else (0, d));
    terms, (2, B) or (2, 0), and the number of pairs.
    """
    dim = features.shape[1]
    outputs = _allocate_outputs(features, parameter, options)
    if len(features):
        in_triton = bool(options & LossOption.TRITON)
        plan = None
        if options & LossOption.VMF:
            plan = _loss_plan(dim, radius, False, outputs.loss.dtype, in_triton)
        fill_outputs = launch_pair_likelihood if in_triton else pair_likelihood_torch
        fill_outputs(features, parameter, labels, outputs, plan)
    pairs = outputs.partners.sum() // 2
    loss = outputs.loss.sum()
    if options & LossOption.MEAN:
        loss = loss / pairs.clamp(min=1)
    return loss, outputs.slope, outputs.feature_slope, outputs.terms, pairs


@_pair_likelihood_loss.register_fake
def _(features, parameter, labels, radius, options):
    outputs = _allocate_outputs(features, parameter, options)
    loss, pairs = outputs.loss.new_empty(()), outputs.partners.new_empty(())
    return loss, outputs.slope, outputs.feature_slope, outputs.terms, pairs


def _allocate_outputs(features: torch.Tensor, parameter: torch.Tensor, options: int) -> PairOutputs:
    batch, dim = features.shape
    dtype, device = promoted_dtype(features, parameter), features.device
    return PairOutputs(
        torch.empty(batch, dtype=dtype, device=device),
        torch.empty(parameter.shape, dtype=dtype, device=device),
        torch.empty((batch if options & LossOption.COEFFICIENTS else 0, dim), dtype=dtype, device=device),
        torch.empty((2, batch if options & LossOption.TERMS else 0), dtype=dtype, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )


@torch.library.custom_op("scf::pair_likelihood_loss_backward", mutates_args=())
def _pair_likelihood_loss_backward(
    grad: torch.Tensor,
    slope: torch.Tensor,
    feature_slope: torch.Tensor,
    pairs: torch.Tensor,
    features: torch.Tensor,
    parameter: torch.Tensor,
    options: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of the parameter and of the features, the latter (0, d) where not asked for. Both are
    arguments so that differentiating again is an error, not a zero.
    """
    if options & LossOption.MEAN:
        grad = grad / pairs.clamp(min=1)
    return (grad * slope).to(parameter.dtype), (grad * feature_slope).to(features.dtype)


@_pair_likelihood_loss_backward.register_fake
def _(grad, slope, feature_slope, pairs, features, parameter, options):
    return torch.empty_like(slope, dtype=parameter.dtype), torch.empty_like(feature_slope, dtype=features.dtype)


def _setup(ctx, inputs, output):
    features, parameter, _, _, ctx.options = inputs
    _, slope, feature_slope, terms, pairs = output
    ctx.mark_non_differentiable(slope, feature_slope, terms, pairs)
    ctx.save_for_backward(slope, feature_slope, pairs, features, parameter)


def _backward(ctx, grad, *_):
    of_parameter, of_features = _pair_likelihood_loss_backward(grad, *ctx.saved_tensors, ctx.options)
    return of_features if ctx.needs_input_grad[0] else None, of_parameter, None, None, None


_pair_likelihood_loss.register_autograd(_backward, setup_context=_setup)


def _transformed_loss(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, radius: float, options: int
) -> torch.Tensor | tuple[torch.Tensor, PairTerms]:
    """Returns what ``pair_likelihood_loss`` does, under a transform of ``torch.func`` or in forward mode."""
    dtype = promoted_dtype(features, parameter)
    vmf = bool(options & LossOption.VMF)
    if vmf:
        plan = _loss_plan(features.shape[1], radius, False, dtype, False)
        parameter = parameter.clamp(max=plan.log_kappa_max)
    loss, cos, confidence, pairs = _transforms.pair_likelihood(features, parameter, labels, radius if vmf else None)
    if options & LossOption.MEAN:
        loss = loss / pairs.clamp(min=1)
    if options & LossOption.TERMS:
        return loss.to(dtype), PairTerms(cos.detach().to(dtype), confidence.detach().to(dtype), pairs)
    return loss.to(dtype)


# ---- public function


@overload
def pair_likelihood_loss(
    features: torch.Tensor,
    parameter: torch.Tensor,
    labels: torch.Tensor,
    density: str = "vmf",
    radius: float = DEFAULT_RADIUS,
    reduction: str = "mean",
    return_terms: Literal[False] = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor: ...


@overload
def pair_likelihood_loss(
    features: torch.Tensor,
    parameter: torch.Tensor,
    labels: torch.Tensor,
    density: str = "vmf",
    radius: float = DEFAULT_RADIUS,
    reduction: str = "mean",
    *,
    return_terms: Literal[True],
    backend: str = "auto",
    debug: bool = False,
) -> tuple[torch.Tensor, PairTerms]: ...


def pair_likelihood_loss(
    features: torch.Tensor,
    parameter: torch.Tensor,
    labels: torch.Tensor,
    density: str = "vmf",
    radius: float = DEFAULT_RADIUS,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, PairTerms]:
    """Mean negative score of all unordered pairs of rows with equal labels ("PFE-v", "PFE-G"), with its gradients from
    the same pass; the head of this module has the formulas and their sources.

    Args:
        features: (B, d) float, embeddings before normalization; d in 2 .. 8192. Half precision is read as it is and
            computed in float32.
        parameter: for "vmf", (B,) or (B, 1) float log concentration; larger values count as 41.5 (float64: 346). For
            "gaussian", log s^2: (B,) or (B, 1), one for all dimensions, or (B, d), one for each; values outside -60 ..
            60 count as the nearer of the two, where the gradient still leads back.
        labels: (B,) int32 or int64, any numbers, in any order.
        density: "vmf" or "gaussian".
        radius: r > 0 of the sphere; it shifts the vMF loss and changes nothing else.
        reduction: "mean" over the pairs, or "sum"; deterministic.
        return_terms: also return the terms to log.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
        debug: accepted as by the other losses; there is no value to check here.
    Returns:
        The loss, a scalar, float32 (float64 if an argument is); with return_terms, (loss, PairTerms). Without any pair
        it is 0, and so are its gradients.
        In float32, relative to the sum over the pairs of max(|loss|, kt, d/2), or for Gaussians of max(|loss|,
        |u1 - u2|^2 / v, d/2), the loss is within 1e-6, and each gradient of the parameter within 2e-6 of the sum of its
        terms' sizes; with a variance for each dimension, of directions that differ by up to 4e-7 in length.
        Differentiable once, in features and parameter; deterministic. A row of zeros has no direction, and gives NaN if
        it is in a pair.
    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown option, radius <= 0, or a backend that cannot run.
    """
    if density not in ("vmf", "gaussian"):
        raise ValueError(f'density must be "vmf" or "gaussian", got {density!r}')
    name = "log kappa (parameter)" if density == "vmf" else "log variance (parameter)"
    check_rows(features, name, parameter, labels, per_dimension=density == "gaussian")
    if reduction == "none":
        raise ValueError('reduction must be "mean" or "sum", got \'none\': a loss belongs to a pair, not to a row')
    check_radius(radius)
    options = loss_options(reduction, return_terms, backend, debug, features)
    if torch.is_grad_enabled() and features.requires_grad:
        options |= LossOption.COEFFICIENTS.value
    if density == "vmf":
        options |= LossOption.VMF.value
    if parameter.shape[1:] != features.shape[1:]:
        parameter = parameter.reshape(-1)
    if transformed():
        return _transformed_loss(features, parameter, labels, float(radius), options)
    loss, _, _, terms, pairs = _pair_likelihood_loss(features, parameter, labels, float(radius), options)
    return (loss, PairTerms(terms[0], terms[1], pairs)) if return_terms else loss
