"""Confidence-weighted pooling of the images of a template into one direction and one confidence: a concentration
(``pool_templates``), or the precision of a Gaussian (``pool_gaussian_templates``).

    s_t = sum over images m of template t of kappa_m mu_m,    direction_t = s_t / |s_t|,    kappa_t = |s_t|

With g and h the gradients of direction_t and kappa_t,

    d loss / d s_t     = (g - (g . direction_t) direction_t) / kappa_t + h direction_t
    d loss / d mu_m    = kappa_m d loss / d s_t        d loss / d kappa_m = mu_m . d loss / d s_t

For Gaussians the weights are precisions q = 1 / sigma^2, of an image or of each of its dimensions (products are then by
element), and their sum is the precision of the template:

    q_t = sum over m of q_m,    mean_t = s_t / q_t,    direction_t = mean_t / |mean_t|
    d loss / d q_m     = (mu_m - mean_t) d loss / d s_t + d loss / d q_t

where a scalar q_t, which does not turn the direction, is left out of mean_t.

Images are sorted by template (stably) and summed one after another, which, unlike atomic additions, gives the same bits
on every run.
"""

import math

import torch
import triton
import triton.language as tl

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import (
    MAX_DIM,
    as_compute,
    check_floating,
    dense_rows,
    promoted_dtype,
    transformed,
    use_triton,
)

_TILE = 4096  # elements of the images that a program reads at a time: enough loads in flight to hide their latency


def _pool_templates_torch(
    mu: torch.Tensor, kappa: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools by one segmented sum of the sorted rows; the CPU path."""
    dtype = promoted_dtype(mu, kappa)
    weighted = mu.to(dtype) if kappa is None else mu.to(dtype) * kappa.to(dtype)[:, None]
    order, offsets = _segments(template_ids, num_templates)
    sums = torch.segment_reduce(weighted[order], "sum", lengths=offsets.diff(), axis=0, initial=0.0)
    kappas = torch.linalg.vector_norm(sums, dim=1)
    return sums / kappas.clamp(min=torch.finfo(dtype).tiny)[:, None], kappas


def _pool_gaussian_templates_torch(
    mu: torch.Tensor, precision: torch.Tensor, template_ids: torch.Tensor, num_templates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns directions, precisions and the lengths of the means, by segmented sums of sorted rows; the CPU path."""
    dtype = promoted_dtype(mu, precision)
    precision = precision.to(dtype)
    weighted = mu.to(dtype) * (precision[:, None] if precision.ndim == 1 else precision)
    order, offsets = _segments(template_ids, num_templates)
    means, pooled = (
        torch.segment_reduce(rows[order], "sum", lengths=offsets.diff(), axis=0, initial=0.0)
        for rows in (weighted, precision)
    )
    if pooled.ndim == 2:
        means /= torch.where(pooled == 0, 1.0, pooled)
    lengths = torch.linalg.vector_norm(means, dim=1)
    return means / lengths.clamp(min=torch.finfo(dtype).tiny)[:, None], pooled, lengths


def _segments(template_ids: torch.Tensor, num_templates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N,) rows in the order of their templates, and (T + 1,) positions in it at which the templates start."""
    counts = torch.bincount(template_ids, minlength=num_templates)
    return torch.argsort(template_ids, stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@triton.jit
def _pool_kernel(
    mu_ptr,  # (N, D), rows of mu_stride
    weights_ptr,  # (N,), or with DIAGONAL (N, D), rows of weights_stride
    order_ptr,  # (N,) int64
    offsets_ptr,  # (T + 1,) int64
    directions_ptr,  # (T, D) out
    lengths_ptr,  # (T,) out
    pooled_ptr,  # (T,), or with DIAGONAL (T, D), out: with GAUSSIAN, the sums of the weights
    mu_stride,
    weights_stride,
    WEIGHTED: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TINY: tl.constexpr,
    FP64: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per template, ROWS images at a time."""
    template = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets_ptr + template), tl.load(offsets_ptr + template + 1)
    cols = tl.arange(0, BLOCK_D)
    inside_d = cols < D
    total = as_compute(tl.zeros((BLOCK_D,), tl.float32), FP64)
    pooled = as_compute(tl.zeros((BLOCK_D if DIAGONAL else ROWS,), tl.float32), FP64)
    for at in range(start, stop, ROWS):
        positions = at + tl.arange(0, ROWS)
        inside = positions < stop
        images = tl.load(order_ptr + positions, mask=inside, other=0)
        mask = inside[:, None] & inside_d[None, :]
        values = as_compute(tl.load(mu_ptr + images[:, None] * mu_stride + cols[None, :], mask=mask, other=0.0), FP64)
        if DIAGONAL:
            at_weights = weights_ptr + images[:, None] * weights_stride + cols[None, :]
            weights = as_compute(tl.load(at_weights, mask=mask, other=0.0), FP64)
            values *= weights
            pooled += tl.sum(weights, axis=0)
        elif WEIGHTED:
            weights = as_compute(tl.load(weights_ptr + images, mask=inside, other=0.0), FP64)
            values *= weights[:, None]
            pooled += weights
        total += tl.sum(values, axis=0)
    if DIAGONAL:
        total = total / tl.where(pooled == 0.0, 1.0, pooled)
        tl.store(pooled_ptr + template * D + cols, pooled, mask=inside_d)
    elif GAUSSIAN:
        tl.store(pooled_ptr + template, tl.sum(pooled))
    length = tl.sqrt(tl.sum(total * total))
    scale = 1.0 / tl.where(length < TINY, TINY, length)
    tl.store(directions_ptr + template * D + cols, total * scale, mask=inside_d)
    tl.store(lengths_ptr + template, length)


def _pool_templates_triton(
    mu: torch.Tensor, weights: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int, gaussian: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns directions, sums of the weights (of a ``gaussian`` only), and the lengths of the means or sums."""
    dim, dtype = mu.shape[1], promoted_dtype(mu, weights)
    directions = torch.empty(num_templates, dim, dtype=dtype, device=mu.device)
    lengths = torch.empty(num_templates, dtype=dtype, device=mu.device)
    pooled = lengths
    diagonal = weights is not None and weights.ndim == 2
    if gaussian and weights is not None:
        pooled = torch.empty(num_templates, *weights.shape[1:], dtype=dtype, device=mu.device)
    mu = dense_rows(mu)
    if weights is None:
        weights_or_any = mu
    else:
        weights_or_any = dense_rows(weights) if diagonal else weights.contiguous()
    order, offsets = _segments(template_ids, num_templates)
    block_d = triton.next_power_of_2(dim)
    with torch.cuda.device_of(mu):
        _pool_kernel[(num_templates,)](
            mu,
            weights_or_any,
            order,
            offsets,
            directions,
            lengths,
            pooled,
            mu.stride(0),
            weights_or_any.stride(0),
            WEIGHTED=weights is not None,
            GAUSSIAN=gaussian,
            DIAGONAL=diagonal,
            TINY=torch.finfo(dtype).tiny,
            FP64=dtype == torch.float64,
            D=dim,
            ROWS=max(1, min(8, _TILE // block_d)),
            BLOCK_D=block_d,
            num_warps=4 if block_d <= 1024 else 8,
        )
    return directions, pooled, lengths


def _check_range_of_ids(template_ids: torch.Tensor, num_templates: int) -> None:
    lowest, highest = (int(value) for value in template_ids.aminmax()) if len(template_ids) else (0, -1)
    if lowest < 0 or highest >= num_templates:
        raise ValueError(
            f"template_ids must lie in [0, {num_templates}), got {lowest}..{highest}; "
            "number them with torch.unique(return_inverse=True)"
        )


@torch.library.custom_op("scf::pool_templates", mutates_args=())
def _pool_templates(
    mu: torch.Tensor, kappa: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int, triton_kernel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_range_of_ids(template_ids, num_templates)
    if not triton_kernel:
        return _pool_templates_torch(mu, kappa, template_ids, num_templates)
    directions, _, kappas = _pool_templates_triton(mu, kappa, template_ids, num_templates, False)
    return directions, kappas


@_pool_templates.register_fake
def _(mu, kappa, template_ids, num_templates, triton_kernel):
    dtype = promoted_dtype(mu, kappa)
    directions = torch.empty(num_templates, mu.shape[1], dtype=dtype, device=mu.device)
    return directions, torch.empty(num_templates, dtype=dtype, device=mu.device)


def _setup(ctx, inputs, output):
    mu, kappa, template_ids, *_ = inputs
    ctx.save_for_backward(mu, kappa, template_ids, *output)


def _through_direction(
    grad_directions: torch.Tensor, grad_lengths: torch.Tensor, directions: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of vectors, (T, D), from those of their directions and lengths. The direction of a template
    that cancels has no derivative; its gradient is 0, as its direction is.
    """
    along = (grad_directions * directions).sum(dim=1, keepdim=True)
    inverse = 1 / torch.where(lengths > 0, lengths, math.inf)[:, None]
    return (grad_directions - along * directions) * inverse + grad_lengths[:, None] * directions


def _backward(ctx, grad_directions, grad_kappas):
    mu, kappa, template_ids, directions, kappas = ctx.saved_tensors
    grad = _through_direction(grad_directions, grad_kappas, directions, kappas)[template_ids]
    grad_kappa = None if kappa is None else (mu.to(grad.dtype) * grad).sum(dim=1).to(kappa.dtype)
    grad_mu = grad if kappa is None else grad * kappa.to(grad.dtype)[:, None]
    return grad_mu.to(mu.dtype), grad_kappa, None, None, None


_pool_templates.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("scf::pool_gaussian_templates", mutates_args=())
def _pool_gaussian_templates(
    mu: torch.Tensor, precision: torch.Tensor, template_ids: torch.Tensor, num_templates: int, triton_kernel: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_range_of_ids(template_ids, num_templates)
    if triton_kernel:
        return _pool_templates_triton(mu, precision, template_ids, num_templates, True)
    return _pool_gaussian_templates_torch(mu, precision, template_ids, num_templates)


@_pool_gaussian_templates.register_fake
def _(mu, precision, template_ids, num_templates, triton_kernel):
    options = {"dtype": promoted_dtype(mu, precision), "device": mu.device}
    directions = torch.empty(num_templates, mu.shape[1], **options)
    pooled = torch.empty(num_templates, *precision.shape[1:], **options)
    return directions, pooled, torch.empty(num_templates, **options)


def _backward_gaussian(ctx, grad_directions, grad_precisions, grad_lengths):
    mu, precision, template_ids, directions, pooled, lengths = ctx.saved_tensors
    grad = _through_direction(grad_directions, grad_lengths, directions, lengths)
    rows, weight = mu.to(grad.dtype), precision.to(grad.dtype)
    if precision.ndim == 2:
        grad = (grad / torch.where(pooled > 0, pooled, math.inf))[template_ids]
        by_weight = (rows - (lengths[:, None] * directions)[template_ids]) * grad
    else:
        grad, weight = grad[template_ids], weight[:, None]
        by_weight = (rows * grad).sum(dim=1)
    grad_precision = by_weight + grad_precisions[template_ids]
    return (grad * weight).to(mu.dtype), grad_precision.to(precision.dtype), None, None, None


_pool_gaussian_templates.register_autograd(_backward_gaussian, setup_context=_setup)


def _check_templates(mu: torch.Tensor, template_ids: torch.Tensor, num_templates: int | None) -> int:
    """Checks the arguments that both public functions share, and returns the number of templates."""
    check_floating("mu", mu)
    if mu.ndim != 2 or not 1 <= mu.shape[1] <= MAX_DIM:
        raise ValueError(f"mu must be (N, D) with D in 1 .. {MAX_DIM}, got {tuple(mu.shape)}")
    if template_ids.shape != mu.shape[:1] or template_ids.dtype != torch.int64:
        got = f"{tuple(template_ids.shape)} {template_ids.dtype}"
        raise ValueError(f"template_ids must be ({len(mu)},) int64, one per row of mu, got {got}")
    if num_templates is None:
        num_templates = int(template_ids.max()) + 1 if len(mu) else 0
    if num_templates < 1:
        raise ValueError(f"there must be at least one template, got {num_templates}; pass images or num_templates")
    return num_templates


def pool_templates(
    mu: torch.Tensor,
    kappa: torch.Tensor | None,
    template_ids: torch.Tensor,
    num_templates: int | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools image directions into templates of any size. Source: Eqn (14), Li et al., CVPR 2021.

    Args:
        mu: (N, D) floating point, unit rows, D <= 8192.
        kappa: (N,) floating point weights >= 0; None gives every image the same weight (average pooling).
        template_ids: (N,) int64 in [0, T), in any order. Their range is checked, which waits for the device.
        num_templates: T >= 1; by default the largest id plus one. torch.compile needs it given.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
    Returns:
        directions (T, D) and kappas (T,), summed in float32, or in float64 if an argument is. A template without
        images, or whose images cancel exactly, has direction 0 and kappa 0: the uniform distribution. Differentiable in
        mu and kappa. Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above, an id lies outside [0, T), T is 0, or the backend cannot run.
    """
    num_templates = _check_templates(mu, template_ids, num_templates)
    if kappa is not None:
        check_floating("kappa", kappa)
        if kappa.shape != mu.shape[:1]:
            raise ValueError(f"kappa must be ({len(mu)},), one per row of mu, or None, got {tuple(kappa.shape)}")
    triton_kernel = use_triton(backend, mu)
    if transformed():
        dtype = promoted_dtype(mu, kappa)
        directions, kappas = _transforms.pool_templates(mu, kappa, template_ids, num_templates)
        return directions.to(dtype), kappas.to(dtype)
    return _pool_templates(mu, kappa, template_ids, num_templates, triton_kernel)


def pool_gaussian_templates(
    mu: torch.Tensor,
    precision: torch.Tensor,
    template_ids: torch.Tensor,
    num_templates: int | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fuses Gaussian images into templates of any size, by precision. Source: section 4.2, Shi and Jain, ICCV 2019:
    1 / s^2 = sum_m 1 / s_m^2 and mu = s^2 sum_m mu_m / s_m^2 in each dimension; mu is then brought to length one.

    Args:
        mu: (N, D) floating point, unit rows, D <= 8192.
        precision: floating point 1 / sigma^2 >= 0, (N,), one in all dimensions, or (N, D).
        template_ids: (N,) int64 in [0, T), in any order. Their range is checked, which waits for the device.
        num_templates: T >= 1; by default the largest id plus one. torch.compile needs it given.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
    Returns:
        directions (T, D), and precision (T,) or (T, D), the sum of the images', in which their agreement plays no part:
        ``pool_templates`` gives the same directions for scalar precisions, but the length of the weighted sum as kappa.
        Summed in float32, or in float64 if an argument is. A template without images has direction 0 and precision 0;
        one whose images cancel exactly has direction 0. Differentiable in mu and precision. Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above, an id lies outside [0, T), T is 0, or the backend cannot run.
    """
    num_templates = _check_templates(mu, template_ids, num_templates)
    check_floating("precision", precision)
    if precision.shape not in (mu.shape[:1], mu.shape):
        raise ValueError(
            f"precision must be ({len(mu)},), one per row of mu, or {tuple(mu.shape)}, one per dimension, got "
            f"{tuple(precision.shape)}"
        )
    triton_kernel = use_triton(backend, mu)
    if transformed():
        dtype = promoted_dtype(mu, precision)
        directions, pooled = _transforms.pool_gaussian_templates(mu, precision, template_ids, num_templates)
        return directions.to(dtype), pooled.to(dtype)
    directions, pooled, _ = _pool_gaussian_templates(mu, precision, template_ids, num_templates, triton_kernel)
    return directions, pooled
