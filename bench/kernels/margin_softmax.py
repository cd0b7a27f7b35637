"""Speed and memory of margin softmax at d = 512, loss and both gradients: ours, dense, dense compiled, and peers.

    python -m bench.suite --sections margin_softmax
    python -m pytest bench/bench_margin_softmax.py --benchmark-json=bench/results/<device>/margin_softmax-<date>.json

"dense" computes all logits, as arcface_torch does. "scf_fast_skip" skips tiles whose gradient is below 2^-12 of the
largest, which is under the rounding of bf16. The peers (bench/peers/peers.py) run where they are installed; the two
made for language models get normalized inputs, no margin and no gradient through the normalization, which is less work.
Peak memory is what comes on top of the inputs and includes both gradients. A case that needs more memory than there is
is left out, with the reason.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.dense_margin_softmax import compiled_dense_margin_softmax_loss, dense_margin_softmax_loss
from bench.measuring import roofline
from bench.measuring.case import Case, NotMeasured, benchmark_case
from bench.measuring.environment import DEVICE
from bench.measuring.roofline import Machine
from bench.measuring.timing import Buffers
from bench.peers import peers
from scf_fast.kernels.margin_softmax import margin_softmax_loss

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DIM = 512
SCALE = 64.0
ON_GPU = DEVICE == "cuda"
COMPUTE = torch.bfloat16 if ON_GPU else torch.float32

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of (embeddings, class_centers, labels)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def ours(
    embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, skip_below: float = 0.0
) -> torch.Tensor:
    return margin_softmax_loss(
        embeddings,
        class_centers,
        labels,
        SCALE,
        margin_gradient="straight_through",
        compute_dtype=COMPUTE,
        skip_below=skip_below,
    )[0]


LOSSES: dict[str, Loss] = {
    "scf_fast": ours,
    "scf_fast_skip": partial(ours, skip_below=2.0**-12),
    "dense": partial(dense_margin_softmax_loss, scale=SCALE, compute_dtype=COMPUTE),
    "compiled": partial(compiled_dense_margin_softmax_loss, scale=SCALE, compute_dtype=COMPUTE),
    "arcface_torch": partial(peers.arcface_torch_loss, scale=SCALE, compute_dtype=COMPUTE),
}
ON_UNIT_ROWS: dict[str, Loss] = {
    "cut_cross_entropy": partial(peers.cut_cross_entropy_loss, scale=SCALE),
    "liger": partial(peers.liger_loss, scale=SCALE),
}
if not ON_GPU:
    del LOSSES["scf_fast_skip"]  # only the Triton kernels can skip


def forward_backward(
    loss: Loss, embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(embeddings, class_centers, labels), (embeddings, class_centers))


def fresh_batch(batch: int, class_centers: torch.Tensor) -> Batch:
    """Returns embeddings that lean to their class center (cos about 0.45), the class centers, and random labels."""
    device = class_centers.device
    labels = torch.randint(len(class_centers), (batch,), device=device)
    own = F.normalize(class_centers.detach()[labels]) * DIM**0.5
    return torch.randn(batch, DIM, device=device).add_(own, alpha=0.5).requires_grad_(), class_centers, labels


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns the normalized rows in the compute dtype, as a leaf that requires a gradient."""
    return F.normalize(x.detach()).to(COMPUTE).requires_grad_()


def check(name: str, device: torch.device | str) -> None:
    """Refuses to time a loss whose value or gradients differ from the dense formula in float64.

    Raises:
        AssertionError: they differ.
    """
    class_centers = torch.randn(300, DIM, device=device).requires_grad_()
    inputs = fresh_batch(64, class_centers)
    formula: Loss
    if name in LOSSES:
        loss, formula = LOSSES[name], partial(dense_margin_softmax_loss, scale=SCALE)
    else:
        # Without a margin the loss at the own class is a rounding error; wrong labels make it large enough to compare.
        embeddings, class_centers, labels = inputs
        inputs = unit_rows(embeddings), unit_rows(class_centers), labels.roll(1)
        loss, formula = ON_UNIT_ROWS[name], lambda e, w, y: F.cross_entropy(SCALE * e @ w.t(), y)
    embeddings, class_centers, labels = inputs
    exact = [x.detach().double().requires_grad_() for x in (embeddings, class_centers)]
    expected = formula(exact[0], exact[1], labels)
    value = loss(*inputs)
    rtol = 2e-2 if COMPUTE == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    gradients = torch.autograd.grad(value, (embeddings, class_centers)), torch.autograd.grad(expected, exact)
    for found, theirs in zip(*gradients):
        torch.testing.assert_close(found.double(), theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


def prepare(name: str, batch: int, classes: int, device: torch.device | str) -> tuple[Callable, Buffers]:
    problem = peers.problem(name, device)
    if problem:
        raise NotMeasured(problem)
    if ON_GPU and name in ("dense", "compiled", "arcface_torch"):
        needed = 16 * batch * classes  # logits, their shift, softmax and gradient in float32
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            raise NotMeasured(f"four (B, C) tensors take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    check(name, device)
    class_centers = torch.randn(classes, DIM, device=device).mul_(0.01).requires_grad_()
    batches = [fresh_batch(batch, class_centers) for _ in range(2)]
    if name in ON_UNIT_ROWS:
        centers = unit_rows(class_centers)
        batches = [(unit_rows(embeddings), centers, labels) for embeddings, _, labels in batches]
    return partial(forward_backward, LOSSES.get(name) or ON_UNIT_ROWS[name]), batches


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every loss, number of classes and batch size."""
    if tiny:
        shapes = [(8, 300)]
    elif device == "cuda":
        shapes = [(b, c) for c in (10_000, 100_000, 1_000_000, 4_000_000) for b in (256, 1024, 8192)]
    else:
        shapes = [(32, 1_000), (256, 1_000), (32, 20_000), (256, 20_000), (32, 100_000)]
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        Case(
            f"margin_softmax, forward_backward, B = {batch}, C = {classes}",
            name,
            partial(prepare, name, batch, classes, device),
            roofline.margin_softmax(batch, classes, DIM, dtype),
            (batch, "images"),
            {
                "batch": batch,
                "classes": classes,
                "dim": DIM,
                "dtype": dtype,
                "gradients_mib": 4 * DIM * (batch + classes) / 2**20,
                "logits_mib": 4 * batch * classes / 2**20,
            },
        )
        for batch, classes in shapes
        for name in (*LOSSES, *ON_UNIT_ROWS)
    ]


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_margin_softmax(benchmark: "BenchmarkFixture", case: Case, device: str, machine: Machine) -> None:
    benchmark_case(benchmark, case, device, machine)
