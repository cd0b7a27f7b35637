"""The norm of gradients against float64, and where float32 overflows."""

import pytest
import torch

from scf_fast.engine.gradient_norm import total_norm


@pytest.mark.parametrize("scale", [1e-10, 1.0, 3e19, 1e38])
def test_norm_is_that_of_float64(scale):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) * scale for shape in ((3, 5), (7,), ())]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert total_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_norm_is_not_finite_where_a_gradient_is_not(value):
    assert not total_norm([torch.ones(3), torch.tensor([1e30, value])]).isfinite()


def test_no_gradients_have_norm_zero():
    assert total_norm([]) == 0
