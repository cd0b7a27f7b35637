"""Triton kernels of the log-Bessel functions and of the inverse of A_d, and their launches: ``log_bessel`` has the
formulas and the operators.
"""

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import as_compute
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._float_pairs import negative
from scf_fast.kernels.debye import debye_kernel

# Elements per program: in float32 one 16-byte load per thread; neither spills registers.
_BLOCK = {torch.float32: 512, torch.float64: 128}
_NUM_WARPS = 4


@triton.jit
def _log_bessel_kernel(
    kappa_ptr,  # (count,)
    value_ptr,  # (count,) out: f^(n)
    slope_ptr,  # (count,) out: f^(n+1)
    count,
    PLAN: tl.constexpr,
    NEGATE: tl.constexpr,
    WITH_POWER: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of elements; n = DERIVATIVE."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    kappa = as_compute(tl.load(kappa_ptr + at, mask=mask, other=1.0), FP64)
    psi, psi_tail, first, _, second, third = debye_kernel(kappa, PLAN, DERIVATIVE, DERIVATIVE + 1, WITH_POWER)
    if WITH_POWER and PLAN.order[0] > 0:
        power = PLAN.order[0] / kappa
        first += power
        second -= power / kappa
        third += 2.0 * power / kappa / kappa
    if DERIVATIVE == 0:
        value = psi + psi_tail
        if WITH_POWER and PLAN.order[0] > 0:
            value = tl.where(kappa == 0, float("-inf"), value)
        slope = first
    elif DERIVATIVE == 1:
        value = first
        slope = second
    else:
        value = second
        slope = third
    if NEGATE:
        value = negative(value)
        slope = negative(slope)
    tl.store(value_ptr + at, value, mask=mask)
    tl.store(slope_ptr + at, slope, mask=mask)


@triton.jit
def _inverse_kernel(
    rho_ptr,  # (count,)
    kappa_ptr,  # (count,) out
    count,
    PLAN: tl.constexpr,
    STEPS: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of elements, by Halley's method; A near 1 is compared by its complement, which holds the
    digits.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    rho = as_compute(tl.load(rho_ptr + at, mask=mask, other=0.5), FP64)
    one_minus_rho = 1.0 - rho
    kappa = rho * (2.0 * PLAN.order[0] + 2.0 - rho * rho) / (one_minus_rho * (1.0 + rho))
    for _iteration in range(STEPS):  # not `_`, whose type Triton 3.4 keeps through the loop
        _, _, ratio, complement, second, third = debye_kernel(kappa, PLAN, 1, 3)
        step = tl.where(rho < 0.5, ratio - rho, one_minus_rho - complement) / second
        kappa = kappa - step / (1.0 - 0.5 * step * third / second)
    tl.store(kappa_ptr + at, tl.where(rho == 1.0, float("inf"), kappa), mask=mask)


def launch_log_bessel(
    kappa: torch.Tensor,
    value: torch.Tensor,
    slope: torch.Tensor,
    *,
    plan: DebyePlan,
    negate: bool,
    with_power: bool,
    derivative: int,
) -> None:
    """Fills value and slope with (f^(n), f^(n+1)), n = derivative; at least one element."""
    block = _BLOCK[value.dtype]
    with torch.cuda.device_of(kappa):
        _log_bessel_kernel[(triton.cdiv(kappa.numel(), block),)](
            kappa.contiguous(),
            value,
            slope,
            kappa.numel(),
            PLAN=plan,
            NEGATE=negate,
            WITH_POWER=with_power,
            DERIVATIVE=derivative,
            FP64=value.dtype == torch.float64,
            BLOCK=block,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def launch_inverse(rho: torch.Tensor, kappa: torch.Tensor, *, plan: DebyePlan, steps: int) -> None:
    """Fills kappa with A^(-1)(rho) by steps of Halley's method; at least one element."""
    block = _BLOCK[kappa.dtype]
    with torch.cuda.device_of(rho):
        _inverse_kernel[(triton.cdiv(rho.numel(), block),)](
            rho.contiguous(),
            kappa,
            rho.numel(),
            PLAN=plan,
            STEPS=steps,
            FP64=kappa.dtype == torch.float64,
            BLOCK=block,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
