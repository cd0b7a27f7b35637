"""The SCF loss: KL divergence between a Dirac at the class center and the r-radius von Mises-Fisher distribution,
forward in one pass.

    mu = features / |features|      w = class_centers[labels] / |class_centers[labels]|      cos = <mu, w>      kappa = exp(log_kappa)

    loss = -kappa cos + psi_v(kappa) + (d/2) log(2 pi) + d log r,  v = d/2 - 1          (Li et al., CVPR 2021, Eq. (8))
         = kappa (1 - cos) + [psi - kappa + (d/2) log(2 pi) + d log r]                  1 - cos = |mu - w|^2 / 2
    d loss / d log_kappa = kappa ((1 - cos) - (1 - A_d(kappa)))
    d loss / d features  = -kappa (w - cos mu) / |features|                             and likewise for the class center

in which nothing cancels: both brackets and both complements are evaluated as such. The published code's normalizer is

    kappa = exp(log_kappa) + e      l1 = -kappa cos      l2 = -v log(e + kappa)      l3 = log(e + I_v(kappa) exp(-kappa)) + kappa      e = 1e-6
    loss = l1 + l2 + l3 + (d/2) log(2 pi) + d log r

Its e swallows I_v exp(-kappa) wherever that is smaller, for d = 512 up to kappa = 3200: there its loss grows with kappa
- 13.8, and no kappa below v / (1 - cos) is optimal. It is kept to reproduce what was trained with it.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import as_compute, check_floating, compute_dtype, use_triton
from scf_fast.kernels.debye import debye, debye_plan, debye_reference, exp_kernel, two_sum_kernel

_MAX_DIM = 8192  # a row and its class center are held in registers
_TILE_BYTES = 8192  # of a tile of rows; 4 warps hold two of them in 32 registers a thread
_ROW_BYTES = 16  # of one number of each row of a tile at most: what is computed per row takes registers in every thread
_MAX_WARPS = 16  # leaves each thread 128 registers
_REFERENCE_TILE = (
    1 << 17
)  # elements in plain PyTorch: a gathered chunk of class centers, 512 KB, stays in the second-level cache
PUBLISHED_EPSILON = 1e-6
_EPSILON = tl.constexpr(PUBLISHED_EPSILON)


class SCFTerms(NamedTuple):
    """What a training run logs, (B,) each and without gradient. With normalizer="exact", l1 = -kappa cos, l2 = -v log
    kappa, l3 = log I_v.
    """

    cos: torch.Tensor
    kappa: torch.Tensor
    l1: torch.Tensor
    l2: torch.Tensor
    l3: torch.Tensor


@functools.lru_cache(maxsize=64)
def _constant(dim: int, radius: float) -> float:
    return dim / 2 * math.log(2 * math.pi) + dim * math.log(radius)


def _plan(dim: int, radius: float, published: bool, dtype: torch.dtype, compensated: bool = True):
    return debye_plan(dim / 2 - 1, dtype, 0.0 if published else _constant(dim, radius), compensated)


def _chunks(features: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype):
    """Slices of rows with their features and gathered class centers, a cache-sized tile at a time; the second is a
    buffer, overwritten.
    """
    rows = max(1, _REFERENCE_TILE // features.shape[1])
    buffer = torch.empty(
        (min(rows, len(labels)), features.shape[1]), dtype=class_centers.dtype, device=class_centers.device
    )
    for start in range(0, len(labels), rows):
        chunk = slice(start, min(start + rows, len(labels)))
        own = torch.index_select(class_centers, 0, labels[chunk], out=buffer[: chunk.stop - start])
        yield chunk, features[chunk].to(dtype), own.to(dtype)


def scf_loss_reference(
    features, log_kappa, class_centers, labels, loss, slope, coefficients, terms, radius, published, mean
):
    """The kernel's outputs (see `_scf_loss`) in plain PyTorch, to the accuracy of their dtype; coefficients and terms
    unless they are empty.
    """
    dim, dtype = features.shape[1], loss.dtype
    norms = torch.empty((3, len(labels)), dtype=dtype, device=features.device)
    feature_norm, center_norm, difference = norms
    for chunk, f, c in _chunks(features, class_centers, labels, dtype):
        torch.linalg.vector_norm(f, dim=1, out=feature_norm[chunk])
        torch.linalg.vector_norm(c, dim=1, out=center_norm[chunk])
        scaled = torch.addcmul(f, c, (feature_norm[chunk] / center_norm[chunk]).unsqueeze(1), value=-1)
        torch.linalg.vector_norm(scaled, dim=1, out=difference[chunk])
    feature_norm, center_norm, difference = norms.double()
    one_minus_cos = 0.5 * (difference / feature_norm).square()

    plan = _plan(dim, radius, published, dtype, compensated=dtype == torch.float64)
    order = plan.order[0]
    log_kappa = log_kappa.double().clamp(max=plan.log_kappa_max)
    growth = log_kappa.exp()  # d kappa / d log_kappa
    kappa = growth + PUBLISHED_EPSILON if published else growth
    bessel = debye_reference(kappa, plan, with_power=published)
    phi = (bessel.psi - kappa) + bessel.psi_tail
    if published:
        scaled_bessel = phi.exp()
        floored_bessel = scaled_bessel + PUBLISHED_EPSILON
        floored_kappa = kappa + PUBLISHED_EPSILON
        l2, log_floored_bessel = -order * floored_kappa.log(), floored_bessel.log()
        torch.add(kappa * one_minus_cos + l2, log_floored_bessel + _constant(dim, radius), out=loss)
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
        rows = pull / feature_norm.square(), -kappa / (feature_norm * center_norm), pull / center_norm.square()
        torch.div(torch.stack(rows), share, out=coefficients)
    if terms.numel():
        l2 = l2 if published else -order * log_kappa
        l3 = log_floored_bessel + kappa if published else phi - _constant(dim, radius) + kappa - l2
        torch.stack((cos, kappa, -pull, l2, l3), out=terms)


@triton.jit
def _scf_loss_kernel(
    features_ptr,
    log_kappa_ptr,
    class_centers_ptr,
    labels_ptr,
    loss_ptr,
    slope_ptr,
    coefficients_ptr,
    terms_ptr,
    features_stride,
    class_centers_stride,
    B,
    C,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    CONSTANT: tl.constexpr,
    PUBLISHED: tl.constexpr,
    MEAN: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TERMS: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of rows a program: each row and its class center are read once and stay in registers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < B
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    known = (labels >= 0) & (labels < C)
    labels = tl.where(known, labels, 0)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    log_kappa = as_compute(tl.load(log_kappa_ptr + rows, mask=inside, other=0.0), FP64)
    log_kappa = tl.where(known, log_kappa, float("nan"))

    f_inverse = tl.rsqrt(tl.where(inside, tl.sum(f * f, axis=1), 1.0))
    c_inverse = tl.rsqrt(tl.where(inside, tl.sum(c * c, axis=1), 1.0))
    difference = f * f_inverse[:, None] - c * c_inverse[:, None]
    one_minus_cos = 0.5 * tl.sum(difference * difference, axis=1)
    cos = 1.0 - one_minus_cos

    LOG_KAPPA_MAX: tl.constexpr = PLAN.log_kappa_max
    ORDER: tl.constexpr = PLAN.order[0]
    log_kappa = tl.where(log_kappa > LOG_KAPPA_MAX, LOG_KAPPA_MAX, log_kappa)
    growth = exp_kernel(log_kappa)
    kappa = growth
    if PUBLISHED:
        kappa = growth + _EPSILON
    psi, psi_tail, _, complement, _, _ = debye(kappa, PLAN, WITH_POWER=PUBLISHED)
    phi, rest = two_sum_kernel(psi, -kappa)
    phi += rest + psi_tail
    if PUBLISHED:
        scaled_bessel = tl.exp(phi)
        floored_bessel = scaled_bessel + _EPSILON
        floored_kappa = kappa + _EPSILON
        log_floored_bessel = tl.log(floored_bessel)
        l2 = -ORDER * tl.log(floored_kappa)
        l3 = log_floored_bessel + kappa
        loss = kappa * one_minus_cos + (l2 + (log_floored_bessel + CONSTANT))
        slope = growth * (
            one_minus_cos - ORDER / floored_kappa + scaled_bessel / floored_bessel * (ORDER / kappa - complement)
        )
    else:
        l2 = -ORDER * log_kappa
        l3 = phi - CONSTANT + kappa - l2
        loss = kappa * one_minus_cos + phi
        slope = kappa * (one_minus_cos - complement)
    tl.store(loss_ptr + rows, loss, mask=inside)
    weight = kappa
    if MEAN:
        slope = slope / B
        weight = kappa / B
    tl.store(slope_ptr + rows, slope, mask=inside)
    if COEFFICIENTS:
        tl.store(coefficients_ptr + rows, weight * cos * f_inverse * f_inverse, mask=inside)
        tl.store(coefficients_ptr + B + rows, -weight * f_inverse * c_inverse, mask=inside)
        tl.store(coefficients_ptr + 2 * B + rows, weight * cos * c_inverse * c_inverse, mask=inside)
    if TERMS:
        tl.store(terms_ptr + rows, cos, mask=inside)
        tl.store(terms_ptr + B + rows, kappa, mask=inside)
        tl.store(terms_ptr + 2 * B + rows, -kappa * cos, mask=inside)
        tl.store(terms_ptr + 3 * B + rows, l2, mask=inside)
        tl.store(terms_ptr + 4 * B + rows, l3, mask=inside)


@torch.library.custom_op("scf::scf_loss", mutates_args=())
def _scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float,
    options: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss; d loss / d log_kappa (B,); coefficients a, b, c of d loss / d features = a features + b center and
    d loss / d center = b features + c center, (3, B) or, not asked for, (3, 0); terms, (5, B) or (5, 0).
    The gradients are those of the reduced loss.

    `options` are words: a reduction, and any of published, coefficients, terms, triton, debug. One argument for all of
    them: each would cost PyTorch's Python layer time in every call, and a place in four signatures.
    """
    options = options.split()
    published, mean = "published" in options, "mean" in options
    batch, dim = features.shape
    if ("debug" in options or not labels.is_cuda) and batch:
        _check_labels(labels, len(class_centers))
    rows, *others = outputs = [
        torch.empty(shape, dtype=compute_dtype(features, log_kappa, class_centers), device=features.device)
        for shape in _output_shapes(batch, options)
    ]
    if "triton" not in options:
        scf_loss_reference(features, log_kappa, class_centers, labels, *outputs, radius, published, mean)
    elif batch:
        features, class_centers = _dense_rows(features), _dense_rows(class_centers)
        block_d, tile_rows, num_warps = _tile(dim, rows.dtype)
        with torch.cuda.device_of(features):
            _scf_loss_kernel[(triton.cdiv(batch, tile_rows),)](
                features,
                log_kappa.contiguous(),
                class_centers,
                labels.contiguous(),
                *outputs,
                features.stride(0),
                class_centers.stride(0),
                batch,
                len(class_centers),
                D=dim,
                PLAN=_plan(dim, radius, published, rows.dtype),
                CONSTANT=_constant(dim, radius),
                PUBLISHED=published,
                MEAN=mean,
                COEFFICIENTS="coefficients" in options,
                TERMS="terms" in options,
                FP64=rows.dtype == torch.float64,
                ROWS=tile_rows,
                BLOCK_D=block_d,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    loss = rows.mean() if mean else rows.sum() if "sum" in options else rows
    return (loss, *others)


@_scf_loss.register_fake
def _(features, log_kappa, class_centers, labels, radius, options):
    rows, *others = (
        torch.empty(shape, dtype=compute_dtype(features, log_kappa, class_centers), device=features.device)
        for shape in _output_shapes(features.shape[0], options.split())
    )
    return (rows if "none" in options else rows.new_empty(()), *others)


def _output_shapes(batch: int, options: list[str]) -> tuple[tuple[int, ...], ...]:
    """Of the rows of the loss, the slope, the coefficients and the terms."""
    return (batch,), (batch,), (3, batch if "coefficients" in options else 0), (5, batch if "terms" in options else 0)


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    low, high = (value.item() for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(
            f"labels must be in [0, {classes}), one for each class center, got values from {low} to {high}"
        )


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Block width, rows a program, warps."""
    block_d = triton.next_power_of_2(dim)
    tile = _TILE_BYTES // dtype.itemsize
    return (
        block_d,
        min(_ROW_BYTES // dtype.itemsize, max(1, tile // block_d)),
        min(_MAX_WARPS, max(4, 4 * block_d // tile)),
    )


@triton.jit
def _feature_gradient_kernel(
    grad_ptr,
    coefficients_ptr,
    features_ptr,
    class_centers_ptr,
    labels_ptr,
    result_ptr,
    features_stride,
    class_centers_stride,
    B,
    C,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad (a f + b c), a tile of rows a program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < B
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    labels = tl.where((labels >= 0) & (labels < C), labels, 0)  # the coefficients of an unknown class are NaN
    grad = tl.load(grad_ptr + rows * GRAD_STRIDE, mask=inside, other=0.0)
    a = grad * tl.load(coefficients_ptr + rows, mask=inside, other=0.0)
    b = grad * tl.load(coefficients_ptr + B + rows, mask=inside, other=0.0)
    mask = inside[:, None] & (cols < D)[None, :]
    f = as_compute(tl.load(features_ptr + rows[:, None] * features_stride + cols[None, :], mask=mask, other=0.0), FP64)
    c = as_compute(
        tl.load(class_centers_ptr + labels[:, None] * class_centers_stride + cols[None, :], mask=mask, other=0.0), FP64
    )
    tl.store(result_ptr + rows[:, None] * D + cols[None, :], a[:, None] * f + b[:, None] * c, mask=mask)


@triton.jit
def _class_center_gradient_kernel(
    grad_ptr,
    coefficients_ptr,
    features_ptr,
    class_centers_ptr,
    sorted_labels_ptr,
    order_ptr,
    result_ptr,
    features_stride,
    class_centers_stride,
    B,
    C,
    GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum of grad (b f + c center) over the rows of one class, by the program at the first of them: one order of
    summation, no atomics.
    """
    position = tl.program_id(0)
    label = tl.load(sorted_labels_ptr + position).to(tl.int64)
    previous = tl.load(sorted_labels_ptr + position - 1, mask=position > 0, other=-1).to(tl.int64)
    if (label != previous) & (label >= 0) & (label < C):
        cols = tl.arange(0, BLOCK_D)
        mask = cols < D
        center = as_compute(
            tl.load(class_centers_ptr + label * class_centers_stride + cols, mask=mask, other=0.0), FP64
        )
        total = center * 0.0
        following = label
        while following == label:
            row = tl.load(order_ptr + position).to(tl.int64)
            grad = tl.load(grad_ptr + row * GRAD_STRIDE)
            along_f = grad * tl.load(coefficients_ptr + B + row)
            along_center = grad * tl.load(coefficients_ptr + 2 * B + row)
            f = as_compute(tl.load(features_ptr + row * features_stride + cols, mask=mask, other=0.0), FP64)
            total += along_f * f + along_center * center
            position += 1
            following = tl.load(sorted_labels_ptr + position, mask=position < B, other=-1).to(tl.int64)
        tl.store(result_ptr + label * D + cols, total, mask=mask)


def _gradients_reference(grad, coefficients, features, class_centers, labels, grad_features, grad_class_centers):
    """Fills whichever of the two is not empty, in plain PyTorch."""
    for chunk, f, c in _chunks(features, class_centers, labels, coefficients.dtype):
        along_f, across, along_c = (coefficients[:, chunk] * grad.expand(len(labels))[chunk]).unsqueeze(2)
        if grad_features.numel():
            torch.addcmul(across * c, f, along_f, out=grad_features[chunk])
        if grad_class_centers.numel():
            grad_class_centers.index_add_(
                0, labels[chunk], torch.addcmul(across * f, c, along_c).to(grad_class_centers.dtype)
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
    """The three gradients; empty where not asked for. log_kappa is here so that differentiating again is an error, not
    a zero.
    """
    batch, dim = features.shape
    grad_features = torch.empty(
        features.shape if for_features else (0, dim), dtype=features.dtype, device=features.device
    )
    grad_class_centers = class_centers.new_zeros(class_centers.shape if for_class_centers else (0, dim))
    if not triton_kernel:
        if for_features or for_class_centers:
            _gradients_reference(grad, coefficients, features, class_centers, labels, grad_features, grad_class_centers)
    elif batch:
        features, class_centers, labels, grad = (
            _dense_rows(features),
            _dense_rows(class_centers),
            labels.contiguous(),
            grad.contiguous(),
        )
        block_d, tile_rows, num_warps = _tile(dim, slope.dtype)
        settings = dict(
            GRAD_STRIDE=grad.ndim, D=dim, FP64=coefficients.dtype == torch.float64, BLOCK_D=block_d, num_warps=num_warps
        )
        strides = features.stride(0), class_centers.stride(0), batch, len(class_centers)
        with torch.cuda.device_of(features):
            if for_features:
                _feature_gradient_kernel[(triton.cdiv(batch, tile_rows),)](
                    grad,
                    coefficients,
                    features,
                    class_centers,
                    labels,
                    grad_features,
                    *strides,
                    ROWS=tile_rows,
                    **settings,
                )
            if for_class_centers:
                sorted_labels, order = torch.sort(labels, stable=True)
                _class_center_gradient_kernel[(batch,)](
                    grad,
                    coefficients,
                    features,
                    class_centers,
                    sorted_labels,
                    order,
                    grad_class_centers,
                    *strides,
                    **settings,
                )
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
    ctx.triton_kernel = "triton" in options
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


def scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
    normalizer: str = "exact",
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SCFTerms]:
    """SCF loss of a batch, with its gradient from the same pass. Source: Li et al., CVPR 2021, Eq. (8); see the head of
    this module.

    Args:
        features: (B, d) float, embeddings before normalization; d in 2 .. 8192. Half precision is read as it is and
            computed in float32.
        log_kappa: (B,) or (B, 1) float, log concentration; taken for 41.5 (float64: 346) beyond that.
        class_centers: (C, d) float, of any length.
        labels: (B,) int32 or int64 in [0, C). On CUDA, a label outside gives NaN in its row.
        radius: r > 0 of the sphere; it shifts the loss and no more.
        normalizer: "exact"; or "published", the published code's, its clamps of kappa included.
        reduction: "mean", "sum" or "none"; deterministic.
        return_terms: also return the per-sample terms to log.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
        debug: check the labels on CUDA too, which waits for the device.
    Returns:
        The loss, scalar or (B,), float32 (float64 if any argument is); with return_terms, (loss, SCFTerms).
        Differentiable once, in features, log_kappa and class_centers; deterministic. A row of zeros has no direction,
        and gives NaN.
    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown option, radius <= 0, or a backend that cannot run.
        IndexError: a label outside [0, C), where values are checked.
    """
    for name, tensor in (("features", features), ("log_kappa", log_kappa), ("class_centers", class_centers)):
        check_floating(name, tensor)
    if features.ndim != 2 or not 2 <= features.shape[1] <= _MAX_DIM:
        raise ValueError(f"features must be (B, d) with d in 2 .. {_MAX_DIM}, got {tuple(features.shape)}")
    batch, dim = features.shape
    if class_centers.ndim != 2 or class_centers.shape[1] != dim:
        raise ValueError(
            f"class_centers must be (C, {dim}) to match features {tuple(features.shape)}, got "
            f"{tuple(class_centers.shape)}"
        )
    if tuple(log_kappa.shape) not in ((batch,), (batch, 1)):
        raise ValueError(
            f"log_kappa must be ({batch},) or ({batch}, 1) to match features, got {tuple(log_kappa.shape)}"
        )
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels must be ({batch},) to match features, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, got {labels.dtype}: convert them with .long()")
    if normalizer not in ("exact", "published"):
        raise ValueError(f'normalizer must be "exact" or "published", got {normalizer!r}')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be a positive number, got {radius!r}")
    differentiable = torch.is_grad_enabled() and (features.requires_grad or class_centers.requires_grad)
    words = {
        "published": normalizer == "published",
        "coefficients": differentiable,
        "terms": return_terms,
        "triton": use_triton(backend, features),
        "debug": debug,
    }
    options = " ".join([reduction, *(word for word, wanted in words.items() if wanted)])
    loss, _, _, terms = _scf_loss(features, log_kappa.reshape(-1), class_centers, labels, float(radius), options)
    return (loss, SCFTerms(*terms.unbind(0))) if return_terms else loss
