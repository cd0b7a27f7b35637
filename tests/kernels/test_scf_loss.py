import math
from functools import partial

import numpy
import pytest
import scipy.special
import torch

from scf_fast.kernels import SCFTerms, reference, scf_loss
from scf_fast.kernels._loss_arguments import LossOption
from scf_fast.kernels.scf_loss import _scf_loss, _scf_loss_backward

# NaN and infinity, which tests feed on purpose, make the interpreter's NumPy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

RADIUS = 64.0


def inputs(batch, dim, classes=11, *, dtype=torch.float32, device="cpu", spread=1.0, seed=0, log_kappa=(-2.0, 11.0)):
    """Features around their class center, the closer the smaller ``spread``; log kappa over a wide range; centers of
    any length.
    """
    generator = torch.Generator().manual_seed(seed + 1000 * batch + dim)
    class_centers = 3 * torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    features = class_centers[labels] + spread * torch.randn(batch, dim, generator=generator)
    log_kappas = torch.empty(batch).uniform_(*log_kappa, generator=generator)
    return features.to(device, dtype), log_kappas.to(device, dtype), class_centers.to(device, dtype), labels.to(device)


def value_and_gradients(loss, features, log_kappa, class_centers, labels):
    leaves = [t.clone().requires_grad_() for t in (features, log_kappa, class_centers)]
    value = loss(*leaves, labels)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
    gradients = torch.autograd.grad((value.double().cpu() * weights).sum(), leaves)
    return [t.detach().cpu().double() for t in (value, *gradients)]


def doubled(features, log_kappa, class_centers, labels):
    return *(t.cpu().double() for t in (features, log_kappa, class_centers)), labels.cpu()


SHAPES = [(1, 2), (5, 3), (6, 37), (9, 512), (3, 1024), (2, 8192)]


@pytest.mark.executed_for(
    "batch, dim, reduction", [(*shape, "mean") for shape in SHAPES] + [(6, 37, "sum"), (6, 37, "none")]
)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float32_against_float64(batch, dim, reduction, place, poisoned):
    backend, device = place
    data = inputs(batch, dim, device=device)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}[reduction]
    expected = value_and_gradients(lambda *x: reduce(reference.scf_loss(*x)), *doubled(*data))
    result = value_and_gradients(partial(scf_loss, backend=backend, reduction=reduction), *data)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=0)
    for got, exact in zip(result[1:], expected[1:]):
        # Up to four roundings of 1 in the unit vectors, whose difference the gradients are: 0.05 at (1, 2).
        assert (got - exact).norm() <= 5e-6 * exact.norm()


@pytest.mark.parametrize("dim", [2, 37, 512])
def test_float64(dim, place):
    backend, device = place
    data = inputs(7, dim, dtype=torch.float64, device=device, log_kappa=(-2.0, 6.0))
    expected = value_and_gradients(reference.scf_loss, *doubled(*data))
    result = value_and_gradients(partial(scf_loss, backend=backend, reduction="none"), *data)
    for got, exact in zip(result, expected):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12 * exact.abs().max().item())


@pytest.mark.parametrize("cos", [1.0, 1 - 1e-7, 1 - 1e-4, 0.6, 0.0, -1.0])
@pytest.mark.parametrize("kappa", [1e-2, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("normalizer", ["exact", "published"])
def test_nothing_cancels(cos, kappa, normalizer, place, poisoned):
    """Loss, and d loss / d log kappa relative to its larger half, hold float32's digits where -kappa cos + psi would
    lose them.
    """
    backend, device = place
    generator = torch.Generator().manual_seed(3)
    first, second = torch.linalg.qr(torch.randn(64, 2, dtype=torch.float64, generator=generator)).Q.T
    features = (7 * (cos * first + math.sqrt(max(0, 1 - cos**2)) * second)).float().to(device).unsqueeze(0)
    class_centers = (5 * first).float().to(device).unsqueeze(0)
    log_kappa = torch.tensor([math.log(kappa)], dtype=torch.float32, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    (expected, _, slope, _), (value, _, got, _) = (
        value_and_gradients(partial(scf_loss, normalizer=normalizer, backend=b), *data)
        for b, data in (
            ("torch", doubled(features, log_kappa, class_centers, labels)),
            (backend, (features, log_kappa, class_centers, labels)),
        )
    )
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    half = max(abs(slope.item()), 0.5 * kappa * (1 - cos), 1e-2 * min(kappa, 31.5))
    assert abs(got - slope).item() <= 3e-6 * half


def published_with_scipy(features, log_kappa, class_centers, labels, radius=RADIUS):
    """The published formulas in float64 NumPy and SciPy: loss, terms and d loss / d log kappa."""
    f, x, c = (t.cpu().double().numpy() for t in (features, log_kappa, class_centers[labels]))
    order, dim = f.shape[1] / 2 - 1, f.shape[1]
    cos = (f * c).sum(1) / numpy.linalg.norm(f, axis=1) / numpy.linalg.norm(c, axis=1)
    kappa = numpy.exp(numpy.log(1e-6 + numpy.exp(x)))
    ive = scipy.special.ive(order, kappa)
    terms = -kappa * cos, -order * numpy.log(1e-6 + kappa), numpy.log(1e-6 + ive) + kappa
    loss = sum(terms) + dim / 2 * math.log(2 * math.pi) + dim * math.log(radius)
    ive_slope = scipy.special.ive(order - 1, kappa) - ive * (order + kappa) / kappa
    slope = -cos - order / (1e-6 + kappa) + ive_slope / (1e-6 + ive) + 1
    return SCFTerms(cos, kappa, *terms), loss, slope * numpy.exp(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 8, 128, 512])
def test_published_against_scipy(dim, dtype, place, poisoned):
    backend, device = place
    batch = 9
    features, _, class_centers, labels = inputs(batch, dim, dtype=dtype, device=device, spread=3.0)
    log_kappa = torch.linspace(0, math.log(1e5), batch, dtype=dtype, device=device).unsqueeze(1).requires_grad_()
    loss, terms = scf_loss(
        features,
        log_kappa,
        class_centers,
        labels,
        normalizer="published",
        reduction="none",
        return_terms=True,
        backend=backend,
    )
    (slope,) = torch.autograd.grad(loss.sum(), log_kappa)
    assert slope.shape == (batch, 1)
    expected_terms, expected, expected_slope = published_with_scipy(
        features, log_kappa.detach().squeeze(1), class_centers, labels
    )
    # A rounding of each of the terms that the published code adds up. SciPy's own ive is good to 1e-12 at these orders.
    unit = {torch.float32: 2e-7, torch.float64: 1e-11}[dtype]
    size = sum(abs(t) for t in expected_terms[2:]) + 6 * dim
    assert (abs(loss.detach().cpu().numpy() - expected) <= 2 * unit * size).all()
    for got, exact in zip(terms, expected_terms):
        numpy.testing.assert_allclose(
            got.cpu().numpy(), exact, rtol=5 * unit, atol=unit * dim
        )  # d / 2 times the rounding of log(kappa) near 0
    scale = expected_terms.kappa * (1 + dim / expected_terms.kappa)
    assert (abs(slope.squeeze(1).cpu().numpy() - expected_slope) <= 4 * unit * scale).all()


def test_published_gradients_of_features():
    """The normalizer does not touch them."""
    data = inputs(9, 32, dtype=torch.float64)
    leaves = [data[0].clone().requires_grad_() for _ in range(2)]
    exact, published = (
        torch.autograd.grad(scf_loss(leaf, *data[1:], normalizer=n), leaf)[0]
        for leaf, n in zip(leaves, ("exact", "published"))
    )
    torch.testing.assert_close(published, exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["exact", "published"])
def test_terms(normalizer, place, poisoned):
    """They come from the same pass, carry no gradient, and add up to the loss."""
    backend, device = place
    dim = 128
    features, log_kappa, class_centers, labels = inputs(10, dim, device=device)
    log_kappa.requires_grad_()
    options = dict(normalizer=normalizer, reduction="none", backend=backend)
    loss, terms = scf_loss(features, log_kappa, class_centers, labels, return_terms=True, **options)
    assert torch.equal(loss, scf_loss(features, log_kappa, class_centers, labels, **options))
    assert isinstance(terms, SCFTerms) and not any(t.requires_grad for t in terms)
    total = sum(t.double() for t in terms[2:]) + dim / 2 * math.log(2 * math.pi) + dim * math.log(RADIUS)
    size = sum(t.double().abs() for t in terms[2:]) + 6 * dim
    assert ((total - loss.double()).abs() <= 3e-7 * size).all()
    torch.testing.assert_close(terms.kappa, log_kappa.detach().exp(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(terms.cos, torch.cosine_similarity(features, class_centers[labels]), rtol=0, atol=1e-6)


def test_strides_and_types(place, poisoned):
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(6, 37, device=device)
    loss = partial(scf_loss, backend=backend)
    expected = value_and_gradients(loss, features, log_kappa, class_centers, labels)
    padded = [torch.zeros(len(t), 64, device=device) for t in (features, class_centers)]
    padded[0][:, :37], padded[1][:, :37] = features, class_centers
    for views in (
        (features.t().contiguous().t(), log_kappa, class_centers.t().contiguous().t(), labels),
        (padded[0][:, :37], log_kappa.repeat_interleave(2)[::2], padded[1][:, :37], labels.repeat_interleave(2)[::2]),
        (features, log_kappa, class_centers, labels.int()),
    ):
        leaves = [t.detach().requires_grad_() for t in views[:3]]  # as strided as they are
        value = loss(*leaves, views[3])
        result = value, *torch.autograd.grad(0.5 * value, leaves)  # 0.5: the weight of a scalar in value_and_gradients
        for got, exact in zip(result, expected):
            assert (got.cpu().double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, place):
    """Halves are read as float32, so the loss is that of the converted tensors; gradients are rounded to the type of
    their argument.
    """
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(6, 64, device=device)
    halves = features.to(dtype), log_kappa.to(dtype), class_centers.to(dtype), labels
    loss = partial(scf_loss, backend=backend, reduction="none")
    exact = value_and_gradients(loss, *(t.float() for t in halves[:3]), labels)
    result = value_and_gradients(loss, *halves)
    assert torch.equal(result[0], exact[0]) and loss(*halves).dtype == torch.float32
    unit = torch.finfo(dtype).eps
    for got, expected in zip(result[1:], exact[1:]):
        torch.testing.assert_close(got, expected, rtol=2 * unit, atol=1e-4 * expected.abs().max().item())


def test_gradients_only_where_asked(place, poisoned):
    """With features and class centers frozen, the operator's second pass is a product; with one of them, only its
    gradient is made.
    """
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(6, 37, device=device)
    full = value_and_gradients(partial(scf_loss, backend=backend), features, log_kappa, class_centers, labels)
    for wanted in ([1], [0], [2], [0, 1], [1, 2]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((features, log_kappa, class_centers))]
        loss = scf_loss(*leaves, labels, backend=backend)
        gradients = torch.autograd.grad(0.5 * loss, [leaves[i] for i in wanted])
        for i, gradient in zip(wanted, gradients):
            torch.testing.assert_close(gradient.cpu().double(), full[1 + i], rtol=1e-6, atol=1e-12)


def test_same_bits_every_time(place):
    """Many rows share a class: their gradients are added in one order."""
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(24, 37, classes=3, device=device)
    class_centers.requires_grad_()
    first, second = (
        torch.autograd.grad(scf_loss(features, log_kappa, class_centers, labels, backend=backend), class_centers)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_batch(reduction, place):
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(0, 37, device=device)
    features.requires_grad_(), class_centers.requires_grad_()
    loss, terms = scf_loss(
        features, log_kappa, class_centers, labels, reduction=reduction, return_terms=True, backend=backend
    )
    assert loss.shape == (() if reduction == "sum" else (0,)) and terms.l3.shape == (0,)
    gradients = torch.autograd.grad(loss.sum(), [features, class_centers])
    assert gradients[0].shape == (0, 37) and not gradients[1].any()


def test_a_row_of_zeros_is_nan(place):
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(3, 37, device=device)
    features[1] = 0
    loss = scf_loss(features, log_kappa, class_centers, labels, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


def test_very_large_log_kappa_is_held(place):
    backend, device = place
    features, _, class_centers, labels = inputs(2, 64, device=device)
    log_kappa = torch.tensor([41.5, 200.0], device=device, requires_grad=True)
    loss = scf_loss(features, log_kappa, class_centers, labels, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), log_kappa)
    assert loss.isfinite().all() and slope.isfinite().all() and (slope > 0).all()


@pytest.mark.parametrize("dim", [2, 5, 64])
@pytest.mark.parametrize("normalizer", ["exact", "published"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(dim, normalizer, reduction):
    features, log_kappa, class_centers, labels = inputs(4, dim, classes=3, dtype=torch.float64, log_kappa=(0.0, 4.0))
    leaves = [t.requires_grad_() for t in (features, log_kappa, class_centers)]
    assert torch.autograd.gradcheck(lambda *x: scf_loss(*x, labels, normalizer=normalizer, reduction=reduction), leaves)


def test_differentiating_twice_is_refused():
    features, log_kappa, class_centers, labels = inputs(4, 8)
    log_kappa.requires_grad_()
    (slope,) = torch.autograd.grad(scf_loss(features, log_kappa, class_centers, labels), log_kappa, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(slope.sum(), log_kappa)


def test_operators(place):
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(3, 5, device=device)
    triton_kernel = backend == "triton"
    options = LossOption.MEAN | LossOption.COEFFICIENTS | LossOption.TERMS | (LossOption.TRITON if triton_kernel else 0)
    leaves = [t.requires_grad_() for t in (features, log_kappa, class_centers)]
    torch.library.opcheck(_scf_loss, (*leaves, labels, RADIUS, int(options)))
    frozen = [t.detach() for t in leaves]
    rows = torch.rand(3, device=device)
    torch.library.opcheck(
        _scf_loss_backward,
        (
            torch.ones((), device=device),
            rows,
            torch.rand(4, 3, device=device),
            *frozen,
            labels,
            True,
            True,
            triton_kernel,
        ),
    )


@pytest.mark.parametrize("length", [1e-20, 1e19])
def test_rows_whose_squares_leave_float32(length, place):
    """The feature of one row, the class center of another: neither the loss nor a gradient notices."""
    backend, device = place
    features, log_kappa, class_centers, labels = inputs(4, 37, device=device, log_kappa=(-1.0, 3.0))
    labels = torch.arange(4, device=device)
    features[1] *= length / features[1].norm()
    class_centers[2] *= length / class_centers[2].norm()
    data = features, log_kappa, class_centers, labels
    expected = value_and_gradients(reference.scf_loss, *doubled(*data))
    result = value_and_gradients(partial(scf_loss, backend=backend, reduction="none"), *data)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=0)
    for got, exact in zip(result[1:], expected[1:]):
        rows = exact.reshape(len(exact), -1)
        assert ((got - exact).reshape(rows.shape).norm(dim=1) <= 3e-6 * rows.norm(dim=1)).all()


def test_extreme_log_kappa(place):
    """exp(-inf) = 0 is the uniform distribution, whose loss does not depend on the direction; a huge one is bounded."""
    backend, device = place
    features, _, class_centers, labels = inputs(3, 37, device=device)
    log_kappa = torch.tensor([-math.inf, -200.0, 100.0], device=device)
    data = features, log_kappa, class_centers, labels
    loss, _, slope, _ = value_and_gradients(partial(scf_loss, backend=backend, reduction="none"), *data)
    uniform = -reference.log_vmf_normalizer(torch.zeros(1), 37) + 37 * math.log(RADIUS)
    torch.testing.assert_close(loss[:2], uniform.expand(2), rtol=1e-6, atol=0)
    assert (slope[:2] == 0).all()
    assert loss[2].isfinite() and slope[2] > 0


@pytest.mark.parametrize("normalizer", ["exact", "published"])
def test_compile_and_export(normalizer):
    features, log_kappa, class_centers, labels = inputs(6, 37)
    function = partial(scf_loss, normalizer=normalizer, return_terms=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [t.clone().requires_grad_() for t in (features, log_kappa, class_centers)]
        loss, terms = call(*leaves, labels)
        results.append((loss, *terms, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))

    class Module(torch.nn.Module):
        def forward(self, features, log_kappa, class_centers, labels):
            return function(features, log_kappa, class_centers, labels)[0]

    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(
        Module(), (features, log_kappa, class_centers, labels), dynamic_shapes=(batch, batch, None, batch)
    )
    more = inputs(20, 37)
    assert torch.equal(
        exported.module()(more[0], more[1], class_centers, more[3]),
        function(more[0], more[1], class_centers, more[3])[0],
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph():
    """Forward and backward; capture refuses anything that waits for the device."""
    features, log_kappa, class_centers, labels = inputs(300, 512, device="cuda")
    leaves = [t.requires_grad_() for t in (features, log_kappa, class_centers)]

    def step():
        loss = scf_loss(*leaves, labels)
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        log_kappa.sub_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_unknown_labels_on_cuda():
    features, log_kappa, class_centers, labels = inputs(4, 37, classes=5, device="cuda")
    leaves = [t.requires_grad_() for t in (features, log_kappa, class_centers)]
    labels[1], labels[2] = -1, 5
    loss = scf_loss(*leaves, labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    gradients = torch.autograd.grad(loss[0] + loss[3], leaves)
    assert gradients[2].isfinite().all()
    with pytest.raises(IndexError, match=r"labels must be in \[0, 5\)"):
        scf_loss(*leaves, labels, debug=True)


@pytest.mark.parametrize("label", [-1, 11])
def test_unknown_labels(label):
    features, log_kappa, class_centers, labels = inputs(4, 8)
    labels[2] = label
    with pytest.raises(IndexError, match=r"labels must be in \[0, 11\), one for each class center"):
        scf_loss(features, log_kappa, class_centers, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.ones(4)), r"features must be \(B, d\)"),
        (dict(features=torch.ones(4, 1)), r"features must be \(B, d\) with d in 2 .. 8192"),
        (dict(features=torch.ones(4, 8, dtype=torch.int64)), "features must be float16"),
        (dict(log_kappa=torch.ones(3)), r"log_kappa must be \(4,\) or \(4, 1\)"),
        (dict(log_kappa=torch.ones(4, dtype=torch.int32)), "log_kappa must be float16"),
        (dict(class_centers=torch.ones(11, 7)), r"class_centers must be \(C, 8\)"),
        (dict(class_centers=torch.ones(11, 8, dtype=torch.int64)), "class_centers must be float16"),
        (dict(labels=torch.zeros(4, 1, dtype=torch.int64)), r"labels must be \(4,\)"),
        (dict(labels=torch.zeros(4)), "labels must be int32 or int64"),
        (dict(radius=0.0), "radius must be a positive number"),
        (dict(normalizer="scipy"), 'normalizer must be "exact" or "published"'),
        (dict(reduction="max"), 'reduction must be "mean", "sum" or "none"'),
        (dict(backend="numpy"), 'backend must be "auto", "triton" or "torch"'),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("features", "log_kappa", "class_centers", "labels"), inputs(4, 8)))
    with pytest.raises(ValueError, match=message):
        scf_loss(**{**arguments, **change})
