import math
from functools import partial

import pytest
import torch

from scf_fast.kernels import _all_pairs_triton
from scf_fast.kernels._all_pairs_triton import DIAGONAL_SPREAD, SCALAR_SPREAD
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


def rounding(first, second):
    """Error that float32 arithmetic may leave in a score: 4e-7 of a cosine or 5e-7 of the squares, and two roundings
    of the sum of logarithms, of its terms relative to the mean variance and of the constant.
    """
    (mu1, log1), (mu2, log2) = (
        (torch.nn.functional.normalize(mu.double(), dim=1), log_variance.double())
        for mu, log_variance in (first, second)
    )
    dim, mean = mu1.shape[1], torch.cat([log1, log2]).mean(dim=0)
    log_v = torch.logaddexp(log1[:, None], log2)
    if log_v.ndim == 2:
        squares, logs = 0.8 * torch.exp(-log_v), dim * (log_v - mean).abs()
    else:
        squares = ((mu1[:, None] - mu2).square() / log_v.exp()).sum(dim=2)
        logs = (log_v - mean).abs().sum(dim=2)
    constant = dim / 2 * abs(math.log(2 * math.pi)) + mean.abs().expand(dim).sum() / 2
    return 5e-7 * squares + 1.2e-7 * (dim + logs + constant)


def double(first, second):
    return [x.double() for x in (*first, *second)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dim", [2, 37, 130])
def test_triton_matrix_against_float64(triton_device, poisoned, dim, variance, gaussian_faces):
    first = gaussian_faces(130 if dim == 2 else 5, dim, variance, triton_device, 1)
    second = gaussian_faces(3, dim, variance, triton_device, 2)
    first[0][1] = -2 * second[0][1]
    exact = mutual_likelihood_matrix(*double(first, second))
    scores = mutual_likelihood_matrix(*first, *second, backend="triton")
    assert scores.dtype == torch.float32
    assert ((scores - exact).abs() <= rounding(first, second)).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_triton_matrix_of_half_precision(triton_device, poisoned, variance, gaussian_faces):
    """The score is that of the rounded directions."""
    first, second = (gaussian_faces(n, 40, variance, triton_device, n, torch.float16) for n in (5, 6))
    exact = mutual_likelihood_matrix(*double(first, second))
    scores = mutual_likelihood_matrix(*first, *second, backend="triton", dtype=torch.float16)
    assert scores.dtype == torch.float16
    assert ((scores - exact).abs() <= rounding(first, second) + 1e-3 * exact.abs()).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_genuine_pairs_in_triton(triton_device, poisoned, variance, unit_rows):
    """Cosines of about 0.95 in 512 dimensions and precisions of about 1 / (1 - cos) in each, where an error of a cosine
    counts most.
    """
    center = unit_rows(1, 512, torch.float32, seed=3)
    sets = []
    for count, seed in (8, 1), (5, 2):
        mu = (center + math.sqrt(1 / 0.95 - 1) * unit_rows(count, 512, torch.float32, seed)).to(triton_device)
        log_variance = torch.randn((count, 512) if variance == "diagonal" else (count,)) / 4 - math.log(512 / 0.05)
        sets.append((mu, log_variance.to(triton_device)))
    exact = mutual_likelihood_matrix(*double(*sets))
    scores = mutual_likelihood_matrix(*sets[0], *sets[1], backend="triton")
    assert ((scores - exact).abs() <= rounding(*sets)).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_spread_of_log_variances_in_triton(triton_device, poisoned, variance):
    """Far from the mean of many no product overflows or vanishes; what lies too far, or is no number, is NaN and leaves
    the other scores alone.
    """
    spread = DIAGONAL_SPREAD if variance == "diagonal" else SCALAR_SPREAD
    mu = torch.eye(4)[torch.arange(106) % 2]
    log_variance = -20 + spread * torch.tensor([0.8, 0.8, -0.8, -0.8, 1.3, math.nan] + 100 * [0.0])
    if variance == "diagonal":
        log_variance = log_variance[:, None].repeat(1, 4)
    mu, log_variance = mu.to(triton_device), log_variance.to(triton_device)
    scores = mutual_likelihood_matrix(mu, log_variance, mu[:6], log_variance[:6], backend="triton")
    exact = mutual_likelihood_matrix(*double((mu, log_variance), (mu[:6], log_variance[:6])))
    kept = [0, 1, 2, 3, 104, 105]
    torch.testing.assert_close(scores[kept, :4].double(), exact[kept, :4], rtol=2e-6, atol=1e-4)
    scores = scores[:6]
    assert scores[4:].isnan().all() and scores[:, 4:].isnan().all()


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
def test_histogram_counts_the_matrix(place, monkeypatch, variance, distinct, gaussian_faces):
    # Two layers where there are two blocks of columns.
    monkeypatch.setattr(_all_pairs_triton, "_MOST_PROGRAMS", 1)
    mu1, log1 = first = gaussian_faces(129, 8, variance, place.device, 1)
    mu2, log2 = second = first if distinct else gaussian_faces(40, 8, variance, place.device, 2)
    mu1[7] = math.nan
    ids1, ids2 = (torch.arange(len(mu), device=place.device) % 5 - 2 for mu in (mu1, mu2))
    scores = mutual_likelihood_matrix(*double(first, second))
    quantiles = torch.tensor([0.2, 0.8], dtype=torch.float64, device=place.device)
    low, high = scores.nanquantile(quantiles).tolist()  # scores lie beyond both
    counts = mutual_likelihood_histogram(
        mu1, log1, ids1, mu2, log2, ids2, low, high, 8, distinct=distinct, backend=place.backend
    )
    wanted = ~scores.isnan() & (torch.ones_like(scores).triu(1).bool() if distinct else True)
    genuine = ids1[:, None] == ids2
    edges = torch.linspace(low, high, 9, dtype=torch.float64, device=place.device)
    edges[0], edges[-1] = -math.inf, math.inf
    near = rounding(first, second).nan_to_num(0.0)  # of an edge, where a score may be counted on either side
    for row, kind in zip(counts, (wanted & ~genuine, wanted & genuine)):
        assert row.sum() == kind.sum() > 0
        for bin, count in enumerate(row.tolist()):
            certain = kind & (scores >= edges[bin] + near) & (scores < edges[bin + 1] - near)
            possible = kind & (scores >= edges[bin] - near) & (scores < edges[bin + 1] + near)
            assert certain.sum() <= count <= possible.sum()
    assert counts[:, 0].any() and counts[:, -1].any()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("n", "m", "dim", "k"), [(66, 70, 8, 5), (3, 40, 8, 20)])
def test_top_k_is_the_head_of_the_sorted_matrix(place, poisoned, monkeypatch, n, m, dim, k, variance, gaussian_faces):
    first, second = (gaussian_faces(count, dim, variance, place.device, seed) for count, seed in ((n, 1), (m, 2)))
    monkeypatch.setitem(BAND, "cpu", 3 * m)  # three rows at a time
    exact = mutual_likelihood_matrix(*double(first, second))
    scores, indices = mutual_likelihood_top_k(*first, *second, k, backend=place.backend)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64 and (scores.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    error = rounding(first, second).amax(dim=1, keepdim=True)  # scores closer than this may change places
    found = exact.gather(1, indices)
    assert ((found - exact.sort(dim=1, descending=True).values[:, :k]).abs() <= 2 * error).all()
    assert ((scores - found).abs() <= error).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_operators(variance, gaussian_faces):
    faces = *gaussian_faces(4, 6, variance, "cpu", 1), *gaussian_faces(4, 6, variance, "cpu", 2)
    mu1, log1, mu2, log2 = faces
    ids = torch.arange(4)
    # Without a gradient there is no graph of it to check.
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    for triton_kernel in (False, True):
        check(_mutual_likelihood_matrix, (*faces, torch.float32, triton_kernel))
        check(_mutual_likelihood_top_k, (*faces, 2, triton_kernel))
        check(_mutual_likelihood_histogram, (mu1, log1, ids, mu2, log2, ids, -1.0, 1.0, 4, False, triton_kernel))


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
        (
            lambda mu, log: mutual_likelihood_matrix(mu.double(), log, mu, log, backend="triton"),
            "in float32, got float64",
        ),
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
