import pytest
import torch

from scf_fast.kernels import reference
from scf_fast.kernels.template_pooling import (
    _pool_gaussian_templates,
    _pool_templates,
    pool_gaussian_templates,
    pool_templates,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dim", [2, 37])
def test_equals_a_loop_over_templates(dtype, tolerance, weighted, dim, unit_rows):
    mu = unit_rows(60, dim, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.arange(5), torch.randint(0, 9, (54,), generator=generator), torch.tensor([11])])
    kappa = (torch.rand(60, generator=generator, dtype=torch.float64) * 16 - 4).exp().to(dtype) if weighted else None
    directions, kappas = pool_templates(mu, kappa, ids)
    assert directions.shape == (12, dim) and kappas.shape == (12,)
    assert directions.dtype == kappas.dtype == torch.promote_types(dtype, torch.float32)
    check_against_loop(directions, kappas, mu, kappa, ids, tolerance)
    check_against_loop(*reference.pool_templates(mu, kappa, ids, 12), mu, kappa, ids, 1e-14)


def check_against_loop(directions, kappas, mu, kappa, ids, tolerance):
    for template in range(len(kappas)):
        total = torch.zeros(mu.shape[1], dtype=torch.float64)
        for image in range(len(mu)):
            if ids[image] == template:
                total += (1.0 if kappa is None else kappa[image].double()) * mu[image].double()
        length = total.norm()
        assert abs(kappas[template] - length) <= tolerance * max(length, 1)
        if template not in ids:
            assert not directions[template].any() and kappas[template] == 0
        else:
            torch.testing.assert_close(directions[template].double(), total / length, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("dtype", "dim", "tolerance"), [(torch.float32, 37, 1e-6), (torch.float64, 2, 1e-14), (torch.float16, 600, 1e-6)]
)
def test_triton_equals_a_loop_over_templates(triton_device, poisoned, dtype, dim, tolerance, weighted, unit_rows):
    mu = unit_rows(40, dim, dtype)
    ids = torch.tensor([3, 0, 5]).repeat_interleave(torch.tensor([25, 14, 1]))[
        torch.randperm(40, generator=torch.Generator().manual_seed(3))
    ]
    kappa = torch.logspace(-1, 3, 40, dtype=dtype) if weighted else None
    directions, kappas = pool_templates(
        mu.to(triton_device),
        None if kappa is None else kappa.to(triton_device),
        ids.to(triton_device),
        7,
        backend="triton",
    )
    assert directions.shape == (7, dim) and directions.dtype == torch.promote_types(dtype, torch.float32)
    check_against_loop(directions.cpu(), kappas.cpu(), mu, kappa, ids, tolerance)


def test_operator(unit_rows):
    mu, kappa, ids = (
        unit_rows(5, 6).float().requires_grad_(),
        torch.rand(5).requires_grad_(),
        torch.tensor([1, 0, 1, 3, 3]),
    )
    for triton_kernel in (False, True):
        torch.library.opcheck(_pool_templates, (mu, kappa, ids, 5, triton_kernel))
        torch.library.opcheck(_pool_templates, (mu, None, ids, 5, triton_kernel))


def test_a_confident_image_leads_its_template():
    mu = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    directions, kappas = pool_templates(mu, torch.tensor([3.0, 4.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(directions, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(kappas, torch.tensor([5.0]))


def test_opposite_images_give_the_uniform_distribution():
    mu = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    directions, kappas = pool_templates(mu, torch.tensor([7.0, 7.0]), torch.tensor([0, 0]))
    assert not directions.any() and not kappas.any()


def test_order_of_templates_does_not_change_a_bit(unit_rows):
    mu, kappa = unit_rows(500, 16, torch.float32), torch.rand(500, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(500) % 7
    by_template = torch.argsort(ids, stable=True)
    for first, second in zip(
        pool_templates(mu, kappa, ids), pool_templates(mu[by_template], kappa[by_template], ids[by_template])
    ):
        assert torch.equal(first, second)


def test_gradients(unit_rows):
    mu, kappa = unit_rows(7, 5).requires_grad_(), torch.rand(7, dtype=torch.float64).add(0.1).requires_grad_()
    ids = torch.tensor([2, 0, 2, 3, 3, 3, 0])
    assert torch.autograd.gradcheck(lambda mu, kappa: pool_templates(mu, kappa, ids), (mu, kappa))
    assert torch.autograd.gradgradcheck(lambda mu, kappa: pool_templates(mu, kappa, ids), (mu, kappa))
    assert torch.autograd.gradcheck(lambda mu: pool_templates(mu, None, ids, 6), (mu,))


def test_templates_without_images():
    directions, kappas = pool_templates(torch.empty(0, 8), None, torch.empty(0, dtype=torch.int64), num_templates=3)
    assert directions.shape == (3, 8) and not directions.any() and not kappas.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.ones(3)}, "mu must be"),
        ({"mu": torch.ones(3, 2, dtype=torch.int64)}, "mu must be"),
        ({"kappa": torch.ones(2)}, "kappa must be"),
        ({"kappa": torch.ones(3, dtype=torch.int64)}, "kappa must be"),
        ({"backend": "numpy"}, "backend must be"),
        ({"template_ids": torch.zeros(3)}, "template_ids must be"),
        ({"template_ids": torch.tensor([0, 1, -1])}, "must lie in"),
        ({"num_templates": 2}, r"must lie in \[0, 2\), got 0\.\.2"),
        ({"num_templates": 0}, "at least one template"),
    ],
)
def test_refuses(change, message):
    arguments = {"mu": torch.ones(3, 2), "kappa": torch.ones(3), "template_ids": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        pool_templates(**arguments)


# ---- Gaussian templates


def gaussian_images(count, dim, diagonal, unit_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shape = (count, dim) if diagonal else (count,)
    precision = (torch.rand(shape, generator=generator, dtype=torch.float64) * 8).exp()
    ids = torch.cat([torch.arange(3), torch.randint(0, 5, (count - 4,), generator=generator), torch.tensor([6])])
    return unit_rows(count, dim, dtype), precision.to(dtype), ids


def check_fusion(directions, pooled, mu, precision, ids, tolerance):
    """Template by template, image by image: two Gaussians fuse into mu = s^2 (mu1 / s1^2 + mu2 / s2^2)."""
    for template in range(len(directions)):
        mean, of_mean = torch.zeros(mu.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for image in torch.nonzero(ids == template).flatten():
            q = precision[image].double()
            mean = (of_mean * mean + q * mu[image].double()) / (of_mean + q)
            of_mean = of_mean + q
        torch.testing.assert_close(
            pooled[template].double(), of_mean.expand(pooled[template].shape), rtol=tolerance, atol=0
        )
        expected = mean / mean.norm() if template in ids else mean
        torch.testing.assert_close(directions[template].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("dim", [2, 37])
def test_gaussian_fusion_image_by_image(dtype, tolerance, diagonal, dim, unit_rows):
    mu, precision, ids = gaussian_images(40, dim, diagonal, unit_rows, dtype)
    directions, pooled = pool_gaussian_templates(mu, precision, ids, 8)
    assert directions.shape == (8, dim) and pooled.shape == (8, *precision.shape[1:])
    assert directions.dtype == pooled.dtype == torch.promote_types(dtype, torch.float32)
    check_fusion(directions, pooled, mu, precision, ids, tolerance)
    check_fusion(*reference.pool_gaussian_templates(mu, precision, ids, 8), mu, precision, ids, 1e-12)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "dim", "tolerance"), [(torch.float32, 37, 1e-6), (torch.float64, 2, 1e-13), (torch.float16, 600, 1e-6)]
)
def test_triton_gaussian_fusion(triton_device, poisoned, dtype, dim, tolerance, diagonal, unit_rows):
    mu, precision, ids = gaussian_images(20, dim, diagonal, unit_rows, dtype)
    on_device = (tensor.to(triton_device) for tensor in (mu, precision, ids))
    directions, pooled = pool_gaussian_templates(*on_device, 8, backend="triton")
    assert directions.dtype == pooled.dtype == torch.promote_types(dtype, torch.float32)
    check_fusion(directions.cpu(), pooled.cpu(), mu, precision, ids, tolerance)


def test_scalar_precision_points_where_kappa_does(unit_rows):
    mu, precision, ids = gaussian_images(40, 16, False, unit_rows)
    directions, pooled = pool_gaussian_templates(mu, precision, ids)
    expected, kappas = pool_templates(mu, precision, ids)
    assert torch.equal(directions, expected)
    several = torch.bincount(ids) > 1
    assert (pooled[several] > 1.01 * kappas[several]).all()  # a sum of lengths, not the length of a sum
    diagonal, _ = pool_gaussian_templates(mu, precision[:, None].expand(-1, 16), ids)
    torch.testing.assert_close(diagonal, expected)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gaussian_operator_and_gradients(diagonal, unit_rows):
    mu, precision, ids = gaussian_images(7, 5, diagonal, unit_rows)
    leaves = mu.requires_grad_(), (0.01 * precision).detach().requires_grad_()
    for triton_kernel in (False, True):
        torch.library.opcheck(_pool_gaussian_templates, (*leaves, ids, 8, triton_kernel))
    pool = lambda mu, precision: pool_gaussian_templates(mu, precision, ids, 8)  # noqa: E731
    assert torch.autograd.gradcheck(pool, leaves)
    assert torch.autograd.gradgradcheck(pool, leaves)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gaussian_templates_of_no_or_of_opposite_images(diagonal):
    mu = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    precision = torch.full((2, 2) if diagonal else (2,), 7.0)
    directions, pooled = pool_gaussian_templates(mu, precision, torch.tensor([0, 0]), 2)
    assert not directions.any() and (pooled[0] == 14).all() and not pooled[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.ones(3)}, "mu must be"),
        ({"precision": torch.ones(2)}, r"precision must be \(3,\), one per row of mu, or \(3, 2\)"),
        ({"precision": torch.ones(3, 2, dtype=torch.int64)}, "precision must be float16"),
        ({"template_ids": torch.zeros(3)}, "template_ids must be"),
        ({"num_templates": 2}, r"must lie in \[0, 2\), got 0\.\.2"),
        ({"num_templates": 0}, "at least one template"),
        ({"backend": "numpy"}, "backend must be"),
    ],
)
def test_gaussian_templates_refuse(change, message):
    arguments = {"mu": torch.ones(3, 2), "precision": torch.ones(3), "template_ids": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        pool_gaussian_templates(**arguments)
