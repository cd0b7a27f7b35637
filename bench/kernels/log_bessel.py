"""Speed of the log-Bessel family at d = 512: ours, the published way through SciPy, plain PyTorch, and that compiled.

    python -m bench.suite --sections log_bessel
    python -m pytest bench/bench_log_bessel.py --benchmark-json=bench/results/<device>/log_bessel-<date>.json

"value" is the forward pass of a tensor that requires a gradient, so that ours also writes the derivative;
"value_and_gradient" adds the backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.special
import torch

from bench.baselines.compiled import compiled_log_bessel_i, compiled_log_vmf_normalizer
from bench.baselines.eager import eager_log_bessel_i, eager_log_vmf_normalizer
from bench.baselines.published_normalizer import OFFSET, published_log_bessel_i, published_log_vmf_normalizer
from bench.measuring import roofline
from bench.measuring.case import Case, NotMeasured, benchmark_case
from bench.measuring.environment import DEVICE
from bench.measuring.roofline import Machine
from bench.measuring.timing import Buffers, buffer_count
from scf_fast.kernels import inverse_mean_resultant_length, log_bessel_i, log_vmf_normalizer, mean_resultant_length

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DIM = 512
ORDER = DIM / 2 - 1
MOST_PUBLISHED = 2**20  # elements; beyond it a call through the host takes seconds to a minute
Function = Callable[[torch.Tensor], torch.Tensor]  # of kappa alone
FAMILY: dict[str, dict[str, Function]] = {  # {quantity: {way: function}}
    "log_bessel_i": {
        "scf_fast": partial(log_bessel_i, ORDER),
        "published": partial(published_log_bessel_i, ORDER),
        "eager": partial(eager_log_bessel_i, ORDER),
        "compiled": partial(compiled_log_bessel_i, ORDER),
    },
    "log_vmf_normalizer": {
        "scf_fast": partial(log_vmf_normalizer, dim=DIM),
        "published": partial(published_log_vmf_normalizer, dim=DIM),
        "eager": partial(eager_log_vmf_normalizer, dim=DIM),
        "compiled": partial(compiled_log_vmf_normalizer, dim=DIM),
    },
    "mean_resultant_length": {"scf_fast": partial(mean_resultant_length, dim=DIM)},
}


def value(function: Function, kappa: torch.Tensor) -> torch.Tensor:
    return function(kappa)


def value_and_gradient(function: Function, kappa: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result = function(kappa)
    return torch.autograd.grad(result, kappa, torch.ones_like(result))


PASSES: dict[str, Callable] = {"value": value, "value_and_gradient": value_and_gradient}


def fresh_kappas(size: int, device: torch.device | str) -> list[torch.Tensor]:
    """Returns (size,) float32 tensors that require a gradient, log-uniform over the working range of 50 to 5000."""
    count = buffer_count(4 * size)
    return [torch.empty(size, device=device).uniform_(3.9, 8.5).exp_().requires_grad_() for _ in range(count)]


def expected(quantity: str, name: str, kappa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (value, gradient) in float64 at the float64 tensor ``kappa``: of the published formula through SciPy for
    the way "published", of the eager expansion for all others.
    """
    if name == "published":
        at = kappa.cpu().numpy()
        scaled, lower = scipy.special.ive(ORDER, at), scipy.special.ive(ORDER - 1, at)
        log_i = np.log(OFFSET + scaled) + at
        slope = 1 + (lower - scaled * (ORDER + at) / at) / (OFFSET + scaled)
        if quantity == "log_vmf_normalizer":
            log_i, slope = (
                ORDER * np.log(OFFSET + at) - DIM / 2 * np.log(2 * np.pi) - log_i,
                ORDER / (OFFSET + at) - slope,
            )
        return torch.from_numpy(log_i).to(kappa.device), torch.from_numpy(slope).to(kappa.device)
    kappa = kappa.clone().requires_grad_()
    log_i = eager_log_bessel_i(ORDER, kappa)
    (slope,) = torch.autograd.grad(log_i.sum(), kappa, create_graph=True)
    a = slope - ORDER / kappa
    if quantity == "mean_resultant_length":
        return a.detach(), torch.autograd.grad(a.sum(), kappa)[0]
    if quantity == "log_bessel_i":
        return log_i, slope
    return ORDER * torch.log(kappa) - DIM / 2 * np.log(2 * np.pi) - log_i, -a


def check(quantity: str, name: str, kappa: torch.Tensor) -> None:
    """Refuses to time a function whose values or gradients differ from float64.

    Raises:
        AssertionError: they differ.
    """
    kappa = kappa[:4096].detach().requires_grad_()
    result = FAMILY[quantity][name](kappa)
    (gradient,) = torch.autograd.grad(result.sum(), kappa)
    expected_value, expected_gradient = (
        tensor.detach() for tensor in expected(quantity, name, kappa.detach().double())
    )
    # The baselines subtract terms in the thousands in float32: their values are good to 1e-3, and their gradients lose
    # as many digits.
    torch.testing.assert_close(
        result.double(), expected_value, rtol=1e-5, atol=1e-6 if quantity == "mean_resultant_length" else 1e-3
    )
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-4, atol=0 if quantity == "mean_resultant_length" else 1e-5
    )


def prepare(
    quantity: str, name: str, direction: str, size: int, device: torch.device | str
) -> tuple[Callable, Buffers]:
    if name == "published" and size > MOST_PUBLISHED:
        raise NotMeasured("a call takes seconds to a minute")
    buffers = fresh_kappas(size, device)
    check(quantity, name, buffers[0])
    return partial(PASSES[direction], FAMILY[quantity][name]), [(kappa,) for kappa in buffers]


def prepare_inverse(size: int, device: torch.device | str) -> tuple[Callable, Buffers]:
    kappas = [kappa.detach() for kappa in fresh_kappas(size, device)]
    buffers = [mean_resultant_length(kappa, DIM) for kappa in kappas]
    found = inverse_mean_resultant_length(buffers[0], DIM)
    # The relative rounding error of rho grows by rho / (kappa A') in kappa: tenfold at kappa = 5000.
    torch.testing.assert_close(found, kappas[0], rtol=1e-5, atol=0)
    return partial(inverse_mean_resultant_length, dim=DIM), [(rho,) for rho in buffers]


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every function, way, size and direction."""
    powers = (8,) if tiny else (10, 14, 18, 22, 26) if device == "cuda" else (10, 14, 18)
    found = []
    for size in (2**power for power in powers):
        facts = {"size": size, "dim": DIM, "dtype": "float32"}
        for direction in PASSES:
            least = roofline.log_bessel(size, backward=direction != "value")
            for quantity, ways in FAMILY.items():
                work = f"{quantity}, {direction}, {size} values"
                found += [
                    Case(
                        work,
                        name,
                        partial(prepare, quantity, name, direction, size, device),
                        least,
                        (size, "values"),
                        facts,
                    )
                    for name in ways
                ]
        found.append(
            Case(
                f"inverse_mean_resultant_length, value, {size} values",
                "scf_fast",
                partial(prepare_inverse, size, device),
                roofline.Work(nbytes=2 * roofline.FLOAT * size),
                (size, "values"),
                facts,
            )
        )
    return found


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_log_bessel(benchmark: "BenchmarkFixture", case: Case, device: str, machine: Machine) -> None:
    benchmark_case(benchmark, case, device, machine)
