import math

import numpy as np
import pytest
import torch

from kernels.margin_softmax import margin_softmax_loss, target_cosine_with_margin

MARGINS = [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (1.0, 0.3, 0.2), (1.35, 0.0, 0.0), (1.0, 0.0, 0.0)]


def reference(embeddings, centers, labels, scale, margins):
    """Mean loss in NumPy float64, angle by arccos."""
    m1, m2, m3 = margins
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    w = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    logits = e @ w.T
    rows = np.arange(len(labels))
    theta = np.arccos(logits[rows, labels])
    turning = (math.pi - m2) / m1
    logits[rows, labels] = np.where(theta < turning, np.cos(m1 * theta + m2), np.cos(theta) - np.cos(turning) - 1) - m3
    logits *= scale
    top = logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[rows, labels])


@pytest.mark.parametrize("margins", MARGINS)
def test_loss_and_gradient_against_float64(margins):
    rng = np.random.default_rng(0)
    e, w, labels = rng.normal(size=(7, 19)), rng.normal(size=(11, 19)), rng.integers(0, 11, 7)
    te, tw = torch.tensor(e, requires_grad=True), torch.tensor(w, requires_grad=True)
    loss, correct = margin_softmax_loss(te, tw, torch.tensor(labels), 16.0, margins)
    assert loss.item() == pytest.approx(reference(e, w, labels, 16.0, margins), rel=1e-5)
    loss.backward()
    for array, grad in ((e, te.grad), (w, tw.grad)):
        direction = rng.normal(size=array.shape)
        h = 1e-5
        plus, minus = (reference(*((array + s * h * direction, w) if array is e else (e, array + s * h * direction)), labels, 16.0, margins) for s in (1, -1))
        assert (grad * torch.tensor(direction)).sum().item() == pytest.approx((plus - minus) / (2 * h), rel=2e-4)
    expected = (e @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T).argmax(1) == labels
    assert correct.tolist() == expected.tolist()


def test_straight_through_passes_the_gradient_of_the_plain_cosine():
    cos = torch.tensor([0.3], dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda c: target_cosine_with_margin(c, (1.0, 0.5, 0.0)), cos).item()
    theta = math.acos(0.3)
    assert exact == pytest.approx(math.sin(theta + 0.5) / math.sin(theta))
    e, w = torch.randn(4, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    a, _ = margin_softmax_loss(e, w, labels, 8.0, (1.0, 0.5, 0.0), "exact")
    b, _ = margin_softmax_loss(e, w, labels, 8.0, (1.0, 0.5, 0.0), "straight_through")
    assert a.item() == b.item()
    ga, gb = torch.autograd.grad(a, e)[0], torch.autograd.grad(b, e)[0]
    assert not torch.allclose(ga, gb)


@pytest.mark.parametrize("margins", MARGINS)
def test_target_falls_with_the_angle_and_is_finite_at_the_poles(margins):
    cos = torch.linspace(-1, 1, 4001, requires_grad=True)
    target = target_cosine_with_margin(cos, margins)
    target.sum().backward()
    assert torch.isfinite(target).all() and torch.isfinite(cos.grad).all()
    assert (target[1:] > target[:-1] - 1e-6).all()


def test_errors():
    e, w, labels = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="margin_gradient must be"):
        margin_softmax_loss(e, w, labels, margin_gradient="approximate")
    with pytest.raises(ValueError, match="margins must have m1 >= 1"):
        margin_softmax_loss(e, w, labels, margins=(0.5, 0.0, 0.0))
    with pytest.raises(ValueError, match="to match class_centers"):
        margin_softmax_loss(e[:, :3], w, labels)
