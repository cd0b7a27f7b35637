import math
from functools import partial

import pytest
import torch

from scf_fast.kernels import PairTerms, pair_likelihood_loss, reference, vmf_similarity
from scf_fast.kernels._loss_arguments import LossOption
from scf_fast.kernels.pair_likelihood_loss import _pair_likelihood_loss, _pair_likelihood_loss_backward

# NaN and infinity, which tests feed on purpose, make the interpreter's NumPy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FORMS = ("vmf", "scalar", "diagonal")
GROUPS = torch.tensor([7, 7, 7, -2, 4, 4, 7, 4, 2**40, 9, 9])  # one run broken, two people alone


def density(form):
    return "vmf" if form == "vmf" else "gaussian"


def inputs(labels, dim, form, *, dtype=torch.float32, device="cpu", spread=1.0):
    """Features around their person's direction; log kappa from 0 to 8, or log variances around that of distances."""
    generator = torch.Generator().manual_seed(1000 * len(labels) + dim)
    _, people = labels.unique(return_inverse=True)
    features = 3 * torch.randn(len(labels), dim, generator=generator)[people]
    features = features + spread * torch.randn(len(labels), dim, generator=generator)
    if form == "vmf":
        parameter = torch.empty(len(labels)).uniform_(0, 8, generator=generator)
    else:
        shape = (len(labels), dim) if form == "diagonal" else (len(labels),)
        parameter = torch.randn(shape, generator=generator) + 2 * math.log(spread / 3) - math.log(dim)
    return features.to(device, dtype), parameter.to(device, dtype), labels.to(device)


def value_and_gradients(loss, features, parameter, labels, form):
    leaves = [t.clone().requires_grad_() for t in (features, parameter)]
    value = loss(*leaves, labels, density(form))
    gradients = torch.autograd.grad(value, leaves)
    return [t.detach().cpu().double() for t in (value, *gradients)]


def doubled(features, parameter, labels):
    return features.cpu().double(), parameter.cpu().double(), labels.cpu()


def close(result, expected, dim):
    assert (result[0] - expected[0]).abs() <= 1e-6 * expected[0].abs().clamp(min=dim)
    for got, exact in zip(result[1:], expected[1:]):
        assert (got - exact).norm() <= (1e-5 if dim == 2 else 5e-6) * exact.norm()


@pytest.mark.parametrize("dim", [2, 37, 512])
@pytest.mark.parametrize("form", FORMS)
def test_float32_against_float64(dim, form, place, poisoned):
    backend, device = place
    data = inputs(GROUPS, dim, form, device=device)
    expected = value_and_gradients(reference.pair_likelihood_loss, *doubled(*data), form)
    close(value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form), expected, dim)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [torch.zeros(2).long(), torch.zeros(11).long(), torch.arange(6) % 3])
def test_groups_of_any_size_and_order(labels, form, place, poisoned):
    backend, device = place
    data = inputs(labels, 37, form, device=device)
    expected = value_and_gradients(reference.pair_likelihood_loss, *doubled(*data), form)
    close(value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form), expected, 37)


@pytest.mark.parametrize("form", FORMS)
def test_the_widest_rows(form, place):
    backend, device = place
    data = inputs(torch.tensor([1, 1, 2]), 8192, form, device=device)
    expected = value_and_gradients(partial(pair_likelihood_loss, backend="torch"), *doubled(*data), form)
    close(value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form), expected, 8192)


@pytest.mark.parametrize("form", FORMS)
def test_float64(form, place):
    backend, device = place
    data = inputs(GROUPS, 37, form, dtype=torch.float64, device=device)
    expected = value_and_gradients(reference.pair_likelihood_loss, *doubled(*data), form)
    result = value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form)
    for got, exact in zip(result, expected):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-11 * exact.abs().max().item())


@pytest.mark.parametrize("cos", [1.0, 1 - 1e-6, 0.6, 0.0, -0.6, -1.0])
@pytest.mark.parametrize("kappas", [(1e-2, 3e-2), (40.0, 3e3), (1e5, 1e5), (5.0, 1e6)])
@pytest.mark.parametrize("dim", [3, 512])
def test_nothing_cancels(cos, kappas, dim, place):
    """vMF: one pair against ``vmf_similarity`` and its gradients in float64, relative to the larger terms."""
    backend, device = place
    generator = torch.Generator().manual_seed(3)
    first, second = torch.linalg.qr(torch.randn(dim, 2, dtype=torch.float64, generator=generator)).Q.T
    features = torch.stack([7 * first, cos * first + math.sqrt(1 - cos**2) * second]).float()
    log_kappa, labels = torch.tensor(kappas).log(), torch.zeros(2, dtype=torch.int64)
    exact = [t.double().requires_grad_() for t in (features, log_kappa)]
    kappa = exact[1].exp()
    score = vmf_similarity(exact[0][:1], kappa[:1], exact[0][1:], kappa[1:], backend="torch")
    expected = -score, *torch.autograd.grad(-score, exact)
    result = value_and_gradients(
        partial(pair_likelihood_loss, backend=backend),
        features.to(device),
        log_kappa.to(device),
        labels.to(device),
        "vmf",
    )
    size = max(kappas)
    assert (result[0] - expected[0]).abs() <= 1e-6 * max(expected[0].abs().item(), size, dim)
    # Of the larger half of the slope: 1 - A, or what the other face takes away; 1e-2 where both vanish.
    halves = (expected[2].abs() + torch.minimum(kappa, torch.tensor(dim / 2))).detach()
    assert ((result[2] - expected[2]).abs() <= 2e-6 * halves).all()
    weight = min(kappas) * torch.tensor([1 / 7, 1.0])
    assert ((result[1] - expected[1]).norm(dim=1) <= 2e-6 * weight).all()


def test_pair_by_pair_against_the_similarity(place):
    backend, device = place
    features, log_kappa, _ = inputs(GROUPS, 64, "vmf", device=device)
    kappa = log_kappa.double().exp()
    for i, j in ((0, 1), (2, 6), (4, 9)):
        pair = [i, j]
        loss = pair_likelihood_loss(
            features[pair],
            log_kappa[pair],
            torch.zeros(2, dtype=torch.int64, device=device),
            radius=3.0,
            backend=backend,
        )
        score = vmf_similarity(
            features[[i]].double(), kappa[[i]], features[[j]].double(), kappa[[j]], 3.0, backend="torch"
        )
        torch.testing.assert_close(-loss.double(), score[0], rtol=1e-6, atol=1e-6 * kappa[pair].max().item())


def test_published_optimum_of_a_pair():
    """d = 512, cosine 0.5, equal parameters: the loss is least at kappa = 723.4, or where v = 2 (1 - cos) / d."""
    features = torch.zeros(2, 512, dtype=torch.float64)
    features[:, 0], features[1, 1] = 1.0, math.sqrt(3.0)
    labels = torch.zeros(2, dtype=torch.int64)
    for form, best in (("vmf", math.log(723.4)), ("scalar", -math.log(1024.0))):
        parameter = torch.full((2,), best, dtype=torch.float64, requires_grad=True)
        loss = pair_likelihood_loss(features, parameter, labels, density(form))
        (slope,) = torch.autograd.grad(loss, parameter)
        assert slope.abs().max() < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_no_pairs(form, place, poisoned):
    backend, device = place
    for labels in (torch.arange(5), torch.zeros(1).long(), torch.zeros(0).long()):
        data = inputs(labels, 37, form, device=device)
        data[0][:1] = 0  # no direction, but in no pair
        loss, *gradients = value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form)
        assert loss == 0 and not any(gradient.any() for gradient in gradients)
        _, terms = pair_likelihood_loss(*data, density(form), return_terms=True, backend=backend)
        assert terms.pairs == 0 and terms.cos.shape == labels.shape and not terms.cos.any()


@pytest.mark.parametrize("form", FORMS)
def test_terms_and_sum(form, place, poisoned):
    backend, device = place
    data = inputs(GROUPS, 37, form, device=device)
    options = dict(density=density(form), backend=backend)
    loss, terms = pair_likelihood_loss(data[0], data[1].requires_grad_(), data[2], return_terms=True, **options)
    assert isinstance(terms, PairTerms) and not any(term.requires_grad for term in terms)
    assert torch.equal(loss, pair_likelihood_loss(*data, **options)) and terms.pairs == 6 + 3 + 1
    torch.testing.assert_close(pair_likelihood_loss(*data, reduction="sum", **options), 10 * loss, rtol=1e-6, atol=0)
    units = torch.nn.functional.normalize(data[0].cpu().double())
    same = (GROUPS[:, None] == GROUPS).double().fill_diagonal_(0)
    cosines = (same * (units @ units.T)).sum(dim=1) / same.sum(dim=1).clamp(min=1)
    torch.testing.assert_close(terms.cos.cpu().double(), cosines, rtol=0, atol=1e-6)
    parameter = data[1].detach().cpu()
    confidence = parameter.exp() if form == "vmf" else (-parameter).exp().reshape(len(parameter), -1).mean(dim=1)
    torch.testing.assert_close(terms.confidence.cpu(), confidence, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_order_strides_and_types(form, place, poisoned):
    """Rows in another order have the same gradients to the bit but for the order of sums; integers of either type."""
    backend, device = place
    features, parameter, labels = inputs(torch.tensor([3, 3, 3, 1, 1]), 37, form, device=device)
    loss = partial(pair_likelihood_loss, backend=backend)
    expected = value_and_gradients(loss, features, parameter, labels, form)
    order = torch.tensor([4, 0, 3, 2, 1])
    result = value_and_gradients(loss, features[order], parameter[order], labels[order].int(), form)
    for got, exact in zip(result, (expected[0], *(gradient[order] for gradient in expected[1:]))):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
    column = parameter if form == "diagonal" else parameter[:, None]
    leaves = [x.t().contiguous().t().detach().requires_grad_() for x in (features, column)]
    gradients = torch.autograd.grad(loss(*leaves, labels.repeat_interleave(2)[::2], density(form)), leaves)
    assert torch.equal(gradients[0].cpu().double(), expected[1])
    assert torch.equal(gradients[1].cpu().double(), expected[2].reshape(column.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(dtype, form, place):
    backend, device = place
    features, parameter, labels = inputs(GROUPS, 64, form, device=device)
    features, parameter = features.to(dtype), parameter.to(dtype)
    loss = partial(pair_likelihood_loss, backend=backend)
    exact = value_and_gradients(loss, features.float(), parameter.float(), labels, form)
    result = value_and_gradients(loss, features, parameter, labels, form)
    assert torch.equal(result[0], exact[0])
    for got, expected in zip(result[1:], exact[1:]):
        torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_features_and_same_bits(form, place):
    backend, device = place
    features, parameter, labels = inputs(GROUPS, 37, form, device=device)
    full = value_and_gradients(partial(pair_likelihood_loss, backend=backend), features, parameter, labels, form)
    for _ in range(2):
        leaf = parameter.clone().requires_grad_()
        loss = pair_likelihood_loss(features, leaf, labels, density(form), backend=backend)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0].cpu().double(), full[2])


@pytest.mark.parametrize("form", FORMS)
def test_extreme_parameters_are_held(form, place):
    """No infinity, none times zero; beyond the limit the gradient leads back. NaN spoils the pairs it is in."""
    backend, device = place
    features, parameter, labels = inputs(torch.arange(8) // 2, 37, form, device=device)
    extreme = torch.tensor([math.inf, -math.inf, 1e4, 1e4, -1e4, -1e4, math.inf, 0.0], device=device)
    parameter = (extreme[:, None] if form == "diagonal" else extreme) + 0 * parameter
    loss = partial(pair_likelihood_loss, backend=backend)
    value, *gradients = value_and_gradients(loss, features, parameter, labels, form)
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    slopes = gradients[1].reshape(8, -1).sum(dim=1)
    if form == "vmf":
        assert (slopes[2:4] > 0).all() and not slopes[[1, 4, 5]].any()  # exp(-inf) = 0 is the uniform distribution
    else:
        assert (slopes[2:4] > 0).all() and (slopes[4:6] < 0).all()
    parameter[0] = math.nan
    value, _, of_parameter = value_and_gradients(loss, features, parameter, labels, form)
    assert value.isnan() and of_parameter[:2].isnan().all() and of_parameter[2:].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_zeros_is_nan(form, place):
    backend, device = place
    features, parameter, labels = inputs(torch.tensor([1, 1, 2, 2]), 37, form, device=device)
    features[1] = 0
    value, of_features, of_parameter = value_and_gradients(
        partial(pair_likelihood_loss, backend=backend), features, parameter, labels, form
    )
    assert value.isnan() and of_features[:2].isnan().all() and of_parameter[:2].isnan().all()
    assert of_features[2:].isfinite().all() and of_parameter[2:].isfinite().all()


@pytest.mark.parametrize("length", [1e-20, 1e19])
@pytest.mark.parametrize("form", FORMS)
def test_rows_whose_squares_leave_float32(length, form, place):
    backend, device = place
    data = inputs(torch.tensor([1, 1, 1, 2, 2]), 37, form, device=device)
    data[0][1] *= length / data[0][1].norm()
    expected = value_and_gradients(reference.pair_likelihood_loss, *doubled(*data), form)
    result = value_and_gradients(partial(pair_likelihood_loss, backend=backend), *data, form)
    assert (result[0] - expected[0]).abs() <= 1e-6 * expected[0].abs().clamp(min=37)
    for got, exact in zip(result[1:], expected[1:]):
        rows = exact.reshape(len(exact), -1)
        assert ((got - exact).reshape(rows.shape).norm(dim=1) <= 5e-6 * rows.norm(dim=1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    features, parameter, labels = inputs(torch.tensor([0, 1, 0, 0, 1]), 5, form, dtype=torch.float64)
    leaves = [features.requires_grad_(), parameter.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: pair_likelihood_loss(*x, labels, density(form)), leaves)


def test_differentiating_twice_is_refused():
    features, parameter, labels = inputs(GROUPS, 8, "vmf")
    parameter.requires_grad_()
    (slope,) = torch.autograd.grad(pair_likelihood_loss(features, parameter, labels), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(slope.sum(), parameter)


@pytest.mark.parametrize("form", FORMS)
def test_operators(form, place):
    backend, device = place
    features, parameter, labels = inputs(torch.tensor([1, 1, 2]), 5, form, device=device)
    options = LossOption.MEAN | LossOption.COEFFICIENTS | LossOption.TERMS
    options |= LossOption.TRITON if backend == "triton" else 0
    options = int(options | (LossOption.VMF if form == "vmf" else 0))
    leaves = features.requires_grad_(), parameter.requires_grad_()
    torch.library.opcheck(_pair_likelihood_loss, (*leaves, labels, 64.0, options))
    saved = torch.rand(parameter.shape, device=device), torch.rand(3, 5, device=device), torch.tensor(3, device=device)
    arguments = (torch.ones((), device=device), *saved, features.detach(), parameter.detach(), options)
    torch.library.opcheck(_pair_likelihood_loss_backward, arguments)


def test_terms_under_a_transform():
    features, parameter, labels = inputs(GROUPS, 8, "diagonal", dtype=torch.float64)
    _, terms = pair_likelihood_loss(features, parameter, labels, "gaussian", return_terms=True)
    of_transform = torch.func.grad(
        lambda x: pair_likelihood_loss(features, x, labels, "gaussian", return_terms=True), has_aux=True
    )
    _, found = of_transform(parameter)
    for got, exact in zip(found, terms):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("form", FORMS)
def test_compile(form):
    features, parameter, labels = inputs(GROUPS, 37, form)
    function = partial(pair_likelihood_loss, density=density(form), return_terms=True)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (features, parameter)]
        loss, terms = call(*leaves, labels)
        results.append((loss, *terms, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph(form):
    """Forward and backward; capture refuses anything that waits for the device."""
    features, parameter, labels = inputs(torch.arange(256) // 4, 512, form, device="cuda")
    leaves = [features.requires_grad_(), parameter.requires_grad_()]

    def step():
        loss = pair_likelihood_loss(*leaves, labels, density(form))
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        parameter.sub_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.ones(4)), r"features must be \(B, d\)"),
        (dict(parameter=torch.ones(4, 8)), r"log kappa \(parameter\) must be \(4,\) or \(4, 1\)"),
        (
            dict(parameter=torch.ones(4, 7), density="gaussian"),
            r"log variance \(parameter\) must be \(4,\), \(4, 1\) or",
        ),
        (dict(parameter=torch.ones(4, dtype=torch.int32)), "must be float16"),
        (dict(labels=torch.zeros(3).long()), r"labels must be \(4,\)"),
        (dict(labels=torch.zeros(4)), "labels must be int32 or int64"),
        (dict(density="watson"), 'density must be "vmf" or "gaussian"'),
        (dict(radius=0.0), "radius must be a positive number"),
        (dict(reduction="none"), 'reduction must be "mean" or "sum"'),
        (dict(backend="numpy"), 'backend must be "auto", "triton" or "torch"'),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("features", "parameter", "labels"), inputs(torch.arange(4) // 2, 8, "vmf")))
    with pytest.raises(ValueError, match=message):
        pair_likelihood_loss(**{**arguments, **change})
