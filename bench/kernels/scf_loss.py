"""Speed of the whole SCF loss at d = 512: ours, the published composition, plain PyTorch, and that compiled.

    python -m bench.suite --sections scf_loss
    python -m pytest bench/bench_scf_loss.py --benchmark-json=bench/results/<device>/scf_loss-<date>.json

"scf_fast_published" is our loss with the published normalizer. "confidence" takes the gradient in log_kappa alone, as
stage 2 does with its frozen backbone; "finetune" also that in the features. The published code scales its class centers
to the radius on load, so that scaling is not timed.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from bench.baselines.compiled import compiled_scf_loss
from bench.baselines.eager import eager_scf_loss
from bench.baselines.published_scf_loss import published_scf_loss
from bench.measuring import roofline
from bench.measuring.case import Case, benchmark_case
from bench.measuring.environment import DEVICE
from bench.measuring.roofline import Machine
from bench.measuring.timing import Buffers, buffer_count
from scf_fast.kernels import scf_loss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DIM = 512
RADIUS = 64.0
BATCHES = (256, 1024, 4096, 16384, 65536)
MS1M, MILLION = 85_742, 1_000_000  # identities; class centers of a million take 2 GB and are made on GPUs only
Loss = Callable[..., torch.Tensor]  # of (features, log_kappa, class_centers, labels)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
LOSSES: dict[str, Loss] = {
    "scf_fast": lambda x, k, w, y: scf_loss(x, k, w, y, RADIUS),
    "scf_fast_published": lambda x, k, w, y: scf_loss(x, k, w, y, RADIUS, normalizer="published"),
    "published": lambda x, k, w, y: published_scf_loss(x, k, w, y, RADIUS).loss.mean(),
    "eager": lambda x, k, w, y: eager_scf_loss(x, k, w, y, RADIUS).mean(),
    "compiled": lambda x, k, w, y: compiled_scf_loss(x, k, w, y, RADIUS).mean(),
}
PUBLISHED = {"scf_fast_published", "published"}


def forward(
    loss: Loss, features: torch.Tensor, log_kappa: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        return loss(features, log_kappa, class_centers, labels)


def forward_backward(
    loss: Loss, features: torch.Tensor, log_kappa: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    inputs = [tensor for tensor in (features, log_kappa) if tensor.requires_grad]
    return torch.autograd.grad(loss(features, log_kappa, class_centers, labels), inputs)


PASSES: dict[str, Callable] = {"forward": forward, "forward_backward": forward_backward}


def fresh_class_centers(classes: int, device: torch.device | str) -> torch.Tensor:
    """Returns (classes, DIM) float32 random directions of length RADIUS."""
    centers = torch.randn(classes, DIM, device=device)
    return centers.mul_(RADIUS / centers.norm(dim=1, keepdim=True))


def fresh_batches(batch: int, class_centers: torch.Tensor, finetune: bool) -> list[Batch]:
    """Returns input sets of a loss: features that lean to their class center (cos about 0.6), log kappa around log 400,
    and random labels.
    """
    device = class_centers.device
    batches = []
    for _ in range(buffer_count(4 * batch * DIM)):
        labels = torch.randint(len(class_centers), (batch,), device=device)
        features = torch.randn(batch, DIM, device=device).add_(class_centers[labels], alpha=0.75 * DIM**0.5 / RADIUS)
        log_kappa = torch.empty(batch, device=device).normal_(6.0, 0.7).requires_grad_()
        batches.append((features.requires_grad_(finetune), log_kappa, class_centers, labels))
    return batches


def check(name: str, batch: Batch) -> None:
    """Refuses to time a loss that differs, in value or gradient, from the same formula in float64 plain PyTorch.

    Raises:
        AssertionError: it differs.
    """
    features, log_kappa, class_centers, labels = batch
    features, labels = features[:256].detach(), labels[:256]
    log_kappa = log_kappa[:256].detach().requires_grad_()
    mean = LOSSES[name](features, log_kappa, class_centers, labels)
    (gradient,) = torch.autograd.grad(mean, log_kappa)
    exact = log_kappa.detach().double().requires_grad_()
    rows = torch.arange(len(labels), device=labels.device)
    inputs = features.double(), exact, class_centers[labels].double(), rows
    expected = LOSSES["published" if name in PUBLISHED else "eager"](*inputs)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * float(expected_gradient.abs().max())
    )


def prepare(
    name: str, direction: str, batch: int, classes: int, finetune: bool, device: torch.device | str
) -> tuple[Callable, Buffers]:
    batches = fresh_batches(batch, fresh_class_centers(classes, device), finetune)
    check(name, batches[0])
    return partial(PASSES[direction], LOSSES[name]), batches


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every loss, number of classes, batch size and direction."""
    found = []
    for classes in (100,) if tiny else (MS1M, MILLION) if device == "cuda" else (MS1M,):
        for batch in (32,) if tiny else BATCHES if device == "cuda" else (256, 1024, 16384):
            for direction, finetune in (("forward", False), ("forward_backward", False), ("forward_backward", True)):
                work = f"scf_loss, {direction} ({'finetune' if finetune else 'confidence'}), B = {batch}, C = {classes}"
                least = roofline.scf_loss(batch, DIM, finetune)
                facts = {"batch": batch, "classes": classes, "dim": DIM, "dtype": "float32"}
                found += [
                    Case(
                        work,
                        name,
                        partial(prepare, name, direction, batch, classes, finetune, device),
                        least,
                        (batch, "images"),
                        facts,
                    )
                    for name in LOSSES
                ]
    return found


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_scf_loss(benchmark: "BenchmarkFixture", case: Case, device: str, machine: Machine) -> None:
    benchmark_case(benchmark, case, device, machine)
