"""Where the Triton kernels run: compiled on a CUDA device, interpreted on the CPU where there is none (see
tests/conftest.py).
"""

from typing import NamedTuple

import pytest
import torch


class Place(NamedTuple):
    backend: str
    device: str


def _available(place: Place) -> Place:
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if place == Place("triton", "cpu"):
        if torch.cuda.is_available():
            pytest.skip("the kernels run compiled here, not interpreted")
        from scf_fast.kernels._common import INTERPRETED

        assert INTERPRETED, "kernels was imported before TRITON_INTERPRET=1 was set: set it for the whole run"
    return place


_TRITON = [
    pytest.param(Place("triton", "cpu"), id="interpreted"),
    pytest.param(Place("triton", "cuda"), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=_TRITON)
def triton_device(request):
    """Device whose tensors backend="triton" takes."""
    return _available(request.param).device


@pytest.fixture(params=[pytest.param(Place("torch", "cpu"), id="torch"), *_TRITON])
def place(request):
    """Backend and device of each implementation in turn."""
    return _available(request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """Fills what torch.empty and torch.empty_like return with NaN, so that an element a kernel forgets to write
    shows.
    """
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_nan(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, allocate_nan)
