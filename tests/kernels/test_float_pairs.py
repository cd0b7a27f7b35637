from fractions import Fraction

import pytest
import torch

from scf_fast.kernels import _float_pairs as pairs


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(3, 200, dtype=torch.float64).uniform_(-40, 40, generator=generator)
    signs = torch.randint(0, 2, (3, 200), generator=generator) * 2 - 1
    return torch.exp2(exponents) * signs


def exact(*tensors):
    return [tuple(map(Fraction, values)) for values in zip(*(tensor.tolist() for tensor in tensors))]


def test_sums_and_products_are_exact(numbers):
    a, b, _ = numbers
    for (a_i, b_i), (head, tail) in zip(exact(a, b), exact(*pairs.two_sum(a, b))):
        assert head + tail == a_i + b_i
    larger, smaller = torch.where(a.abs() >= b.abs(), a, b), torch.where(a.abs() >= b.abs(), b, a)
    assert all(map(torch.equal, pairs.fast_two_sum(larger, smaller), pairs.two_sum(larger, smaller)))
    for (a_i, b_i), (head, tail) in zip(exact(a, b), exact(*pairs.two_product(a, b))):
        assert head + tail == a_i * b_i


def test_residual_and_difference_with_a_product(numbers):
    a, b, c = numbers
    for (a_i, b_i, c_i), (value,) in zip(exact(a, b, a * b), exact(pairs.residual(a, b, a * b))):
        assert value == c_i - a_i * b_i
    head, tail = pairs.subtract_product(c, c * 1e-17, (3.0, 1e-17), a, a * 1e-17)
    for (a_i, a_tail, c_i, c_tail), (head_i, tail_i) in zip(exact(a, a * 1e-17, c, c * 1e-17), exact(head, tail)):
        expected = c_i + c_tail - (3 + Fraction(1e-17)) * (a_i + a_tail)
        assert abs(head_i + tail_i - expected) <= Fraction(1e-31) * (abs(c_i) + 3 * abs(a_i))
