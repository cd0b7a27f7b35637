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
import triton
import triton.language as tl

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import as_compute, dense_rows, row_tile, transformed, use_triton
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


@triton.jit
def _variance_kernel(log_variance1, log_variance2):
    """Returns log v and 1 / v of two float64 log variances, without overflow."""
    larger = tl.maximum(log_variance1, log_variance2)
    total = 1.0 + tl.exp(-tl.abs(log_variance1 - log_variance2))
    return larger + tl.log(total), tl.exp(-larger) / total


@triton.jit
def _mutual_likelihood_kernel(
    mu1_ptr,  # (P, D), rows of mu1_stride
    log_variance1_ptr,  # (P,), or with DIAGONAL (P, D), rows of log_variance1_stride
    mu2_ptr,  # (P, D), rows of mu2_stride
    log_variance2_ptr,  # as log_variance1_ptr
    score_ptr,  # (P,) out
    mu1_stride,
    log_variance1_stride,
    mu2_stride,
    log_variance2_stride,
    P,
    CONSTANT: tl.constexpr,
    D: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per ROWS pairs, each read once; float64 throughout, and CONSTANT with it."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < P
    mask = inside[:, None] & (cols < D)[None, :]
    mu1 = as_compute(tl.load(mu1_ptr + rows[:, None] * mu1_stride + cols[None, :], mask=mask, other=0.0), True)
    mu2 = as_compute(tl.load(mu2_ptr + rows[:, None] * mu2_stride + cols[None, :], mask=mask, other=0.0), True)
    difference = mu1 / tl.sqrt(tl.sum(mu1 * mu1, axis=1))[:, None] - mu2 / tl.sqrt(tl.sum(mu2 * mu2, axis=1))[:, None]
    square = difference * difference
    if DIAGONAL:
        at1 = log_variance1_ptr + rows[:, None] * log_variance1_stride + cols[None, :]
        at2 = log_variance2_ptr + rows[:, None] * log_variance2_stride + cols[None, :]
        log_variance1 = as_compute(tl.load(at1, mask=mask, other=0.0), True)
        log_variance2 = as_compute(tl.load(at2, mask=mask, other=0.0), True)
        log_v, precision = _variance_kernel(log_variance1, log_variance2)
        terms = tl.sum(tl.where(mask, square * precision + log_v, 0.0), axis=1)
    else:
        log_variance1 = as_compute(tl.load(log_variance1_ptr + rows, mask=inside, other=0.0), True)
        log_variance2 = as_compute(tl.load(log_variance2_ptr + rows, mask=inside, other=0.0), True)
        log_v, precision = _variance_kernel(log_variance1, log_variance2)
        terms = tl.sum(square, axis=1) * precision + D * log_v
    tl.store(score_ptr + rows, CONSTANT - 0.5 * terms, mask=inside)


def _mutual_likelihood_triton(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Fills scores, (P,); at least one."""
    count, dim = mu1.shape
    diagonal = log_variance1.ndim == 2
    mu1, mu2 = dense_rows(mu1), dense_rows(mu2)
    log_variance1, log_variance2 = (
        dense_rows(x) if diagonal else x.contiguous() for x in (log_variance1, log_variance2)
    )
    block_d, tile_rows, num_warps = row_tile(dim)
    with torch.cuda.device_of(mu1):
        _mutual_likelihood_kernel[(triton.cdiv(count, tile_rows),)](
            mu1,
            log_variance1,
            mu2,
            log_variance2,
            scores,
            mu1.stride(0),
            log_variance1.stride(0),
            mu2.stride(0),
            log_variance2.stride(0),
            count,
            CONSTANT=gaussian_constant(dim),
            D=dim,
            DIAGONAL=diagonal,
            ROWS=tile_rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=False,  # lanes that share a row would round its sums differently
        )


@torch.library.custom_op("scf::mutual_likelihood", mutates_args=())
def _mutual_likelihood(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    dtype: torch.dtype,
    triton_kernel: bool,
) -> torch.Tensor:
    if not triton_kernel:
        return _mutual_likelihood_torch(mu1, log_variance1, mu2, log_variance2).to(dtype)
    scores = torch.empty(len(mu1), dtype=dtype, device=mu1.device)
    if len(mu1):
        _mutual_likelihood_triton(mu1, log_variance1, mu2, log_variance2, scores)
    return scores


@_mutual_likelihood.register_fake
def _(mu1, log_variance1, mu2, log_variance2, dtype, triton_kernel):
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
    return (*(gradient.to(saved.dtype) for gradient, saved in zip(gradients, ctx.saved_tensors)), None, None)


_mutual_likelihood.register_autograd(_backward, setup_context=_setup)


def mutual_likelihood(
    mu1: torch.Tensor,
    log_variance1: torch.Tensor,
    mu2: torch.Tensor,
    log_variance2: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Mutual likelihood score of each pair of Gaussian faces, larger for more similar ones. Source: Eqn (3), Shi and
    Jain, ICCV 2019.

    Args:
        mu1, mu2: (P, D) floating point directions, D in 2 .. 8192; any positive length, since each row is normalized
            here in float64.
        log_variance1, log_variance2: floating point log sigma^2, both (P,), one variance in all dimensions, or both
            (P, D).
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
    Returns:
        (P,) log likelihood (nats), computed in float64 and rounded to the inputs' promoted dtype (at least float32:
        pass float64 to keep close scores apart). NaN where an input is or a direction is zero. Differentiable twice.
        Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above, or the backend cannot run.
    """
    dtype = check_gaussian_faces(mu1, log_variance1, mu2, log_variance2)
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"mu1 and mu2 must have one shape, got {tuple(mu1.shape)} and {tuple(mu2.shape)}; "
            "mutual_likelihood_matrix compares all pairs"
        )
    triton_kernel = use_triton(backend, mu1)
    if transformed():
        return _transforms.mutual_likelihood(mu1, log_variance1, mu2, log_variance2).to(dtype)
    return _mutual_likelihood(mu1, log_variance1, mu2, log_variance2, dtype, triton_kernel)


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
