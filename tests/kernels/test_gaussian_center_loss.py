import math
from functools import partial

import pytest
import torch

from scf_fast.kernels import GaussianTerms, gaussian_center_loss, reference, scf_loss
from scf_fast.kernels._loss_arguments import LossOption
from scf_fast.kernels.gaussian_center_loss import _diagonal_backward, _gaussian_center_loss

# NaN and infinity, which tests feed on purpose, make the interpreter's NumPy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

VARIANCES = ("scalar", "diagonal")


def inputs(batch, dim, variance, classes=5, *, dtype=torch.float32, device="cpu", spread=1.0):
    """Features around their class center, log variances around that of their distance, centers of any length."""
    generator = torch.Generator().manual_seed(1000 * batch + dim)
    class_centers = 3 * torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    features = class_centers[labels] + spread * torch.randn(batch, dim, generator=generator)
    log_variance = torch.randn((batch, dim) if variance == "diagonal" else (batch,), generator=generator)
    log_variance += 2 * math.log(spread / 3) - math.log(dim)
    tensors = features, log_variance, class_centers
    return *(tensor.to(device, dtype) for tensor in tensors), labels.to(device)


def value_and_gradients(loss, features, log_variance, class_centers, labels):
    leaves = [t.clone().requires_grad_() for t in (features, log_variance, class_centers)]
    value = loss(*leaves, labels)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
    gradients = torch.autograd.grad((value.double().cpu() * weights).sum(), leaves)
    return [t.detach().cpu().double() for t in (value, *gradients)]


def doubled(features, log_variance, class_centers, labels):
    return *(t.cpu().double() for t in (features, log_variance, class_centers)), labels.cpu()


@pytest.mark.parametrize(("batch", "dim"), [(1, 2), (6, 37), (9, 512), (2, 8192)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_float32_against_float64(batch, dim, reduction, variance, place, poisoned):
    backend, device = place
    data = inputs(batch, dim, variance, device=device)
    reduce = {"mean": torch.mean, "none": torch.clone}[reduction]
    expected = value_and_gradients(lambda *x: reduce(reference.gaussian_center_loss(*x)), *doubled(*data))
    result = value_and_gradients(partial(gaussian_center_loss, backend=backend, reduction=reduction), *data)
    assert ((result[0] - expected[0]).abs() <= 1e-6 * expected[0].abs().clamp(min=dim / 2)).all()
    for got, exact in zip(result[1:], expected[1:]):
        # Roundings of 1 in unit vectors, whose difference the gradients are: 0.05 at (1, 2).
        assert (got - exact).norm() <= (1e-5 if dim == 2 else 5e-6) * exact.norm()


@pytest.mark.parametrize("variance", VARIANCES)
def test_float64(variance, place):
    backend, device = place
    data = inputs(7, 37, variance, dtype=torch.float64, device=device)
    expected = value_and_gradients(reference.gaussian_center_loss, *doubled(*data))
    result = value_and_gradients(partial(gaussian_center_loss, backend=backend, reduction="none"), *data)
    for got, exact in zip(result, expected):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12 * exact.abs().max().item())


@pytest.mark.parametrize("cos", [1.0, 1 - 1e-7, 1 - 1e-4, 0.6, -1.0])
@pytest.mark.parametrize("precision", [1e-2, 10.0, 1e5])
def test_nothing_cancels(cos, precision, place, poisoned):
    """One variance: loss and slope relative to the larger of their two terms."""
    backend, device = place
    generator = torch.Generator().manual_seed(3)
    first, second = torch.linalg.qr(torch.randn(64, 2, dtype=torch.float64, generator=generator)).Q.T
    features = (7 * (cos * first + math.sqrt(max(0, 1 - cos**2)) * second)).float().to(device).unsqueeze(0)
    log_variance = torch.tensor([-math.log(precision)], device=device)
    data = features, log_variance, (5 * first).float().to(device).unsqueeze(0), torch.zeros(1, dtype=int, device=device)
    expected = value_and_gradients(reference.gaussian_center_loss, *doubled(*data))
    result = value_and_gradients(partial(gaussian_center_loss, backend=backend), *data)
    pull = precision * (1 - cos)
    assert (result[0] - expected[0]).abs() <= 1e-6 * max(expected[0].abs().item(), pull, 32)
    assert (result[2] - expected[2]).abs() <= 1e-6 * max(0.5 * pull, 16)  # halves: the weight of a scalar


def test_diagonal_of_equal_variances_is_the_scalar_loss():
    """And in the direction of the features that is the SCF loss with kappa = 1 / variance."""
    features, log_variance, class_centers, labels = inputs(6, 37, "scalar", dtype=torch.float64)
    value, of_features, of_scalar, of_centers = value_and_gradients(
        gaussian_center_loss, features, log_variance, class_centers, labels
    )
    diagonal = log_variance[:, None].expand(6, 37)
    other = value_and_gradients(gaussian_center_loss, features, diagonal, class_centers, labels)
    other[2] = other[2].sum(dim=1)
    for got, exact in zip(other, (value, of_features, of_scalar, of_centers)):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)
    scf = value_and_gradients(scf_loss, features, -log_variance, class_centers, labels)
    torch.testing.assert_close(scf[1], of_features, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("variance", VARIANCES)
def test_terms(variance, place, poisoned):
    backend, device = place
    features, log_variance, class_centers, labels = inputs(9, 37, variance, device=device)
    log_variance.requires_grad_()
    options = dict(reduction="none", backend=backend)
    loss, terms = gaussian_center_loss(features, log_variance, class_centers, labels, return_terms=True, **options)
    assert torch.equal(loss, gaussian_center_loss(features, log_variance, class_centers, labels, **options))
    assert isinstance(terms, GaussianTerms) and not any(term.requires_grad for term in terms)
    torch.testing.assert_close(terms.cos, torch.cosine_similarity(features, class_centers[labels]), rtol=0, atol=1e-6)
    precision = torch.exp(-log_variance.detach()).reshape(9, -1).mean(dim=1)
    torch.testing.assert_close(terms.precision, precision, rtol=1e-6, atol=0)


def test_strides_and_shapes(place, poisoned):
    backend, device = place
    for variance in VARIANCES:
        data = inputs(6, 37, variance, device=device)
        loss = partial(gaussian_center_loss, backend=backend)
        expected = value_and_gradients(loss, *data)
        features, log_variance, class_centers, labels = data
        if variance == "scalar":
            views = [log_variance[:, None], log_variance.repeat_interleave(2)[::2]]
        else:
            padded = torch.zeros(6, 64, device=device)
            padded[:, :37] = log_variance
            views = [padded[:, :37], log_variance.t().contiguous().t()]
        for view in views:
            leaves = [features.t().contiguous().t().requires_grad_(), view.detach().requires_grad_()]
            value = loss(*leaves, class_centers, labels.int())
            result = value, *torch.autograd.grad(0.5 * value, leaves)
            for got, exact in zip(result, expected):
                torch.testing.assert_close(got.cpu().double(), exact.reshape(got.shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, place):
    backend, device = place
    data = inputs(6, 64, "diagonal", device=device)
    halves = *(t.to(dtype) for t in data[:3]), data[3]
    loss = partial(gaussian_center_loss, backend=backend, reduction="none")
    exact = value_and_gradients(loss, *(t.float() for t in halves[:3]), data[3])
    result = value_and_gradients(loss, *halves)
    assert torch.equal(result[0], exact[0]) and loss(*halves).dtype == torch.float32
    for got, expected in zip(result[1:], exact[1:]):
        torch.testing.assert_close(
            got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 * expected.abs().max().item()
        )


@pytest.mark.parametrize("variance", VARIANCES)
def test_gradients_only_where_asked(variance, place, poisoned):
    backend, device = place
    *tensors, labels = inputs(6, 37, variance, device=device)
    full = value_and_gradients(partial(gaussian_center_loss, backend=backend), *tensors, labels)
    for wanted in ([1], [0], [2]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        loss = gaussian_center_loss(*leaves, labels, backend=backend)
        for i, gradient in zip(wanted, torch.autograd.grad(0.5 * loss, [leaves[i] for i in wanted])):
            torch.testing.assert_close(gradient.cpu().double(), full[1 + i], rtol=1e-6, atol=1e-12)


def test_same_bits_every_time(place):
    backend, device = place
    features, log_variance, class_centers, labels = inputs(24, 37, "diagonal", classes=3, device=device)
    class_centers.requires_grad_()
    first, second = (
        torch.autograd.grad(
            gaussian_center_loss(features, log_variance, class_centers, labels, backend=backend), class_centers
        )[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("variance", VARIANCES)
def test_empty_batch_zero_row_and_unlabeled(variance, place):
    backend, device = place
    features, log_variance, class_centers, labels = inputs(0, 37, variance, device=device)
    features.requires_grad_(), class_centers.requires_grad_()
    loss = gaussian_center_loss(features, log_variance, class_centers, labels, reduction="sum", backend=backend)
    gradients = torch.autograd.grad(loss, [features, class_centers])
    assert loss == 0 and gradients[0].shape == (0, 37) and not gradients[1].any()
    features, log_variance, class_centers, labels = inputs(3, 37, variance, device=device)
    features[1] = 0
    loss = gaussian_center_loss(features, log_variance, class_centers, labels, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("variance", VARIANCES)
def test_log_variances_are_held(variance, place):
    """Beyond 60 they count as 60: no infinity, none times zero, and the gradient leads back."""
    backend, device = place
    features, log_variance, class_centers, labels = inputs(5, 37, variance, device=device)
    extreme = torch.tensor([-math.inf, -1e4, 1e4, math.inf, math.nan], device=device)
    log_variance = (extreme[:, None] if variance == "diagonal" else extreme) + 0 * log_variance
    data = features, log_variance, class_centers, labels
    value, *gradients = value_and_gradients(partial(gaussian_center_loss, backend=backend, reduction="none"), *data)
    held = features, log_variance.clamp(-60, 60), class_centers, labels
    expected, *exact = value_and_gradients(reference.gaussian_center_loss, *doubled(*held))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert value[:4].isfinite().all() and gradients[0][:4].isfinite().all() and value[4].isnan()
    slopes = gradients[1].reshape(5, -1).sum(dim=1)
    assert (slopes[:2] < 0).all() and (slopes[2:4] > 0).all()
    torch.testing.assert_close(gradients[0][:4], exact[0][:4], rtol=1e-5, atol=1e-5 * exact[0][:2].abs().max().item())


@pytest.mark.parametrize("length", [1e-20, 1e19])
@pytest.mark.parametrize("variance", VARIANCES)
def test_rows_whose_squares_leave_float32(length, variance, place):
    backend, device = place
    features, log_variance, class_centers, labels = inputs(4, 37, variance, device=device)
    labels = torch.arange(4, device=device)
    features[1] *= length / features[1].norm()
    class_centers[2] *= length / class_centers[2].norm()
    data = features, log_variance, class_centers, labels
    expected = value_and_gradients(reference.gaussian_center_loss, *doubled(*data))
    result = value_and_gradients(partial(gaussian_center_loss, backend=backend, reduction="none"), *data)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=1e-6 * 37)
    for got, exact in zip(result[1:], expected[1:]):
        rows = exact.reshape(len(exact), -1)
        assert ((got - exact).reshape(rows.shape).norm(dim=1) <= 3e-6 * rows.norm(dim=1)).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_gradcheck(variance):
    *tensors, labels = inputs(4, 5, variance, classes=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *x: gaussian_center_loss(*x, labels), leaves)


@pytest.mark.parametrize("variance", VARIANCES)
def test_differentiating_twice_is_refused(variance):
    features, log_variance, class_centers, labels = inputs(4, 8, variance)
    log_variance.requires_grad_()
    loss = gaussian_center_loss(features, log_variance, class_centers, labels)
    (slope,) = torch.autograd.grad(loss, log_variance, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(slope.sum(), log_variance)


@pytest.mark.parametrize("variance", VARIANCES)
def test_operators(variance, place):
    backend, device = place
    *tensors, labels = inputs(3, 5, variance, device=device)
    options = int(LossOption.MEAN | LossOption.COEFFICIENTS | LossOption.TERMS)
    options |= LossOption.TRITON.value if backend == "triton" else 0
    torch.library.opcheck(_gaussian_center_loss, (*(t.requires_grad_() for t in tensors), labels, options))
    if variance == "diagonal":
        saved = torch.rand(3, 5, device=device), torch.rand(4, 3, device=device)
        grad = torch.ones((), device=device)
        arguments = (grad, *saved, *(t.detach() for t in tensors), labels, True, True, options)
        torch.library.opcheck(_diagonal_backward, arguments)


@pytest.mark.parametrize("variance", VARIANCES)
def test_compile(variance):
    *tensors, labels = inputs(6, 37, variance)
    function = partial(gaussian_center_loss, return_terms=True)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss, terms = call(*leaves, labels)
        results.append((loss, *terms, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variance", VARIANCES)
def test_unknown_labels_on_cuda(variance):
    *tensors, labels = inputs(4, 37, variance, device="cuda")
    leaves = [t.requires_grad_() for t in tensors]
    labels[1], labels[2] = -1, 5
    loss = gaussian_center_loss(*leaves, labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert torch.autograd.grad(loss[0] + loss[3], leaves)[2].isfinite().all()
    with pytest.raises(IndexError, match=r"labels must be in \[0, 5\)"):
        gaussian_center_loss(*leaves, labels, debug=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.ones(4)), r"features must be \(B, d\)"),
        (dict(log_variance=torch.ones(3)), r"log_variance must be \(4,\), \(4, 1\) or \(4, 8\)"),
        (dict(log_variance=torch.ones(4, 7)), r"log_variance must be \(4,\), \(4, 1\) or \(4, 8\)"),
        (dict(log_variance=torch.ones(4, dtype=torch.int32)), "log_variance must be float16"),
        (dict(class_centers=torch.ones(11, 7)), r"class_centers must be \(C, 8\)"),
        (dict(labels=torch.zeros(4)), "labels must be int32 or int64"),
        (dict(reduction="max"), 'reduction must be "mean", "sum" or "none"'),
        (dict(backend="numpy"), 'backend must be "auto", "triton" or "torch"'),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("features", "log_variance", "class_centers", "labels"), inputs(4, 8, "scalar")))
    with pytest.raises(ValueError, match=message):
        gaussian_center_loss(**{**arguments, **change})
    arguments["labels"][2] = 5
    with pytest.raises(IndexError, match=r"labels must be in \[0, 5\)"):
        gaussian_center_loss(**arguments)
