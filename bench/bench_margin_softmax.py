"""Margin softmax at d = 512, loss and both gradients: ours, all logits as arcface_torch has them, that compiled, and cut cross-entropy.

    python -m pytest bench/bench_margin_softmax.py --benchmark-json=bench/results/margin_softmax-<device>-<date>.json

"scf_fast_skip" passes over tiles whose gradient is below 2^-12 of the largest: what is left out is under bf16's rounding. Cut
cross-entropy, where it is installed, gets normalised inputs and no margin, and no gradient through the normalisation. `floor_ms` is four
matrix products at the rate of one large product measured in the same run; peak memory is beyond inputs and includes both gradients. A
case that would need more memory than there is is left out, with the reason.
"""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from bench._environment import DEVICE, environment
from bench._measure import footprint, interleaved_seconds, time_case
from bench.baselines.dense_margin_softmax import compiled_dense_margin_softmax_loss, dense_margin_softmax_loss
from kernels.margin_softmax import margin_softmax_loss

DIM = 512
SCALE = 64.0
ON_GPU = DEVICE == "cuda"
COMPUTE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = (
    [(b, c) for c in (10_000, 100_000, 1_000_000, 4_000_000) for b in (256, 1024, 8192)]
    if ON_GPU
    else [(b, c) for c in (1_000, 20_000) for b in (32, 256)]
)


def ours(embeddings, class_centers, labels, skip_below=0.0):
    return margin_softmax_loss(
        embeddings, class_centers, labels, SCALE, margin_gradient="straight_through", compute_dtype=COMPUTE, skip_below=skip_below
    )[0]


def cut_cross_entropy(embeddings, class_centers, labels):
    from cut_cross_entropy import linear_cross_entropy

    e, w = (F.normalize(x.detach()).to(COMPUTE).requires_grad_() for x in (SCALE * embeddings, class_centers))
    return linear_cross_entropy(SCALE * e, w, labels)


LOSSES = {
    "scf_fast": ours,
    "scf_fast_skip": partial(ours, skip_below=2.0**-12),
    "dense": lambda *inputs: dense_margin_softmax_loss(*inputs, SCALE, compute_dtype=COMPUTE),
    "compiled": lambda *inputs: compiled_dense_margin_softmax_loss(*inputs, SCALE, compute_dtype=COMPUTE),
    "cut_cross_entropy": cut_cross_entropy,
}
HAS_MARGIN = {"scf_fast", "scf_fast_skip", "dense", "compiled"}
if not ON_GPU:
    del LOSSES["scf_fast_skip"], LOSSES["cut_cross_entropy"]  # Triton alone skips; cut cross-entropy has no CPU path of its own


def forward_backward(loss, embeddings, class_centers, labels):
    return torch.autograd.grad(loss(embeddings, class_centers, labels), (embeddings, class_centers))


def fresh_batch(batch, class_centers):
    """Embeddings that lean to their class center (cos about 0.45), random labels."""
    device = class_centers.device
    labels = torch.randint(len(class_centers), (batch,), device=device)
    own = F.normalize(class_centers.detach()[labels]) * DIM**0.5
    return torch.randn(batch, DIM, device=device).add_(own, alpha=0.5).requires_grad_(), class_centers, labels


def check(name, device):
    """Refuses to time a loss whose value or gradients differ from dense float64."""
    class_centers = torch.randn(300, DIM, device=device).requires_grad_()
    embeddings, _, labels = fresh_batch(64, class_centers)
    exact = [x.detach().double().requires_grad_() for x in (embeddings, class_centers)]
    expected = dense_margin_softmax_loss(*exact, labels, SCALE)
    loss = LOSSES[name](embeddings, class_centers, labels)
    rtol = 2e-2 if COMPUTE == torch.bfloat16 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for ours_, theirs in zip(torch.autograd.grad(loss, (embeddings, class_centers)), torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


@pytest.fixture(scope="session")
def flops_per_second(device):
    """Of one large matrix product in the compute type."""
    size = 8192 if ON_GPU else 1024
    left, right = (torch.randn(size, size, device=device, dtype=COMPUTE) for _ in range(2))
    return 2 * size**3 / interleaved_seconds({"product": torch.mm}, [(left, right)], device, rounds=9)["product"]


@pytest.fixture(scope="module", params=sorted({c for _, c in SHAPES}))
def class_centers(request, device):
    return torch.randn(request.param, DIM, device=device).mul_(0.01).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", sorted({b for b, _ in SHAPES}))
def test_margin_softmax(benchmark, device, flops_per_second, class_centers, batch, name):
    classes = len(class_centers)
    if name == "cut_cross_entropy" and find_spec("cut_cross_entropy") is None:
        pytest.skip("cut-cross-entropy is not installed")
    if ON_GPU and name in ("dense", "compiled"):
        needed, free = 16 * batch * classes, torch.cuda.mem_get_info()[0]  # logits, their shift, softmax and gradient in float32
        if needed > free:
            pytest.skip(f"four (B, C) tensors take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    if name in HAS_MARGIN:
        check(name, device)
    benchmark.group = f"margin_softmax, forward_backward, B = {batch}, C = {classes}"
    batches = [fresh_batch(batch, class_centers) for _ in range(2)]
    call = partial(forward_backward, LOSSES[name])
    seconds = time_case(benchmark, call, batches, device)
    floor = 4 * 2 * batch * classes * DIM / flops_per_second
    benchmark.extra_info.update(
        environment(device), shape=[batch, DIM], classes=classes, dtype=str(COMPUTE).removeprefix("torch."), **footprint(call, batches[0], device),
        gradients_mib=4 * DIM * (batch + classes) / 2**20, logits_mib=4 * batch * classes / 2**20, floor_ms=1e3 * floor, times_floor=seconds / floor,
    )
