import math

import pytest
import torch
from scipy.stats import multivariate_normal

from scf_fast.kernels import reference
from scf_fast.kernels.mutual_likelihood import (
    _mutual_likelihood,
    mutual_likelihood,
    mutual_likelihood_from_cosine,
)

VARIANCES = ["scalar", "diagonal"]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dim", [2, 37])
def test_is_the_density_of_the_difference(dim, variance, gaussian_faces):
    """The score is the log density at 0 of x1 - x2, x ~ N(mu, diag(sigma^2)), with mu of length one."""
    (mu1, log1), (mu2, log2) = (gaussian_faces(6, dim, variance, "cpu", seed, torch.float64) for seed in (1, 2))
    scores = mutual_likelihood(3 * mu1, log1, mu2 / 7, log2)
    for i in range(6):
        difference = (mu1[i] / mu1[i].norm() - mu2[i] / mu2[i].norm()).numpy()
        covariance = (log1[i].exp() + log2[i].exp()).expand(dim).diag().numpy()
        assert scores[i].item() == pytest.approx(multivariate_normal.logpdf(difference, cov=covariance), rel=1e-11)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dim", [2, 37, 512])
def test_pairs_against_the_reference(dim, variance, gaussian_faces):
    (mu1, log1), (mu2, log2) = (gaussian_faces(30, dim, variance, "cpu", seed, torch.float64) for seed in (1, 2))
    arguments = [tensor.requires_grad_() for tensor in (mu1, log1, mu2, log2)]
    scores, expected = mutual_likelihood(*arguments), reference.mutual_likelihood(*arguments)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-9)
    gradients = zip(torch.autograd.grad(scores.sum(), arguments), torch.autograd.grad(expected.sum(), arguments))
    for gradient, exact in gradients:
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-10 * exact.abs().max().item())


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dim", [2, 300])
def test_triton_pairs_against_float64(triton_device, poisoned, dim, variance, gaussian_faces):
    (mu1, log1), (mu2, log2) = (gaussian_faces(9, dim, variance, triton_device, seed) for seed in (1, 2))
    mu1[1] = -2 * mu2[1]
    mu2[2], log1[3], log2[4] = 0, math.nan, 500
    exact = mutual_likelihood(mu1.double(), log1.double(), mu2.double(), log2.double(), backend="torch")
    scores = mutual_likelihood(mu1, log1, mu2, log2, backend="triton")
    assert scores.isnan().nonzero().flatten().tolist() == [2, 3]
    torch.testing.assert_close(scores, exact.float(), rtol=1.2e-7, atol=1e-6, equal_nan=True)
    transposed = mu1.t().contiguous().t().double()
    double = mutual_likelihood(transposed, log1.double(), mu2.double(), log2.double(), backend="triton")
    torch.testing.assert_close(double, exact, rtol=1e-13, atol=1e-10, equal_nan=True)


def test_float32_inputs_cost_no_more_than_their_rounding(gaussian_faces):
    (mu1, log1), (mu2, log2) = (gaussian_faces(30, 512, "diagonal", "cpu", seed) for seed in (1, 2))
    rounded = mutual_likelihood(mu1, log1, mu2, log2)
    exact = mutual_likelihood(mu1.double(), log1.double(), mu2.double(), log2.double())
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact.float())


def test_one_variance_is_that_variance_in_all_dimensions(gaussian_faces):
    (mu1, log1), (mu2, log2) = (gaussian_faces(9, 64, "scalar", "cpu", seed, torch.float64) for seed in (1, 2))
    repeated = (log[:, None].expand(-1, 64) for log in (log1, log2))
    score = mutual_likelihood(mu1, log1, mu2, log2)
    torch.testing.assert_close(mutual_likelihood(mu1, next(repeated), mu2, next(repeated)), score, rtol=1e-12, atol=0)
    torch.testing.assert_close(mutual_likelihood(mu2, log2, mu1, log1), score, rtol=1e-13, atol=0)


def test_log_variances_far_apart_neither_overflow_nor_vanish():
    """exp(1000) is no float64; the larger variance alone counts."""
    mu = torch.eye(2, dtype=torch.float64)
    score = mutual_likelihood(mu[:1], torch.tensor([1000.0]), mu[1:], torch.tensor([-1000.0]))
    assert score.item() == pytest.approx(-1000 - math.log(2 * math.pi), rel=1e-7)


@pytest.mark.parametrize("dim", [2, 37])
def test_from_cosine_is_the_pair(dim, gaussian_faces):
    (mu1, log1), (mu2, log2) = (gaussian_faces(30, dim, "scalar", "cpu", seed, torch.float64) for seed in (1, 2))
    cosine = torch.nn.functional.cosine_similarity(mu1, mu2)
    scores = mutual_likelihood_from_cosine(cosine, log1, log2, dim)
    torch.testing.assert_close(scores, mutual_likelihood(mu1, log1, mu2, log2), rtol=1e-12, atol=1e-9)
    all_pairs = mutual_likelihood_from_cosine(cosine.float().expand(30, 30), log1[:, None], log2, dim)
    assert all_pairs.dtype == torch.float64 and all_pairs.shape == (30, 30)
    torch.testing.assert_close(all_pairs.diag(), scores, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        mutual_likelihood_from_cosine(cosine, log1, log2, 1)


@pytest.mark.parametrize("variance", VARIANCES)
def test_operators(variance, gaussian_faces):
    leaves = [tensor.requires_grad_() for seed in (1, 2) for tensor in gaussian_faces(4, 6, variance, "cpu", seed)]
    for triton_kernel in (False, True):
        torch.library.opcheck(_mutual_likelihood, (*leaves, torch.float32, triton_kernel))


@pytest.mark.parametrize("variance", VARIANCES)
def test_gradients(variance, gaussian_faces):
    faces = (gaussian_faces(3, 5, variance, "cpu", seed, torch.float64) for seed in (1, 2))
    leaves = [tensor.requires_grad_() for face in faces for tensor in face]
    assert torch.autograd.gradcheck(mutual_likelihood, leaves)
    assert torch.autograd.gradgradcheck(mutual_likelihood, leaves)


def test_nan_stays_where_it_is():
    mu, log_variance = torch.eye(4), torch.tensor([1.0, math.nan, 2.0, 3.0])
    mu[3] = 0
    assert mutual_likelihood(mu, log_variance, mu, log_variance).isnan().tolist() == [False, True, False, True]


def test_nothing_to_compare():
    assert mutual_likelihood(torch.empty(0, 4), torch.empty(0), torch.empty(0, 4), torch.empty(0)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu1": torch.ones(3)}, "mu1 and mu2 must be"),
        ({"mu2": torch.ones(3, 5)}, "mu1 and mu2 must be"),
        ({"mu1": torch.ones(3, 1), "mu2": torch.ones(3, 1)}, "D in 2"),
        ({"mu2": torch.ones(3, 4, dtype=torch.int64)}, "mu2 must be float16, bfloat16, float32 or float64"),
        ({"log_variance1": torch.ones(2)}, r"log_variance1 must be \(3,\), one per row of mu1, or \(3, 4\)"),
        ({"log_variance2": torch.ones(3, 1)}, "log_variance2 must be"),
        ({"log_variance2": torch.ones(3, 4)}, "must both have one value per row or both one per dimension"),
        ({"mu2": torch.ones(2, 4), "log_variance2": torch.ones(2)}, "mutual_likelihood_matrix"),
    ],
)
def test_refuses(change, message):
    mu, log_variance = torch.ones(3, 4), torch.ones(3)
    arguments = {"mu1": mu, "log_variance1": log_variance, "mu2": mu, "log_variance2": log_variance}
    with pytest.raises(ValueError, match=message):
        mutual_likelihood(**arguments | change)
