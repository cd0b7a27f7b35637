import json
import math
from functools import partial
from pathlib import Path

import mpmath
import pytest
import scipy.special
import torch

from scf_fast.kernels import (
    _common,
    inverse_mean_resultant_length,
    log_bessel_i,
    log_vmf_normalizer,
    mean_resultant_length,
    psi_and_ratio,
)
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels.debye import debye_torch
from scf_fast.kernels.log_bessel import Function, _inverse, _log_bessel

# NaN and infinity, which tests feed on purpose, make the interpreter's NumPy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())
DIMS = REFERENCE["dims"]
DTYPES = [torch.float32, torch.float64]
# One for each way that a plan evaluates: many steps of recurrence, few, none.
EXECUTED = pytest.mark.executed_for(
    "dim, dtype",
    [(2, torch.float32), (8, torch.float32), (512, torch.float32), (8192, torch.float32)]
    + [(3, torch.float64), (512, torch.float64)],
)
# Of A, relative; of psi, log I and log C relative to max(1, their size).
RATIO_TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-13}
VALUE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
# Of A', relative; small orders, brought down N steps by a recurrence that magnifies what each step rounds off, lose two
# digits.
SLOPE_TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-14}

FUNCTIONS = {
    "log_bessel_i": lambda kappa, dim=37, **options: log_bessel_i(dim / 2 - 1, kappa, **options),
    "log_vmf_normalizer": lambda kappa, dim=37, **options: log_vmf_normalizer(kappa, dim, **options),
    "mean_resultant_length": lambda kappa, dim=37, **options: mean_resultant_length(kappa, dim, **options),
    "inverse_mean_resultant_length": lambda rho, dim=37, **options: inverse_mean_resultant_length(rho, dim, **options),
}


def arguments(name, shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    return (uniform if name.startswith("inverse") else 0.05 + 40 * uniform).to(device, dtype)


@pytest.fixture
def table(dim):
    """kappa, psi, A and A' of one dimension; all but kappa to 40 digits."""
    entries = [e for e in REFERENCE["entries"] if e["dim"] == dim]
    assert len(entries) >= 20
    with mpmath.workdps(45):
        return [e["kappa"] for e in entries], *(
            [mpmath.mpf(e[name]) for e in entries] for name in ("psi", "A", "A_prime")
        )


def assert_digits(result, exact, tolerance, floor=0.0):
    with mpmath.workdps(45):
        errors = [
            float(abs(mpmath.mpf(value) - x) / max(floor, abs(x))) for value, x in zip(result.double().tolist(), exact)
        ]
    assert max(errors) <= tolerance, max(errors)


@EXECUTED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_against_mpmath(dim, table, dtype, place, poisoned):
    backend, device = place
    kappas, psi, ratio, slope = table
    kappa = torch.tensor(kappas, dtype=dtype, device=device)
    assert kappa.double().tolist() == kappas, "the table's kappa are float32 numbers"
    kappa.requires_grad_()
    with mpmath.workdps(45):
        order = mpmath.mpf(dim) / 2 - 1
        log_bessel = [p + order * mpmath.log(k) for p, k in zip(psi, kappas)]
        log_normalizer = [-p - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) for p in psi]
    got_psi, got_ratio = psi_and_ratio(dim / 2 - 1, kappa, backend=backend)
    assert_digits(got_psi, psi, VALUE_TOLERANCE[dtype], floor=1)
    assert_digits(got_ratio, ratio, RATIO_TOLERANCE[dtype])
    assert_digits(log_bessel_i(dim / 2 - 1, kappa, backend=backend), log_bessel, VALUE_TOLERANCE[dtype], floor=1)
    normalizer = log_vmf_normalizer(kappa, dim, backend=backend)
    assert_digits(normalizer, log_normalizer, VALUE_TOLERANCE[dtype], floor=1)
    assert_digits(-torch.autograd.grad(normalizer.sum(), kappa)[0], ratio, RATIO_TOLERANCE[dtype])
    mean = mean_resultant_length(kappa, dim, backend=backend)
    assert_digits(mean, ratio, RATIO_TOLERANCE[dtype])
    assert_digits(torch.autograd.grad(mean.sum(), kappa)[0], slope, SLOPE_TOLERANCE[dtype] * (100 if dim < 32 else 1))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1,), (513,), (3, 5, 7)])
@pytest.mark.parametrize("dim", [2, 37, 512])
def test_triton_against_float64_pytorch(name, shape, dim, triton_device, poisoned):
    """Value and derivative in float32, on random input of odd shapes; the conditioning of the inverse is its
    derivative's.
    """
    x = arguments(name, shape, torch.float32, seed=len(shape) + dim)
    results = {}
    for backend, argument in (("torch", x.double()), ("triton", x.to(triton_device))):
        argument.requires_grad_()
        value = FUNCTIONS[name](argument, dim, backend=backend)
        results[backend] = value.detach(), *torch.autograd.grad(value.sum(), argument)
    (expected, slope), (value, got_slope) = results["torch"], results["triton"]
    assert value.dtype == torch.float32 and value.shape == x.shape
    scale = slope.abs() * x.double() if name.startswith("inverse") else expected.abs().clamp_min(1)
    assert ((value.cpu() - expected).abs() <= 1e-6 * scale).all()
    torch.testing.assert_close(got_slope.cpu().double(), slope, rtol=3e-5, atol=0)


@pytest.mark.parametrize("order", [0, 0.3, 1.0, 2.75, 7.2, 30.5])
def test_any_real_order_against_scipy(order):
    kappa = torch.linspace(0.01, 300, 400, dtype=torch.float64)
    expected = torch.log(torch.from_numpy(scipy.special.ive(order, kappa.numpy()))) + kappa
    torch.testing.assert_close(log_bessel_i(order, kappa), expected, rtol=1e-13, atol=1e-13)


@EXECUTED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_mean_resultant_length_is_bounded_and_monotone(dim, dtype, place):
    backend, device = place
    kappa = torch.logspace(-6, 7, 300, dtype=dtype, device=device)
    mean = mean_resultant_length(kappa, dim, backend=backend)
    assert (mean > 0).all() and (mean < 1).all()
    resolved = (
        1 - mean.double() > 1e-5 if dtype == torch.float32 else mean < 1
    )  # below, steps of kappa get lost in the rounding of A
    assert (mean.diff()[resolved[1:]] > 0).all() and (mean.diff() >= 0).all()


@EXECUTED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_inverse(dim, dtype, place):
    """A(A^(-1)(rho)) = rho, with the float64 A that is tested against mpmath above."""
    backend, device = place
    rho = torch.cat([torch.logspace(-7, -0.31, 60, dtype=dtype), 1 - torch.logspace(-6, -0.31, 60, dtype=dtype)]).to(
        device
    )
    kappa = inverse_mean_resultant_length(rho, dim, backend=backend)
    exact = mean_resultant_length(kappa.double(), dim, backend="torch")
    tolerance = {torch.float32: 1e-6, torch.float64: 2e-15}[dtype]
    assert ((exact / rho.double() - 1).abs() <= tolerance).all()
    # Near 1 that says little: there 1 - rho holds the digits, and has to equal 1 - A.
    near = rho > 0.5
    complement = debye_torch(kappa[near].cpu().double(), debye_plan(dim / 2 - 1, torch.float64)).complement.to(device)
    tolerance = {torch.float32: 2e-6, torch.float64: 2e-14}[dtype]
    if dim < 32 and (
        dtype == torch.float64 or backend == "torch"
    ):  # where the exact 1 - A has as many roundings, as A'
        tolerance *= 50
    assert ((complement / (1 - rho.double()[near]) - 1).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 512])
def test_limits(dim, dtype, place):
    backend, device = place
    kappa = torch.tensor([0.0, math.inf, math.nan], dtype=dtype, device=device, requires_grad=True)
    order = dim / 2 - 1
    psi, ratio = psi_and_ratio(order, kappa, backend=backend)
    at_zero = -order * math.log(2) - math.lgamma(order + 1)
    assert psi[0].item() == pytest.approx(at_zero, rel=1e-6, abs=1e-6) and psi[1].item() == math.inf and psi[2].isnan()
    assert ratio[:2].tolist() == [0, 1] and ratio[2].isnan()
    assert log_vmf_normalizer(kappa, dim, backend=backend)[1].item() == -math.inf
    log_bessel = log_bessel_i(order, kappa, backend=backend)
    assert (
        log_bessel[0].item() == (pytest.approx(0, abs=1e-7) if dim == 2 else -math.inf)
        and log_bessel[1].item() == math.inf
    )
    mean = mean_resultant_length(kappa, dim, backend=backend)
    (slope,) = torch.autograd.grad(mean.sum(), kappa)
    assert mean[:2].tolist() == [0, 1]
    assert slope[0].item() == pytest.approx(1 / dim, rel=1e-6) and slope[1].item() == 0
    rho = torch.tensor([0.0, 1.0, math.nan], dtype=dtype, device=device)
    inverse = inverse_mean_resultant_length(rho, dim, backend=backend)
    assert inverse[:2].tolist() == [0, math.inf] and inverse[2].isnan()


def test_smallest_and_largest_numbers(place):
    """Subnormal kappa, whose logarithm has to come from its leading zeros, and kappa whose square would overflow."""
    backend, device = place
    kappa = torch.tensor([1e-42, 1e-30, 1e18, 1e25, 3e38], dtype=torch.float32, device=device)
    tiny, large = kappa[:2].double().log(), kappa[2:].double()
    log_bessel = log_bessel_i(255.0, kappa, backend=backend).double()
    torch.testing.assert_close(log_bessel[:2], 255 * tiny - 255 * math.log(2) - math.lgamma(256), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_bessel[2:], large, rtol=1e-6, atol=0)
    mean = mean_resultant_length(kappa, 512, backend=backend).double()
    torch.testing.assert_close(
        mean, torch.cat([kappa[:2].double() / 512, torch.ones_like(large)]), rtol=1e-6, atol=1e-45
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_and_strides(name, place, poisoned):
    backend, device = place
    function = partial(FUNCTIONS[name], backend=backend)
    x = arguments(name, (6, 10), torch.float32, device)
    flat = function(x.reshape(-1))
    for view, expected in (
        (x, flat.reshape(6, 10)),
        (x.t(), flat.reshape(6, 10).t()),
        (x[::2, 1::3], flat.reshape(6, 10)[::2, 1::3]),
        (x[3, 4], flat[34]),
        (x[:0], flat.reshape(6, 10)[:0]),
        (x[:, :1].expand(6, 4), flat.reshape(6, 10)[:, :1].expand(6, 4)),
    ):
        result = function(view)
        assert result.shape == view.shape
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(name, dtype, place):
    """To float32 in the result; a half is a float32, so that nothing else may change. The gradient has the type of its
    argument.
    """
    backend, device = place
    x = arguments(name, (40,), dtype, device).requires_grad_()
    result = FUNCTIONS[name](x, backend=backend)
    assert torch.equal(result, FUNCTIONS[name](x.float(), backend=backend)) and result.dtype == torch.float32
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("name", [*FUNCTIONS, "psi_and_ratio"])
@pytest.mark.parametrize("dim", [2, 3, 512])
def test_gradients(name, dim):
    function = (
        (lambda x: psi_and_ratio(dim / 2 - 1, x)) if name == "psi_and_ratio" else lambda x: FUNCTIONS[name](x, dim)
    )
    x = arguments(name, (4,), torch.float64, seed=dim).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_gradients(name, triton_device):
    x = arguments(name, (2,), torch.float64, triton_device).requires_grad_()
    function = partial(FUNCTIONS[name], dim=64, backend="triton")
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    if not _common.INTERPRETED:  # which takes ten times as long, and registers the same derivatives
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_the_fourth_derivative_is_refused():
    kappa = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    value = mean_resultant_length(kappa, 8)
    for _ in range(2):
        (value,) = torch.autograd.grad(value.sum(), kappa, create_graph=True)
    with pytest.raises(NotImplementedError, match="derivatives up to the third"):
        torch.autograd.grad(value.sum(), kappa)


def test_operators(place):
    backend, device = place
    kappa = arguments("kappa", (3, 2), torch.bfloat16 if backend == "torch" else torch.float32, device).requires_grad_()
    for function, derivative in ((Function.PSI, 1), (Function.LOG_BESSEL_I, 0)):
        torch.library.opcheck(_log_bessel, (kappa, 127.0, function.value, derivative, backend == "triton", False))
    rho = arguments("inverse", (3, 2), torch.float64, device).requires_grad_()
    torch.library.opcheck(_inverse, (rho, 127.0, backend == "triton", False))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_and_export(name):
    x = arguments(name, (9,), torch.float32)
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        argument = x.clone().requires_grad_()
        value = call(argument)
        results.append((value, *torch.autograd.grad(value.sum(), argument)))
    assert all(torch.equal(a, b) for a, b in zip(*results))

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    more = arguments(name, (20,), torch.float32)
    assert torch.equal(exported.module()(more), function(more))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph():
    """Capture refuses anything that waits for the device."""
    kappa = arguments("kappa", (1000,), torch.float32, "cuda")
    rho = arguments("inverse", (1000,), torch.float32, "cuda")
    log_vmf_normalizer(kappa, 512), inverse_mean_resultant_length(rho, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = log_vmf_normalizer(kappa, 512), inverse_mean_resultant_length(rho, 512)
    kappa.mul_(0.5), rho.mul_(0.5)
    graph.replay()
    assert torch.equal(results[0], log_vmf_normalizer(kappa, 512)) and torch.equal(
        results[1], inverse_mean_resultant_length(rho, 512)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_bessel_i(-0.5, torch.ones(2)), "order must be a real number >= 0, got -0.5"),
        (lambda: log_bessel_i(math.nan, torch.ones(2)), "order must be a real number"),
        (lambda: psi_and_ratio("2", torch.ones(2)), "order must be a real number"),
        (lambda: log_vmf_normalizer(torch.ones(2), 1), "dim must be an integer >= 2"),
        (lambda: mean_resultant_length(torch.ones(2), 2.5), "dim must be an integer >= 2"),
        (lambda: inverse_mean_resultant_length(torch.ones(2), 0), "dim must be an integer >= 2"),
        (
            lambda: log_vmf_normalizer(torch.ones(2, dtype=torch.int64), 8),
            "kappa must be float16, bfloat16, float32 or float64",
        ),
        (lambda: inverse_mean_resultant_length(torch.ones(2, dtype=torch.int32), 8), "rho must be float16"),
        (lambda: log_bessel_i(1.0, torch.tensor([1.0, -2.0])), "kappa must be >= 0, got -2"),
        (lambda: log_vmf_normalizer(torch.tensor([math.nan, -2.0]), 8), "kappa must be >= 0, got -2"),
        (lambda: inverse_mean_resultant_length(torch.tensor([0.5, 1.25]), 8), r"rho must be in \[0, 1\], got 1.25"),
        (
            lambda: mean_resultant_length(torch.ones(2), 8, backend="cuda"),
            'backend must be "auto", "triton" or "torch"',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_negative_kappa_on_cuda():
    kappa = torch.tensor([1.0, -2.0], device="cuda")
    for function in (
        partial(log_vmf_normalizer, dim=8),
        partial(mean_resultant_length, dim=8),
        partial(log_bessel_i, 3.0),
    ):
        assert function(kappa=kappa).isnan().tolist() == [False, True]
        with pytest.raises(ValueError, match="kappa must be >= 0, got -2"):
            function(kappa=kappa, debug=True)
