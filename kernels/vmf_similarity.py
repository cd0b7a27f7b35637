"""Mutual likelihood of two von Mises-Fisher distributions on the r-radius sphere: the SCF similarity of two faces.

    kt    = |kappa1 mu1 + kappa2 mu2|,   kt^2 = (kappa1 - kappa2)^2 + 2 kappa1 kappa2 (1 + mu1 . mu2)
    score = log C_d(kappa1) + log C_d(kappa2) - log C_d(kt) - d log r

The normalisers are thousands each and their differences rank the pairs, so the arithmetic is float64 whatever comes in. Measured at
d = 512 for kappas in 1e1..1e2, 1e2..1e3 and 1e3..1e4: float32 arithmetic errs by 2e-4, 3e-4 and 3e-3 nats, which changes of the cosine
by 9e-4, 7e-6 and 1e-6 would also cause; the float64 result rounded to float32 by 6e-5, 6e-5 and 1e-4, like 3e-4, 3e-6 and 1e-7.
"""

import math

import torch

from .log_bessel import log_vmf_normalizer

_TILE = 1 << 20  # scores worked on at once by the matrix form: 8 MiB per float64 temporary, about ten of them alive


def vmf_similarity(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float = 64.0
) -> torch.Tensor:
    """Similarity of each pair of faces, larger is more alike. Source: Eqn (13), Li et al., CVPR 2021.

    CPU and CUDA tensors run the same PyTorch code.

    Args:
        mu1, mu2: (B, D) floating point directions, D >= 2; any positive length, since each row is normalised here in float64.
        kappa1, kappa2: (B,) floating point concentrations >= 0. Where 0, the distribution is uniform and its direction may be zero.
        radius: r > 0 of the sphere; it shifts every score by the same amount.
    Returns:
        (B,) log likelihood (nats), computed in float64 and rounded to the inputs' promoted dtype (at least float32: pass float64
        to keep close scores apart). NaN where an input is, or a direction is zero at kappa > 0. Differentiable. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above.
    """
    dtype = _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 and mu2 must have one shape, got {tuple(mu1.shape)} and {tuple(mu2.shape)}; "
                         "vmf_similarity_matrix compares all pairs")
    (mu1, kappa1), (mu2, kappa2) = _in_float64(mu1, kappa1), _in_float64(mu2, kappa2)
    # The length of the vector sum has no cancellation at mu1 = -mu2, unlike the cosine formula.
    kappa_sum = torch.linalg.vector_norm(kappa1[:, None] * mu1 + kappa2[:, None] * mu2, dim=1)
    dim = mu1.shape[1]
    score = log_vmf_normalizer(kappa1, dim) + log_vmf_normalizer(kappa2, dim) - log_vmf_normalizer(kappa_sum, dim)
    return (score - dim * math.log(radius)).to(dtype)


@torch.no_grad()
def vmf_similarity_matrix(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float = 64.0
) -> torch.Tensor:
    """Similarity of every row of mu1 with every row of mu2; entry (i, j) is what vmf_similarity gives for that pair.

    Source: Eqn (13), Li et al., CVPR 2021. CPU and CUDA tensors run the same PyTorch code, a band of rows at a time, so that beside
    the scores and the float64 copies of the inputs about 100 MiB are needed.

    Args:
        mu1, kappa1: (N, D) and (N,), as in vmf_similarity.
        mu2, kappa2: (M, D) and (M,).
        radius: r > 0 of the sphere.
    Returns:
        (N, M) log likelihood (nats) in the inputs' promoted dtype, at least float32. Carries no gradient. Deterministic.
    Raises:
        ValueError: shapes, dtypes or radius are not as above.
    """
    dtype = _check_arguments(mu1, kappa1, mu2, kappa2, radius)
    (mu1, kappa1), (mu2, kappa2) = _in_float64(mu1, kappa1), _in_float64(mu2, kappa2)
    dim = mu1.shape[1]
    constant1 = log_vmf_normalizer(kappa1, dim) - dim * math.log(radius)
    constant2 = log_vmf_normalizer(kappa2, dim)
    scores = torch.empty(len(mu1), len(mu2), dtype=dtype, device=mu1.device)
    height = max(1, _TILE // max(1, len(mu2)))
    for start in range(0, len(mu1), height):
        rows = slice(start, start + height)
        k1 = kappa1[rows, None]
        # Clamped because a cosine of -1 - 1e-16 would make the square negative where kappa1 = kappa2.
        kappa_sum = ((k1 - kappa2).square() + 2 * k1 * kappa2 * (1 + mu1[rows] @ mu2.T)).clamp(min=0).sqrt()
        scores[rows] = constant1[rows, None] + constant2 - log_vmf_normalizer(kappa_sum, dim)
    return scores


def _in_float64(mu: torch.Tensor, kappa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions and concentrations; a direction of zero stays so where kappa is 0, and is NaN elsewhere."""
    mu, kappa = mu.double(), kappa.double()
    length = torch.linalg.vector_norm(mu, dim=1)
    return mu / torch.where((length == 0) & (kappa == 0), 1.0, length)[:, None], kappa


def _check_arguments(mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float) -> torch.dtype:
    """The dtype of the result, after checking what both public functions ask of their arguments."""
    dtype = torch.float32
    for name, tensor in {"mu1": mu1, "kappa1": kappa1, "mu2": mu2, "kappa2": kappa2}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; convert it with {name}.float()")
        dtype = torch.promote_types(dtype, tensor.dtype)
    if mu1.ndim != 2 or mu2.ndim != 2 or mu1.shape[1] != mu2.shape[1] or mu1.shape[1] < 2:
        raise ValueError(f"mu1 and mu2 must be (N, D) and (M, D) with D >= 2, got {tuple(mu1.shape)} and {tuple(mu2.shape)}")
    for index, mu, kappa in (1, mu1, kappa1), (2, mu2, kappa2):
        if kappa.shape != mu.shape[:1]:
            raise ValueError(f"kappa{index} must be ({len(mu)},), one per row of mu{index}, got {tuple(kappa.shape)}")
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}")
    return dtype
