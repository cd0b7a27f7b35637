import math

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from scf_fast.kernels import _margin_softmax_torch, _margin_softmax_triton, reference
from scf_fast.kernels import margin_softmax as module
from scf_fast.kernels._margin_softmax_arguments import MarginSoftmaxArguments
from scf_fast.kernels.margin_softmax import (
    MarginSoftmaxStatistics,
    margin_softmax_gradients,
    margin_softmax_loss,
    margin_softmax_rows,
    margin_softmax_statistics,
    target_cosine_with_margin,
)

MARGINS = [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (1.0, 0.3, 0.2), (1.35, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 2.5, 0.0)]
ARCFACE = (1.0, 0.5, 0.0)


def batch(b, c, d, seed=0, lean=1.0, device="cpu", dtype=torch.float32):
    """Embeddings that lean toward their class center, by ``lean`` standard deviations, some of them without a label."""
    generator = torch.Generator().manual_seed(seed)
    e, w = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (b, c))
    labels = torch.randint(c, (b,), generator=generator)
    e += lean * w[labels]
    if b > 3:
        labels[3] = -1
    return e.to(device, dtype).requires_grad_(), w.to(device, dtype).requires_grad_(), labels.to(device)


def assert_matches_reference(inputs, rtol, scale=16.0, margins=ARCFACE, backend="auto", **options):
    """Value, ``correct`` and both gradients; errors relative to the largest entry, and those of the value to a rounding
    of the largest logit: with one class, the sum of all cosines less the target's is nothing but rounding.
    """
    e, w, labels = inputs
    loss, correct = margin_softmax_loss(e, w, labels, scale, margins, **options, backend=backend)
    grads = torch.autograd.grad(loss, (e, w))
    exact = [t.detach().cpu().double().requires_grad_() for t in (e, w)]
    expected, expected_correct = reference.margin_softmax_loss(*exact, labels.cpu(), scale, margins, **options)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=rtol, atol=1e-7 + 1.2e-8 * scale)
    assert torch.equal(correct.cpu(), expected_correct)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=rtol * theirs.abs().max().item() + 1e-30)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes several blocks, splits and tiles out of a problem that is small enough for the interpreter."""
    monkeypatch.setattr(_margin_softmax_torch, "_BLOCK_CLASSES", (5, 5))
    monkeypatch.setattr(_margin_softmax_triton, "_BLOCK_CLASSES", (70, 70))
    monkeypatch.setattr(_margin_softmax_triton, "_PROGRAMS", 4)


@pytest.mark.parametrize("margin_gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("margins", MARGINS)
def test_float64(margins, margin_gradient, small_blocks):
    for seed, lean in enumerate((-2.0, 0.3, 2.0)):  # beyond theta*, as at the start, and near the own class center
        inputs = batch(7, 11, 19, seed, lean, dtype=torch.float64)
        assert_matches_reference(inputs, 1e-10, margins=margins, margin_gradient=margin_gradient)


@pytest.mark.parametrize("shape", [(66, 150, 37), (1, 1, 8), (5, 2, 70)])
def test_float32_in_every_implementation(shape, place, small_blocks, poisoned):
    backend, device = place
    assert_matches_reference(batch(*shape, device=device), 3e-6, scale=32.0, backend=backend, label_smoothing=0.1)


def test_logits_of_plus_and_minus_64(place, small_blocks):
    backend, device = place
    e = torch.eye(4, device=device).requires_grad_()
    w = torch.cat([torch.eye(4), -torch.eye(4)]).to(device).requires_grad_()
    labels = torch.tensor([0, 4, 5, 2], device=device)  # right, opposite, orthogonal, orthogonal
    for margins in (ARCFACE, (1.35, 0.0, 0.0)):
        loss, correct = margin_softmax_loss(e, w, labels, 64.0, margins, backend=backend)
        for grad in torch.autograd.grad(loss, (e, w)):
            assert torch.isfinite(grad).all()
        assert torch.isfinite(loss) and correct.tolist() == [True, False, False, False]


def test_no_loss_without_labels_and_none_without_other_classes(place):
    backend, device = place
    e, w, _ = batch(3, 4, 8, device=device)
    loss, correct = margin_softmax_loss(e, w, torch.full((3,), -1, device=device), backend=backend)
    assert loss.item() == 0 and not correct.any()
    assert not torch.autograd.grad(loss, e)[0].any()
    loss, correct = margin_softmax_loss(e, w[:1], torch.zeros(3, dtype=torch.int64, device=device), backend=backend)
    assert loss.item() == 0 and correct.all()
    empty = margin_softmax_statistics(e, w[:0], torch.full((3,), -1, device=device), backend=backend)
    assert (
        (empty.log_sum_exp == -math.inf).all()
        and (empty.nearest_other == -math.inf).all()
        and not empty.target_cosine.any()
    )


@pytest.mark.parametrize(
    "rows, classes, programs", [(128, 100_000, 264), (256, 100_000, 264), (1024, 100_000, 264), (128, 300, 3)]
)
def test_statistics_fill_the_chip_at_every_batch(monkeypatch, rows, classes, programs):
    """Two programs for each of 132 multiprocessors, and none without a tile of classes; on tensors without memory."""
    grids = {"unit_rows_kernel": [], "statistics_kernel": []}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: grids[self.name].append(grid)

    for name in grids:
        monkeypatch.setattr(_margin_softmax_triton, name, Kernel(name))
    e, w = (torch.empty(n, 512, device="meta") for n in (rows, classes))
    arguments = MarginSoftmaxArguments(
        e, w, torch.zeros(rows, dtype=torch.int64, device="meta"), None, 64.0, torch.bfloat16
    )
    _margin_softmax_triton.TritonMarginSoftmax(arguments).statistics(False)
    assert {math.prod(grid) for grid in grids["statistics_kernel"]} == {programs}


def gradient_of_embeddings(*arguments, **options):
    finished = []
    margin_softmax_gradients(*arguments, finish=finished.append, **options)
    (gradient,) = finished
    return gradient


def test_embeddings_have_their_gradient_before_the_last_block_of_class_centers(place, small_blocks):
    backend, device = place
    e, w, labels = batch(6, 9, 12, device=device)
    e, w, order = e.detach(), w.detach(), []
    statistics = margin_softmax_statistics(e, w, labels, backend=backend)
    margin_softmax_gradients(
        e,
        w,
        labels,
        statistics.log_sum_exp,
        torch.rand(6, device=device),
        torch.rand(6, device=device),
        backend=backend,
        finish=lambda gradient: order.append("embeddings"),
        consume=lambda start, stop, gradient: order.append(stop),
    )
    assert order[-2:] == ["embeddings", 9] and order.count("embeddings") == 1
    margin_softmax_gradients(
        e,
        w[:0],
        labels.fill_(-1),
        torch.zeros(6, device=device),
        torch.zeros(6, device=device),
        torch.zeros(6, device=device),
        backend=backend,
        finish=lambda gradient: order.append(gradient.abs().sum().item()),
    )
    assert order[-1] == 0


def test_shards_combine_to_the_whole(place, small_blocks):
    """Statistics and gradients of two ranks' classes, and of a sample of them, against all classes at once."""
    backend, device = place
    e, w, labels = batch(6, 9, 12, device=device)
    e, w = e.detach(), w.detach()
    options = {"scale": 8.0, "backend": backend}
    whole = margin_softmax_statistics(e, w, labels, with_cosine_sum=True, **options)
    row_grad, target_grad = torch.rand(2, 6, device=device)
    target_grad = torch.where(labels >= 0, target_grad, 0.0)
    expected = torch.zeros_like(w)
    grad_e = gradient_of_embeddings(
        e,
        w,
        labels,
        whole.log_sum_exp,
        row_grad,
        target_grad,
        consume=lambda a, b, g: expected[a:b].copy_(g),
        **options,
    )

    parts, sums, found = [], torch.zeros_like(e), torch.zeros_like(w)
    for rows in (torch.arange(0, 4, device=device), torch.tensor([8, 6, 5, 4, 7], device=device)):
        position = (labels[:, None] == rows).int()
        local = torch.where(position.any(1), position.argmax(1), -1)
        parts.append(margin_softmax_statistics(e, w, local, class_rows=rows, with_cosine_sum=True, **options))
        own_target = torch.where(local >= 0, target_grad, 0.0)
        consumed = []

        def consume(start, stop, grad, rows=rows, consumed=consumed):
            consumed.extend(range(start, stop))
            found[rows[start:stop]] = grad

        sums += gradient_of_embeddings(
            e, w, local, whole.log_sum_exp, row_grad, own_target, class_rows=rows, consume=consume, **options
        )
        assert consumed == list(range(len(rows)))
    torch.testing.assert_close(torch.logaddexp(parts[0].log_sum_exp, parts[1].log_sum_exp), whole.log_sum_exp)
    torch.testing.assert_close(parts[0].target_cosine + parts[1].target_cosine, whole.target_cosine)
    torch.testing.assert_close(torch.maximum(parts[0].nearest_other, parts[1].nearest_other), whole.nearest_other)
    torch.testing.assert_close(parts[0].cosine_sum + parts[1].cosine_sum, whole.cosine_sum)
    torch.testing.assert_close(sums, grad_e)
    torch.testing.assert_close(found, expected)


def test_skipped_tiles_leave_out_less_than_the_threshold(triton_device, small_blocks, poisoned):
    e, w, labels = batch(9, 150, 40, lean=0.8, device=triton_device)
    e, w = e.detach(), w.detach()
    statistics = margin_softmax_statistics(e, w, labels, 64.0, backend="triton")
    row_grad = torch.where(labels >= 0, 1e-3, 0.0)

    def gradients(skip_below):
        centers = torch.zeros_like(w)
        return gradient_of_embeddings(
            e,
            w,
            labels,
            statistics.log_sum_exp,
            row_grad,
            -64 * row_grad,
            skip_below=skip_below,
            backend="triton",
            consume=lambda a, b, g: centers[a:b].copy_(g),
        ), centers

    exact, skipped, nothing = gradients(0.0), gradients(0.5), gradients(1.01)
    assert not torch.equal(exact[1], skipped[1]) and not nothing[0].any() and not nothing[1].any()
    largest = 64 * 1e-3  # of dloss/dcos; a row of the other factor is a unit vector
    for (ours, theirs), source, terms in zip(zip(skipped, exact), (e, w), (150, 9)):
        bound = 0.5 * largest * terms / source.norm(dim=1)
        assert ((ours - theirs).norm(dim=1) <= bound).all()


def test_a_weight_that_is_not_a_number_is_not_skipped(triton_device, small_blocks, poisoned):
    """It reaches every gradient that it belongs to, whatever the threshold, and no other row of the embeddings."""
    e, w, labels = batch(70, 150, 40, lean=0.8, device=triton_device)
    e, w = e.detach(), w.detach()
    statistics = margin_softmax_statistics(e, w, labels, 64.0, backend="triton")
    for name in ("row", "target"):
        weights = {
            "row": torch.full((70,), 1e-3, device=triton_device),
            "target": torch.zeros(70, device=triton_device),
        }
        weights[name][5] = math.nan
        centers = torch.zeros_like(w)
        gradient = gradient_of_embeddings(
            e,
            w,
            labels,
            statistics.log_sum_exp,
            weights["row"],
            weights["target"],
            skip_below=1.01,
            backend="triton",
            consume=lambda a, b, g, centers=centers: centers[a:b].copy_(g),
        )
        assert gradient[5].isnan().all() and not gradient[:5].isnan().any() and not gradient[6:].isnan().any()
        own = torch.arange(150, device=triton_device) == labels[5]
        assert torch.equal(centers.isnan().all(dim=1), own if name == "target" else ~own)


@pytest.mark.parametrize("compute_dtype, rtol", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_products_keep_the_scale_of_the_gradient(compute_dtype, rtol, place, small_blocks):
    """A loss divided by a million: entries of 1e-9 would be zero in half precision."""
    backend, device = place
    kernel = _margin_softmax_triton.product_kernel
    if compute_dtype == torch.bfloat16 and backend == "triton" and isinstance(kernel, InterpretedFunction):
        pytest.skip("the interpreter has no bf16 products")
    e, w, labels = batch(9, 20, 33, lean=0.5, device=device)
    loss, _ = margin_softmax_loss(e, w, labels, 16.0, compute_dtype=compute_dtype, backend=backend)
    grads = torch.autograd.grad(loss * 1e-6, (e, w))
    exact = [t.detach().cpu().double().requires_grad_() for t in (e, w)]
    expected, _ = reference.margin_softmax_loss(*exact, labels.cpu(), 16.0, ARCFACE)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=rtol, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(expected * 1e-6, exact)):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=rtol * theirs.abs().max().item())


def test_strided_inputs_equal_bits_and_frozen_class_centers(place, small_blocks):
    backend, device = place
    e, w, labels = batch(6, 10, 12, device=device)
    wide_e, wide_w = (torch.stack([t.detach(), t.detach()], dim=2) for t in (e, w))
    plain = margin_softmax_loss(e, w, labels, backend=backend)[0]
    assert plain.item() == margin_softmax_loss(e, w, labels, backend=backend)[0].item()
    assert plain.item() == margin_softmax_loss(wide_e[..., 0], wide_w[..., 1], labels, backend=backend)[0].item()
    frozen = margin_softmax_loss(e, w.detach(), labels, backend=backend)[0]
    assert torch.equal(torch.autograd.grad(plain, e, retain_graph=True)[0], torch.autograd.grad(frozen, e)[0])
    assert torch.equal(*(torch.autograd.grad(plain, w, retain_graph=True)[0] for _ in range(2)))


def test_label_smoothing_needs_the_sum_over_all_classes():
    e, w, labels = batch(6, 9, 12, dtype=torch.float64)
    statistics = MarginSoftmaxStatistics(*margin_softmax_statistics(e, w, labels, 8.0, with_cosine_sum=True))
    rows = margin_softmax_rows(statistics, 9, 8.0, ARCFACE, label_smoothing=0.2)
    expected = reference.margin_softmax_loss(e, w, labels, 8.0, ARCFACE, label_smoothing=0.2)[0]
    assert rows[labels >= 0].mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_operators_are_well_formed_and_compile():
    e, w, labels = batch(4, 6, 8)
    settings = (8.0, torch.float32, True, 0.0, False)
    torch.library.opcheck(module._statistics_op, (e, w, labels, *settings))
    row = torch.rand(4)
    torch.library.opcheck(
        module._gradients_op,
        (e.detach(), w.detach(), labels, row, row, row, None, 8.0, torch.float32, 0.0, False, True),
    )
    compiled = torch.compile(margin_softmax_loss, backend="aot_eager", fullgraph=True)
    ours, eager = compiled(e, w, labels)[0], margin_softmax_loss(e, w, labels)[0]
    assert ours.item() == eager.item()
    assert all(map(torch.equal, torch.autograd.grad(ours, (e, w)), torch.autograd.grad(eager, (e, w))))


def test_straight_through_passes_the_gradient_of_the_plain_cosine():
    cos = torch.tensor([0.3], dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda c: target_cosine_with_margin(c, ARCFACE), cos).item()
    theta = math.acos(0.3)
    assert exact == pytest.approx(math.sin(theta + 0.5) / math.sin(theta))
    e, w, labels = batch(4, 3, 8, dtype=torch.float64)
    a, _ = margin_softmax_loss(e, w, labels, 8.0, ARCFACE, "exact")
    b, _ = margin_softmax_loss(e, w, labels, 8.0, ARCFACE, "straight_through")
    assert a.item() == b.item()
    assert not torch.allclose(torch.autograd.grad(a, e)[0], torch.autograd.grad(b, e)[0])


@pytest.mark.parametrize("margins", MARGINS)
def test_target_falls_with_the_angle_and_is_finite_at_the_poles(margins):
    cos = torch.linspace(-1, 1, 4001, requires_grad=True)
    target = target_cosine_with_margin(cos, margins)
    target.sum().backward()
    assert torch.isfinite(target).all() and torch.isfinite(cos.grad).all()
    assert (target[1:] > target[:-1] - 1e-6).all()


def test_nan_is_passed_on(place, small_blocks):
    backend, device = place
    e, w, labels = batch(3, 4, 8, device=device)
    with torch.no_grad():
        e[1, 2] = float("nan")
    assert margin_softmax_loss(e, w, labels, backend=backend)[0].isnan()


def test_errors():
    e, w, labels = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    for error, match, arguments in (
        (ValueError, "margin_gradient must be", {"margin_gradient": "approximate"}),
        (ValueError, "margins must have m1 >= 1", {"margins": (0.5, 0.0, 0.0)}),
        (ValueError, "margins must have m1 >= 1", {"margins": (1.0, np.nan, 0.0)}),
        (ValueError, r"label_smoothing must be in \[0, 1\)", {"label_smoothing": 1.0}),
        (ValueError, "to match class_centers", {"embeddings": e[:, :3]}),
        (ValueError, "embeddings must be float16", {"embeddings": e.long()}),
        (ValueError, r"labels must be \(2,\) int64", {"labels": labels[:1]}),
        (ValueError, "compute_dtype must be", {"compute_dtype": torch.float64}),
        (ValueError, "float64 is computed by PyTorch", {"embeddings": e.double(), "backend": "triton"}),
        (ValueError, "backend must be", {"backend": "numpy"}),
        (IndexError, r"labels must be in \[0, 3\).*got 3", {"labels": torch.tensor([0, 3])}),
        (IndexError, "got -2", {"labels": torch.tensor([-2, 0])}),
    ):
        with pytest.raises(error, match=match):
            margin_softmax_loss(**{"embeddings": e, "class_centers": w, "labels": labels, **arguments})
