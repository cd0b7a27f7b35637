"""Log of the modified Bessel function I_v and its relatives: the von Mises-Fisher normalizer, its mean resultant length
and the inverse of the latter.

    log C_d(kappa) = -psi_v(kappa) - (d/2) log(2 pi),  v = d/2 - 1          A_d(kappa) = I_(v+1) / I_v = psi_v'

psi and its derivatives are those of ``scf_fast.kernels.debye``, which also states their accuracy. A function and its
derivative come from one evaluation: the operator returns the pair (f^(n), f^(n+1)), so the backward pass of the first
is a product, and differentiating once more raises n by one.
"""

import enum
import functools
import math
from collections.abc import Callable
from typing import NoReturn

import torch

from scf_fast.kernels._common import (
    check_floating,
    check_range,
    promoted_dtype,
    refuse_repeated_forward_mode,
    slices,
    transformed,
    use_triton,
)
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels._log_bessel_triton import launch_inverse, launch_log_bessel
from scf_fast.kernels.debye import debye_torch

_TORCH_BLOCK = 1 << 14  # elements at a time in plain PyTorch: the float64 temporaries stay in cache
# Halley's method from within 7 % (d = 2, the worst) leaves 3e-5 after one step and rounding after two, for every d in 2
# .. 8192.
_HALLEY_STEPS = 2


class Function(enum.IntEnum):
    """The functions of the operator ``scf::log_bessel``."""

    PSI = 0  # psi_v
    LOG_BESSEL_I = 1  # psi_v + v log kappa
    LOG_VMF_NORMALIZER = 2  # -(psi_v + (v + 1) log(2 pi))


def _constant_within(function: Function, order: float) -> float:
    """Returns the constant that is added to psi before the sign."""
    return (order + 1) * math.log(2 * math.pi) if function == Function.LOG_VMF_NORMALIZER else 0.0


# ---- log I_v and log C_d


def _apply_in_blocks(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], argument: torch.Tensor, *outputs: torch.Tensor
) -> None:
    """Writes ``function(argument in float64)`` to the outputs, a cache-sized block at a time."""
    source, *targets = (t.view(-1) for t in (argument.contiguous(), *outputs))
    for block in slices(len(source), _TORCH_BLOCK):
        for target, value in zip(targets, function(source[block].double())):
            target[block].copy_(value)


def _log_bessel_torch(
    kappa: torch.Tensor, order: float, function: Function, derivative: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Returns (f^(n), f^(n+1)) of float64 kappa to the accuracy of ``dtype``; the CPU path."""
    with_power = function == Function.LOG_BESSEL_I
    plan = debye_plan(order, dtype, _constant_within(function, order), compensated=dtype == torch.float64)
    terms = debye_torch(kappa, plan, derivative, derivative + 1, with_power)
    results = [terms.ratio, terms.second, terms.third][max(derivative - 1, 0) : derivative + 1]
    if with_power and order > 0:  # v log kappa: v / kappa, -v / kappa^2, 2 v / kappa^3
        slopes = order / kappa, -order / kappa / kappa, 2 * order / kappa / kappa / kappa
        results = [f + g for f, g in zip(results, slopes[max(derivative - 1, 0) :])]
    if derivative == 0:
        value = terms.psi + terms.psi_tail
        if with_power and order > 0:
            value = value.masked_fill(kappa == 0, -math.inf)
        results = [value, *results]
    return tuple(-f for f in results) if function == Function.LOG_VMF_NORMALIZER else tuple(results)


@torch.library.custom_op("scf::log_bessel", mutates_args=())
def _log_bessel(
    kappa: torch.Tensor, order: float, function: int, derivative: int, triton_kernel: bool, debug: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (f^(n), f^(n+1)) of a ``Function``, n = derivative."""
    kind = Function(function)
    check_range("kappa", kappa, debug)
    dtype = promoted_dtype(kappa)
    value = torch.empty(kappa.shape, dtype=dtype, device=kappa.device)
    slope = torch.empty_like(value)
    if not triton_kernel:
        _apply_in_blocks(lambda block: _log_bessel_torch(block, order, kind, derivative, dtype), kappa, value, slope)
    elif kappa.numel():
        launch_log_bessel(
            kappa,
            value,
            slope,
            plan=debye_plan(order, dtype, _constant_within(kind, order)),
            negate=kind == Function.LOG_VMF_NORMALIZER,
            with_power=kind == Function.LOG_BESSEL_I,
            derivative=derivative,
        )
    return value, slope


@_log_bessel.register_fake
def _(kappa, order, function, derivative, triton_kernel, debug):
    value = torch.empty(kappa.shape, dtype=promoted_dtype(kappa), device=kappa.device)
    return value, torch.empty_like(value)


def _log_bessel_setup(ctx, inputs, output):
    kappa, *ctx.settings = inputs
    ctx.save_for_backward(kappa, output[1])
    ctx.set_materialize_grads(False)


def _refuse_another_derivative(function: int) -> NoReturn:
    name = Function(function).name.lower()
    raise NotImplementedError(
        f"{name} has derivatives up to the third, all that its kernels evaluate; differentiate less often"
    )


def _log_bessel_backward(ctx, grad_value, grad_slope):
    kappa, slope = ctx.saved_tensors
    order, function, derivative, triton_kernel, debug = ctx.settings
    terms = []
    if grad_value is not None:
        terms.append(grad_value * slope)
    if grad_slope is not None:
        if derivative == 2:  # the recurrences of the kernels end here; a Hessian of the loss needs no more
            _refuse_another_derivative(function)
        terms.append(grad_slope * _log_bessel(kappa, order, function, derivative + 1, triton_kernel, debug)[1])
    return sum(terms).to(kappa.dtype) if terms else None, None, None, None, None, None


_log_bessel.register_autograd(_log_bessel_backward, setup_context=_log_bessel_setup)


class _TransformedDerivative(torch.autograd.Function):
    """f^(n) for the transforms of ``torch.func`` and forward mode, n = 0 .. 3; its derivative is f^(n+1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kappa, order, function, derivative, triton_kernel, debug):
        first = min(derivative, 2)
        return _log_bessel(kappa, order, function, first, triton_kernel, debug)[derivative - first]

    @staticmethod
    def setup_context(ctx, inputs, output):
        kappa, *ctx.settings = inputs
        ctx.save_for_backward(kappa)
        ctx.save_for_forward(kappa)

    @staticmethod
    def _slope(ctx):
        (kappa,) = ctx.saved_tensors
        order, function, derivative, triton_kernel, debug = ctx.settings
        if derivative == 3:
            _refuse_another_derivative(function)
        return _TransformedDerivative.apply(kappa, order, function, derivative + 1, triton_kernel, debug)

    @staticmethod
    def backward(ctx, grad):
        slope = _TransformedDerivative._slope(ctx)
        return (grad * slope).to(ctx.saved_tensors[0].dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        slope = _TransformedDerivative._slope(ctx)
        return tangent.to(slope.dtype) * slope


# ---- the inverse of A_d


def _inverse_torch(rho: torch.Tensor, order: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns A^(-1) of float64 rho to the accuracy of ``dtype``; the CPU path."""
    plan = debye_plan(order, dtype, compensated=dtype == torch.float64)
    one_minus_rho = 1 - rho
    kappa = rho * (2 * order + 2 - rho * rho) / (one_minus_rho * (1 + rho))
    for _ in range(_HALLEY_STEPS):
        terms = debye_torch(kappa, plan, lowest=1, highest=3)
        step = torch.where(rho < 0.5, terms.ratio - rho, one_minus_rho - terms.complement) / terms.second
        kappa = kappa - step / (1 - 0.5 * step * terms.third / terms.second)
    return kappa.masked_fill(rho == 1, math.inf)


@torch.library.custom_op("scf::inverse_mean_resultant_length", mutates_args=())
def _inverse(rho: torch.Tensor, order: float, triton_kernel: bool, debug: bool) -> torch.Tensor:
    """Returns kappa with A(kappa) = rho."""
    check_range("rho", rho, debug, at_most=1.0)
    dtype = promoted_dtype(rho)
    kappa = torch.empty(rho.shape, dtype=dtype, device=rho.device)
    if not triton_kernel:
        _apply_in_blocks(lambda block: (_inverse_torch(block, order, dtype),), rho, kappa)
    elif rho.numel():
        launch_inverse(rho, kappa, plan=debye_plan(order, dtype), steps=_HALLEY_STEPS)
    return kappa


@_inverse.register_fake
def _(rho, order, triton_kernel, debug):
    return torch.empty(rho.shape, dtype=promoted_dtype(rho), device=rho.device)


def _inverse_setup(ctx, inputs, output):
    rho, *ctx.settings = inputs
    ctx.rho_dtype = rho.dtype
    ctx.save_for_backward(output)


def _inverse_backward(ctx, grad):
    (kappa,) = ctx.saved_tensors
    order, triton_kernel, debug = ctx.settings
    slope = _log_bessel(kappa, order, Function.PSI.value, 1, triton_kernel, debug)[1]
    return (grad / slope).to(ctx.rho_dtype), None, None, None


_inverse.register_autograd(_inverse_backward, setup_context=_inverse_setup)


class _TransformedInverse(torch.autograd.Function):
    """A^(-1) for the transforms of ``torch.func`` and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rho, order, triton_kernel, debug):
        return _inverse(rho, order, triton_kernel, debug)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rho, *ctx.settings = inputs
        ctx.rho_dtype = rho.dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def _slope(ctx):
        """Returns d rho / d kappa."""
        (kappa,) = ctx.saved_tensors
        order, triton_kernel, debug = ctx.settings
        return _TransformedDerivative.apply(kappa, order, Function.PSI.value, 2, triton_kernel, debug)

    @staticmethod
    def backward(ctx, grad):
        return (grad / _TransformedInverse._slope(ctx)).to(ctx.rho_dtype), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        slope = _TransformedInverse._slope(ctx)
        return tangent.to(slope.dtype) / slope


def _map_over_elements(operator, info, in_dims, argument, *settings):
    """The ``vmap`` rule of an operator whose results have the shape of its argument, element by element."""
    outputs = operator(argument, *settings)
    return outputs, in_dims[0] if isinstance(outputs, torch.Tensor) else (in_dims[0],) * len(outputs)


_log_bessel.register_vmap(functools.partial(_map_over_elements, _log_bessel))
_inverse.register_vmap(functools.partial(_map_over_elements, _inverse))


# ---- public functions


def _evaluate(
    kappa: torch.Tensor, order: float, function: Function, derivatives: tuple[int, ...], backend: str, debug: bool
) -> tuple[torch.Tensor, ...]:
    """Returns f^(n) for each n of ``derivatives``: one of them, or two in a row."""
    check_floating("kappa", kappa)
    triton_kernel = use_triton(backend, kappa)
    if transformed():
        refuse_repeated_forward_mode()
        settings = triton_kernel, debug
        return tuple(_TransformedDerivative.apply(kappa, order, function.value, n, *settings) for n in derivatives)
    pair = _log_bessel(kappa, order, function.value, derivatives[0], triton_kernel, debug)
    return pair[: len(derivatives)]


def _check_order(order: float) -> float:
    if not (isinstance(order, (int, float)) and 0 <= order < math.inf):
        raise ValueError(f"order must be a real number >= 0, got {order!r}")
    return float(order)


def _order_in(dim: int) -> float:
    """Returns the order d/2 - 1 that belongs to a dimension."""
    if not isinstance(dim, int) or dim < 2:
        raise ValueError(f"dim must be an integer >= 2, the dimension of the space around the sphere, got {dim!r}")
    return dim / 2 - 1


def log_bessel_i(order: float, kappa: torch.Tensor, *, backend: str = "auto", debug: bool = False) -> torch.Tensor:
    """Logarithm of the modified Bessel function of the first kind, log I_v(kappa). Source: DLMF 10.41.3 and 10.29.1.

    Args:
        order: v, any real number >= 0.
        kappa: float tensor of any shape and stride, >= 0; half precision is promoted to float32. 0 and +inf give the
            limits.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others; "triton" or "torch" insists.
        debug: check kappa on CUDA too, which waits for the device. Without it, a negative kappa gives NaN there.
    Returns:
        float32 (float64 for float64 kappa) of the same shape, relative to max(1, |log I|) within 7e-7 from Triton
        (1.2e-7 from v = 14) and 7e-8 from PyTorch (float64: 1e-13), for v <= 4095 and kappa <= 1e7
        (``python -m bench.accuracy``). Differentiable three times.
    Raises:
        ValueError: order < 0, kappa negative or not floating point, or a backend that cannot run.
    """
    return _evaluate(kappa, _check_order(order), Function.LOG_BESSEL_I, (0,), backend, debug)[0]


def psi_and_ratio(
    order: float, kappa: torch.Tensor, *, backend: str = "auto", debug: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """psi_v(kappa) = log I_v(kappa) - v log kappa and its derivative A = I_(v+1) / I_v, from one evaluation.

    Arguments and errors are those of ``log_bessel_i``. Both results are finite and smooth at kappa = 0, and
    differentiable: psi three times, A twice.
    """
    psi, ratio = _evaluate(kappa, _check_order(order), Function.PSI, (0, 1), backend, debug)
    return psi, ratio


def log_vmf_normalizer(kappa: torch.Tensor, dim: int, *, backend: str = "auto", debug: bool = False) -> torch.Tensor:
    """log C_d(kappa), the log normalizer of the von Mises-Fisher density C_d exp(kappa mu . x) on the unit sphere of
    R^dim.

    Source: Mardia and Jupp, Directional Statistics, Eq. (9.3.4). Its derivative is -A_d.

    Args:
        kappa: concentration, float tensor of any shape and stride, >= 0; half precision is promoted to float32.
        dim: d >= 2.
        backend, debug: as in ``log_bessel_i``.
    Returns:
        float32 (float64 for float64 kappa) of kappa's shape, relative to max(1, |log C|) within 4e-7 from Triton
        and 7e-8 from PyTorch (float64: 1e-13; ``python -m bench.accuracy``). Differentiable three times.
    Raises:
        ValueError: dim < 2, kappa negative or not floating point, or a backend that cannot run.
    """
    return _evaluate(kappa, _order_in(dim), Function.LOG_VMF_NORMALIZER, (0,), backend, debug)[0]


def mean_resultant_length(kappa: torch.Tensor, dim: int, *, backend: str = "auto", debug: bool = False) -> torch.Tensor:
    """A_d(kappa) = I_(d/2) / I_(d/2-1), the length of the mean of a von Mises-Fisher distribution. Source: Mardia and
    Jupp, Eq. (9.3.7).

    Arguments and errors are those of ``log_vmf_normalizer``. In [0, 1], relative within 3e-7 from Triton and 7e-8 from
    PyTorch (float64: 1e-13) for d in 2 .. 8192 and kappa in 1e-6 .. 1e7; 0 and 1 at kappa = 0 and +inf. Differentiable
    twice, by forms of A' and A'' that do not cancel: A' from Triton is within 3e-7 from d = 30 and within 2e-6, 8e-6
    and 6e-5 at d = 16, 8 and 2, where a recurrence magnifies its roundings (``python -m bench.accuracy``).
    """
    return _evaluate(kappa, _order_in(dim), Function.PSI, (1,), backend, debug)[0]


def inverse_mean_resultant_length(
    rho: torch.Tensor, dim: int, *, backend: str = "auto", debug: bool = False
) -> torch.Tensor:
    """kappa with A_d(kappa) = rho, by Halley's method from rho (d - rho^2) / (1 - rho^2) (Banerjee et al., JMLR 2005,
    Eq. (4.4)).

    Args:
        rho: mean resultant length, float tensor of any shape and stride, in [0, 1]; half precision is promoted to
            float32.
        dim: d >= 2.
        backend, debug: as in ``log_bessel_i``; a value outside [0, 1] gives NaN on CUDA without ``debug``.
    Returns:
        float32 (float64 for float64 rho) of rho's shape; 0 and +inf for 0 and 1. Differentiable twice.
    Raises:
        ValueError: dim < 2, rho outside [0, 1] or not floating point, or a backend that cannot run.
    """
    check_floating("rho", rho)
    if transformed():
        refuse_repeated_forward_mode()
        return _TransformedInverse.apply(rho, _order_in(dim), use_triton(backend, rho), debug)
    return _inverse(rho, _order_in(dim), use_triton(backend, rho), debug)
