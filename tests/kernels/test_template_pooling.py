import pytest
import torch

from scf_fast.kernels import reference
from scf_fast.kernels.template_pooling import _pool_templates, pool_templates


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
