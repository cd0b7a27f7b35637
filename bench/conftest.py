"""Fixtures of the benchmarks, and the fields of their JSON files: hardware and versions, but no host name."""

from collections.abc import Sequence
from typing import Any

import pytest

from bench.measuring.case import reset_state
from bench.measuring.environment import DEVICE, environment
from bench.measuring.roofline import Machine


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine.measure(DEVICE)


@pytest.fixture(autouse=True)
def _reset_state() -> None:
    reset_state()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment(DEVICE))


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Sequence[object], output_json: dict[str, Any]
) -> None:
    """Leaves the samples out of the file: quartiles and their number are what comparisons need."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
