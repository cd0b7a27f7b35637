"""Margin softmax: cross-entropy over scaled cosines, the target's cosine reduced by a margin (ArcFace, CosFace,
SphereFace in one form).

    cos_ij = <embeddings_i / |embeddings_i|, class_centers_j / |class_centers_j|>,    t = labels_i
    loss_i = log(exp(s psi(cos_it)) + sum_{j != t} exp(s cos_ij)) - s psi(cos_it)
    psi    = cos(m1 theta + m2) - m3                       while m1 theta + m2 <= pi
             cos(theta) - cos(theta*) - 1 - m3   beyond,   theta* = (pi - m2) / m1

The second line of psi continues it without a jump and keeps it decreasing in theta, where the cosine alone would turn
back up.

No (B, C) tensor exists. The forward pass keeps three numbers per row: the log-sum-exp over the other classes, the
target's cosine, and the largest cosine of another class. Margin, label smoothing and the reduction are arithmetic on
these (``margin_softmax_rows``), and class centers spread over ranks combine them with two small all-reduces. The
backward pass takes the log-sum-exp over all ranks and recomputes the cosines of one block of classes after another:

    G_ij = dloss/dcos_ij        dE^_i = sum_j G_ij w^_j        dW^_j = sum_i G_ij e^_i
    dW_j = (dW^_j - w^_j <w^_j, dW^_j>) / |w_j|

Cosines and sums are float32 (float64 for float64 input); the unit rows that enter the matrix products are rounded to
``compute_dtype``. Only the target's cosine is computed separately, from unrounded rows. Every sum has a fixed order:
equal input gives equal bits. Below: margins and rows, operators, public functions; the passes themselves lie in
``_margin_softmax_torch``, ``_margin_softmax_triton`` and ``_margin_softmax_kernels``.
"""

import math
from typing import NamedTuple

import torch

from scf_fast.kernels import _transforms
from scf_fast.kernels._common import check_floating, promoted_dtype, transformed, use_triton
from scf_fast.kernels._margin_softmax_arguments import (
    ConsumeCenters,
    FinishEmbeddings,
    Implementation,
    MarginSoftmaxArguments,
    StatisticsGradients,
    target_cosine,
)
from scf_fast.kernels._margin_softmax_torch import TorchMarginSoftmax
from scf_fast.kernels._margin_softmax_triton import TritonMarginSoftmax

# A smaller sin(theta) counts as this: bounds the exact gradient s sin(theta + m2)/sin(theta) at theta = 0 and pi; the
# loss moves by < 1e-4 s.
SIN_FLOOR = 1e-4


class MarginSoftmaxStatistics(NamedTuple):
    """Statistics of each row's cosines, from which its loss follows; (B,) each, float32 or float64."""

    log_sum_exp: torch.Tensor  # log sum_{j != target} exp(scale cos_ij); -inf where there is no other class
    target_cosine: torch.Tensor  # 0 where the label is none of these classes
    nearest_other: torch.Tensor  # max_{j != target} cos_ij; -inf where there is no other class
    cosine_sum: torch.Tensor  # sum_j cos_ij, the target's included; 0 unless asked for


# ---- rows


def target_cosine_with_margin(cos: torch.Tensor, margins: tuple[float, float, float]) -> torch.Tensor:
    """Returns psi of the module's formula for cosines of any shape; differentiable, finite at cos = +-1."""
    m1, m2, m3 = margins
    cos = cos.clamp(-1.0, 1.0)
    if m1 == 1.0 and m2 == 0.0:
        return cos - m3
    sin = (1.0 - cos * cos).clamp_min(SIN_FLOOR**2).sqrt()
    if m1 == 1.0:
        shifted = cos * math.cos(m2) - sin * math.sin(m2)
    else:
        shifted = torch.cos(m1 * torch.atan2(sin, cos) + m2)
    turning = math.cos((math.pi - m2) / m1)
    return torch.where(cos > turning, shifted, cos - turning - 1.0) - m3


def margin_softmax_rows(
    statistics: MarginSoftmaxStatistics,
    num_classes: int | torch.Tensor,
    scale: float,
    margins: tuple[float, float, float],
    margin_gradient: str = "exact",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Returns the loss of each row, (B,), from its statistics over all classes; differentiable in log_sum_exp,
    target_cosine and cosine_sum.

    ``num_classes`` counts the classes that the statistics are over; only label smoothing, which gives each of them
    label_smoothing / num_classes of the target distribution, needs it and ``cosine_sum``.
    """
    cos = statistics.target_cosine
    shifted = target_cosine_with_margin(cos, margins)
    if margin_gradient == "straight_through":
        shifted = cos + (shifted - cos).detach()
    target = scale * shifted
    gap = statistics.log_sum_exp - target
    loss = torch.logaddexp(gap, torch.zeros_like(gap))
    if label_smoothing:
        mean_logit = (scale * (statistics.cosine_sum - cos) + target) / num_classes
        loss = loss + label_smoothing * (target - mean_logit)
    return loss


def mean_over_labeled(loss: torch.Tensor, labels: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the rows with a label >= 0, 0 if there is none; NaN if any row is ``outside``: its label
    is no class.
    """
    labeled = labels >= 0
    mean = torch.where(labeled, loss, 0.0).sum() / labeled.sum().clamp_min(1)
    return torch.where(outside.any(), math.nan, mean)


# ---- checks


def _choose_implementation(
    embeddings: torch.Tensor, class_centers: torch.Tensor, compute_dtype: torch.dtype | None, backend: str
) -> tuple[torch.dtype, bool]:
    """Returns the type of the matrix products' operands, and whether Triton runs."""
    dtype = promoted_dtype(embeddings, class_centers)
    if compute_dtype is None:
        compute_dtype = embeddings.dtype if embeddings.is_cuda and dtype == torch.float32 else dtype
    if dtype == torch.float64:
        if compute_dtype != torch.float64 or backend == "triton":
            raise ValueError(
                'float64 is computed by PyTorch, in float64: leave compute_dtype out and take backend="auto", or '
                "convert with .float()"
            )
        return compute_dtype, False
    if compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compute_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {compute_dtype}")
    return compute_dtype, use_triton(backend, embeddings)


def _check_tensors(embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    for name, tensor in (("embeddings", embeddings), ("class_centers", class_centers)):
        check_floating(name, tensor)
    if class_centers.ndim != 2 or embeddings.ndim != 2 or embeddings.shape[1] != class_centers.shape[1]:
        width = class_centers.shape[-1] if class_centers.ndim else "D"
        raise ValueError(
            f"embeddings must be (B, {width}) to match class_centers {tuple(class_centers.shape)}, got "
            f"{tuple(embeddings.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels must be ({len(embeddings)},) int64, one for each embedding, got {tuple(labels.shape)} "
            f"{labels.dtype}"
        )


def check_margin_softmax(margins: tuple[float, float, float], margin_gradient: str, label_smoothing: float) -> None:
    """Raises ValueError for settings of the loss that have no meaning."""
    m1, m2, _ = margins
    if margin_gradient not in ("exact", "straight_through"):
        raise ValueError(f"margin_gradient must be 'exact' or 'straight_through', got {margin_gradient!r}")
    if not (m1 >= 1.0 and 0.0 <= m2 < math.pi):
        raise ValueError(
            f"margins must have m1 >= 1 and 0 <= m2 < pi, so that the target falls with the angle, got {tuple(margins)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


# ---- both passes, and their operators over all classes of one rank


def _implement(arguments: MarginSoftmaxArguments, triton_kernel: bool) -> Implementation:
    return TritonMarginSoftmax(arguments) if triton_kernel else TorchMarginSoftmax(arguments)


def _compute_statistics(
    arguments: MarginSoftmaxArguments, with_cosine_sum: bool, triton_kernel: bool
) -> MarginSoftmaxStatistics:
    embeddings = arguments.embeddings
    if arguments.empty:
        nothing = torch.zeros(len(embeddings), dtype=arguments.dtype, device=embeddings.device)
        return MarginSoftmaxStatistics(nothing - math.inf, nothing, nothing - math.inf, nothing.clone())
    with torch.cuda.device_of(embeddings):
        log_sum_exp, nearest, cosine_sum = _implement(arguments, triton_kernel).statistics(with_cosine_sum)
    return MarginSoftmaxStatistics(log_sum_exp, target_cosine(arguments), nearest, cosine_sum)


def _compute_gradients(
    arguments: MarginSoftmaxArguments,
    log_sum_exp: torch.Tensor,
    grads: StatisticsGradients,
    skip_below: float,
    triton_kernel: bool,
    consume: ConsumeCenters | None,
    finish: FinishEmbeddings,
) -> None:
    embeddings = arguments.embeddings
    if arguments.empty:
        finish(torch.zeros(embeddings.shape, dtype=arguments.dtype, device=embeddings.device))
        return
    # Without another class, or without weight, a row has no term here: keep exp(-inf - -inf) out of it.
    no_term = (grads.log_sum_exp == 0) | (log_sum_exp == -math.inf)
    log_sum_exp = torch.where(no_term, math.inf, log_sum_exp)
    with torch.cuda.device_of(embeddings):
        _implement(arguments, triton_kernel).gradients(grads, log_sum_exp, skip_below, consume, finish)


@torch.library.custom_op("scf::margin_softmax_statistics", mutates_args=())
def _statistics_op(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    compute_dtype: torch.dtype,
    with_cosine_sum: bool,
    skip_below: float,  # for the backward pass
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = MarginSoftmaxArguments(embeddings, class_centers, labels, None, scale, compute_dtype)
    log_sum_exp, target, nearest, cosine_sum = _compute_statistics(arguments, with_cosine_sum, triton_kernel)
    return log_sum_exp, target, nearest, cosine_sum


@_statistics_op.register_fake
def _(embeddings, class_centers, labels, scale, compute_dtype, with_cosine_sum, skip_below, triton_kernel):
    row = embeddings.new_empty(embeddings.shape[0], dtype=promoted_dtype(embeddings, class_centers))
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row)


@torch.library.custom_op("scf::margin_softmax_gradients", mutates_args=())
def _gradients_op(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    log_sum_exp: torch.Tensor,
    row_grad: torch.Tensor,
    target_grad: torch.Tensor,
    uniform_grad: torch.Tensor | None,
    scale: float,
    compute_dtype: torch.dtype,
    skip_below: float,
    triton_kernel: bool,
    for_centers: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_centers = (
        torch.empty_like(class_centers, memory_format=torch.contiguous_format)
        if for_centers
        else class_centers.new_empty(0)
    )
    grad_embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)

    def store_centers(start: int, stop: int, grad: torch.Tensor) -> None:
        grad_centers[start:stop] = grad

    _compute_gradients(
        MarginSoftmaxArguments(embeddings, class_centers, labels, None, scale, compute_dtype),
        log_sum_exp,
        StatisticsGradients(row_grad, target_grad, uniform_grad),
        skip_below,
        triton_kernel,
        consume=store_centers if for_centers else None,
        finish=grad_embeddings.copy_,
    )
    return grad_embeddings, grad_centers


@_gradients_op.register_fake
def _(
    embeddings,
    class_centers,
    labels,
    log_sum_exp,
    row_grad,
    target_grad,
    uniform_grad,
    scale,
    compute_dtype,
    skip_below,
    triton_kernel,
    for_centers,
):
    return embeddings.new_empty(embeddings.shape), class_centers.new_empty(class_centers.shape if for_centers else 0)


def _setup(ctx, inputs, output):
    embeddings, class_centers, labels, *ctx.settings = inputs
    log_sum_exp, _, nearest, _ = output
    ctx.mark_non_differentiable(nearest)
    ctx.save_for_backward(embeddings, class_centers, labels, log_sum_exp)


def _backward(ctx, row_grad, target_grad, _, uniform_grad):
    scale, compute_dtype, with_cosine_sum, skip_below, triton_kernel = ctx.settings
    grads = _gradients_op(
        *ctx.saved_tensors,
        row_grad,
        target_grad,
        uniform_grad if with_cosine_sum else None,
        scale,
        compute_dtype,
        skip_below,
        triton_kernel,
        ctx.needs_input_grad[1],
    )
    of_tensors = (grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad))
    return (*of_tensors, *[None] * 6)


_statistics_op.register_autograd(_backward, setup_context=_setup)


# ---- public functions


def margin_softmax_statistics(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 64.0,
    *,
    class_rows: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    with_cosine_sum: bool = False,
    backend: str = "auto",
) -> MarginSoftmaxStatistics:
    """Statistics of a batch's cosines with the class centers of one rank, from which the loss follows; not
    differentiable, see ``margin_softmax_gradients``.

    Args:
        embeddings: (B, D) float, unnormalized.
        class_centers: (C, D) float, unnormalized; C may be 0.
        labels: (B,) int64 in [0, C), or negative where the own class is not among these.
        scale: s, multiplies the cosines.
        class_rows: (N,) int64: only these rows of class_centers take part, and labels are positions among them.
        compute_dtype: type of the unit rows in the matrix products: torch.float32, bfloat16 or float16. Default: the
            embeddings' on CUDA, else float32. On CUDA, float32 runs as TF32 where torch.set_float32_matmul_precision
            allows it.
        with_cosine_sum: compute ``cosine_sum``, which label smoothing needs.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others and for float64; "triton" or "torch"
            insists.
    Returns:
        MarginSoftmaxStatistics. Those of disjoint sets of classes combine by logaddexp, addition, maximum and addition.
    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    _check_tensors(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose_implementation(embeddings, class_centers, compute_dtype, backend)
    arguments = MarginSoftmaxArguments(embeddings, class_centers, labels, class_rows, scale, compute_dtype)
    with torch.no_grad():
        return _compute_statistics(arguments, with_cosine_sum, triton_kernel)


def margin_softmax_gradients(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    log_sum_exp: torch.Tensor,
    row_grad: torch.Tensor,
    target_grad: torch.Tensor,
    uniform_grad: torch.Tensor | None = None,
    scale: float = 64.0,
    *,
    finish: FinishEmbeddings,
    consume: ConsumeCenters | None = None,
    class_rows: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    backend: str = "auto",
) -> None:
    """Backward pass of ``margin_softmax_statistics``, whose arguments it shares.

    Args:
        log_sum_exp: (B,), over the other classes of all ranks.
        row_grad, target_grad, uniform_grad: (B,), gradients of the loss in ``log_sum_exp``, ``target_cosine`` and,
            where it is used, ``cosine_sum``.
        finish: called once with the (B, D) float32 (float64) gradient of embeddings from these classes, before the
            class centers of the last block get theirs: the caller can overlap communication with this computation.
        consume: called as consume(start, stop, gradient) for one block of classes after another, in order, with the
            complete (stop - start, D) float32 gradient of class_centers[start:stop] (of
            class_centers[class_rows[start:stop]]). It may change these class centers, which are not read again. None:
            no gradient for class centers.
        skip_below: Triton skips tiles in which every dloss/dcos is below this share of the largest one that any row can
            have, max_i(s |row_grad_i|, |target_grad_i|). 0 is exact.
    Raises:
        ValueError: as ``margin_softmax_statistics``.
    """
    _check_tensors(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose_implementation(embeddings, class_centers, compute_dtype, backend)
    arguments = MarginSoftmaxArguments(embeddings, class_centers, labels, class_rows, scale, compute_dtype)
    grads = StatisticsGradients(row_grad, target_grad, uniform_grad)
    with torch.no_grad():
        _compute_gradients(arguments, log_sum_exp, grads, skip_below, triton_kernel, consume, finish)


def margin_softmax_loss(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 64.0,
    margins: tuple[float, float, float] = (1.0, 0.5, 0.0),
    margin_gradient: str = "exact",
    *,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean margin-softmax loss. Source: ArcFace (Deng et al., 2019), CosFace (Wang et al., 2018), SphereFace (Liu et
    al., 2017).

    Args:
        embeddings: (B, D) float, unnormalized.
        class_centers: (C, D) float, unnormalized.
        labels: (B,) int64 in [0, C); rows with label -1 are left out of the mean and get no gradient. Another label
            makes the loss NaN on CUDA, where checking for it would stall the device, and raises elsewhere.
        scale: s, multiplies the logits.
        margins: (m1, m2, m3), m2 in radians, m3 in cosine.
        margin_gradient: ``"exact"`` is the derivative of psi, s sin(theta + m2)/sin(theta) at the target;
            ``"straight_through"`` passes the gradient s, as code that applies its margin without gradient
            (arcface_torch) does.
        label_smoothing: share of the target distribution that is spread evenly over all classes, in [0, 1).
        compute_dtype, skip_below, backend: as in ``margin_softmax_statistics`` and ``margin_softmax_gradients``.
    Returns:
        (loss, correct): scalar float32 (float64) mean loss, and (B,) bool, True where the own class center is nearer
        (without margin) than all others. Under ``torch.func`` and in forward mode all B x C cosines exist, in float64.
    Raises:
        ValueError: settings without meaning, or shapes and dtypes that do not fit.
        IndexError: a label outside [-1, C), on the CPU.
    """
    check_margin_softmax(margins, margin_gradient, label_smoothing)
    _check_tensors(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose_implementation(embeddings, class_centers, compute_dtype, backend)
    num_classes = len(class_centers)
    outside = (labels < -1) | (labels >= num_classes)
    if not (labels.is_cuda or torch.compiler.is_compiling() or transformed()) and outside.any():
        raise IndexError(f"labels must be in [0, {num_classes}), or -1 to be left out, got {labels[outside][0].item()}")
    labels_here = labels.masked_fill(outside, -1)
    if transformed():
        fields = _transforms.margin_softmax_statistics(embeddings, class_centers, labels_here, scale)
    else:
        fields = _statistics_op(
            embeddings,
            class_centers,
            labels_here,
            scale,
            compute_dtype,
            label_smoothing > 0,
            skip_below,
            triton_kernel,
        )
    statistics = MarginSoftmaxStatistics(*fields)
    loss = margin_softmax_rows(statistics, num_classes, scale, margins, margin_gradient, label_smoothing)
    correct = (labels >= 0) & (statistics.target_cosine > statistics.nearest_other)
    return mean_over_labeled(loss, labels, outside).to(promoted_dtype(embeddings, class_centers)), correct
