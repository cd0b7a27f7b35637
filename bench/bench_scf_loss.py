"""The whole SCF loss at d = 512: ours ("scf_fast_published" with the published normaliser), the published composition, plain PyTorch, and that compiled.

    python -m pytest bench/bench_scf_loss.py --benchmark-json=bench/results/scf_loss-<device>-<date>.json

"confidence" asks for the gradient of log_kappa alone, as stage 2 does with its backbone frozen; "finetune" also for that of the
features. `least_mib` counts what any implementation must read and write: each feature row and its class center once, and the feature
gradient once where it is asked for. The published code scales its class centers to the radius on load, so that is not timed.
"""

from functools import partial

import pytest
import torch

from bench._environment import DEVICE, environment
from bench._measure import buffer_count, footprint, time_case
from bench.baselines.compiled import compiled_scf_loss
from bench.baselines.eager import eager_scf_loss
from bench.baselines.published_scf_loss import published_scf_loss
from kernels import scf_loss

DIM = 512
RADIUS = 64.0
BATCHES = (256, 1024, 4096, 16384, 65536)
# Identities of MS1M; and a million, 2 GB of class centers, where a GPU is there to generate them.
CLASSES = (85_742, 1_000_000) if DEVICE == "cuda" else (85_742,)
LOSSES = {
    "scf_fast": lambda *inputs: scf_loss(*inputs, radius=RADIUS),
    "scf_fast_published": lambda *inputs: scf_loss(*inputs, radius=RADIUS, normalizer="published"),
    "published": lambda *inputs: published_scf_loss(*inputs, radius=RADIUS).loss.mean(),
    "eager": lambda *inputs: eager_scf_loss(*inputs, radius=RADIUS).mean(),
    "compiled": lambda *inputs: compiled_scf_loss(*inputs, radius=RADIUS).mean(),
}
PUBLISHED = {"scf_fast_published", "published"}


def forward(loss, features, log_kappa, class_centers, labels):
    with torch.no_grad():
        return loss(features, log_kappa, class_centers, labels)


def forward_backward(loss, features, log_kappa, class_centers, labels):
    asked_for = [tensor for tensor in (features, log_kappa) if tensor.requires_grad]
    return torch.autograd.grad(loss(features, log_kappa, class_centers, labels), asked_for)


PASSES = {"forward": forward, "forward_backward": forward_backward}


def fresh_class_centers(classes, device):
    """(classes, DIM) float32, random directions of length RADIUS."""
    centers = torch.randn(classes, DIM, device=device)
    return centers.mul_(RADIUS / centers.norm(dim=1, keepdim=True))


def fresh_batches(batch, class_centers, finetune):
    """Inputs of a loss, in turn: features that lean to their class center (cos about 0.6), log kappa about log 400, random labels."""
    device = class_centers.device
    batches = []
    for _ in range(buffer_count(4 * batch * DIM)):
        labels = torch.randint(len(class_centers), (batch,), device=device)
        features = torch.randn(batch, DIM, device=device).add_(class_centers[labels], alpha=0.75 * DIM**0.5 / RADIUS)
        log_kappa = torch.empty(batch, device=device).normal_(6.0, 0.7).requires_grad_()
        batches.append((features.requires_grad_(finetune), log_kappa, class_centers, labels))
    return batches


def check(name, batch):
    """Refuses to time a loss that differs, in value or gradient, from the same formula in float64 plain PyTorch."""
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
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * float(expected_gradient.abs().max()))


@pytest.fixture(scope="module", params=CLASSES)
def class_centers(request, device):
    return fresh_class_centers(request.param, device)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("direction", "gradients"),
    [("forward", "confidence"), ("forward_backward", "confidence"), ("forward_backward", "finetune")],
)
def test_scf_loss(benchmark, device, copy_bytes_per_second, class_centers, direction, gradients, batch, name):
    benchmark.group = f"scf_loss, {direction} ({gradients}), B = {batch}, C = {len(class_centers)}"
    finetune = gradients == "finetune"
    batches = fresh_batches(batch, class_centers, finetune)
    check(name, batches[0])

    call = partial(PASSES[direction], LOSSES[name])
    seconds = time_case(benchmark, call, batches, device)
    least_bytes = 4 * batch * DIM * (3 if finetune else 2)
    benchmark.extra_info.update(
        environment(device), shape=[batch, DIM], classes=len(class_centers), dtype="float32",
        **footprint(call, batches[0], device), least_mib=least_bytes / 2**20, gb_per_s=least_bytes / seconds / 1e9,
        copy_gb_per_s=copy_bytes_per_second / 1e9, share_of_copy=least_bytes / seconds / copy_bytes_per_second,
    )
