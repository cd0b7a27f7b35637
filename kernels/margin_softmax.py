"""Margin softmax: cross-entropy over scaled cosines, the target's cosine reduced by a margin (ArcFace, CosFace,
SphereFace in one form).

    cos_ij = <embeddings_i / |embeddings_i|, class_centers_j / |class_centers_j|>,    t = labels_i
    loss_i = log(exp(s psi(cos_it)) + sum_{j != t} exp(s cos_ij)) - s psi(cos_it)
    psi    = cos(m1 theta + m2) - m3                       while m1 theta + m2 <= pi
             cos(theta) - cos(theta*) - 1 - m3   beyond,   theta* = (pi - m2) / m1

The second line of psi continues it without a jump and keeps it decreasing in theta, where the cosine alone would turn
back up.

No (B, C) tensor exists. The forward pass keeps three numbers a row: the log-sum-exp over the other classes, the
target's cosine, and the largest cosine of another class. Margin, label smoothing and the reduction are arithmetic on
these (`margin_softmax_rows`), and class centers spread over ranks combine them with two small all-reduces. The backward
pass takes the log-sum-exp over all ranks and recomputes the cosines of one block of classes after another:

    G_ij = dloss/dcos_ij        dE^_i = sum_j G_ij w^_j        dW^_j = sum_i G_ij e^_i        dW_j = (dW^_j - w^_j <w^_j, dW^_j>) / |w_j|

Cosines and sums are float32 (float64 for float64 input); the unit rows that enter the matrix products are rounded to
`compute_dtype`. The target's cosine alone is computed apart, from unrounded rows. Every sum has a fixed order: equal
input gives equal bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scf_fast.kernels._common import check_floating, use_triton

# sin(theta) below it counts as it: bounds the exact gradient s sin(theta + m2)/sin(theta) at theta = 0 and pi; the loss
# moves by < 1e-4 s
SIN_FLOOR = 1e-4
_NORM_FLOOR = 1e-12  # rows shorter than it count as that long, as in torch.nn.functional.normalize
_LOG2_E = math.log2(math.e)
# Classes at a time. Plain PyTorch: the block of logits and that of unit rows stay in cache. Triton: the gradient of the
# block's cosines has at most C D / 4 values, an eighth of the class centers' bytes in bf16, while C is large; a launch
# is then lost in its run time.
_PLAIN_BLOCK_VALUES = 1 << 19
_PLAIN_CLASSES = (256, 8192)
_TRITON_CLASSES = (4096, 1 << 17)


class _Tiles(NamedTuple):
    rows: int  # of embeddings
    classes: int
    width: int  # of the embedding, a step
    num_warps: int
    num_stages: int


# The largest that compile without register spills for sm_80, sm_90 and sm_100; float32 products run outside the tensor
# cores unless TF32 is on.
_HALF_TILES = _Tiles(rows=128, classes=128, width=64, num_warps=8, num_stages=3)
_FLOAT_TILES = _Tiles(rows=64, classes=64, width=32, num_warps=4, num_stages=3)
# The classes of a block are split into independent partial sums until a launch has about this many programs: two for
# each of 132 multiprocessors.
_PROGRAMS = 264
_SPLITS = 64  # at most


class MarginSoftmaxStatistics(NamedTuple):
    """What is left of a batch's cosines, each (B,) float32 or float64."""

    log_sum_exp: torch.Tensor  # log sum_{j != target} exp(scale cos_ij); -inf where there is no other class
    target_cosine: torch.Tensor  # 0 where the label is none of these classes
    nearest_other: torch.Tensor  # max_{j != target} cos_ij; -inf where there is no other class
    cosine_sum: torch.Tensor  # sum_j cos_ij, the target's included; 0 unless asked for


def target_cosine_with_margin(cos: torch.Tensor, margins: tuple[float, float, float]) -> torch.Tensor:
    """psi(theta) of the module's formula from cos(theta), any shape; differentiable, finite at cos = +-1."""
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
    """Loss of each row from its statistics over all classes: (B,), differentiable in log_sum_exp, target_cosine and
    cosine_sum.

    `num_classes` counts the classes that the statistics are over; only label smoothing, which gives each of them
    label_smoothing / num_classes of the target distribution, needs it and `cosine_sum`.
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


def _blocks(num_classes: int, width: int, batch: int, triton_kernel: bool) -> Iterator[tuple[int, int]]:
    """[start, stop) of one block of classes after another."""
    if triton_kernel:
        least, most = _TRITON_CLASSES
        size = min(most, max(least, num_classes * width // (4 * max(batch, 1))))
    else:
        least, most = _PLAIN_CLASSES
        size = min(most, max(least, _PLAIN_BLOCK_VALUES // max(batch, width, 1)))
    for start in range(0, num_classes, size):
        yield start, min(start + size, num_classes)


def _inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(_NORM_FLOOR).reciprocal_()


def _target_cosine(embeddings, class_centers, labels, rows, dtype):
    """Cosine with the own class center, 0 without one, from unrounded rows."""
    here = labels >= 0
    own = labels.clamp_min(0)
    own = class_centers[own if rows is None else rows[own]].to(dtype)
    e = embeddings.to(dtype)
    cos = (e * own).sum(dim=1) * (_inverse_norm(e) * _inverse_norm(own)).squeeze(1)
    return torch.where(here, cos.clamp_(-1.0, 1.0), torch.zeros_like(cos))


# ---- plain PyTorch


class _Plain:
    """One block of classes after another in plain PyTorch, in cache-sized pieces: the CPU path and the test oracle."""

    def __init__(self, embeddings, class_centers, labels, rows, scale, compute_dtype, accumulate_dtype):
        self.class_centers, self.labels, self.rows, self.scale = class_centers, labels, rows, scale
        self.count = _count(class_centers, rows)
        self.compute_dtype, self.dtype = compute_dtype, accumulate_dtype
        self.embedding_norm = _inverse_norm(embeddings.to(accumulate_dtype))
        self.embeddings = embeddings.to(accumulate_dtype) * self.embedding_norm
        self.unit_embeddings = self._rounded(self.embeddings)
        self.scaled_embeddings = self.unit_embeddings * scale

    def _rounded(self, unit):
        return unit if self.compute_dtype == self.dtype else unit.to(self.compute_dtype).to(self.dtype)

    def _unit_centers(self, start, stop):
        """Unit rows of a block, unrounded, and 1 / norm."""
        block = self.class_centers[start:stop] if self.rows is None else self.class_centers[self.rows[start:stop]]
        block = block.to(self.dtype)
        inverse_norm = _inverse_norm(block)
        return block * inverse_norm, inverse_norm

    def _put_at_target(self, block, start, values):
        """block[i, labels_i - start] = values_i where that is a column."""
        column = self.labels - start
        here = ((column >= 0) & (column < block.shape[1]))[:, None]
        column = column.clamp(0, block.shape[1] - 1)[:, None]
        block.scatter_(1, column, torch.where(here, values, block.gather(1, column)))

    def statistics(self, blocks, with_cosine_sum):
        batch = len(self.labels)
        top = self.unit_embeddings.new_full((batch,), -math.inf)
        total, center_sum = torch.zeros_like(top), self.unit_embeddings.new_zeros(self.unit_embeddings.shape[1])
        other = top[:, None]
        floor = torch.finfo(self.dtype).min  # stands in for a maximum over no class: -inf - -inf would be NaN
        for start, stop in blocks:
            unit, _ = self._unit_centers(start, stop)
            unit = self._rounded(unit)
            logits = self.scaled_embeddings @ unit.t()
            self._put_at_target(logits, start, other)
            higher = torch.maximum(top, logits.amax(dim=1))
            shift = higher.clamp_min(floor)
            total = total * torch.exp(top - shift) + logits.sub_(shift[:, None]).exp_().sum(dim=1)
            top = higher
            if with_cosine_sum:
                center_sum += unit.sum(dim=0)
        return top + torch.log(total), top / self.scale, self.unit_embeddings @ center_sum

    def gradients(self, blocks, row_grad, target_grad, uniform_grad, log_sum_exp, skip_below, consume, finish):
        weight, offset = (row_grad * self.scale)[:, None], -log_sum_exp.to(self.dtype)[:, None]
        target_grad = (target_grad + (0 if uniform_grad is None else uniform_grad))[:, None]
        grad_embeddings = torch.zeros_like(self.unit_embeddings)
        for start, stop in blocks:
            exact, inverse_norm = self._unit_centers(start, stop)
            unit = self._rounded(exact)
            grad = torch.addmm(offset, self.scaled_embeddings, unit.t()).exp_().mul_(weight)
            if uniform_grad is not None:
                grad += uniform_grad[:, None]
            self._put_at_target(grad, start, target_grad)
            grad_embeddings.addmm_(grad, unit)
            if stop == self.count:
                finish(_through_norm(grad_embeddings, self.embeddings, self.embedding_norm))
            if consume is not None:
                consume(start, stop, _through_norm(grad.t() @ self.unit_embeddings, exact, inverse_norm))


def _through_norm(grad_unit, unit, inverse_norm):
    """Gradient of rows from that of their unit rows; overwrites grad_unit."""
    along = (grad_unit * unit).sum(dim=1, keepdim=True)
    return grad_unit.addcmul_(unit, along, value=-1).mul_(inverse_norm)


# ---- Triton


@triton.jit
def _unit_rows_kernel(
    source_ptr,
    rows_ptr,
    unit_ptr,
    inverse_norm_ptr,
    count,
    source_stride,
    D,
    FLOOR,
    GATHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per row of unit (padded to WIDTH columns and whole tiles of rows): source row over its norm, zeros in
    the padding.
    """
    row = tl.program_id(0).to(tl.int64)
    there = row < count
    if GATHER:
        source_row = tl.load(rows_ptr + row, mask=there, other=0)
    else:
        source_row = row
    source_ptr += source_row * source_stride
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, WIDTH, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)
        x = tl.load(source_ptr + at, mask=there & (at < D), other=0.0).to(tl.float32)
        squares += x * x
    inverse_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares)), FLOOR)
    for k in range(0, WIDTH, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)
        x = tl.load(source_ptr + at, mask=there & (at < D), other=0.0).to(tl.float32)
        tl.store(unit_ptr + row * WIDTH + at, (x * inverse_norm).to(unit_ptr.dtype.element_ty), mask=at < WIDTH)
    tl.store(inverse_norm_ptr + row, inverse_norm)


@triton.jit
def _cosine_tile(
    embeddings_ptr,
    centers_ptr,
    rows,
    classes,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<unit embedding, unit center> of a tile, float32; the padding makes every load whole."""
    step = tl.arange(0, STEP)
    e_ptr = embeddings_ptr + rows.to(tl.int64)[:, None] * WIDTH + step[None, :]
    w_ptr = centers_ptr + classes.to(tl.int64)[None, :] * WIDTH + step[:, None]
    cos = tl.zeros((ROWS, CLASSES), tl.float32)
    for _ in range(0, WIDTH, STEP):
        cos = tl.dot(tl.load(e_ptr), tl.load(w_ptr), cos, input_precision=PRECISION)
        e_ptr += STEP
        w_ptr += STEP
    return cos


@triton.jit(do_not_specialize=("first_class", "count"))  # they change from block to block
def _statistics_kernel(
    embeddings_ptr,
    centers_ptr,
    labels_ptr,
    top_ptr,
    total_ptr,
    sum_ptr,
    padded_batch,
    first_class,
    count,
    scale_log2,
    WITH_SUM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carries the running maximum (of logits over ln 2), the sum of exponentials and the sum of cosines of one tile of
    rows and one split of the classes.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    at = split.to(tl.int64) * padded_batch + rows
    own = tl.load(labels_ptr + rows) - first_class
    top = tl.load(top_ptr + at)
    total = tl.load(total_ptr + at)
    if WITH_SUM:
        cosine_sum = tl.load(sum_ptr + at)
    for tile in range(split, tl.cdiv(count, CLASSES), tl.num_programs(1)):
        classes = tile * CLASSES + tl.arange(0, CLASSES)
        cos = _cosine_tile(embeddings_ptr, centers_ptr, rows, classes, WIDTH, ROWS, CLASSES, STEP, PRECISION)
        if WITH_SUM:
            cosine_sum += tl.sum(cos, axis=1)  # the padding's cosines are 0
        other = (classes[None, :] < count) & (classes[None, :] != own[:, None])
        logits = tl.where(other, cos * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        top = higher
    tl.store(top_ptr + at, top)
    tl.store(total_ptr + at, total)
    if WITH_SUM:
        tl.store(sum_ptr + at, cosine_sum)


@triton.jit(do_not_specialize=("first_class", "count"))  # they change from block to block
def _cosine_gradient_kernel(
    embeddings_ptr,
    centers_ptr,
    labels_ptr,
    row_grad_ptr,
    target_grad_ptr,
    uniform_grad_ptr,
    log_sum_exp_ptr,
    grad_ptr,
    used_ptr,
    padded_count,
    first_class,
    count,
    scale_log2,
    skip_below,
    UNIFORM: tl.constexpr,
    SKIP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G of one tile, recomputed; with SKIP a tile whose entries are all below the threshold is marked unused instead of
    stored.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    cos = _cosine_tile(embeddings_ptr, centers_ptr, rows, classes, WIDTH, ROWS, CLASSES, STEP, PRECISION)
    grad = tl.load(row_grad_ptr + rows)[:, None] * tl.exp2(cos * scale_log2 - tl.load(log_sum_exp_ptr + rows)[:, None])
    if UNIFORM:
        grad += tl.load(uniform_grad_ptr + rows)[:, None]
    own = tl.load(labels_ptr + rows) - first_class
    grad = tl.where(classes[None, :] == own[:, None], tl.load(target_grad_ptr + rows)[:, None], grad)
    grad = tl.where(classes[None, :] < count, grad, 0.0)  # the padding has cosine 0, not gradient 0
    grad_ptr += rows.to(tl.int64)[:, None] * padded_count + classes[None, :]
    if SKIP:
        used = tl.max(tl.abs(grad)) >= skip_below
        tl.store(used_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), used.to(tl.int8))
        if used:
            tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))


@triton.jit
def _product_kernel(
    left_ptr,
    right_ptr,
    used_ptr,
    out_ptr,
    left_row_stride,
    left_inner_stride,
    used_row_stride,
    used_inner_stride,
    inner_tiles,
    padded_rows,
    ADD: tl.constexpr,
    SKIP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (+)= left @ right for one tile of ROWS x COLUMNS and one split of the inner dimension, whose unused tiles are
    passed over.
    """
    tile = tl.program_id(0)
    split = tl.program_id(2)
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out_ptr += (split.to(tl.int64) * padded_rows + rows[:, None]) * WIDTH + columns[None, :]
    left_ptr += rows[:, None] * left_row_stride
    right_ptr += columns[None, :]
    if ADD:
        product = tl.load(out_ptr)
    else:
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
    STEPS: tl.constexpr = INNER // STEP
    for turn in range(
        0, tl.cdiv(inner_tiles - split, tl.num_programs(2)) * STEPS
    ):  # one flat loop, so that its loads overlap its products
        inner_tile = split + turn // STEPS * tl.num_programs(2)
        inner = (inner_tile * INNER + turn % STEPS * STEP + tl.arange(0, STEP)).to(tl.int64)
        if SKIP:
            if tl.load(used_ptr + tile * used_row_stride + inner_tile * used_inner_stride) != 0:
                product = tl.dot(
                    tl.load(left_ptr + inner[None, :] * left_inner_stride),
                    tl.load(right_ptr + inner[:, None] * WIDTH),
                    product,
                    input_precision=PRECISION,
                )
        else:
            product = tl.dot(
                tl.load(left_ptr + inner[None, :] * left_inner_stride),
                tl.load(right_ptr + inner[:, None] * WIDTH),
                product,
                input_precision=PRECISION,
            )
    tl.store(out_ptr, product)


@triton.jit
def _through_norm_kernel(
    grad_unit_ptr,
    source_ptr,
    rows_ptr,
    inverse_norm_ptr,
    factor_ptr,
    out_ptr,
    source_stride,
    splits,
    padded_rows,
    D,
    GATHER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one row from that of its unit row (a sum over splits), times a factor."""
    row = tl.program_id(0).to(tl.int64)
    if GATHER:
        source_row = tl.load(rows_ptr + row)
    else:
        source_row = row
    at = tl.arange(0, BLOCK_D)
    mask = at < D
    grad = tl.zeros((BLOCK_D,), tl.float32)
    grad_unit_ptr += row * WIDTH
    for _ in range(splits):
        grad += tl.load(grad_unit_ptr + at, mask=mask, other=0.0)
        grad_unit_ptr += padded_rows * WIDTH
    inverse_norm = tl.load(inverse_norm_ptr + row)
    unit = tl.load(source_ptr + source_row * source_stride + at, mask=mask, other=0.0).to(tl.float32) * inverse_norm
    grad = (grad - unit * tl.sum(grad * unit)) * (inverse_norm * tl.load(factor_ptr))
    tl.store(out_ptr + row * D + at, grad, mask=mask)


class _Fused:
    """The same blocks through Triton. Unit rows, labels and weights are padded to whole tiles, so that the products
    need no masks.
    """

    def __init__(self, embeddings, class_centers, labels, rows, scale, compute_dtype, accumulate_dtype):
        del accumulate_dtype  # always float32 here
        self.source, self.class_centers, self.rows, self.scale = (
            embeddings.contiguous(),
            class_centers.contiguous(),
            rows,
            scale,
        )
        self.count = _count(class_centers, rows)
        self.dtype = compute_dtype
        self.tiles = _FLOAT_TILES if compute_dtype == torch.float32 else _HALF_TILES
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.width = _round_up(embeddings.shape[1], max(self.tiles.width, 64))
        self.device = embeddings.device
        self.padded_batch = _round_up(len(embeddings), self.tiles.rows)
        self.labels = self._padded(labels, -1)
        self.embeddings, self.embedding_norm = self._unit_rows(self.source, None, 0, len(embeddings), self.tiles.rows)
        self.options = {
            "WIDTH": self.width,
            "ROWS": self.tiles.rows,
            "CLASSES": self.tiles.classes,
            "STEP": self.tiles.width,
            "PRECISION": self.precision,
            "num_warps": self.tiles.num_warps,
            "num_stages": self.tiles.num_stages,
        }

    def _padded(self, values, fill):
        padded = values.new_full((self.padded_batch,), fill)
        padded[: len(values)] = values
        return padded

    def _unit_rows(self, source, rows, start, stop, multiple):
        count = _round_up(stop - start, multiple)
        unit = torch.empty((count, self.width), dtype=self.dtype, device=self.device)
        inverse_norm = torch.empty(count, dtype=torch.float32, device=self.device)
        if rows is None:
            source = source[start:stop]
        _unit_rows_kernel[(count,)](
            source,
            None if rows is None else rows[start:stop],
            unit,
            inverse_norm,
            stop - start,
            source.stride(0),
            source.shape[1],
            _NORM_FLOOR,
            GATHER=rows is not None,
            WIDTH=self.width,
            BLOCK_D=min(triton.next_power_of_2(self.width), 1024),
        )
        return unit, inverse_norm

    def statistics(self, blocks, with_cosine_sum):
        batch = len(self.source)
        row_tiles = self.padded_batch // self.tiles.rows
        splits = max(1, min(_SPLITS, _PROGRAMS // row_tiles))
        shape = (splits, self.padded_batch)
        top = torch.full(shape, -math.inf, dtype=torch.float32, device=self.device)
        total = torch.zeros_like(top)
        cosine_sum = torch.zeros_like(top) if with_cosine_sum else None
        for start, stop in blocks:
            centers, _ = self._unit_rows(self.class_centers, self.rows, start, stop, self.tiles.classes)
            _statistics_kernel[(row_tiles, splits)](
                self.embeddings,
                centers,
                self.labels,
                top,
                total,
                cosine_sum,
                self.padded_batch,
                start,
                stop - start,
                self.scale * _LOG2_E,
                WITH_SUM=with_cosine_sum,
                **self.options,
            )
        log_sum_exp = torch.logsumexp((top + torch.log2(total)) / _LOG2_E, dim=0)[:batch]
        sums = cosine_sum.sum(dim=0)[:batch] if with_cosine_sum else torch.zeros_like(log_sum_exp)
        return log_sum_exp, top.amax(dim=0)[:batch] / (self.scale * _LOG2_E), sums

    def gradients(self, blocks, row_grad, target_grad, uniform_grad, log_sum_exp, skip_below, consume, finish):
        # In units of the largest, so that half precision holds them whatever the reduction and the loss scale are.
        largest = torch.stack([row_grad.abs().amax() * self.scale, target_grad.abs().amax()]).amax()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        row = self._padded(row_grad * (self.scale / largest), 0)
        uniform = None if uniform_grad is None else self._padded(uniform_grad / largest, 0)
        target = self._padded(target_grad / largest, 0)
        if uniform is not None:
            target += uniform
        log2_sum = self._padded(log_sum_exp * _LOG2_E, 0)
        tiles, skip = self.tiles, skip_below > 0
        columns = 128 if self.width % 128 == 0 and self.dtype != torch.float32 else 64
        row_tiles, column_tiles = self.padded_batch // tiles.rows, self.width // columns
        splits = max(1, min(_SPLITS, _PROGRAMS // (row_tiles * column_tiles)))
        grad_embeddings = torch.zeros((splits, self.padded_batch, self.width), dtype=torch.float32, device=self.device)
        shared = {
            "SKIP": skip,
            "WIDTH": self.width,
            "STEP": tiles.width,
            "PRECISION": self.precision,
            "COLUMNS": columns,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }
        for start, stop in blocks:
            centers, inverse_norm = self._unit_rows(self.class_centers, self.rows, start, stop, tiles.classes)
            padded_count = len(centers)
            class_tiles = padded_count // tiles.classes
            grad = torch.empty((self.padded_batch, padded_count), dtype=self.dtype, device=self.device)
            used = torch.empty((row_tiles, class_tiles), dtype=torch.int8, device=self.device) if skip else None
            _cosine_gradient_kernel[(class_tiles, row_tiles)](
                self.embeddings,
                centers,
                self.labels,
                row,
                target,
                uniform,
                log2_sum,
                grad,
                used,
                padded_count,
                start,
                stop - start,
                self.scale * _LOG2_E,
                skip_below,
                UNIFORM=uniform is not None,
                SKIP=skip,
                **self.options,
            )
            _product_kernel[(row_tiles, column_tiles, splits)](
                grad,
                centers,
                used,
                grad_embeddings,
                padded_count,
                1,
                class_tiles,
                1,
                class_tiles,
                self.padded_batch,
                ADD=True,
                ROWS=tiles.rows,
                INNER=tiles.classes,
                **shared,
            )
            if stop == self.count:
                finish(
                    self._through_norm(
                        grad_embeddings, self.source, None, self.embedding_norm, largest, len(self.source)
                    )
                )
            if consume is not None:
                grad_centers = torch.empty((padded_count, self.width), dtype=torch.float32, device=self.device)
                _product_kernel[(class_tiles, column_tiles, 1)](
                    grad,
                    self.embeddings,
                    used,
                    grad_centers,
                    1,
                    padded_count,
                    1,
                    class_tiles,
                    row_tiles,
                    padded_count,
                    ADD=False,
                    ROWS=tiles.classes,
                    INNER=tiles.rows,
                    **shared,
                )
                source = self.class_centers[start:stop] if self.rows is None else self.class_centers
                rows = None if self.rows is None else self.rows[start:stop]
                consume(
                    start,
                    stop,
                    self._through_norm(grad_centers[None], source, rows, inverse_norm, largest, stop - start),
                )

    def _through_norm(self, grad_unit, source, rows, inverse_norm, factor, count):
        out = torch.empty((count, source.shape[1]), dtype=torch.float32, device=self.device)
        splits, padded_rows, _ = grad_unit.shape
        _through_norm_kernel[(count,)](
            grad_unit,
            source,
            rows,
            inverse_norm,
            factor,
            out,
            source.stride(0),
            splits,
            padded_rows,
            source.shape[1],
            GATHER=rows is not None,
            WIDTH=self.width,
            BLOCK_D=triton.next_power_of_2(self.width),
        )
        return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---- both


def _accumulate_dtype(embeddings, class_centers):
    return torch.float64 if torch.float64 in (embeddings.dtype, class_centers.dtype) else torch.float32


def _choose(embeddings, class_centers, compute_dtype, backend):
    """(dtype of the matrix products' operands, whether Triton runs)."""
    accumulate = _accumulate_dtype(embeddings, class_centers)
    if compute_dtype is None:
        compute_dtype = embeddings.dtype if embeddings.is_cuda and accumulate == torch.float32 else accumulate
    if accumulate == torch.float64:
        if compute_dtype != torch.float64 or backend == "triton":
            raise ValueError(
                'float64 is computed by PyTorch, in float64: leave compute_dtype out and take backend="auto", or '
                "convert with .float()"
            )
        return compute_dtype, False
    if compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compute_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {compute_dtype}")
    return compute_dtype, use_triton(backend, embeddings)


def _check(embeddings, class_centers, labels):
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


def _count(class_centers, rows):
    return len(class_centers) if rows is None else len(rows)


def _prepare(embeddings, class_centers, labels, rows, scale, compute_dtype, triton_kernel):
    """(implementation, blocks of classes)."""
    kind = _Fused if triton_kernel else _Plain
    return (
        kind(
            embeddings, class_centers, labels, rows, scale, compute_dtype, _accumulate_dtype(embeddings, class_centers)
        ),
        _blocks(_count(class_centers, rows), embeddings.shape[1], len(embeddings), triton_kernel),
    )


def _statistics(embeddings, class_centers, labels, rows, scale, compute_dtype, with_cosine_sum, triton_kernel):
    dtype = _accumulate_dtype(embeddings, class_centers)
    if not _count(class_centers, rows) or not len(embeddings):
        nothing = torch.zeros(len(embeddings), dtype=dtype, device=embeddings.device)
        return MarginSoftmaxStatistics(nothing - math.inf, nothing, nothing - math.inf, nothing.clone())
    with torch.cuda.device_of(embeddings):
        implementation, blocks = _prepare(embeddings, class_centers, labels, rows, scale, compute_dtype, triton_kernel)
        log_sum_exp, nearest, cosine_sum = implementation.statistics(blocks, with_cosine_sum)
    return MarginSoftmaxStatistics(
        log_sum_exp, _target_cosine(embeddings, class_centers, labels, rows, dtype), nearest, cosine_sum
    )


def _gradients(
    embeddings,
    class_centers,
    labels,
    rows,
    log_sum_exp,
    grads,
    scale,
    compute_dtype,
    skip_below,
    triton_kernel,
    consume,
    finish,
):
    row_grad, target_grad, uniform_grad = grads
    if not _count(class_centers, rows) or not len(embeddings):
        finish(
            torch.zeros(embeddings.shape, dtype=_accumulate_dtype(embeddings, class_centers), device=embeddings.device)
        )
        return
    # Without another class, or without weight, a row has no term here: keep exp(-inf - -inf) out of it.
    log_sum_exp = torch.where((row_grad == 0) | (log_sum_exp == -math.inf), math.inf, log_sum_exp)
    with torch.cuda.device_of(embeddings):
        implementation, blocks = _prepare(embeddings, class_centers, labels, rows, scale, compute_dtype, triton_kernel)
        implementation.gradients(blocks, row_grad, target_grad, uniform_grad, log_sum_exp, skip_below, consume, finish)


@torch.library.custom_op("scf::margin_softmax_statistics", mutates_args=())
def _statistics_op(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    compute_dtype: torch.dtype,
    with_cosine_sum: bool,
    skip_below: float,
    triton_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(
        _statistics(embeddings, class_centers, labels, None, scale, compute_dtype, with_cosine_sum, triton_kernel)
    )


@_statistics_op.register_fake
def _(embeddings, class_centers, labels, scale, compute_dtype, with_cosine_sum, skip_below, triton_kernel):
    row = embeddings.new_empty(embeddings.shape[0], dtype=_accumulate_dtype(embeddings, class_centers))
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
    _gradients(
        embeddings,
        class_centers,
        labels,
        None,
        log_sum_exp,
        (row_grad, target_grad, uniform_grad),
        scale,
        compute_dtype,
        skip_below,
        triton_kernel,
        (lambda start, stop, grad: grad_centers[start:stop].copy_(grad)) if for_centers else None,
        grad_embeddings.copy_,
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
    return (
        grads[0] if ctx.needs_input_grad[0] else None,
        grads[1] if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
        None,
        None,
        None,
    )


_statistics_op.register_autograd(_backward, setup_context=_setup)


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
    """What a margin softmax needs of a batch's cosines with the class centers of one rank; not differentiable, see
    `margin_softmax_gradients`.

    Args:
        embeddings: (B, D) float, unnormalized.
        class_centers: (C, D) float, unnormalized; C may be 0.
        labels: (B,) int64 in [0, C), or negative where the own class is not among these.
        scale: s, multiplies the cosines.
        class_rows: (N,) int64: only these rows of class_centers take part, and labels are positions among them.
        compute_dtype: of the unit rows in the matrix products: torch.float32, bfloat16 or float16. Default: the
            embeddings' on CUDA, else float32. On CUDA, float32 runs as TF32 where torch.set_float32_matmul_precision
            allows it.
        with_cosine_sum: compute `cosine_sum`, which label smoothing needs.
        backend: "auto" runs Triton for CUDA tensors and PyTorch for others and for float64; "triton" or "torch"
            insists.
    Returns:
        MarginSoftmaxStatistics. Those of disjoint sets of classes combine by logaddexp, addition, maximum and addition.
    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    _check(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose(embeddings, class_centers, compute_dtype, backend)
    with torch.no_grad():
        return _statistics(
            embeddings, class_centers, labels, class_rows, scale, compute_dtype, with_cosine_sum, triton_kernel
        )


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
    finish: Callable[[torch.Tensor], None],
    consume: Callable[[int, int, torch.Tensor], None] | None = None,
    class_rows: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    backend: str = "auto",
) -> None:
    """The backward pass of `margin_softmax_statistics`, whose arguments it shares.

    Args:
        log_sum_exp: (B,), over the other classes of all ranks.
        row_grad, target_grad, uniform_grad: (B,), gradients of the loss in `log_sum_exp`, `target_cosine` and, where it
            is used, `cosine_sum`.
        finish: called once with the (B, D) float32 (float64) gradient of embeddings from these classes, before the
            class centers of the last block get theirs: whoever sends it to other ranks does so while that is computed.
        consume: called as consume(start, stop, gradient) for one block of classes after another, in order, with the
            finished (stop - start, D) float32 gradient of class_centers[start:stop] (of
            class_centers[class_rows[start:stop]]); the block may be changed there: once it has been consumed its class
            centers are not read again. None: no gradient for class centers.
        skip_below: Triton passes over tiles all of whose dloss/dcos are below this share of the largest one that any
            row can have, max_i(s |row_grad_i|, |target_grad_i|). 0 is exact.
    Raises:
        ValueError: as `margin_softmax_statistics`.
    """
    _check(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose(embeddings, class_centers, compute_dtype, backend)
    with torch.no_grad():
        _gradients(
            embeddings,
            class_centers,
            labels,
            class_rows,
            log_sum_exp,
            (row_grad, target_grad, uniform_grad),
            scale,
            compute_dtype,
            skip_below,
            triton_kernel,
            consume,
            finish,
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
            makes the loss NaN on CUDA, where looking for it would stall the device, and raises elsewhere.
        scale: s, multiplies the logits.
        margins: (m1, m2, m3), m2 in radians, m3 in cosine.
        margin_gradient: ``"exact"`` is the derivative of psi, s sin(theta + m2)/sin(theta) at the target;
            ``"straight_through"`` passes the gradient s, as code that applies its margin without gradient
            (arcface_torch) does.
        label_smoothing: share of the target distribution that is spread evenly over all classes, in [0, 1).
        compute_dtype, skip_below, backend: as in `margin_softmax_statistics` and `margin_softmax_gradients`.
    Returns:
        (loss, correct): scalar float32 (float64) mean loss, and (B,) bool whether the own class center is nearer
        (without margin) than all others.
    Raises:
        ValueError: settings without meaning, or shapes and dtypes that do not fit.
        IndexError: a label outside [-1, C), on the CPU.
    """
    check_margin_softmax(margins, margin_gradient, label_smoothing)
    _check(embeddings, class_centers, labels)
    compute_dtype, triton_kernel = _choose(embeddings, class_centers, compute_dtype, backend)
    num_classes = len(class_centers)
    outside = (labels < -1) | (labels >= num_classes)
    if not labels.is_cuda and not torch.compiler.is_compiling() and outside.any():
        raise IndexError(f"labels must be in [0, {num_classes}), or -1 to be left out, got {labels[outside][0].item()}")
    statistics = MarginSoftmaxStatistics(
        *_statistics_op(
            embeddings,
            class_centers,
            labels.masked_fill(outside, -1),
            scale,
            compute_dtype,
            label_smoothing > 0,
            skip_below,
            triton_kernel,
        )
    )
    loss = margin_softmax_rows(statistics, num_classes, scale, margins, margin_gradient, label_smoothing)
    return mean_over_labeled(loss, labels, outside), (labels >= 0) & (
        statistics.target_cosine > statistics.nearest_other
    )


def mean_over_labeled(loss: torch.Tensor, labels: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Mean of the rows of loss with a label >= 0 (0 where there is none); NaN where a label is outside the classes."""
    labeled = labels >= 0
    mean = torch.where(labeled, loss, 0.0).sum() / labeled.sum().clamp_min(1)
    return torch.where(outside.any(), math.nan, mean)
