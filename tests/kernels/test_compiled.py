"""Kernels as compiled for GPUs, executed with every approximate instruction at an end of its documented bound, and with
tensor cores that cut as an A100's and an H100's do. The other tests run compiled kernels too, with instructions
anywhere within their bounds and an A100's tensor cores: the places "executed" of their fixtures.

Exact values are those of the float64 PyTorch twins, which other tests compare with mpmath, and of
``scf_fast.kernels.reference``.
"""

import math
from functools import partial

import pytest
import torch

from bench.executor import launcher
from bench.executor.approximation import Approximation, Mode, TensorCores
from bench.executor.launcher import executing
from scf_fast.kernels import (
    gaussian_center_loss,
    inverse_mean_resultant_length,
    log_bessel,
    log_bessel_i,
    log_vmf_normalizer,
    margin_softmax_loss,
    mean_resultant_length,
    pair_likelihood_loss,
    pool_templates,
    reference,
    scf_loss,
    vmf_similarity,
)
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels._margin_softmax_arguments import MarginSoftmaxArguments
from scf_fast.kernels._margin_softmax_triton import TritonMarginSoftmax
from scf_fast.kernels.debye import debye_torch
from scf_fast.kernels.log_bessel import Function, _log_bessel
from scf_fast.kernels.vmf_similarity_tiles import (
    vmf_similarity_histogram,
    vmf_similarity_matrix,
    vmf_similarity_top_k,
)

ENDS = [Mode.PLUS, Mode.MINUS]
CORES = [TensorCores.EXACT, TensorCores.A100, TensorCores.H100]
KAPPA = torch.logspace(-6, 7, 512)


def relative(value, exact, floor=0.0):
    """The largest error, relative to the exact value or to the floor where that is larger."""
    return ((value.double() - exact).abs() / torch.maximum(exact.abs(), torch.as_tensor(floor))).max().item()


# ---- log-Bessel family


def family(kappa, dim, backend):
    """log I, log C, A and A'."""
    log_i = log_bessel_i(dim / 2 - 1, kappa, backend=backend)
    return *(log_i, log_vmf_normalizer(kappa, dim, backend=backend)), *_log_bessel(
        kappa, dim / 2 - 1, Function.PSI.value, 1, backend == "triton", False
    )


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("dim", [2, 8, 37, 64, 512, 8192])
def test_float32_family_at_the_ends_of_the_bounds(dim, mode, architecture):
    exact = family(KAPPA.double(), dim, "torch")
    with executing(architecture, Approximation(mode)):
        log_i, log_c, ratio, slope = family(KAPPA, dim, "triton")
    assert relative(log_i, exact[0], 1) <= (4e-7 if dim >= 10 else 1e-6)
    assert relative(log_c, exact[1], 1) <= 4e-7
    assert relative(ratio, exact[2]) <= 3e-7
    # Brought down N steps by a recurrence that magnifies what each step rounds off.
    assert relative(slope, exact[3]) <= {2: 1e-4, 8: 1e-5, 37: 1e-6}.get(dim, 3.1e-7)


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("dim", [2, 64, 8192])
def test_float64_family_at_the_ends_of_the_bounds(dim, mode):
    """Against the twin, which is as exact as the kernel."""
    kappa = KAPPA.double()[:256]
    exact = family(kappa, dim, "torch")
    with executing(80, Approximation(mode)):
        results = family(kappa, dim, "triton")
    for result, value, floor, tolerance in zip(results, exact, (1, 1, 0, 0), (1e-14, 1e-14, 1e-15, 2e-12)):
        assert relative(result, value, floor) <= tolerance


@pytest.mark.parametrize("derivative", [1, 2])
@pytest.mark.parametrize("function", Function)
def test_derivatives_up_to_the_third(function, derivative):
    kappa = torch.logspace(-2, 5, 300)
    order = 63.0
    exact = _log_bessel(kappa.double(), order, function.value, derivative, False, False)
    with executing(80, Approximation(Mode.PLUS)):
        results = _log_bessel(kappa, order, function.value, derivative, True, False)
    for m, (result, value) in enumerate(zip(results, exact), start=derivative):
        # The m-th derivative of log I is psi's and that of v log kappa, which nearly cancel where kappa is large.
        parts = math.factorial(m - 1) * order / kappa.double() ** m if function == Function.LOG_BESSEL_I else 0.0
        assert relative(result, value, parts) <= 1e-6


SPECIAL = [0.0, -0.0, 1e-45, 1e-38, 3e38, math.inf, math.nan, -1.0, -1e-45, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 3, 512])
@pytest.mark.parametrize("derivative", [0, 1])
def test_special_values_of_kappa(dim, dtype, derivative, monkeypatch):
    """NaN for NaN and for negative numbers, which no check on a GPU finds; elsewhere the limits that the twin has."""
    monkeypatch.setattr(log_bessel, "check_range", lambda *arguments, **options: None)
    kappa = torch.tensor(SPECIAL, dtype=dtype)
    exact = _log_bessel(kappa.double(), dim / 2 - 1, Function.PSI.value, derivative, False, False)
    with executing(80, Approximation(Mode.RANDOM)):
        results = _log_bessel(kappa, dim / 2 - 1, Function.PSI.value, derivative, True, False)
    for result, value in zip(results, exact):
        assert result[6:9].isnan().all()
        kept = [i for i in range(len(SPECIAL)) if i not in (6, 7, 8)]
        torch.testing.assert_close(result[kept], value[kept].to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("dim", [2, 64, 512])
def test_inverse_at_the_ends_of_the_bounds(dim, mode, architecture):
    rho = torch.cat([torch.logspace(-7, -0.31, 60), 1 - torch.logspace(-6, -0.31, 60), torch.tensor([0.0, 1.0])])
    with executing(architecture, Approximation(mode)):
        kappa = inverse_mean_resultant_length(rho, dim, backend="triton")
    assert kappa[-2:].tolist() == [0, math.inf]
    assert relative(mean_resultant_length(kappa.double(), dim), rho.double(), 1e-30) <= 1e-6
    near = (rho > 0.5) & (rho < 1)
    complement = debye_torch(kappa[near].double(), debye_plan(dim / 2 - 1, torch.float64)).complement
    assert relative(complement, 1 - rho.double()[near]) <= 2e-6


def test_worst_signs_of_the_inverse(monkeypatch):
    """Each approximate instruction at the end of its bound that makes 1 - A worse, found one after the other."""
    rho, dim = 1 - torch.logspace(-6, -0.31, 120), 64
    programs = []
    compiled = launcher._program
    monkeypatch.setattr(launcher, "_program", lambda request: programs.append(compiled(request)) or programs[-1])

    def error(signs):
        with executing(80, Approximation(signs=signs)):
            kappa = inverse_mean_resultant_length(rho, dim, backend="triton")
        complement = debye_torch(kappa.double(), debye_plan(dim / 2 - 1, torch.float64)).complement
        return relative(complement, 1 - rho.double())

    signs, worst = {}, error({})
    sites = programs[0][0].sites("rsqrt", "rcp", "div.full", "ex2", "lg2")
    for site in sites:
        for sign in ENDS:
            found = error(signs | {site: sign})
            if found > worst:
                signs, worst = signs | {site: sign}, found
    assert sites and worst <= 1e-6


# ---- SCF loss


def rows_at(cosines, kappas, dim, dtype=torch.float32):
    """Features and class centers of random lengths at given cosines, one pair for each kappa."""
    generator = torch.Generator().manual_seed(dim)
    first, second = (
        torch.nn.functional.normalize(torch.randn(len(kappas), dim, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )
    second = torch.nn.functional.normalize(second - (first * second).sum(1, keepdim=True) * first)
    lengths = 10 ** (4 * torch.rand(2, len(kappas), 1, generator=generator, dtype=torch.float64) - 2)
    features = lengths[0] * (cosines[:, None] * first + (1 - cosines**2).sqrt()[:, None] * second)
    return features.to(dtype), kappas.log().to(dtype), (lengths[1] * first).to(dtype), torch.arange(len(kappas))


def loss_and_slope(data, backend, **options):
    features, log_kappa, centers, labels = data
    log_kappa = log_kappa.clone().requires_grad_()
    loss = scf_loss(features, log_kappa, centers, labels, reduction="none", backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), log_kappa)[0]


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [2, 64, 512])
@pytest.mark.parametrize("normalizer", ["exact", "published"])
def test_scf_loss_at_the_ends_of_the_bounds(dim, dtype, normalizer, mode):
    kappas, cosines = (
        x.reshape(-1).double()
        for x in torch.meshgrid(
            torch.logspace(-1, 4.5, 8), torch.tensor([1.0, 1 - 1e-6, 0.99, 0.6, 0.0, -0.8]), indexing="ij"
        )
    )
    data = rows_at(cosines, kappas, dim, dtype)
    doubled = [*(x.double() for x in data[:3]), data[3]]
    exact, exact_slope = loss_and_slope(doubled, "torch", normalizer=normalizer)
    with executing(80, Approximation(mode)):
        loss, slope = loss_and_slope(data, "triton", normalizer=normalizer)
    kappa, cos = doubled[1].exp(), torch.cosine_similarity(doubled[0], doubled[2])
    if normalizer == "exact":
        assert relative(loss, exact, dim / 4) <= 1e-6  # it crosses zero, where (d / 2) log kappa does not
        half = torch.maximum(exact_slope.abs(), 0.5 * kappa * (1 - cos)).clamp_min(1e-2 * kappa.clamp_max(dim))
        unit = 1e-6
        if dtype != torch.float32:
            unit = torch.finfo(dtype).eps  # the gradient has the type of log_kappa
        assert ((slope.double() - exact_slope).abs() / half).max() <= unit
    else:  # it adds up terms of this size; two rsqrt of 1.3e-7 and an exp of 3.5e-7 go into the first
        size = 2 * kappa + (dim / 2) * kappa.log().abs() + 6 * dim
        assert ((loss.double() - exact).abs() <= 6e-7 * size).all()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dim", [64, 8192])
def test_gradients_of_features_and_class_centers(dim, architecture):
    data = rows_at(torch.tensor([0.9, 0.3, -0.5], dtype=torch.float64), torch.tensor([5.0, 300.0, 4e3]).double(), dim)
    gradients = []
    for backend, tensors in (("torch", [x.double() for x in data[:3]]), ("triton", list(data[:3]))):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with executing(architecture, Approximation(Mode.PLUS)):
            loss = scf_loss(*leaves, data[3], backend=backend)
            gradients.append(torch.autograd.grad(loss, leaves))
    for exact, result in zip(*gradients):
        assert (result - exact).norm() <= 3e-6 * exact.norm()


def test_special_values_of_the_scf_loss(poisoned):
    """Rows of zeros and NaN spoil themselves alone; features of tiny norm and log kappa without a bound do not."""
    generator = torch.Generator().manual_seed(0)
    features, centers = torch.randn(7, 64, generator=generator), torch.randn(3, 64, generator=generator)
    log_kappa = torch.tensor([1.0, 2.0, math.nan, -math.inf, 100.0, 3.0, 4.0])
    features[0], features[5] = 0, features[5] / features[5].norm() * 1e-18
    features[6] = 1e-42
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    expected = scf_loss(features, log_kappa, centers, labels, reduction="none", backend="torch")
    with executing(80, Approximation(Mode.RANDOM)):
        loss = scf_loss(features, log_kappa, centers, labels, reduction="none", backend="triton")
    assert loss[[0, 2]].isnan().all() and loss[[1, 4, 5]].isfinite().all()
    torch.testing.assert_close(loss[[1, 5]], expected[[1, 5]], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss[4], expected[4], rtol=5e-6, atol=0)  # the bound on log kappa is a float32, 41.59


def test_features_of_tiny_norm():
    generator = torch.Generator().manual_seed(0)
    features, centers = torch.randn(3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    features *= torch.tensor([1e-20, 1e-25, 1e-38])[:, None] / features.norm(dim=1, keepdim=True)
    log_kappa, labels = torch.full((3,), 3.0), torch.arange(3)
    expected = scf_loss(features, log_kappa, centers, labels, reduction="none", backend="torch")
    assert expected[:2].isfinite().all()
    with executing():
        loss = scf_loss(features, log_kappa, centers, labels, reduction="none", backend="triton")
    torch.testing.assert_close(loss[:2], expected[:2], rtol=1e-5, atol=0)


def test_log_kappa_of_minus_infinity_is_the_uniform_distribution():
    features, centers, labels = torch.randn(2, 64), torch.randn(2, 64), torch.arange(2)
    log_kappa = torch.full((2,), -math.inf)
    expected = scf_loss(features, log_kappa, centers, labels, backend="torch")
    assert expected.isfinite()
    with executing():
        loss = scf_loss(features, log_kappa, centers, labels, backend="triton")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# ---- losses of Gaussians, and of pairs


def gradients(function, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("dim", [2, 512])
def test_gaussian_center_loss_at_the_ends_of_the_bounds(dim, mode):
    precisions, cosines = (
        x.reshape(-1).double()
        for x in torch.meshgrid(torch.logspace(-2, 5, 8), torch.tensor([1.0, 1 - 1e-6, 0.99, 0.3, -0.8]), indexing="ij")
    )
    features, log_precision, centers, labels = rows_at(cosines, precisions, dim)
    spread = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(1))
    for log_variance in (-log_precision, -log_precision[:, None] + spread):

        def loss(f, x, c, backend="torch"):
            return gaussian_center_loss(f, x, c, labels, reduction="none", backend=backend)

        exact, _, exact_slope, _ = gradients(loss, features.double(), log_variance.double(), centers.double())
        with executing(80, Approximation(mode)):
            value, _, slope, _ = gradients(partial(loss, backend="triton"), features, log_variance, centers)
        if log_variance.ndim == 1:
            pull = dim / 2 - exact_slope
            assert ((value - exact).abs() / torch.maximum(exact.abs(), pull).clamp(min=dim / 2)).max() <= 1e-6
            assert ((slope - exact_slope).abs() / pull.clamp(min=dim / 2)).max() <= 1e-6
        else:  # of directions that differ by 4e-7 in length
            precision = torch.exp(-log_variance.double())
            square = 1 - 2 * exact_slope
            moved = 4e-7 * (precision.amax(dim=1) * square.sum(dim=1)).sqrt()
            assert ((value - exact).abs() <= 1e-6 * (square.sum(dim=1) / 2 + dim / 2 + exact.abs()) + moved).all()
            moved = 4e-7 * (precision * square).sqrt()
            assert ((slope - exact_slope).abs() <= 1e-6 * square.clamp(min=1) + moved + 1e-13 * precision).all()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("form", ["vmf", "scalar", "diagonal"])
def test_pair_likelihood_at_the_ends_of_the_bounds(form, mode, architecture):
    """Groups of two, their cosines and parameters on a grid; d = 512."""
    parameters, cosines = (
        x.reshape(-1).double()
        for x in torch.meshgrid(
            torch.logspace(0, 5, 6), torch.tensor([1.0, 1 - 1e-6, 0.99, 0.3, -0.8, -1.0]), indexing="ij"
        )
    )
    first, log_parameter, second, labels = rows_at(cosines, parameters, 512)
    features, labels = torch.cat([first, second]), torch.cat([labels, labels])
    parameter = torch.cat([log_parameter, log_parameter.flip(0)])
    if form == "diagonal":
        parameter = torch.randn(len(labels), 512, generator=torch.Generator().manual_seed(1)) - parameter[:, None]
    elif form == "scalar":
        parameter = -parameter
    loss = partial(pair_likelihood_loss, labels=labels, density="vmf" if form == "vmf" else "gaussian", reduction="sum")
    exact, of_features, slope = gradients(partial(loss, backend="torch"), features.double(), parameter.double())
    with executing(architecture, Approximation(mode)):
        value, found_features, found_slope = gradients(partial(loss, backend="triton"), features, parameter)
    assert relative(value, exact) <= 1e-6
    if form == "vmf":
        half = (slope.abs() + parameter.exp().clamp(max=256)).double()
        assert ((found_slope - slope).abs() / half).max() <= 2e-6
    else:
        assert (found_slope - slope).norm() <= 1e-6 * slope.norm()
    inside = labels % 6 != 5  # at a cosine of -1 the direction of the vMF gradient is what rounding leaves
    lengths = features.double().norm(dim=1, keepdim=True)
    difference = (found_features - of_features) * lengths
    assert difference[inside].norm() <= 3e-6 * (of_features * lengths)[inside].norm()


# ---- similarity of all pairs


def genuine_pairs(count, dim, dtype, kappa=1000.0):
    """Two sets of faces of the same people: cosines of about 0.95 on the diagonal."""
    generator = torch.Generator().manual_seed(4)
    first, noise = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    second = first + math.sqrt(1 / 0.95**2 - 1) * noise
    kappas = kappa * 10 ** (0.2 * torch.rand(2, count, generator=generator) - 0.2)
    return first.to(dtype), kappas[0], second.to(dtype), kappas[1]


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_pairs_within_3e_7_of_the_larger_kappa(dtype, cores):
    mu1, kappa1, mu2, kappa2 = genuine_pairs(40, 512, dtype)
    exact = vmf_similarity_matrix(mu1.double(), kappa1.double(), mu2.double(), kappa2.double(), 1.0, backend="torch")
    with executing(80, Approximation(tensor_cores=cores)):
        scores = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, 1.0, backend="triton")
    larger = torch.maximum(kappa1[:, None], kappa2)
    assert ((scores - exact).abs() / larger).max() <= 3e-7


@pytest.mark.parametrize("cores", CORES)
def test_top_k_and_histogram_agree_with_the_matrix(cores):
    """To a rounding or two: whatever the tensor cores do, they do it three times."""
    mu1, kappa1, mu2, kappa2 = genuine_pairs(70, 64, torch.float16, kappa=50.0)
    ids1, ids2 = torch.arange(70) % 9, torch.arange(70) % 7
    with executing(80, Approximation(Mode.RANDOM, cores)):
        matrix = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, 1.0, backend="triton")
        scores, indices = vmf_similarity_top_k(mu1, kappa1, mu2, kappa2, 5, 1.0, backend="triton")
        low, high = matrix.min().item() - 1, matrix.max().item() + 1
        counts = vmf_similarity_histogram(mu1, kappa1, ids1, mu2, kappa2, ids2, low, high, 16, 1.0, backend="triton")
    best = matrix.sort(dim=1, descending=True).values[:, :5]
    torch.testing.assert_close(scores, best, rtol=2.5e-7, atol=0)
    torch.testing.assert_close(matrix.gather(1, indices), best, rtol=2.5e-7, atol=0)
    genuine = ids1[:, None] == ids2
    for row, kind in zip(counts, (~genuine, genuine)):
        edges = torch.linspace(low, high, 17, dtype=torch.float64)
        expected = torch.histogram(matrix[kind].double(), edges).hist
        assert row.sum() == kind.sum() and (row - expected).abs().sum() <= 2  # scores on an edge


# ---- margin softmax


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("mode", ENDS)
def test_pairs_and_pooling_at_the_ends_of_the_bounds(mode, architecture, faces):
    mu, kappa = faces(12, 512, "cpu", seed=1)
    ids = torch.arange(12) // 5
    with executing(architecture, Approximation(mode)):
        scores = vmf_similarity(mu[:6], kappa[:6], mu[6:], kappa[6:], backend="triton")
        directions, kappas = pool_templates(mu, kappa, ids, 3, backend="triton")
    expected = vmf_similarity(mu[:6], kappa[:6], mu[6:], kappa[6:], backend="torch")
    torch.testing.assert_close(scores, expected, rtol=2e-7, atol=0)
    exact = reference.pool_templates(mu, kappa, ids, 3)
    torch.testing.assert_close(directions.double(), exact[0], rtol=0, atol=3e-7)
    torch.testing.assert_close(kappas.double(), exact[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("mode", ENDS)
def test_rows_of_the_margin_softmax_at_the_ends_of_the_bounds(mode, architecture):
    """Unit rows, and the gradient through their norm."""
    rows = torch.randn(70, 40, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(70, 40, generator=torch.Generator().manual_seed(1))
    with executing(architecture, Approximation(mode)):
        passes = TritonMarginSoftmax(
            MarginSoftmaxArguments(rows, rows, torch.zeros(70, dtype=torch.int64), None, 64.0, torch.float32)
        )
        count, width = passes.embeddings.shape
        of_unit = torch.zeros(1, count, width)
        of_unit[0, :70, :40] = gradient
        through = passes._through_norm(of_unit, rows, None, passes.embedding_norm, torch.ones(()), 70)
    exact = rows.double().requires_grad_()
    unit = torch.nn.functional.normalize(exact)
    (expected,) = torch.autograd.grad(unit, exact, gradient.double())
    torch.testing.assert_close(passes.embeddings[:70, :40].double(), unit.detach(), rtol=5e-7, atol=0)
    assert not passes.embeddings[70:].any() and not passes.embeddings[:, 40:].any()
    assert ((through - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float32, "highest", 5e-6),
        (torch.float32, "high", 1e-3),
        (torch.bfloat16, "highest", 1e-2),
        (torch.float16, "highest", 1e-3),
    ],
)
def test_margin_softmax_on_tensor_cores(dtype, precision, tolerance, cores):
    """Operands are rounded to 24, 11, 8 and 11 bits; gradients relative to their largest entry."""
    generator = torch.Generator().manual_seed(0)
    class_centers = torch.randn(100, 128, generator=generator)
    labels = torch.randint(100, (10,), generator=generator)
    embeddings = class_centers[labels] + 2 * torch.randn(10, 128, generator=generator)
    exact = [x.double().requires_grad_() for x in (embeddings, class_centers)]
    expected, _ = reference.margin_softmax_loss(*exact, labels, 32.0, (1.0, 0.4, 0.0))
    leaves = [x.requires_grad_() for x in (embeddings, class_centers)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with executing(80, Approximation(Mode.PLUS, cores)):
            loss, _ = margin_softmax_loss(*leaves, labels, 32.0, (1.0, 0.4, 0.0), compute_dtype=dtype, backend="triton")
            gradients = torch.autograd.grad(loss, leaves)
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative(loss, expected) <= tolerance
    for result, value in zip(gradients, torch.autograd.grad(expected, exact)):
        assert (result - value).abs().max() <= 2 * tolerance * value.abs().max()
