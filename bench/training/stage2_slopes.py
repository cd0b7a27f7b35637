"""Ways to train a confidence net that are compared with each other: starts, slopes, limits of the learning rate.

The exact loss has the slope g = kappa (A_d(kappa) - cos) in log kappa: it grows without end above the optimum and
vanishes below it. A slope

    w(kappa) (A_d(kappa) - cos),  w > 0 of the predicted kappa alone

has the same optimum, E[cos | x] = A_d(kappa(x)), whatever w is: for a given image w is one number. A bound on the
slope of each sample has not, since it binds for the samples far from the mean.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scf_fast.kernels import mean_resultant_length

LARGEST_WEIGHT = 32  # of d - 1: kappa that fits a cosine of 0.984


class Slope(enum.Enum):
    """A slope in log kappa; the value is its formula."""

    EXACT = "g = kappa (A - cos)"
    BOUNDED = "min(g, (d - 1) / 2)"
    NATURAL = "(d - 1) / 2 (A - cos) / (kappa A'), within 4 times +-(d - 1) / 2"
    WEIGHTED = "w (A - cos), w = kappa within (d - 1) / 2 and 32 (d - 1)"

    def of(self, exact: torch.Tensor, kappa: torch.Tensor, cos: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the slope, (B,), of samples whose exact one is ``exact``."""
        half = (dim - 1) / 2
        if self is Slope.BOUNDED:
            return exact.clamp(max=half)
        if self is Slope.WEIGHTED:
            return exact * (kappa.clamp(half, LARGEST_WEIGHT * (dim - 1)) / kappa)
        if self is Slope.NATURAL:
            kappa = kappa.double().clamp(1e-3 * dim, 1e5 * dim)  # where A' is 1 / d and (d - 1) / (2 kappa^2)
            mean = mean_resultant_length(kappa, dim)
            derivative = torch.where(
                kappa > 1e3 * dim, half / kappa.square(), (1 - mean.square() - (dim - 1) * mean / kappa).clamp(1e-12)
            )
            return (half * (mean - cos) / (kappa * derivative)).clamp(-4 * half, 4 * half).to(exact.dtype)
        return exact


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        start: kappa that the net starts from: "auto" is the one that fits the features, None is PyTorch's start.
        floor_passes: whether the slope passes through the net's floor, log(1e-6 + exp(raw)), as if it were not there.
        bounded: whether log kappa is the start + 7 tanh((raw - start) / 7).
        drops_overflow: as the engine was: a step whose gradient norm overflows in float32 is dropped.
        max_norm: of the gradient, computed without overflow; 0 is off.
        max_step: the learning rate is at most this over the l1 norm of the gradient of mean log kappa, so that no first
            step of Adam moves it further; 0 is off.
    """

    title: str
    start: str | None = "auto"
    slope: Slope = Slope.EXACT
    floor_passes: bool = False
    bounded: bool = False
    drops_overflow: bool = False
    max_norm: float = 0.0
    max_step: float = 0.0


TODAY = Variant("before", start=None, drops_overflow=True)
CHOSEN = Variant("chosen", slope=Slope.WEIGHTED, floor_passes=True, max_step=4.0)
VARIANTS = (
    TODAY,
    Variant("auto start", drops_overflow=True),
    Variant("no overflow", floor_passes=True),
    Variant("norm at most 1", floor_passes=True, max_norm=1.0),
    Variant("bounded log kappa", bounded=True),
    Variant("bounded slope", slope=Slope.BOUNDED, floor_passes=True),
    Variant("natural slope", slope=Slope.NATURAL, floor_passes=True),
    Variant("weighted slope", slope=Slope.WEIGHTED, floor_passes=True),
    Variant("limited rate", max_step=4.0),
    CHOSEN,
    Variant("limited rate, start as before", start=None, max_step=4.0),
    Variant("chosen, start as before", start=None, slope=Slope.WEIGHTED, floor_passes=True, max_step=4.0),
)
# The published objective has slopes of its own, so only the limit of the rate applies to it.
PUBLISHED_VARIANTS = (TODAY, Variant("limited rate", start=None, max_step=4.0))


def optimum(slope: Slope, cos: torch.Tensor, dim: int) -> float:
    """Returns the one kappa at which the mean slope of these cosines, (N,), is zero."""
    low, high = math.log(1e-3), math.log(1e7)
    for _ in range(60):
        kappa = torch.full_like(cos, math.exp((low + high) / 2), dtype=torch.float64)
        exact = kappa * (mean_resultant_length(kappa, dim) - cos.double())
        low, high = ((low + high) / 2, high) if slope.of(exact, kappa, cos, dim).mean() < 0 else (low, (low + high) / 2)
    return math.exp(low)


def global_norm(gradients: list[torch.Tensor]) -> float:
    """Returns the norm over all gradients, without overflow."""
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def rate_limit(
    net: Callable[[torch.Tensor], torch.Tensor], parameters: list, convf: torch.Tensor, step: float
) -> float:
    """Returns the rate at which a first step of Adam moves mean log kappa by at most ``step``."""
    gradients = torch.autograd.grad(net(convf).mean(), parameters)
    return step / sum(gradient.abs().sum().item() for gradient in gradients)
