"""Fixtures of the benchmarks, and an account of the machine that names hardware and versions but no host."""

import pytest

from bench.measuring.case import fresh
from bench.measuring.environment import DEVICE, environment
from bench.measuring.roofline import Machine


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def machine():
    return Machine.measure(DEVICE)


@pytest.fixture(autouse=True)
def _fresh():
    fresh()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment(DEVICE))
