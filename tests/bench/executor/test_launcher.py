import os

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import native_specialize_impl

from bench.executor import compiler, launcher
from bench.executor.approximation import Approximation, Mode
from bench.executor.errors import MemoryAccessError, RaceError
from bench.executor.launcher import ExecutedKernel, Executor, executing, specialize
from scf_fast.kernels import _common, log_bessel_i, pool_templates, reference, scf_loss
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels._log_bessel_triton import _log_bessel_kernel


@pytest.mark.parametrize(
    "value",
    [
        *(torch.zeros(40, dtype=dtype) for dtype in launcher._POINTERS),
        torch.zeros(40)[4:],
        torch.zeros(40)[1:],
        *(0, 1, 2, 16, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63),
        *(True, 0.5, 1.0, None),
    ],
)
@pytest.mark.parametrize("by_value", [True, False])
def test_specialized_as_triton_does(value, by_value):
    """The rules of Triton's launcher, which it keeps in C++."""
    kind, key = native_specialize_impl(CUDABackend, value, False, by_value, True)
    assert specialize(value, by_value=by_value) == (kind, key == "D" if isinstance(key, str) else False)


def test_kernels_are_replaced_only_within():
    from scf_fast.kernels import _log_bessel_triton as log_bessel

    kappa, interpreted = torch.rand(5), _common.INTERPRETED
    with executing():
        assert isinstance(log_bessel._log_bessel_kernel, ExecutedKernel) and _common.use_triton("triton", kappa)
    assert log_bessel._log_bessel_kernel is _log_bessel_kernel and _common.INTERPRETED == interpreted
    with pytest.raises(ZeroDivisionError), executing():
        raise ZeroDivisionError
    assert log_bessel._log_bessel_kernel is _log_bessel_kernel


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_launch_writes_into_its_tensors(architecture):
    """Also where they are pieces of larger ones, and where a constant is spelled out in no argument."""
    mu, kappa = torch.randn(9, 24)[:, 3:19], torch.rand(18)[::2] + 0.1
    ids = torch.tensor([0, 2, 2, 0, 4, 4, 4, 0, 2])
    with executing(architecture):
        directions, kappas = pool_templates(mu, kappa, ids, 5, backend="triton")
    expected = reference.pool_templates(mu, kappa, ids, 5)
    torch.testing.assert_close(directions.double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(kappas.double(), expected[1], rtol=1e-6, atol=0)


def error_of_log_bessel(**options):
    kappa = torch.logspace(0, 4, 512)
    exact = log_bessel_i(255.0, kappa.double(), backend="torch")
    with executing(**options):
        value = log_bessel_i(255.0, kappa, backend="triton")
    return ((value - exact).abs() / exact.abs().clamp_min(1)).max().item()


def test_contraction_shows_in_a_compensated_kernel():
    """Fused into sums, the products that the rounding errors are computed from are not what was rounded."""
    assert error_of_log_bessel() < 2e-7
    assert error_of_log_bessel(enable_fp_fusion=True) > 2e-6


def test_modes_differ():
    generator = torch.Generator().manual_seed(0)
    features, centers = (torch.randn(40, 64, generator=generator) for _ in range(2))

    def loss(mode):
        with executing(80, Approximation(mode)):
            log_kappa = torch.linspace(0, 8, 40)
            return scf_loss(features, log_kappa, centers, torch.arange(40), reduction="none", backend="triton")

    exact, plus, minus, random = (loss(mode) for mode in (Mode.EXACT, Mode.PLUS, Mode.MINUS, Mode.RANDOM))
    assert not torch.equal(exact, plus) and not torch.equal(plus, minus) and not torch.equal(minus, random)
    torch.testing.assert_close(plus, minus, rtol=1e-6, atol=0)


def launch_reduction(monkeypatch, change):
    """Computes the SCF loss of two wide rows by a changed program."""
    compiled = launcher._program

    def changed(request):
        program, shared_bytes = compiled(request)
        return change(program), shared_bytes

    monkeypatch.setattr(launcher, "_program", changed)
    with executing():
        scf_loss(*(torch.randn(2, 2048), torch.zeros(2), torch.randn(3, 2048), torch.tensor([0, 2])), backend="triton")


def test_barriers_left_out_of_a_kernel_are_races(monkeypatch):
    sites = []
    launch_reduction(monkeypatch, lambda program: sites.append(program.sites("bar")) or program)
    monkeypatch.undo()
    races = 0
    for site in sites[0]:
        try:
            launch_reduction(monkeypatch, lambda program, site=site: program.without(site))
        except RaceError:
            races += 1
        monkeypatch.undo()
    assert 2 * races > len(sites[0])  # others are in branches that these rows do not take


def test_a_short_array_is_reported():
    kernel = ExecutedKernel(_log_bessel_kernel, Executor())
    constants = dict(PLAN=debye_plan(255.0, torch.float32), NEGATE=False, WITH_POWER=False, DERIVATIVE=0)
    constants |= dict(FP64=False, BLOCK=512, num_warps=4, enable_fp_fusion=False)
    kernel[(1,)](torch.ones(100), torch.empty(100), torch.empty(100), 100, **constants)
    with pytest.raises(MemoryAccessError, match="outside of all allocations"):
        kernel[(1,)](torch.ones(100), torch.empty(100), torch.empty(90), 100, **constants)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on disk, and in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launcher, "_programs", {})
    compiler._folder.cache_clear()
    yield tmp_path / "scf_fast" / "executor"
    compiler._folder.cache_clear()


def test_a_kernel_is_compiled_once(cache, monkeypatch):
    asked = []
    ask = compiler._ask_server
    monkeypatch.setattr(compiler, "_ask_server", lambda request: asked.append(request) or ask(request))
    first = error_of_log_bessel()
    assert len(asked) == 1 and asked[0].options == {"num_warps": 4, "enable_fp_fusion": False}
    (path,) = cache.glob("*/*")
    monkeypatch.setattr(launcher, "_programs", {})
    assert error_of_log_bessel() == first and len(asked) == 1
    path.write_bytes(b"half a fi")  # as after a full disk
    monkeypatch.setattr(launcher, "_programs", {})
    assert error_of_log_bessel() == first and len(asked) == 2
    error_of_log_bessel(architecture=90)
    assert len(asked) == 3 and asked[2].architecture == 90


def test_states_of_the_sources_that_are_not_used_are_removed(cache):
    for age in range(12):
        folder = cache / f"state{age}"
        folder.mkdir(parents=True)
        (folder / "kernel.json.gz").touch()
        os.utime(folder, (1e9 - age, 1e9 - age))
    current = compiler._folder()
    assert {path.name for path in cache.iterdir()} == {current.name, *(f"state{age}" for age in range(7))}


def test_an_error_of_the_compiler_is_passed_on():
    kernel = ExecutedKernel(_log_bessel_kernel, Executor())
    with pytest.raises(compiler.CompileError, match="PLAN"):
        kernel[(1,)](*torch.ones(3, 8), 8, PLAN=None, NEGATE=False, WITH_POWER=False, DERIVATIVE=0, FP64=False, BLOCK=8)
    assert error_of_log_bessel() < 2e-7  # it still answers


@triton.jit
def _double_kernel(x_ptr, count, BLOCK: tl.constexpr = 32):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < count), mask=at < count)


def test_requests_name_a_kernel_as_it_is_launched():
    kernel = ExecutedKernel(_double_kernel, Executor(90))
    request = kernel.request(dict(x_ptr=torch.zeros(20)[4:], count=16, BLOCK=32), dict(num_warps=1))
    assert request.signature == {"x_ptr": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    assert request.divisible == (0, 1) and request.constants == {2: 32} and request.architecture == 90
    assert request.kernel == "_double_kernel" and request.options == {"num_warps": 1}
