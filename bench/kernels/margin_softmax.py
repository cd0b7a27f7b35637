"""Margin softmax at d = 512, loss and both gradients: ours, all logits as arcface_torch has them, that compiled, and
real peers.

    python -m bench.suite --sections margin_softmax
    python -m pytest bench/bench_margin_softmax.py --benchmark-json=bench/results/<device>/margin_softmax-<date>.json

"scf_fast_skip" passes over tiles whose gradient is below 2^-12 of the largest: what is left out is under bf16's
rounding. The peers (bench/peers/peers.py) run where they are installed; the two made for language models get normalized
inputs and no margin, and no gradient through the normalization, which is less work. Peak memory is beyond inputs and
includes both gradients. A case that would need more memory than there is is left out, with the reason.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.dense_margin_softmax import compiled_dense_margin_softmax_loss, dense_margin_softmax_loss
from bench.measuring import roofline
from bench.measuring.case import Case, NotMeasured, benchmark_case
from bench.measuring.environment import DEVICE
from bench.peers import peers
from scf_fast.kernels.margin_softmax import margin_softmax_loss

DIM = 512
SCALE = 64.0
ON_GPU = DEVICE == "cuda"
COMPUTE = torch.bfloat16 if ON_GPU else torch.float32


def ours(embeddings, class_centers, labels, skip_below=0.0):
    return margin_softmax_loss(
        embeddings,
        class_centers,
        labels,
        SCALE,
        margin_gradient="straight_through",
        compute_dtype=COMPUTE,
        skip_below=skip_below,
    )[0]


LOSSES = {
    "scf_fast": ours,
    "scf_fast_skip": partial(ours, skip_below=2.0**-12),
    "dense": lambda *inputs: dense_margin_softmax_loss(*inputs, SCALE, compute_dtype=COMPUTE),
    "compiled": lambda *inputs: compiled_dense_margin_softmax_loss(*inputs, SCALE, compute_dtype=COMPUTE),
    "arcface_torch": partial(peers.arcface_torch_loss, scale=SCALE, compute_dtype=COMPUTE),
}
ON_UNIT_ROWS = {
    "cut_cross_entropy": partial(peers.cut_cross_entropy_loss, scale=SCALE),
    "liger": partial(peers.liger_loss, scale=SCALE),
}
if not ON_GPU:
    del LOSSES["scf_fast_skip"]  # Triton alone skips


def forward_backward(loss, embeddings, class_centers, labels):
    return torch.autograd.grad(loss(embeddings, class_centers, labels), (embeddings, class_centers))


def fresh_batch(batch, class_centers):
    """Embeddings that lean to their class center (cos about 0.45), random labels."""
    device = class_centers.device
    labels = torch.randint(len(class_centers), (batch,), device=device)
    own = F.normalize(class_centers.detach()[labels]) * DIM**0.5
    return torch.randn(batch, DIM, device=device).add_(own, alpha=0.5).requires_grad_(), class_centers, labels


def unit_rows(batch):
    embeddings, class_centers, labels = batch
    return *(F.normalize(x.detach()).to(COMPUTE).requires_grad_() for x in (embeddings, class_centers)), labels


def check(name, device):
    """Refuses to time a loss whose value or gradients differ from dense float64."""
    class_centers = torch.randn(300, DIM, device=device).requires_grad_()
    inputs = fresh_batch(64, class_centers)
    loss, formula = LOSSES.get(name), partial(dense_margin_softmax_loss, scale=SCALE)
    if loss is None:
        # Without a margin the loss of the own class is a rounding error: another's label makes it one to compare.
        embeddings, class_centers, labels = unit_rows(inputs)
        inputs, loss, formula = (
            (embeddings, class_centers, labels.roll(1)),
            ON_UNIT_ROWS[name],
            lambda e, w, y: F.cross_entropy(SCALE * e @ w.t(), y),
        )
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    expected = formula(*exact, inputs[2])
    value = loss(*inputs)
    rtol = 2e-2 if COMPUTE == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    for ours_, theirs in zip(torch.autograd.grad(value, inputs[:2]), torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


def prepare(name, batch, classes, device):
    problem = peers.problem(name, device)
    if problem:
        raise NotMeasured(problem)
    if ON_GPU and name in ("dense", "compiled", "arcface_torch"):
        needed, free = (
            16 * batch * classes,
            torch.cuda.mem_get_info()[0],
        )  # logits, their shift, softmax and gradient in float32
        if needed > free:
            raise NotMeasured(f"four (B, C) tensors take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    check(name, device)
    class_centers = torch.randn(classes, DIM, device=device).mul_(0.01).requires_grad_()
    batches = [fresh_batch(batch, class_centers) for _ in range(2)]
    if name in ON_UNIT_ROWS:
        _, centers, _ = unit_rows(batches[0])
        batches = [
            (unit_rows((embeddings, class_centers[:1], labels))[0], centers, labels)
            for embeddings, _, labels in batches
        ]
    return partial(forward_backward, LOSSES.get(name) or ON_UNIT_ROWS[name]), batches


def cases(device, tiny=False):
    """Every loss by classes and batch."""
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
def test_margin_softmax(benchmark, case, device, machine):
    benchmark_case(benchmark, case, device, machine)
