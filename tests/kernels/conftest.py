"""Fixtures for the places where Triton kernels run: compiled on a CUDA device, interpreted on the CPU where there is
none (see tests/conftest.py), compiled for a GPU that need not be there and executed by ``bench.executor``, or only
compiled.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from bench.executor.approximation import Approximation, Mode, TensorCores
from bench.executor.launcher import executing


class Place(NamedTuple):
    backend: str
    device: str


def _interpreted(place: Place) -> contextlib.AbstractContextManager[None]:
    if torch.cuda.is_available():
        pytest.skip("the kernels run compiled here, not interpreted")
    from scf_fast.kernels._common import INTERPRETED

    assert INTERPRETED, "the kernels were imported before TRITON_INTERPRET=1 was set: set it for the whole run"
    return contextlib.nullcontext()


def _executed(place: Place) -> contextlib.AbstractContextManager[None]:
    return executing(80, EXECUTED_AS)


def _on_device(place: Place) -> contextlib.AbstractContextManager[None]:
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return contextlib.nullcontext()


class _PatchOnce:
    """Stands for the interpreter's ``_patch_lang``, which puts Python functions in the place of ``triton.language``'s.

    A kernel does it once, and undoes it at its end. Triton does it again at each call of a device function, which finds
    everything in place and takes half of the interpreter's time.
    """

    def __init__(self, patch):
        self._patch, self._in_place = patch, frozenset()

    def __call__(self, function):
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages <= self._in_place:
            return interpreter._LangPatchScope()
        scope, before = self._patch(function), self._in_place
        restore, self._in_place = scope.restore, before | languages

        def restore_all():
            restore()
            self._in_place = before

        scope.restore = restore_all
        return scope


interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)

# Compiled for sm_80 and run by bench.executor: approximate instructions land anywhere within their documented bounds,
# and tensor cores cut as an A100's do.
EXECUTED_AS = Approximation(Mode.RANDOM, TensorCores.A100)

_TRITON = [
    pytest.param((Place("triton", "cpu"), _interpreted), id="interpreted"),
    pytest.param((Place("triton", "cpu"), _executed), id="executed"),
    pytest.param((Place("triton", "cuda"), _on_device), id="cuda", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(config, items):
    """Deselects the executed runs whose values ``executed_for`` does not name: each compiles kernels of its own."""
    left_out = set()
    for item in items:
        mark = item.get_closest_marker("executed_for")
        if mark is not None and "executed" in item.callspec.id.split("-"):
            names, values = mark.args
            if tuple(item.callspec.params[name] for name in names.split(", ")) not in values:
                left_out.add(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(params=_TRITON)
def triton_device(request):
    """Device whose tensors backend="triton" takes."""
    place, enter = request.param
    with enter(place):
        yield place.device


@pytest.fixture(params=[pytest.param((Place("torch", "cpu"), _on_device), id="torch"), *_TRITON])
def place(request):
    """Backend and device of each implementation in turn."""
    place, enter = request.param
    with enter(place):
        yield place


@pytest.fixture(params=[pytest.param((Place("torch", "cpu"), _on_device), id="torch"), *_TRITON[1:]])
def quick_place(request):
    """As ``place``, without the interpreter: for kernels that take it seconds, once another test runs them in it."""
    place, enter = request.param
    with enter(place):
        yield place


@pytest.fixture
def poisoned(monkeypatch):
    """Makes torch.empty and torch.empty_like return NaN, so that an element that a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_nan(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, allocate_nan)


@pytest.fixture(scope="session")
def compile_for_gpus(tmp_path_factory):
    """``compile_for_gpus(kernels, architectures)``: records of ``bench.instructions``, in a process of their own, since
    kernels that were imported for the interpreter cannot be compiled.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_kernels(works, architectures):
        out = tmp_path_factory.mktemp("instructions")
        command = [sys.executable, "-m", "bench.instructions", "--only", *works, "--out", out]
        command += ["--architectures", ",".join(map(str, architectures))]
        root = Path(__file__).resolve().parents[2]
        child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-4000:]
        return json.loads((out / "instructions.json").read_text())["records"]

    return compile_kernels


@pytest.fixture(scope="session")
def unit_rows():
    """``unit_rows(count, dim)``: random unit rows, rounded from float64."""

    def draw(count, dim, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(rows, dim=1).to(dtype)

    return draw


@pytest.fixture(scope="session")
def faces():
    """``faces(count, dim, device, seed)``: random directions of any length, and kappa from 1e-2 to 1e4."""

    def draw(count, dim, device, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        mu = torch.randn(count, dim, generator=generator) * torch.rand(count, 1, generator=generator).add(0.5)
        kappa = torch.logspace(-2, 4, count)[torch.randperm(count, generator=generator)]
        return mu.to(device, dtype), kappa.to(device)

    return draw


@pytest.fixture(scope="session")
def gaussian_faces():
    """``gaussian_faces(count, dim, variance, device, seed)``: random directions of any length, and log variances,
    "scalar" or "diagonal", of a standard deviation of one around log(1 / dim).
    """

    def draw(count, dim, variance, device, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        mu = torch.randn(count, dim, generator=generator) * torch.rand(count, 1, generator=generator).add(0.5)
        shape = (count, dim) if variance == "diagonal" else (count,)
        log_variance = torch.randn(shape, generator=generator) - math.log(dim)
        return mu.to(device, dtype), log_variance.to(device, torch.promote_types(dtype, torch.float32))

    return draw
