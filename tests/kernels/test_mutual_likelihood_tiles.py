import math
from functools import partial

import pytest
import torch

from scf_fast.kernels._score_bands import BAND, CHUNK
from scf_fast.kernels.mutual_likelihood import mutual_likelihood
from scf_fast.kernels.mutual_likelihood_tiles import (
    LARGEST_LOG_VARIANCE,
    _mutual_likelihood_histogram,
    _mutual_likelihood_matrix,
    _mutual_likelihood_top_k,
    mutual_likelihood_histogram,
    mutual_likelihood_matrix,
    mutual_likelihood_top_k,
)

VARIANCES = ["scalar", "diagonal"]


def pair_by_pair(mu1, log1, mu2, log2):
    count = len(mu1)
    columns = [mutual_likelihood(mu1, log1, *(x.expand(count, *x.shape) for x in face)) for face in zip(mu2, log2)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dim", [2, 37])
def test_matrix_is_every_pair_whatever_the_band(monkeypatch, dim, variance, gaussian_faces):
    first = gaussian_faces(7, dim, variance, "cpu", 1, torch.float64)
    second = gaussian_faces(5, dim, variance, "cpu", 2, torch.float64)
    whole = mutual_likelihood_matrix(*first, *second)
    torch.testing.assert_close(whole, pair_by_pair(*first, *second), rtol=1e-12, atol=1e-9)
    for scores, at_once in (1, 3), (12, 12):  # one row in two pieces, then two rows and a remainder
        monkeypatch.setitem(BAND, "cpu", scores)
        monkeypatch.setitem(CHUNK, "cpu", at_once)
        torch.testing.assert_close(mutual_likelihood_matrix(*first, *second), whole, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("variance", VARIANCES)
def test_float32_arguments_cost_no_more_than_their_rounding(variance, gaussian_faces):
    first, second = gaussian_faces(20, 512, variance, "cpu", 1), gaussian_faces(30, 512, variance, "cpu", 2)
    exact = mutual_likelihood_matrix(*(x.double() for x in (*first, *second)))
    torch.testing.assert_close(mutual_likelihood_matrix(*first, *second), exact.float(), rtol=2e-7, atol=0)
    assert mutual_likelihood_matrix(*first, *second, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("variance", VARIANCES)
def test_log_variances_up_to_the_bound_and_nan_beyond(variance):
    mu = torch.eye(5, 8, dtype=torch.float64)
    log_variance = torch.tensor([1.0, -1.0, 1.01, -1.01, math.nan], dtype=torch.float64) * LARGEST_LOG_VARIANCE
    if variance == "diagonal":
        log_variance = log_variance[:, None].repeat(1, 8)
    scores = mutual_likelihood_matrix(mu, log_variance, mu, log_variance)
    expected = pair_by_pair(mu[:2], log_variance[:2], mu[:2], log_variance[:2])
    torch.testing.assert_close(scores[:2, :2], expected, rtol=1e-12, atol=0)
    assert scores[2:].isnan().all() and scores[:, 2:].isnan().all()


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
def test_histogram_counts_the_matrix(variance, distinct, gaussian_faces):
    mu1, log1 = gaussian_faces(131, 16, variance, "cpu", 1)
    mu2, log2 = (mu1, log1) if distinct else gaussian_faces(40, 16, variance, "cpu", 2)
    mu1[7] = math.nan
    ids1, ids2 = (torch.arange(len(mu)) % 5 - 2 for mu in (mu1, mu2))
    scores = mutual_likelihood_matrix(mu1.double(), log1.double(), mu2.double(), log2.double())
    low, high = scores.nanquantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    counts = mutual_likelihood_histogram(mu1, log1, ids1, mu2, log2, ids2, low, high, 8, distinct=distinct)
    wanted = ~scores.isnan() & (torch.ones_like(scores).triu(1).bool() if distinct else True)
    genuine = ids1[:, None] == ids2
    edges = torch.linspace(low, high, 9, dtype=torch.float64)
    for row, kind in zip(counts, (wanted & ~genuine, wanted & genuine)):
        expected = torch.histogram(scores[kind].clamp(low, high), edges).hist
        assert torch.equal(row, expected.long()) and row.sum() == kind.sum() > 0


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("n", "m", "dim", "k"), [(1, 1, 2, 1), (70, 150, 37, 11), (3, 40, 16, 20)])
def test_top_k_is_the_head_of_the_sorted_matrix(monkeypatch, n, m, dim, k, variance, gaussian_faces):
    first, second = gaussian_faces(n, dim, variance, "cpu", 1), gaussian_faces(m, dim, variance, "cpu", 2)
    monkeypatch.setitem(BAND, "cpu", 3 * m)  # three rows at a time
    exact = mutual_likelihood_matrix(*(x.double() for x in (*first, *second)))
    scores, indices = mutual_likelihood_top_k(*first, *second, k)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    best = exact.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(scores, best.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(exact.gather(1, indices), best, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_operators(variance, gaussian_faces):
    faces = *gaussian_faces(4, 6, variance, "cpu", 1), *gaussian_faces(4, 6, variance, "cpu", 2)
    mu1, log1, mu2, log2 = faces
    ids = torch.arange(4)
    # Without a gradient there is no graph of it to check.
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    check(_mutual_likelihood_matrix, (*faces, torch.float32))
    check(_mutual_likelihood_top_k, (*faces, 2))
    check(_mutual_likelihood_histogram, (mu1, log1, ids, mu2, log2, ids, -1.0, 1.0, 4, False))


@pytest.mark.parametrize("variance", VARIANCES)
def test_nothing_to_compare(variance, gaussian_faces):
    mu, log_variance = gaussian_faces(4, 6, variance, "cpu", 1)
    assert mutual_likelihood_matrix(mu, log_variance, mu[:0], log_variance[:0]).shape == (4, 0)
    assert mutual_likelihood_matrix(mu[:0], log_variance[:0], mu, log_variance).shape == (0, 4)
    assert mutual_likelihood_top_k(mu[:0], log_variance[:0], mu, log_variance, 4)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mu, log: mutual_likelihood_top_k(mu, log, mu, log, 4), "k must be in 1 .. 3"),
        (lambda mu, log: mutual_likelihood_matrix(mu, log, mu, log, dtype=torch.int64), "dtype must be floating point"),
        (lambda mu, log: mutual_likelihood_matrix(mu, log, mu, mu), "must both have one value per row"),
        (
            lambda mu, log: mutual_likelihood_histogram(mu, log, log, mu, log, log, 0.0, 1.0),
            r"ids1 must be \(3,\) int64, one per row of mu1",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4), torch.ones(3))
