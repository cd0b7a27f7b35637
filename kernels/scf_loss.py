"""The SCF loss: KL divergence between a Dirac at the class center and the r-radius von Mises-Fisher distribution. The
forward pass reads its arguments once and leaves what the backward pass needs.

    mu = features / |features|      w = class_centers[labels] / |class_centers[labels]|
    cos = <mu, w>                   kappa = exp(log_kappa)

    loss = -kappa cos + psi_v(kappa) + (d/2) log(2 pi) + d log r,  v = d/2 - 1          (Li et al., CVPR 2021, Eq. (8))
         = kappa (1 - cos) + [psi - kappa + (d/2) log(2 pi) + d log r]                  1 - cos = |mu - w|^2 / 2
    d loss / d log_kappa = kappa ((1 - cos) - (1 - A_d(kappa)))
    d loss / d features  = -kappa (w - cos mu) / |features|                  and likewise for the class center

in which nothing cancels: both brackets and both complements are evaluated as such. The published code's normalizer is

    kappa = exp(log_kappa) + e      l1 = -kappa cos      l2 = -v log(e + kappa)
    e = 1e-6                        l3 = log(e + I_v(kappa) exp(-kappa)) + kappa
    loss = l1 + l2 + l3 + (d/2) log(2 pi) + d log r

Its e swallows I_v exp(-kappa) wherever that is smaller, for d = 512 up to kappa = 3200: there its loss grows with kappa
- 13.8, and no kappa below v / (1 - cos) is optimal. It is kept to reproduce what was trained with it.
"""

import functools
import math
from typing import Literal, NamedTuple, overload

import torch

from scf_fast.kernels import _transforms
from scf_fast.kernels._center_rows_torch import gradients_torch
from scf_fast.kernels._center_rows_triton import launch_gradients
from scf_fast.kernels._common import DEFAULT_RADIUS, check_radius, promoted_dtype, transformed
from scf_fast.kernels._debye_series import DebyePlan, debye_plan
from scf_fast.kernels._loss_arguments import (
    LossOption,
    center_loss_options,
    check_center_loss,
    check_labels,
    reduce_rows,
)
from scf_fast.kernels._scf_loss_torch import scf_loss_torch
from scf_fast.kernels._scf_loss_triton import launch_scf_loss

PUBLISHED_EPSILON = 1e-6


class SCFTerms(NamedTuple):
    """Terms that a training run logs, (B,) each and without gradient. With normalizer="exact", l1 = -kappa cos,
    l2 = -v log kappa, l3 = log I_v.
    """

    cos: torch.Tensor
    kappa: torch.Tensor
    l1: torch.Tensor
    l2: torch.Tensor
    l3: torch.Tensor


@functools.lru_cache(maxsize=64)
def _loss_constant(dim: int, radius: float) -> float:
    """Returns (d/2) log(2 pi) + d log r."""
    return dim / 2 * math.log(2 * math.pi) + dim * math.log(radius)


def _loss_plan(dim: int, radius: float, published: bool, dtype: torch.dtype, in_triton: bool) -> DebyePlan:
    """Returns the plan of psi. The radius enters here and nowhere else, as d log r within the constant that psi gets
    before it is rounded.
    """
    constant = 0.0 if published else _loss_constant(dim, radius)
    return debye_plan(dim / 2 - 1, dtype, constant, compensated=in_triton or dtype == torch.float64)


# ---- operators


@torch.library.custom_op("scf::scf_loss", mutates_args=())
def _scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float,
    options: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss and what its backward pass needs; ``options`` are of ``LossOption``.

    loss; d loss / d log_kappa (B,); coefficients 1 / |features|, 1 / |center|, and for the reduced loss kappa and
    kappa cos, (4, B) or, not asked for, (4, 0); terms, (5, B) or (5, 0).
    """
    published, mean = bool(options & LossOption.PUBLISHED), bool(options & LossOption.MEAN)
    batch, dim = features.shape
    if (options & LossOption.DEBUG or not labels.is_cuda) and batch:
        check_labels(labels, len(class_centers))
    rows, slope, coefficients, terms = outputs = _allocate_outputs(features, log_kappa, class_centers, options)
    if batch:
        fill_loss = launch_scf_loss if options & LossOption.TRITON else scf_loss_torch
        fill_loss(
            features,
            log_kappa,
            class_centers,
            labels,
            *outputs,
            plan=_loss_plan(dim, radius, published, rows.dtype, bool(options & LossOption.TRITON)),
            constant=_loss_constant(dim, radius),
            epsilon=PUBLISHED_EPSILON,
            published=published,
            mean=mean,
        )
    loss = reduce_rows(rows, options)
    return loss, slope, coefficients, terms


@_scf_loss.register_fake
def _(features, log_kappa, class_centers, labels, radius, options):
    rows, *others = _allocate_outputs(features, log_kappa, class_centers, options)
    return (rows.new_empty(()) if options & (LossOption.MEAN | LossOption.SUM) else rows, *others)


def _allocate_outputs(
    features: torch.Tensor, log_kappa: torch.Tensor, class_centers: torch.Tensor, options: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns uninitialized loss rows, slope, coefficients and terms."""
    batch = features.shape[0]
    dtype, device = promoted_dtype(features, log_kappa, class_centers), features.device
    return (
        torch.empty(batch, dtype=dtype, device=device),
        torch.empty(batch, dtype=dtype, device=device),
        torch.empty((4, batch if options & LossOption.COEFFICIENTS else 0), dtype=dtype, device=device),
        torch.empty((5, batch if options & LossOption.TERMS else 0), dtype=dtype, device=device),
    )


@torch.library.custom_op("scf::scf_loss_backward", mutates_args=())
def _scf_loss_backward(
    grad: torch.Tensor,
    slope: torch.Tensor,
    coefficients: torch.Tensor,
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    for_features: bool,
    for_class_centers: bool,
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of log_kappa, features and class_centers, empty where not asked for. log_kappa is an
    argument so that differentiating again is an error, not a zero.
    """
    batch, dim = features.shape
    grad_features = torch.empty(
        features.shape if for_features else (0, dim), dtype=features.dtype, device=features.device
    )
    grad_class_centers = class_centers.new_zeros(class_centers.shape if for_class_centers else (0, dim))
    if batch and (for_features or for_class_centers):
        fill_gradients = launch_gradients if triton_kernel else gradients_torch
        fill_gradients(grad, coefficients, features, class_centers, labels, grad_features, grad_class_centers)
    return (grad * slope).to(log_kappa.dtype), grad_features, grad_class_centers


@_scf_loss_backward.register_fake
def _(
    grad,
    slope,
    coefficients,
    features,
    log_kappa,
    class_centers,
    labels,
    for_features,
    for_class_centers,
    triton_kernel,
):
    dim = features.shape[1]
    return (
        torch.empty(slope.shape, dtype=log_kappa.dtype, device=slope.device),
        torch.empty(features.shape if for_features else (0, dim), dtype=features.dtype, device=features.device),
        class_centers.new_empty(class_centers.shape if for_class_centers else (0, dim)),
    )


def _setup(ctx, inputs, output):
    features, log_kappa, class_centers, labels, _, options = inputs
    _, slope, coefficients, terms = output
    ctx.triton_kernel = bool(options & LossOption.TRITON)
    ctx.mark_non_differentiable(slope, coefficients, terms)
    ctx.save_for_backward(slope, coefficients, features, log_kappa, class_centers, labels)


def _backward(ctx, grad, *_):
    for_features, _, for_class_centers, *_ = ctx.needs_input_grad
    grad_log_kappa, grad_features, grad_class_centers = _scf_loss_backward(
        grad, *ctx.saved_tensors, for_features, for_class_centers, ctx.triton_kernel
    )
    return (
        grad_features if for_features else None,
        grad_log_kappa,
        grad_class_centers if for_class_centers else None,
        None,
        None,
        None,
    )


_scf_loss.register_autograd(_backward, setup_context=_setup)


def _transformed_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float,
    options: int,
) -> torch.Tensor | tuple[torch.Tensor, SCFTerms]:
    """Returns what ``scf_loss`` does, under a transform of ``torch.func`` or in forward mode."""
    dim, dtype = features.shape[1], promoted_dtype(features, log_kappa, class_centers)
    published = bool(options & LossOption.PUBLISHED)
    rows, terms = _transforms.scf_loss_rows(
        features,
        log_kappa.clamp(max=_loss_plan(dim, radius, published, dtype, False).log_kappa_max),
        class_centers,
        labels,
        _loss_constant(dim, radius),
        PUBLISHED_EPSILON if published else None,
    )
    loss = reduce_rows(rows, options)
    if options & LossOption.TERMS:
        return loss.to(dtype), SCFTerms(*(term.detach().to(dtype) for term in terms))
    return loss.to(dtype)


# ---- public function


@overload
def scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = DEFAULT_RADIUS,
    normalizer: str = "exact",
    reduction: str = "mean",
    return_terms: Literal[False] = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor: ...


@overload
def scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = DEFAULT_RADIUS,
    normalizer: str = "exact",
    reduction: str = "mean",
    *,
    return_terms: Literal[True],
    backend: str = "auto",
    debug: bool = False,
) -> tuple[torch.Tensor, SCFTerms]: ...


def scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = DEFAULT_RADIUS,
    normalizer: str = "exact",
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SCFTerms]:
    """SCF loss of a batch, with its gradient from the same pass. Source: Li et al., CVPR 2021, Eq. (8); the head of
    this module has the formulas.

    Args:
        features: (B, d) float, embeddings before normalization; d in 2 .. 8192. Half precision is read as it is and
            computed in float32.
        log_kappa: (B,) or (B, 1) float, log concentration; larger values count as 41.5 (float64: 346).
        class_centers: (C, d) float, of any length.
        labels: (B,) int32 or int64 in [0, C). On CUDA, a label outside gives NaN in its row.
        radius: r > 0 of the sphere; it shifts the loss and changes nothing else.
        normalizer: "exact"; or "published", the published code's, its clamps of kappa included.
        reduction: "mean", "sum" or "none"; deterministic.
        return_terms: also return the per-sample terms to log.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
        debug: check the labels on CUDA too, which waits for the device.
    Returns:
        The loss, scalar or (B,), float32 (float64 if any argument is); with return_terms, (loss, SCFTerms).
        In float32, the loss of a row is within 1e-6 of max(|loss|, kappa (1 - cos), 1) and the gradient of log_kappa
        within 1e-6 of its larger half, kappa (1 - cos) or kappa (1 - A), from Triton; both within 5e-7 from PyTorch
        (``python -m bench.accuracy``). Differentiable once, in features, log_kappa and class_centers; deterministic. A
        row of zeros has no direction, and gives NaN.
    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown option, radius <= 0, or a backend that cannot run.
        IndexError: a label outside [0, C), where values are checked.
    """
    check_center_loss(features, "log_kappa", log_kappa, class_centers, labels)
    if normalizer not in ("exact", "published"):
        raise ValueError(f'normalizer must be "exact" or "published", got {normalizer!r}')
    check_radius(radius)
    options = center_loss_options(features, class_centers, reduction, return_terms, backend, debug)
    if normalizer == "published":
        options |= LossOption.PUBLISHED.value
    if transformed():
        return _transformed_loss(features, log_kappa.reshape(-1), class_centers, labels, radius, options)
    loss, _, _, terms = _scf_loss(features, log_kappa.reshape(-1), class_centers, labels, float(radius), options)
    return (loss, SCFTerms(*terms.unbind(0))) if return_terms else loss
