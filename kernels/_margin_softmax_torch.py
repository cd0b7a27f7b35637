"""Margin softmax in plain PyTorch, in cache-sized blocks of classes: the CPU path, and the float64 path everywhere."""

import math
from collections.abc import Iterator

import torch

from scf_fast.kernels._common import slices
from scf_fast.kernels._margin_softmax_arguments import (
    ConsumeCenters,
    FinishEmbeddings,
    MarginSoftmaxArguments,
    StatisticsGradients,
    inverse_norm,
)

# Classes at a time: the block of logits and that of unit rows stay in cache.
_BLOCK_VALUES = 1 << 19
_BLOCK_CLASSES = (256, 8192)


class TorchMarginSoftmax:
    """One batch against all classes, one block of classes after another."""

    def __init__(self, arguments: MarginSoftmaxArguments):
        self.class_centers, self.class_rows = arguments.class_centers, arguments.class_rows
        self.labels, self.scale = arguments.labels, arguments.scale
        self.num_classes = arguments.num_classes
        self.compute_dtype, self.dtype = arguments.compute_dtype, arguments.dtype
        embeddings = arguments.embeddings.to(self.dtype)
        self.embedding_norm = inverse_norm(embeddings)
        self.embeddings = embeddings * self.embedding_norm
        self.unit_embeddings = self._round(self.embeddings)
        self.scaled_embeddings = self.unit_embeddings * self.scale

    def _blocks(self) -> Iterator[slice]:
        least, most = _BLOCK_CLASSES
        return slices(self.num_classes, min(most, max(least, _BLOCK_VALUES // max(*self.embeddings.shape, 1))))

    def _round(self, unit: torch.Tensor) -> torch.Tensor:
        return unit if self.compute_dtype == self.dtype else unit.to(self.compute_dtype).to(self.dtype)

    def _unit_centers(self, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns unrounded unit rows of a block, and 1 / norm."""
        rows = self.class_centers[block] if self.class_rows is None else self.class_centers[self.class_rows[block]]
        rows = rows.to(self.dtype)
        norm = inverse_norm(rows)
        return rows * norm, norm

    def _set_at_target(self, values: torch.Tensor, block: slice, at_target: torch.Tensor) -> None:
        """Sets values[i, labels_i - block.start] = at_target_i where that is a column."""
        column = self.labels - block.start
        here = ((column >= 0) & (column < values.shape[1]))[:, None]
        column = column.clamp(0, values.shape[1] - 1)[:, None]
        values.scatter_(1, column, torch.where(here, at_target, values.gather(1, column)))

    def statistics(self, with_cosine_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = len(self.labels)
        top = self.unit_embeddings.new_full((batch,), -math.inf)
        total, center_sum = torch.zeros_like(top), self.unit_embeddings.new_zeros(self.unit_embeddings.shape[1])
        no_class = top[:, None]
        floor = torch.finfo(self.dtype).min  # stands in for a maximum over no class: -inf - -inf would be NaN
        for block in self._blocks():
            unit, _ = self._unit_centers(block)
            unit = self._round(unit)
            logits = self.scaled_embeddings @ unit.t()
            self._set_at_target(logits, block, no_class)
            higher = torch.maximum(top, logits.amax(dim=1))
            shift = higher.clamp_min(floor)
            total = total * torch.exp(top - shift) + logits.sub_(shift[:, None]).exp_().sum(dim=1)
            top = higher
            if with_cosine_sum:
                center_sum += unit.sum(dim=0)
        return top + torch.log(total), top / self.scale, self.unit_embeddings @ center_sum

    def gradients(
        self,
        grads: StatisticsGradients,
        log_sum_exp: torch.Tensor,
        skip_below: float,  # saves nothing here
        consume: ConsumeCenters | None,
        finish: FinishEmbeddings,
    ) -> None:
        weight, offset = (grads.log_sum_exp * self.scale)[:, None], -log_sum_exp.to(self.dtype)[:, None]
        uniform = grads.cosine_sum
        target = (grads.target_cosine + (0 if uniform is None else uniform))[:, None]
        grad_embeddings = torch.zeros_like(self.unit_embeddings)
        for block in self._blocks():
            exact, norm = self._unit_centers(block)
            unit = self._round(exact)
            grad = torch.addmm(offset, self.scaled_embeddings, unit.t()).exp_().mul_(weight)
            if uniform is not None:
                grad += uniform[:, None]
            self._set_at_target(grad, block, target)
            grad_embeddings.addmm_(grad, unit)
            if block.stop == self.num_classes:
                finish(_through_norm(grad_embeddings, self.embeddings, self.embedding_norm))
            if consume is not None:
                consume(block.start, block.stop, _through_norm(grad.t() @ self.unit_embeddings, exact, norm))


def _through_norm(grad_unit: torch.Tensor, unit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of rows, given that of their unit rows, which it overwrites, and 1 / norm."""
    along = (grad_unit * unit).sum(dim=1, keepdim=True)
    return grad_unit.addcmul_(unit, along, value=-1).mul_(norm)
