"""Mutual likelihood of two von Mises-Fisher distributions on the r-radius sphere: the SCF similarity of two faces.

    kt    = |kappa1 mu1 + kappa2 mu2|,   kt^2 = (kappa1 - kappa2)^2 + 2 kappa1 kappa2 (1 + mu1 . mu2)
    score = log C_d(kappa1) + log C_d(kappa2) - log C_d(kt) - d log r              (Li et al., CVPR 2021, Eq. (13))
          = phi(kt) - phi(kappa1) - phi(kappa2) + log C_d(0) - d log r
    phi(kappa) = psi_v(kappa) - psi_v(0),  v = d/2 - 1

    With u the unit directions, t = kappa1 u1 + kappa2 u2 and e = t / |t|,
    d score / d kappa1 = A(kt) u1 . e - A(kappa1)           d score / d mu1 = A(kt) kappa1 (e - (u1 . e) u1) / |mu1|

The normalizers are thousands each and their differences rank the pairs. Pairs are therefore computed in float64
whatever their type: their time goes into reading mu. ``vmf_similarity_tiles`` compares all pairs of two sets.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import (
    DEFAULT_RADIUS,
    as_compute,
    check_radius,
    dense_rows,
    promoted_dtype,
    row_tile,
    transformed,
    use_triton,
)
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels._vmf_common import (
    check_faces,
    log_uniform,
    phi,
    phi_of_square,
    score_constant,
    unit_rows,
)
from scf_fast.kernels.debye import debye_kernel
from scf_fast.kernels.log_bessel import log_vmf_normalizer, mean_resultant_length


def neutral_radius(dim: int) -> float:
    """Returns the radius at which a score is the log likelihood ratio against a uniform distribution: at 0 the pair
    says nothing, above 0 it speaks for one person.

    Any radius shifts all scores by one number. This one keeps them small, which a result in half precision needs.
    """
    return math.exp(log_uniform(dim) / dim)


def _vmf_similarity_torch(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float
) -> torch.Tensor:
    """Returns the score of each pair in float64; the CPU path."""
    mu1, kappa1, mu2, kappa2 = (tensor.double() for tensor in (mu1, kappa1, mu2, kappa2))
    # The length of the vector sum has no cancellation at mu1 = -mu2, unlike the cosine formula.
    total = kappa1[:, None] * unit_rows(mu1, kappa1) + kappa2[:, None] * unit_rows(mu2, kappa2)
    kappa_sum = torch.linalg.vector_norm(total, dim=1)
    dim = mu1.shape[1]
    log_c1, log_c2, log_c_sum = (
        log_vmf_normalizer(kappa, dim, backend="torch") for kappa in (kappa1, kappa2, kappa_sum)
    )
    return log_c1 + log_c2 - log_c_sum - dim * math.log(radius)


@triton.jit
def _pair_kernel(
    mu1_ptr,  # (B, D), rows of mu1_stride
    kappa1_ptr,  # (B,)
    mu2_ptr,  # (B, D), rows of mu2_stride
    kappa2_ptr,  # (B,)
    score_ptr,  # (B,) out
    mu1_stride,
    mu2_stride,
    B,
    CONSTANT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per ROWS pairs, each read once; float64 throughout. CONSTANT is a compile-time constant, since a
    launch would round it to float32.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < B
    mask = inside[:, None] & (cols < D)[None, :]
    mu1 = as_compute(tl.load(mu1_ptr + rows[:, None] * mu1_stride + cols[None, :], mask=mask, other=0.0), True)
    mu2 = as_compute(tl.load(mu2_ptr + rows[:, None] * mu2_stride + cols[None, :], mask=mask, other=0.0), True)
    kappa1 = as_compute(tl.load(kappa1_ptr + rows, mask=inside, other=0.0), True)
    kappa2 = as_compute(tl.load(kappa2_ptr + rows, mask=inside, other=0.0), True)
    length1 = tl.sqrt(tl.sum(mu1 * mu1, axis=1))
    length2 = tl.sqrt(tl.sum(mu2 * mu2, axis=1))
    length1 = tl.where((length1 == 0.0) & (kappa1 == 0.0), 1.0, length1)
    length2 = tl.where((length2 == 0.0) & (kappa2 == 0.0), 1.0, length2)
    total = (kappa1 / length1)[:, None] * mu1 + (kappa2 / length2)[:, None] * mu2
    kappa_sum = tl.sqrt(tl.sum(total * total, axis=1))
    psi1, tail1, _, _, _, _ = debye_kernel(kappa1, PLAN)
    psi2, tail2, _, _, _, _ = debye_kernel(kappa2, PLAN)
    psi, tail, _, _, _, _ = debye_kernel(kappa_sum, PLAN)
    tl.store(score_ptr + rows, psi - psi1 - psi2 + CONSTANT + (tail - tail1 - tail2), mask=inside)


@torch.library.custom_op("scf::vmf_similarity", mutates_args=())
def _vmf_similarity(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float, triton_kernel: bool
) -> torch.Tensor:
    if not triton_kernel:
        return _vmf_similarity_torch(mu1, kappa1, mu2, kappa2, radius).to(promoted_dtype(mu1, kappa1, mu2, kappa2))
    batch, dim = mu1.shape
    scores = torch.empty(batch, dtype=promoted_dtype(mu1, kappa1, mu2, kappa2), device=mu1.device)
    if batch:
        mu1, mu2 = dense_rows(mu1), dense_rows(mu2)
        block_d, tile_rows, num_warps = row_tile(dim)
        with torch.cuda.device_of(mu1):
            _pair_kernel[(triton.cdiv(batch, tile_rows),)](
                mu1,
                kappa1.contiguous(),
                mu2,
                kappa2.contiguous(),
                scores,
                mu1.stride(0),
                mu2.stride(0),
                batch,
                CONSTANT=-dim / 2 * math.log(2 * math.pi) - dim * math.log(radius),
                D=dim,
                PLAN=debye_plan(dim / 2 - 1, torch.float64),
                ROWS=tile_rows,
                BLOCK_D=block_d,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return scores


@_vmf_similarity.register_fake
def _(mu1, kappa1, mu2, kappa2, radius, triton_kernel):
    return torch.empty(mu1.shape[0], dtype=promoted_dtype(mu1, kappa1, mu2, kappa2), device=mu1.device)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.triton_kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    mu1, kappa1, mu2, kappa2 = (tensor.double() for tensor in ctx.saved_tensors)
    grad, dim = grad.double(), int(mu1.shape[1])  # a compiled graph is for one width
    ratio = functools.partial(mean_resultant_length, dim=dim, backend="triton" if ctx.triton_kernel else "torch")
    total = kappa1[:, None] * unit_rows(mu1, kappa1) + kappa2[:, None] * unit_rows(mu2, kappa2)
    kappa_sum = torch.linalg.vector_norm(total, dim=1)
    direction = total / kappa_sum.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    grad_sum = grad * ratio(kappa_sum)
    gradients = []
    for mu, kappa in (mu1, kappa1), (mu2, kappa2):
        unit, length = unit_rows(mu, kappa), torch.linalg.vector_norm(mu, dim=1)
        along = (unit * direction).sum(dim=1)
        # Only at kappa = 0 is a zero direction valid, and there it has no effect.
        weight = torch.where(kappa == 0, 0.0, grad_sum * kappa / length)
        gradients += [weight[:, None] * (direction - along[:, None] * unit), grad_sum * along - grad * ratio(kappa)]
    return (*(gradient.to(saved.dtype) for gradient, saved in zip(gradients, ctx.saved_tensors)), None, None)


_vmf_similarity.register_autograd(_backward, setup_context=_setup)


def vmf_similarity(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float = DEFAULT_RADIUS,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Similarity of each pair of faces, larger for more similar ones. Source: Eqn (13), Li et al., CVPR 2021.

    Args:
        mu1, mu2: (B, D) floating point directions, D in 2 .. 8192; any positive length, since each row is normalized
            here in float64.
        kappa1, kappa2: (B,) floating point concentrations >= 0. Where 0, the distribution is uniform and its direction
            may be zero.
        radius: r > 0 of the sphere; it shifts every score by the same amount, see ``neutral_radius``.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
    Returns:
        (B,) log likelihood (nats), computed in float64 and rounded to the inputs' promoted dtype (at least float32:
        pass float64 to keep close scores apart). NaN where an input is, a kappa is negative, or a direction is zero at
        kappa > 0. Differentiable twice. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above, or the backend cannot run.
    """
    dtype = check_faces(mu1, kappa1, mu2, kappa2, radius)
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"mu1 and mu2 must have one shape, got {tuple(mu1.shape)} and {tuple(mu2.shape)}; "
            "vmf_similarity_matrix compares all pairs"
        )
    triton_kernel = use_triton(backend, mu1)
    if transformed():
        return _transforms.vmf_similarity(mu1, kappa1, mu2, kappa2, radius).to(dtype)
    return _vmf_similarity(mu1, kappa1, mu2, kappa2, float(radius), triton_kernel)


@torch.no_grad()
def vmf_similarity_from_cosine(
    cos: torch.Tensor, kappa1: torch.Tensor, kappa2: torch.Tensor, dim: int, radius: float = DEFAULT_RADIUS
) -> torch.Tensor:
    """Similarity of pairs whose cosine is known already, by Eqn (13). Source: Li et al., CVPR 2021.

    Args:
        cos: floating point cosines of any shape.
        kappa1, kappa2: floating point concentrations >= 0 whose shapes broadcast to that of cos.
        dim: D >= 2 of the directions.
        radius: r > 0 of the sphere.
    Returns:
        float64 log likelihood (nats) of cos's shape, to 1e-11 and the accuracy of cos, whose error is multiplied by
        kappa1 kappa2 / kt. NaN where a kappa is negative. Carries no gradient. Deterministic.
    Raises:
        ValueError: dim < 2, or radius is not positive.
    """
    check_radius(radius)
    kappa1, kappa2 = kappa1.double(), kappa2.double()
    square = (2 * kappa1 * kappa2 * (1 + cos.double())).add_((kappa1 - kappa2).square()).clamp_(min=0)
    return phi_of_square(square, dim).sub_(phi(kappa1, dim)).sub_(phi(kappa2, dim)).add_(score_constant(dim, radius))
