"""Mutual likelihood of two von Mises-Fisher distributions on the r-radius sphere: the SCF similarity of two faces.

    kt    = |kappa1 mu1 + kappa2 mu2|,   kt^2 = (kappa1 - kappa2)^2 + 2 kappa1 kappa2 (1 + mu1 . mu2)
    score = log C_d(kappa1) + log C_d(kappa2) - log C_d(kt) - d log r                                 (Li et al., CVPR 2021, Eq. (13))
          = phi(kt) - phi(kappa1) - phi(kappa2) + log C_d(0) - d log r,     phi(kappa) = psi_v(kappa) - psi_v(0),  v = d/2 - 1

The normalizers are thousands each and their differences rank the pairs. Pairs are therefore worked out in float64
whatever comes in: their time goes into reading mu. All pairs of two sets are a matrix product with an epilogue. On CUDA
both are float32, the epilogue in terms of phi, which starts at 0 and never passes kappa; what remains is the rounding
of kt, about 1e-7 kappa nats. On the CPU both are float64: a float32 product alone would cost 1e-7 kappa nats there too
(1.5e-4 at kappa 1000) to save a quarter of the time.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import as_compute, check_floating, use_triton
from scf_fast.kernels.debye import debye, debye_plan, debye_reference
from scf_fast.kernels.log_bessel import log_vmf_normalizer, mean_resultant_length

_MAX_DIM = 8192  # a pair's two rows are held in registers
_PAIR_TILE = 1024  # elements of each of mu1 and mu2 that a program of the pair kernel holds, as float64
_BLOCK = 128  # rows and columns of a tile of scores
_GROUP = 8  # tiles of rows that share their columns in the second-level cache
_NUM_WARPS, _NUM_STAGES = 8, 3
_BAND = {
    "cuda": 1 << 26,
    "cpu": 1 << 20,
}  # scores that exist at once where they are not written out: 512 and 8 MiB as float64
_CHUNK = {"cuda": 1 << 22, "cpu": 1 << 14}  # of them in plain PyTorch, so that the temporaries of psi stay in cache
MAX_BINS = 1024  # of a histogram that one program counts in registers
_KEPT = 16  # best columns of a row that a program keeps in registers
_KEPT_BLOCK = 64  # rows and columns of a tile beside which they fit
_PROGRAMS = 8  # for each multiprocessor, into which the columns are cut where there are few rows
_MOST_PROGRAMS = 65535  # along the second and third dimension of a launch


def _log_uniform(dim: int) -> float:
    """log C_d(0): minus the logarithm of the area of the unit sphere."""
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def neutral_radius(dim: int) -> float:
    """The radius at which a score is the log likelihood ratio against a uniform distribution: 0 says nothing, positive
    means alike.

    Any radius shifts all scores by one number. This one keeps them small, which a result in half precision needs.
    """
    return math.exp(_log_uniform(dim) / dim)


@functools.lru_cache(maxsize=64)
def _phi_plan(dim: int, dtype: torch.dtype):
    """`debye_plan` whose psi is phi: float32 in two floats, float64 in one, which leaves 1e-16 of kappa and of the
    order.
    """
    order = dim / 2 - 1
    return debye_plan(order, dtype, order * math.log(2) + math.lgamma(order + 1), compensated=dtype == torch.float32)


# ---- pairs
# ------------------------------------------------------------------------------------------------------------------------------


def _unit(mu: torch.Tensor, kappa: torch.Tensor) -> torch.Tensor:
    """Unit rows; a zero row stays so where kappa is 0, and is NaN elsewhere."""
    length = torch.linalg.vector_norm(mu, dim=1)
    return mu / torch.where((length == 0) & (kappa == 0), 1.0, length)[:, None]


def vmf_similarity_reference(mu1, kappa1, mu2, kappa2, radius):
    """The score of each pair in plain PyTorch, in float64; differentiable by autograd."""
    mu1, kappa1, mu2, kappa2 = (tensor.double() for tensor in (mu1, kappa1, mu2, kappa2))
    # The length of the vector sum has no cancellation at mu1 = -mu2, unlike the cosine formula.
    kappa_sum = torch.linalg.vector_norm(
        kappa1[:, None] * _unit(mu1, kappa1) + kappa2[:, None] * _unit(mu2, kappa2), dim=1
    )
    dim = mu1.shape[1]
    normalizers = (log_vmf_normalizer(kappa, dim, backend="torch") for kappa in (kappa1, kappa2, kappa_sum))
    return next(normalizers) + next(normalizers) - next(normalizers) - dim * math.log(radius)


@triton.jit
def _pair_kernel(
    mu1_ptr,
    kappa1_ptr,
    mu2_ptr,
    kappa2_ptr,
    score_ptr,
    mu1_stride,
    mu2_stride,
    B,
    CONSTANT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS pairs a program, read once; float64 throughout. CONSTANT is known to the compiler, since a launch would
    round it to float32.
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
    psi1, tail1, _, _, _, _ = debye(kappa1, PLAN)
    psi2, tail2, _, _, _, _ = debye(kappa2, PLAN)
    psi, tail, _, _, _, _ = debye(kappa_sum, PLAN)
    tl.store(score_ptr + rows, psi - psi1 - psi2 + CONSTANT + (tail - tail1 - tail2), mask=inside)


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@torch.library.custom_op("scf::vmf_similarity", mutates_args=())
def _vmf_similarity(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float, triton_kernel: bool
) -> torch.Tensor:
    if not triton_kernel:
        return vmf_similarity_reference(mu1, kappa1, mu2, kappa2, radius).to(_result_dtype(mu1, kappa1, mu2, kappa2))
    batch, dim = mu1.shape
    scores = torch.empty(batch, dtype=_result_dtype(mu1, kappa1, mu2, kappa2), device=mu1.device)
    if batch:
        mu1, mu2 = _dense_rows(mu1), _dense_rows(mu2)
        block_d = triton.next_power_of_2(dim)
        tile_rows = max(1, _PAIR_TILE // block_d)
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
                num_warps=max(4, block_d // 512),
                enable_fp_fusion=False,
            )
    return scores


@_vmf_similarity.register_fake
def _(mu1, kappa1, mu2, kappa2, radius, triton_kernel):
    return torch.empty(mu1.shape[0], dtype=_result_dtype(mu1, kappa1, mu2, kappa2), device=mu1.device)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.triton_kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """With u the unit directions, t = kappa1 u1 + kappa2 u2 and e = t / |t|:  d score / d kappa1 = A(kt) u1 . e - A(kappa1),
    d score / d mu1 = A(kt) kappa1 (e - (u1 . e) u1) / |mu1|."""
    mu1, kappa1, mu2, kappa2 = (tensor.double() for tensor in ctx.saved_tensors)
    grad, dim = grad.double(), int(mu1.shape[1])  # a compiled graph is for one width
    ratio = functools.partial(mean_resultant_length, dim=dim, backend="triton" if ctx.triton_kernel else "torch")
    total = kappa1[:, None] * _unit(mu1, kappa1) + kappa2[:, None] * _unit(mu2, kappa2)
    kappa_sum = torch.linalg.vector_norm(total, dim=1)
    direction = total / kappa_sum.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    grad_sum = grad * ratio(kappa_sum)
    gradients = []
    for mu, kappa in (mu1, kappa1), (mu2, kappa2):
        unit, length = _unit(mu, kappa), torch.linalg.vector_norm(mu, dim=1)
        along = (unit * direction).sum(dim=1)
        # A zero direction counts at kappa = 0 alone, where it has no say.
        weight = torch.where(kappa == 0, 0.0, grad_sum * kappa / length)
        gradients += [weight[:, None] * (direction - along[:, None] * unit), grad_sum * along - grad * ratio(kappa)]
    return (*(gradient.to(saved.dtype) for gradient, saved in zip(gradients, ctx.saved_tensors)), None, None)


_vmf_similarity.register_autograd(_backward, setup_context=_setup)


def vmf_similarity(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float = 64.0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Similarity of each pair of faces, larger is more alike. Source: Eqn (13), Li et al., CVPR 2021.

    Args:
        mu1, mu2: (B, D) floating point directions, D in 2 .. 8192; any positive length, since each row is normalized
            here in float64.
        kappa1, kappa2: (B,) floating point concentrations >= 0. Where 0, the distribution is uniform and its direction
            may be zero.
        radius: r > 0 of the sphere; it shifts every score by the same amount, see `neutral_radius`.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
    Returns:
        (B,) log likelihood (nats), computed in float64 and rounded to the inputs' promoted dtype (at least float32:
        pass float64 to keep close scores apart). NaN where an input is, a kappa is negative, or a direction is zero at
        kappa > 0. Differentiable twice. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above, or the backend cannot run.
    """
    _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"mu1 and mu2 must have one shape, got {tuple(mu1.shape)} and {tuple(mu2.shape)}; "
            "vmf_similarity_matrix compares all pairs"
        )
    return _vmf_similarity(mu1, kappa1, mu2, kappa2, float(radius), use_triton(backend, mu1))


# ---- all pairs
# --------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _series_polynomial(plan) -> list[float]:
    """sum_k p^k Q_k(t^2) of an unshifted order m as one polynomial of t = m p in [0, 1], to 1e-12; highest power
    first.
    """
    powers = np.zeros(3 * plan.terms + 1)
    coefficients = iter(plan.zeroth)
    for k in range(1, plan.terms + 1):
        for j in reversed(range(k + 1)):
            powers[k + 2 * j] += next(coefficients) / plan.shifted[0] ** k
    chebyshev = np.polynomial.Polynomial(powers).convert(kind=np.polynomial.Chebyshev, domain=[0, 1])
    return chebyshev.trim(1e-13).convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()


def _phi_of_square(square: torch.Tensor, dim: int) -> torch.Tensor:
    """phi of the roots of float64 kappa^2, written over them."""
    plan = _phi_plan(dim, torch.float64)
    if plan.steps:
        terms = debye_reference(square.sqrt_(), plan)
        return torch.add(terms.psi, terms.psi_tail, out=square)
    m = plan.shifted[0]
    s = square.add_(m * m).sqrt_()
    t = s.reciprocal().mul_(m)
    highest, *others = _series_polynomial(plan)
    series = torch.full_like(t, highest)
    for coefficient in others:
        series.mul_(t).add_(coefficient)
    series.add_(t.add_(1).log_(), alpha=0.5)
    return series.add_(s).sub_(s.add_(m).log_().add_(sum(plan.offset)), alpha=plan.order_and_half[0])


def _phi(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """phi of each face, float64: what its scores with all others share. NaN for a negative kappa."""
    kappa = kappa.double()
    return _phi_of_square(torch.where(kappa < 0, math.nan, kappa).square(), dim)


class _Faces(NamedTuple):
    """One of the two sets in float64: what all scores of a face share."""

    weighted: torch.Tensor  # (N, D) kappa mu, mu a unit vector
    kappa: torch.Tensor  # (N,)
    phi: torch.Tensor  # (N,)

    @classmethod
    def of(cls, mu: torch.Tensor, kappa: torch.Tensor) -> "_Faces":
        mu, kappa = mu.double(), kappa.double()
        return cls(kappa[:, None] * _unit(mu, kappa), kappa, _phi(kappa, mu.shape[1]))

    def rows(self, rows: slice) -> "_Faces":
        return _Faces(*(tensor[rows] for tensor in self))


def vmf_similarity_matrix_reference(first: _Faces, second: _Faces, radius: float) -> torch.Tensor:
    """All pairs in plain PyTorch, (N, M) float64."""
    (n, dim), m = first.weighted.shape, len(second.kappa)
    scores = first.weighted @ second.weighted.T
    at_once = _CHUNK["cuda" if scores.is_cuda else "cpu"]
    width = max(1, min(m, at_once))
    for rows in _slices(n, max(1, at_once // width)):
        for cols in _slices(m, width):
            square = (first.kappa[rows, None].square() + second.kappa[cols].square()).add_(scores[rows, cols], alpha=2)
            # Clamped because rounding could make the square of opposite directions negative where kappa1 = kappa2.
            phi = _phi_of_square(square.clamp_(min=0), dim).sub_(first.phi[rows, None] - _constant(dim, radius))
            torch.sub(phi, second.phi[cols], out=scores[rows, cols])
    return scores


def _slices(length: int, at_once: int):
    return (slice(start, min(start + at_once, length)) for start in range(0, length, at_once))


@torch.no_grad()
def vmf_similarity_from_cosine(
    cos: torch.Tensor, kappa1: torch.Tensor, kappa2: torch.Tensor, dim: int, radius: float = 64.0
) -> torch.Tensor:
    """Eqn (13) of pairs whose cosine is known already. Source: Li et al., CVPR 2021.

    Args:
        cos: floating point cosines of any shape.
        kappa1, kappa2: floating point concentrations >= 0 of shapes that broadcast to it.
        dim: D >= 2 of the directions.
        radius: r > 0 of the sphere.
    Returns:
        float64 log likelihood (nats) of cos's shape, to 1e-11 and the accuracy of cos: an error in it counts kappa1
        kappa2 / kt times. NaN where a kappa is negative. Carries no gradient. Deterministic.
    Raises:
        ValueError: dim < 2, or radius is not positive.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be > 0, got {radius}")
    kappa1, kappa2 = kappa1.double(), kappa2.double()
    square = (2 * kappa1 * kappa2 * (1 + cos.double())).add_((kappa1 - kappa2).square()).clamp_(min=0)
    return _phi_of_square(square, dim).sub_(_phi(kappa1, dim)).sub_(_phi(kappa2, dim)).add_(_constant(dim, radius))


@triton.jit
def _cosines(
    mu1_ptr,
    mu2_ptr,
    mu1_stride,
    mu2_stride,
    N,
    M,
    row_block,
    col_block,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of mu1 mu2^T in float32, cut into eight strips of columns: the epilogue of one of them fits beside the
    others in registers, that of the whole would not.
    """
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = col_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at1, at2 = rows[:, None] * mu1_stride, cols[None, :] * mu2_stride
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        a = tl.load(mu1_ptr + at1 + inner[None, :], mask=(rows < N)[:, None] & (inner < D)[None, :], other=0.0)
        b = tl.load(mu2_ptr + at2 + inner[:, None], mask=(cols < M)[None, :] & (inner < D)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    left, right = _halves(product)
    a, b = _halves(left)
    c, d = _halves(right)
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    c1, c2 = _halves(c)
    d1, d2 = _halves(d)
    return a1, a2, b1, b2, c1, c2, d1, d2


@triton.jit
def _halves(tile):
    """The left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _scores(
    product, face1_ptr, face2_ptr, N, M, constant, row_block, col_block, STRIP: tl.constexpr, PLAN: tl.constexpr
):
    """The scores of one strip of a tile: rows, cols, scores. face_ptr: (3, N) float32 1 / |mu|, kappa, -phi(kappa)."""
    BLOCK: tl.constexpr = product.shape[0]
    WIDTH: tl.constexpr = product.shape[1]
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = col_block.to(tl.int64) * BLOCK + STRIP * WIDTH + tl.arange(0, WIDTH)
    row_inside, col_inside = rows < N, cols < M
    scale1 = tl.load(face1_ptr + rows, mask=row_inside, other=0.0)
    scale2 = tl.load(face2_ptr + cols, mask=col_inside, other=0.0)
    kappa1 = tl.load(face1_ptr + N + rows, mask=row_inside, other=0.0)
    kappa2 = tl.load(face2_ptr + M + cols, mask=col_inside, other=0.0)
    unary1 = tl.load(face1_ptr + 2 * N + rows, mask=row_inside, other=0.0)
    unary2 = tl.load(face2_ptr + 2 * M + cols, mask=col_inside, other=0.0)
    cos = product * scale1[:, None] * scale2[None, :]
    difference = kappa1[:, None] - kappa2[None, :]
    square = difference * difference + 2.0 * kappa1[:, None] * kappa2[None, :] * (1.0 + cos)
    phi, tail, _, _, _, _ = debye(tl.sqrt(tl.where(square < 0.0, 0.0, square)), PLAN)
    return rows, cols, phi + unary1[:, None] + unary2[None, :] + tail + constant


@triton.jit
def _matrix_kernel(
    mu1_ptr,
    face1_ptr,
    mu2_ptr,
    face2_ptr,
    scores_ptr,
    mu1_stride,
    mu2_stride,
    N,
    M,
    constant,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the matrix a program; programs next to each other work down GROUP tiles of rows before they go on to
    other columns.
    """
    program = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(N, BLOCK), tl.cdiv(M, BLOCK)
    first = program // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * col_blocks)
    row_block, col_block = first + within % height, within // height
    strips = _cosines(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
    )
    for strip in tl.static_range(8):
        rows, cols, scores = _scores(
            strips[strip], face1_ptr, face2_ptr, N, M, constant, row_block, col_block, strip, PLAN
        )
        tl.store(scores_ptr + rows[:, None] * M + cols[None, :], scores, mask=(rows < N)[:, None] & (cols < M)[None, :])
        tl.debug_barrier()  # keeps the compiler from working on two strips at a time, for which there are no registers


@triton.jit
def _histogram_kernel(
    mu1_ptr,
    face1_ptr,
    ids1_ptr,
    mu2_ptr,
    face2_ptr,
    ids2_ptr,
    counts_ptr,
    mu1_stride,
    mu2_stride,
    N,
    M,
    constant,
    low,
    bins_per_nat,
    BINS: tl.constexpr,
    DISTINCT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Counts of one tile of scores: impostors in the first BINS, genuine pairs in the next."""
    row_block, col_block = tl.program_id(0), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if DISTINCT:
        if col_block < row_block:
            return
    strips = _cosines(
        mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
    )
    counts = tl.zeros((2 * BINS,), tl.int32)
    for strip in tl.static_range(8):
        rows, cols, scores = _scores(
            strips[strip], face1_ptr, face2_ptr, N, M, constant, row_block, col_block, strip, PLAN
        )
        ids1 = tl.load(ids1_ptr + rows, mask=rows < N, other=0)
        ids2 = tl.load(ids2_ptr + cols, mask=cols < M, other=0)
        position = tl.minimum(tl.maximum((scores - low) * bins_per_nat, 0.0), BINS - 1.0).to(tl.int32)
        position += tl.where(ids1[:, None] == ids2[None, :], BINS, 0)
        counted = (rows < N)[:, None] & (cols < M)[None, :] & (scores == scores)
        if DISTINCT:
            counted &= rows[:, None] < cols[None, :]
        counts += tl.histogram(tl.ravel(position), 2 * BINS, mask=tl.ravel(counted))
    tl.atomic_add(counts_ptr + tl.arange(0, 2 * BINS), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _top_k_kernel(
    mu1_ptr,
    face1_ptr,
    mu2_ptr,
    face2_ptr,
    best_ptr,
    mu1_stride,
    mu2_stride,
    N,
    M,
    blocks,
    KEPT: tl.constexpr,
    D: tl.constexpr,
    PLAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The KEPT best of a block of rows among `blocks` tiles of columns, in any order, each as one integer that sorts by
    score, then by column.

    What of a strip beats the worst kept in its row takes that one's place, the best first. After the first tiles that
    is rare. Scores are those of the neutral radius: the constant of another would cost them digits.
    """
    LOWEST: tl.constexpr = -(2**63)
    row_block, part = tl.program_id(0), tl.program_id(1)
    best = (
        tl.zeros((BLOCK, KEPT), tl.int64) + (tl.arange(0, KEPT).to(tl.int64) + LOWEST)[None, :]
    )  # no two alike, below any score
    for step in range(tl.minimum(blocks, tl.cdiv(M, BLOCK) - part * blocks)):
        col_block = part * blocks + step
        strips = _cosines(
            mu1_ptr, mu2_ptr, mu1_stride, mu2_stride, N, M, row_block, col_block, D, PRECISION, BLOCK, BLOCK_D
        )
        for strip in tl.static_range(8):
            rows, cols, scores = _scores(
                strips[strip], face1_ptr, face2_ptr, N, M, 0.0, row_block, col_block, strip, PLAN
            )
            bits = tl.where(scores == scores, scores, float("nan")).to(
                tl.int32, bitcast=True
            )  # one NaN, above all numbers
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - cols)[None, :]
            keys = tl.where((cols < M)[None, :], keys, LOWEST)
            better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
            while tl.max((better > worst).to(tl.int32), axis=0) > 0:
                best = tl.where((best == worst[:, None]) & (better > worst)[:, None], better[:, None], best)
                keys = tl.where(keys == better[:, None], LOWEST, keys)
                better, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
            tl.debug_barrier()
    rows = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    places = (rows * tl.num_programs(1) + part)[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(best_ptr + places, best, mask=(rows < N)[:, None])


def _face_terms(mu: torch.Tensor, kappa: torch.Tensor) -> torch.Tensor:
    """(3, N) float32 1 / |mu|, kappa, -phi(kappa), each rounded once."""
    length = torch.linalg.vector_norm(mu, dim=1, dtype=torch.float64)
    scale = 1 / torch.where((length == 0) & (kappa == 0), 1.0, length)
    return torch.stack((scale, kappa.double(), -_phi(kappa, mu.shape[1]))).float()


def _launch(mu1, kappa1, mu2, kappa2, block=_BLOCK):
    """Arguments and settings that the kernels of tiles share: both sets of faces, the compile-time values."""
    dtype = torch.promote_types(mu1.dtype, mu2.dtype)
    mu1, mu2 = _dense_rows(mu1.to(dtype)), _dense_rows(mu2.to(dtype))
    dim = mu1.shape[1]
    # Three products of TF32 parts give a float32 product to a few roundings, at a third of the tensor cores' speed.
    single = dtype == torch.float32
    settings = dict(
        D=dim,
        PLAN=_phi_plan(dim, torch.float32),
        PRECISION="tf32x3" if single else "ieee",
        BLOCK=block,
        BLOCK_D=16 if single else 64,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        enable_fp_fusion=False,
    )
    return (mu1, _face_terms(mu1, kappa1)), (mu2, _face_terms(mu2, kappa2)), settings


def _constant(dim: int, radius: float) -> float:
    """What a score has beside the three phi: 0 at the neutral radius."""
    return _log_uniform(dim) - dim * math.log(radius)


@torch.library.custom_op("scf::vmf_similarity_matrix", mutates_args=())
def _vmf_similarity_matrix(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float,
    dtype: torch.dtype,
    triton_kernel: bool,
) -> torch.Tensor:
    n, m = len(mu1), len(mu2)
    scores = torch.empty(n, m, dtype=dtype, device=mu1.device)
    if not triton_kernel:
        first, second = _Faces.of(mu1, kappa1), _Faces.of(mu2, kappa2)
        for rows in _bands(mu1, m):
            scores[rows] = vmf_similarity_matrix_reference(first.rows(rows), second, radius)
    elif n and m:
        first, second, settings = _launch(mu1, kappa1, mu2, kappa2)
        with torch.cuda.device_of(mu1):
            _matrix_kernel[(triton.cdiv(n, _BLOCK) * triton.cdiv(m, _BLOCK),)](
                *first,
                *second,
                scores,
                first[0].stride(0),
                second[0].stride(0),
                n,
                m,
                _constant(mu1.shape[1], radius),
                GROUP=_GROUP,
                **settings,
            )
    return scores


@_vmf_similarity_matrix.register_fake
def _(mu1, kappa1, mu2, kappa2, radius, dtype, triton_kernel):
    return torch.empty(mu1.shape[0], mu2.shape[0], dtype=dtype, device=mu1.device)


@torch.library.custom_op("scf::vmf_similarity_histogram", mutates_args=())
def _vmf_similarity_histogram(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int,
    distinct: bool,
    radius: float,
    triton_kernel: bool,
) -> torch.Tensor:
    n, m = len(mu1), len(mu2)
    counts = torch.zeros(2, bins, dtype=torch.int64, device=mu1.device)
    if not triton_kernel:
        first, second, columns = _Faces.of(mu1, kappa1), _Faces.of(mu2, kappa2), torch.arange(m, device=mu1.device)
        for rows in _bands(mu1, m):
            scores = vmf_similarity_matrix_reference(first.rows(rows), second, radius)
            position = (
                scores.sub_(low)
                .mul_(bins / (high - low))
                .clamp_(0, bins - 1)
                .floor_()
                .add_(ids1[rows, None] == ids2, alpha=bins)
            )
            position.nan_to_num_(2 * bins)  # beyond the counts, as what is not to be counted
            if distinct:
                position.masked_fill_(torch.arange(n, device=mu1.device)[rows, None] >= columns, 2 * bins)
            counts += torch.bincount(position.long().view(-1), minlength=2 * bins + 1)[:-1].view(2, bins)
    elif n and m:
        first, second, settings = _launch(mu1, kappa1, mu2, kappa2)
        col_blocks = triton.cdiv(m, _BLOCK)
        layers = triton.cdiv(col_blocks, _MOST_PROGRAMS)
        with torch.cuda.device_of(mu1):
            _histogram_kernel[(triton.cdiv(n, _BLOCK), triton.cdiv(col_blocks, layers), layers)](
                *first,
                ids1.contiguous(),
                *second,
                ids2.contiguous(),
                counts,
                first[0].stride(0),
                second[0].stride(0),
                n,
                m,
                _constant(mu1.shape[1], radius),
                low,
                bins / (high - low),
                BINS=bins,
                DISTINCT=distinct,
                **settings,
            )
    return counts


@_vmf_similarity_histogram.register_fake
def _(mu1, kappa1, ids1, mu2, kappa2, ids2, low, high, bins, distinct, radius, triton_kernel):
    return torch.empty(2, bins, dtype=torch.int64, device=mu1.device)


@torch.library.custom_op("scf::vmf_similarity_top_k", mutates_args=())
def _vmf_similarity_top_k(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    k: int,
    radius: float,
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, dim), m, dtype = mu1.shape, len(mu2), _result_dtype(mu1, kappa1, mu2, kappa2)
    if triton_kernel and n and k <= _KEPT:
        scores, indices = _top_kept(mu1, kappa1, mu2, kappa2, k)
        return scores.add_(_constant(dim, radius)).to(dtype), indices
    scores, indices = (
        torch.empty(n, k, dtype=dtype, device=mu1.device),
        torch.empty(n, k, dtype=torch.int64, device=mu1.device),
    )
    first, second = (None, None) if triton_kernel else (_Faces.of(mu1, kappa1), _Faces.of(mu2, kappa2))
    for rows in _bands(mu1, m):
        if triton_kernel:
            band = _vmf_similarity_matrix(
                mu1[rows], kappa1[rows], mu2, kappa2, neutral_radius(dim), torch.float32, True
            )
        else:
            band = vmf_similarity_matrix_reference(first.rows(rows), second, neutral_radius(dim))
        best, indices[rows] = torch.topk(band, k, dim=1)
        scores[rows] = best.double().add_(_constant(dim, radius))
    return scores, indices


def _top_kept(mu1, kappa1, mu2, kappa2, k):
    """(N, k) float64 scores at the neutral radius, falling, and (N, k) int64 columns, by the kernel that keeps them as
    it goes.
    """
    n, m = len(mu1), len(mu2)
    first, second, settings = _launch(mu1, kappa1, mu2, kappa2, _KEPT_BLOCK)
    row_blocks, col_blocks = triton.cdiv(n, _KEPT_BLOCK), triton.cdiv(m, _KEPT_BLOCK)
    processors = torch.cuda.get_device_properties(mu1.device).multi_processor_count if mu1.is_cuda else 1
    blocks = triton.cdiv(col_blocks, min(col_blocks, triton.cdiv(_PROGRAMS * processors, row_blocks)))
    parts = triton.cdiv(col_blocks, blocks)
    kept = torch.empty(n, parts * _KEPT, dtype=torch.int64, device=mu1.device)
    with torch.cuda.device_of(mu1):
        _top_k_kernel[(row_blocks, parts)](
            *first, *second, kept, first[0].stride(0), second[0].stride(0), n, m, blocks, KEPT=_KEPT, **settings
        )
    best = torch.topk(kept, k, dim=1).values
    ordered = best >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32).double(), 0x7FFFFFFF - (best & 0xFFFFFFFF)


@_vmf_similarity_top_k.register_fake
def _(mu1, kappa1, mu2, kappa2, k, radius, triton_kernel):
    dtype = _result_dtype(mu1, kappa1, mu2, kappa2)
    return mu1.new_empty(mu1.shape[0], k, dtype=dtype), mu1.new_empty(mu1.shape[0], k, dtype=torch.int64)


def _bands(mu1: torch.Tensor, columns: int):
    """Slices of rows whose scores with every column are few enough to be held."""
    height = max(1, _BAND["cuda" if mu1.is_cuda else "cpu"] // max(1, columns))
    return (slice(start, min(start + height, len(mu1))) for start in range(0, len(mu1), height))


def _use_tiles(backend: str, dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels of tiles run. Their arithmetic is float32, so float64 arguments go to PyTorch's matrix
    product instead.
    """
    if dtype == torch.float64 and backend == "triton":
        raise ValueError(
            'backend="triton" compares all pairs in float32, got float64 arguments: convert them with .float(), or '
            'use backend="auto"'
        )
    return use_triton(backend, tensor) and dtype != torch.float64


@torch.no_grad()
def vmf_similarity_matrix(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    radius: float = 64.0,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Similarity of every row of mu1 with every row of mu2; entry (i, j) is what vmf_similarity gives for that pair.

    Source: Eqn (13), Li et al., CVPR 2021. One pass: the matrix product, kt and the normalizers in the same tile.
    PyTorch, which serves the CPU and float64 arguments, works on bands of rows, so that beside the scores it needs
    about 100 MiB on the CPU.

    Args:
        mu1, kappa1: (N, D) and (N,), as in vmf_similarity. Half precision directions are multiplied as they are.
        mu2, kappa2: (M, D) and (M,).
        radius: r > 0 of the sphere; for half precision scores use `neutral_radius(D)`, since others are thousands.
        dtype: of the scores; by default the arguments' promoted dtype, at least float32.
        backend: "auto" runs Triton for CUDA tensors that are not float64 and PyTorch for others; "triton" or "torch"
            insists.
    Returns:
        (N, M) log likelihood (nats). From Triton, float32 arithmetic: within about 3e-7 of the largest kappa, and the
        rounding of the result. Carries no gradient. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above, or the backend cannot run.
    """
    arithmetic = _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    return _vmf_similarity_matrix(
        mu1, kappa1, mu2, kappa2, float(radius), dtype or arithmetic, _use_tiles(backend, arithmetic, mu1)
    )


@torch.no_grad()
def vmf_similarity_top_k(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    k: int,
    radius: float = 64.0,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of mu2 most alike to each row of mu1, without the matrix: a search of probes (N) in a gallery (M).

    Source: Eqn (13), Li et al., CVPR 2021. On CUDA up to 16 rows are kept in registers while the tiles go by; for more,
    and in PyTorch, the scores exist some rows at a time, 2^26 of them (CPU: 2^20).

    Args:
        k: in 1 .. M.
        others: as in vmf_similarity_matrix.
    Returns:
        (N, k) scores, falling, and (N, k) int64 rows of mu2. They are ranked before the radius is counted in and the
        score rounded. Of equal scores any may come first; NaN comes before all numbers.
    Raises:
        ValueError: k is not as above, or as in vmf_similarity_matrix.
    """
    arithmetic = _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    if not 1 <= k <= len(mu2):
        raise ValueError(f"k must be in 1 .. {len(mu2)}, the rows of mu2, got {k}")
    return _vmf_similarity_top_k(mu1, kappa1, mu2, kappa2, k, float(radius), _use_tiles(backend, arithmetic, mu1))


@torch.no_grad()
def vmf_similarity_histogram(
    mu1: torch.Tensor,
    kappa1: torch.Tensor,
    ids1: torch.Tensor,
    mu2: torch.Tensor,
    kappa2: torch.Tensor,
    ids2: torch.Tensor,
    low: float,
    high: float,
    bins: int = 512,
    radius: float = 64.0,
    *,
    distinct: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """How the scores of all pairs are distributed, for impostor and for genuine pairs, without the matrix.

    Args:
        ids1, ids2: (N,) and (M,) int64 identities; a pair of equal ones is genuine.
        low, high: scores (nats) at the ends of the range; scores beyond them count in the first and last bin.
        bins: a power of two, 2 .. 1024.
        distinct: both sets are the same rows in the same order: count each pair of two different rows once.
        others: as in vmf_similarity_matrix.
    Returns:
        (2, bins) int64 counts, impostors first. NaN scores are left out. A score within rounding of a bin's edge may be
        on either side.
    Raises:
        ValueError: an argument is not as above, or as in vmf_similarity_matrix.
    """
    arithmetic = _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    for name, ids, mu in ("ids1", ids1, mu1), ("ids2", ids2, mu2):
        if ids.shape != mu.shape[:1] or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be ({len(mu)},) int64, one per row, got {tuple(ids.shape)} {ids.dtype}")
    if not 2 <= bins <= MAX_BINS or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two in 2 .. {MAX_BINS}, got {bins}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite and low < high, got {low} and {high}")
    if distinct and len(mu1) != len(mu2):
        raise ValueError(f"distinct means that both sets are the same rows, got {len(mu1)} and {len(mu2)}")
    return _vmf_similarity_histogram(
        mu1,
        kappa1,
        ids1,
        mu2,
        kappa2,
        ids2,
        float(low),
        float(high),
        bins,
        distinct,
        float(radius),
        _use_tiles(backend, arithmetic, mu1),
    )


def _result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _check_arguments(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float
) -> torch.dtype:
    """The dtype of the result, after checking what all public functions ask of their arguments."""
    for name, tensor in {"mu1": mu1, "kappa1": kappa1, "mu2": mu2, "kappa2": kappa2}.items():
        check_floating(name, tensor)
    if mu1.ndim != 2 or mu2.ndim != 2 or mu1.shape[1] != mu2.shape[1] or not 2 <= mu1.shape[1] <= _MAX_DIM:
        raise ValueError(
            f"mu1 and mu2 must be (N, D) and (M, D) with D in 2 .. {_MAX_DIM}, got {tuple(mu1.shape)} and "
            f"{tuple(mu2.shape)}"
        )
    for index, mu, kappa in (1, mu1, kappa1), (2, mu2, kappa2):
        if kappa.shape != mu.shape[:1]:
            raise ValueError(f"kappa{index} must be ({len(mu)},), one per row of mu{index}, got {tuple(kappa.shape)}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be > 0, got {radius}")
    return _result_dtype(mu1, kappa1, mu2, kappa2)
