"""Fixtures of the benchmarks, and an account of the machine that names hardware and versions but no host."""

import pytest
import torch

from bench._environment import DEVICE, environment
from bench._measure import copy_bandwidth


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def copy_bytes_per_second():
    return copy_bandwidth(DEVICE)


@pytest.fixture(autouse=True)
def _seed_and_recompile():
    """Fresh random data, the same in every run; each case compiles anew, so none runs into the limit of recompilations."""
    torch.manual_seed(0)
    torch.compiler.reset()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment(DEVICE))
