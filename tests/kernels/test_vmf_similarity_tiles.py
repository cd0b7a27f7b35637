import math
from functools import partial

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from scf_fast.kernels import _all_pairs_triton
from scf_fast.kernels._score_bands import BAND, CHUNK
from scf_fast.kernels.vmf_similarity import neutral_radius, vmf_similarity
from scf_fast.kernels.vmf_similarity_tiles import (
    _vmf_similarity_histogram,
    _vmf_similarity_matrix,
    _vmf_similarity_top_k,
    vmf_similarity_histogram,
    vmf_similarity_matrix,
    vmf_similarity_top_k,
)


@pytest.mark.parametrize("dim", [2, 37])
def test_matrix_is_every_pair_whatever_the_band(monkeypatch, dim, unit_rows):
    mu1, mu2 = unit_rows(7, dim, seed=1), unit_rows(5, dim, seed=2)
    kappa1, kappa2 = torch.logspace(-2, 5, 7, dtype=torch.float64), torch.logspace(4, -1, 5, dtype=torch.float64)
    pairs = torch.stack(
        [vmf_similarity(mu1, kappa1, mu2[j].expand(7, -1), kappa2[j].expand(7)) for j in range(5)], dim=1
    )
    whole = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2)
    torch.testing.assert_close(whole, pairs, rtol=1e-12, atol=1e-9)
    for scores, at_once in (1, 3), (12, 12):  # one row in two pieces, then two rows and a remainder
        monkeypatch.setitem(BAND, "cpu", scores)
        monkeypatch.setitem(CHUNK, "cpu", at_once)
        torch.testing.assert_close(vmf_similarity_matrix(mu1, kappa1, mu2, kappa2), whole, rtol=1e-14, atol=1e-11)


def test_float32_arguments_cost_no_more_than_their_rounding(unit_rows):
    """The matrix of float32 arguments is computed in float64 and rounded once."""
    mu1, mu2 = unit_rows(20, 512, seed=1).float(), unit_rows(30, 512, seed=2).float()
    kappa1, kappa2 = torch.logspace(-2, 4, 20), torch.logspace(4, -2, 30)
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double())
    torch.testing.assert_close(vmf_similarity_matrix(mu1, kappa1, mu2, kappa2), exact.float(), rtol=2e-7, atol=0)
    assert vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, dtype=torch.bfloat16).dtype == torch.bfloat16


def rounding(mu1, kappa1, mu2, kappa2, radius):
    """Error that float32 arithmetic may leave in a score: 3e-7 of the greater kappa, 4e-7 of a cosine, and the rounding
    of a score of this size.

    A cosine counts with the factor kappa1 kappa2 A(kt) / kt, no more than a kappa until the directions oppose each
    other. A(kt) / kt is below 1 / (h + sqrt(h^2 + kt^2)), h = (D - 1) / 2 (Amos, 1974).
    """
    kappa1, kappa2 = kappa1.double()[:, None], kappa2.double()
    weighted1, weighted2 = (
        kappa.view(-1, 1) * torch.nn.functional.normalize(mu.double(), dim=1)
        for mu, kappa in ((mu1, kappa1), (mu2, kappa2))
    )
    half, kt = (mu1.shape[1] - 1) / 2, torch.cdist(weighted1, -weighted2, compute_mode="donot_use_mm_for_euclid_dist")
    of_cosine = kappa1 * kappa2 / (half + (half**2 + kt.square()).sqrt())
    of_score = 1.2e-7 * abs(mu1.shape[1] * math.log(radius)) + 1e-5
    return 3e-7 * torch.maximum(kappa1, kappa2) + 4e-7 * of_cosine + of_score


@pytest.mark.executed_for("dim", [(37,), (512,)])
@pytest.mark.parametrize("dim", [2, 37, 512])
def test_triton_matrix_against_float64(triton_device, poisoned, dim, faces):
    (mu1, kappa1), (mu2, kappa2) = faces(130, dim, triton_device, 1), faces(3, dim, triton_device, 2)
    kappa1[0] = 0  # with a zero direction
    mu1[0] = 0
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double())
    scores = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, backend="triton")
    assert ((scores - exact).abs() <= rounding(mu1, kappa1, mu2, kappa2, 64.0)).all()


def test_triton_matrix_of_half_precision(triton_device, poisoned, faces):
    """float16 directions are multiplied as they are; the score is that of the rounded directions."""
    (mu1, kappa1), (mu2, kappa2) = (
        faces(5, 40, triton_device, 1, torch.float16),
        faces(6, 40, triton_device, 2, torch.float16),
    )
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), neutral_radius(40))
    scores = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, neutral_radius(40), backend="triton", dtype=torch.float16)
    assert scores.dtype == torch.float16
    assert ((scores - exact).abs() <= rounding(mu1, kappa1, mu2, kappa2, 1.0) + 1e-3 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_genuine_pairs_within_3e_7_of_kappa(triton_device, poisoned, dtype, unit_rows):
    """Cosines of 0.95 in 512 dimensions: tensor cores cut sums instead of rounding them, and these have one sign."""
    if dtype == torch.bfloat16 and isinstance(_all_pairs_triton.matrix_kernel, InterpretedFunction):
        pytest.skip("the interpreter has no bf16 products")
    center = unit_rows(1, 512, torch.float32, seed=3)
    mu1, mu2 = (
        (center + math.sqrt(1 / 0.95 - 1) * unit_rows(count, 512, torch.float32, seed)).to(triton_device, dtype)
        for count, seed in ((20, 1), (9, 2))
    )
    kappa1, kappa2 = (1000 + torch.arange(count, device=triton_device) / 7 for count in (20, 9))
    radius = neutral_radius(512)
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), radius)
    scores = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, radius, backend="triton")
    assert ((scores - exact).abs() <= 3e-7 * torch.maximum(kappa1.double()[:, None], kappa2.double())).all()


def test_float32_directions_of_any_length(triton_device, poisoned, unit_rows):
    """Their two halves of float16 come from rows that are scaled first; a direction of no length gives NaN."""
    mu, kappa = unit_rows(4, 40, torch.float32), torch.tensor([3.0, 50.0, 400.0, 7.0])
    mu, kappa = mu.to(triton_device), kappa.to(triton_device)
    lengths = torch.tensor([1e-30, 1e-4, 1e5, 1e30], device=triton_device)
    expected = vmf_similarity_matrix(mu, kappa, mu, kappa, neutral_radius(40))
    scores = vmf_similarity_matrix(lengths[:, None] * mu, kappa, mu, kappa, neutral_radius(40), backend="triton")
    assert ((scores - expected).abs() <= 3e-7 * torch.maximum(kappa[:, None], kappa) + 1e-5).all()
    mu[2] = 0
    assert vmf_similarity_matrix(mu, kappa, mu, kappa, backend="triton")[2].isnan().all()


@pytest.mark.executed_for("distinct, backend", [(True, "triton")])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_histogram_counts_the_matrix(triton_device, distinct, backend, monkeypatch, faces):
    # Two layers where there are two blocks of columns.
    monkeypatch.setattr(_all_pairs_triton, "_MOST_PROGRAMS", 1)
    mu1, kappa1 = faces(131, 16, triton_device, 1)
    mu2, kappa2 = (mu1, kappa1) if distinct else faces(40, 16, triton_device, 2)
    mu1[7] = math.nan
    ids1, ids2 = (torch.arange(len(mu), device=triton_device) % 5 - 2 for mu in (mu1, mu2))
    scores = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), 2.0)
    quantiles = torch.tensor([0.2, 0.8], dtype=torch.float64, device=triton_device)
    low, high = scores.nanquantile(quantiles).tolist()  # scores lie beyond both
    bins = 8
    counts = vmf_similarity_histogram(
        mu1, kappa1, ids1, mu2, kappa2, ids2, low, high, bins, 2.0, distinct=distinct, backend=backend
    )
    wanted = ~scores.isnan() & (torch.ones_like(scores).triu(1).bool() if distinct else True)
    genuine = ids1[:, None] == ids2
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device=triton_device)
    edges[0], edges[-1] = -math.inf, math.inf
    # Scores this close to an edge may be counted on either side of it; the bound of what float32 arithmetic does.
    near = rounding(mu1, kappa1, mu2, kappa2, 2.0).nan_to_num(0.0)
    for row, kind in zip(counts, (wanted & ~genuine, wanted & genuine)):
        assert row.sum() == kind.sum() > 0
        for bin, count in enumerate(row.tolist()):
            certain = kind & (scores >= edges[bin] + near) & (scores < edges[bin + 1] - near)
            possible = kind & (scores >= edges[bin] - near) & (scores < edges[bin + 1] + near)
            assert certain.sum() <= count <= possible.sum()
    assert counts[:, 0].any() and counts[:, -1].any()


@pytest.mark.parametrize("dim", [47, 53, 283, 512, 4096])
def test_matrix_to_1e_11_nats(dim, unit_rows):
    """The polynomial into which the series is folded, against the pairs; from dimension 47 on, where the order needs
    no shift.
    """
    mu1, mu2 = unit_rows(40, dim, seed=1), unit_rows(30, dim, seed=2)
    kappa1, kappa2 = torch.logspace(-2, 4, 40, dtype=torch.float64), torch.logspace(4, -2, 30, dtype=torch.float64)
    pairs = torch.stack(
        [vmf_similarity(mu1, kappa1, mu2[j].expand(40, -1), kappa2[j].expand(40), 1.0) for j in range(30)], dim=1
    )
    torch.testing.assert_close(vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, 1.0), pairs, rtol=1e-14, atol=2e-11)


@pytest.mark.executed_for("n, m, dim, k", [(70, 150, 37, 11), (1, 1, 2, 1)])
@pytest.mark.parametrize(
    ("n", "m", "dim", "k"), [(1, 1, 2, 1), (70, 150, 37, 11), (9, 300, 16, 16), (3, 40, 16, 20), (130, 65, 16, 3)]
)
def test_top_k_is_the_head_of_the_sorted_matrix(place, poisoned, monkeypatch, n, m, dim, k, faces):
    (mu1, kappa1), (mu2, kappa2) = faces(n, dim, place.device, 1), faces(m, dim, place.device, 2)
    monkeypatch.setitem(BAND, "cpu", 3 * m)  # three rows at a time
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), 1.0)
    scores, indices = vmf_similarity_top_k(mu1, kappa1, mu2, kappa2, k, backend=place.backend)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64 and (scores.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    error = rounding(mu1, kappa1, mu2, kappa2, 1.0).amax(
        dim=1, keepdim=True
    )  # scores closer than this may change places
    found = exact.gather(1, indices)
    assert ((found - exact.sort(dim=1, descending=True).values[:, :k]).abs() <= 2 * error).all()
    expected = found - dim * math.log(64.0)
    assert ((scores - expected).abs() <= error + 2e-7 * expected.abs()).all()


def test_top_k_puts_nan_first_and_takes_equal_scores_once(place):
    mu, kappa = (
        torch.eye(4, device=place.device)[[0, 1, 1, 1, 2]],
        torch.tensor([5.0, 5.0, 5.0, 5.0, math.nan], device=place.device),
    )
    scores, indices = vmf_similarity_top_k(mu[1:2], kappa[1:2], mu, kappa, 4, backend=place.backend)
    assert scores[0, 0].isnan() and indices[0, 0] == 4
    assert sorted(indices[0, 1:].tolist()) == [1, 2, 3] and (scores[0, 1:] == scores[0, 1]).all()


def test_top_k_of_a_gallery_that_ends_with_nan(place):
    """What pads the last tile repeats the last row, and is never among the best."""
    mu, kappa = torch.eye(4, device=place.device), torch.full((4,), 5.0, device=place.device)
    mu[3] = math.nan
    _, indices = vmf_similarity_top_k(mu[:2], kappa[:2], mu, kappa, 3, backend=place.backend)
    assert indices[:, 0].tolist() == [3, 3] and indices[:, 1].tolist() == [0, 1]
    assert ((indices[:, 2] >= 0) & (indices[:, 2] < 3)).all()


def test_top_k_of_nothing(faces):
    (mu1, kappa1), (mu2, kappa2) = faces(11, 16, "cpu", 1), faces(9, 16, "cpu", 2)
    assert vmf_similarity_top_k(mu1[:0], kappa1[:0], mu2, kappa2, 4)[1].shape == (0, 4)


def test_operators(faces):
    (mu1, kappa1), (mu2, kappa2) = faces(4, 6, "cpu", 1), faces(4, 6, "cpu", 2)
    ids = torch.arange(4)
    # Without a gradient there is no graph of it to check.
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    for triton_kernel in (False, True):
        check(_vmf_similarity_matrix, (mu1, kappa1, mu2, kappa2, 64.0, torch.float32, triton_kernel))
        check(_vmf_similarity_top_k, (mu1, kappa1, mu2, kappa2, 2, 64.0, triton_kernel))
        check(_vmf_similarity_histogram, (mu1, kappa1, ids, mu2, kappa2, ids, -1.0, 1.0, 4, False, 64.0, triton_kernel))


def test_nothing_to_compare():
    mu, kappa = torch.eye(4), torch.ones(4)
    assert vmf_similarity_matrix(mu, kappa, mu[:0], kappa[:0]).shape == (4, 0)
    assert vmf_similarity_matrix(mu[:0], kappa[:0], mu, kappa).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids1": torch.zeros(2, dtype=torch.int64)}, "ids1 must be"),
        ({"ids2": torch.zeros(3)}, "ids2 must be"),
        ({"bins": 12}, "power of two"),
        ({"bins": 2048}, "power of two"),
        ({"low": 1.0}, "low < high"),
        ({"high": math.inf}, "low < high"),
        (
            {
                "mu2": torch.ones(2, 4),
                "kappa2": torch.ones(2),
                "ids2": torch.zeros(2, dtype=torch.int64),
                "distinct": True,
            },
            "same rows",
        ),
    ],
)
def test_histogram_refuses(change, message):
    ids = torch.zeros(3, dtype=torch.int64)
    arguments = {
        "mu1": torch.ones(3, 4),
        "kappa1": torch.ones(3),
        "ids1": ids,
        "mu2": torch.ones(3, 4),
        "kappa2": torch.ones(3),
        "ids2": ids,
        "low": 0.0,
        "high": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        vmf_similarity_histogram(**arguments | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mu, kappa: vmf_similarity_top_k(mu, kappa, mu, kappa, 4), "k must be in 1 .. 3"),
        (
            lambda mu, kappa: vmf_similarity_matrix(mu, kappa, mu, kappa, dtype=torch.int64),
            "dtype must be floating point",
        ),
        (
            lambda mu, kappa: vmf_similarity_matrix(mu.double(), kappa, mu, kappa, backend="triton"),
            "in float32, got float64",
        ),
        (lambda mu, kappa: vmf_similarity(mu, kappa, mu, kappa, backend="numpy"), "backend must be"),
    ],
)
def test_other_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4), torch.ones(3))
