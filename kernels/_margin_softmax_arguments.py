"""Code that both implementations of the margin softmax share, PyTorch and Triton: arguments, interface, and the
target's cosine."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from scf_fast.kernels._common import promoted_dtype

NORM_FLOOR = 1e-12  # rows shorter than this count as this long, as in torch.nn.functional.normalize

FinishEmbeddings = Callable[[torch.Tensor], object]  # (B, D) gradient
ConsumeCenters = Callable[[int, int, torch.Tensor], object]  # start, stop, (stop - start, D) gradient


def inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """Returns 1 / |row| as a column."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(NORM_FLOOR).reciprocal_()


@dataclasses.dataclass(frozen=True)
class MarginSoftmaxArguments:
    """One batch against one set of classes."""

    embeddings: torch.Tensor  # (B, D), unnormalized
    class_centers: torch.Tensor  # (C, D), unnormalized
    labels: torch.Tensor  # (B,) positions among the classes that take part; negative where the own class does not
    class_rows: torch.Tensor | None  # (N,) rows of class_centers that take part; None: all
    scale: float  # s
    compute_dtype: torch.dtype  # of the unit rows in the matrix products

    @property
    def num_classes(self) -> int:
        return len(self.class_centers) if self.class_rows is None else len(self.class_rows)

    @property
    def dtype(self) -> torch.dtype:
        """Type of sums and results."""
        return promoted_dtype(self.embeddings, self.class_centers)

    @property
    def empty(self) -> bool:
        return not self.num_classes or not len(self.embeddings)


def target_cosine(arguments: MarginSoftmaxArguments) -> torch.Tensor:
    """Returns the cosine with the own class center from unrounded rows, 0 where that is not among the classes."""
    class_centers, rows, dtype = arguments.class_centers, arguments.class_rows, arguments.dtype
    here = arguments.labels >= 0
    own = arguments.labels.clamp_min(0)
    own = class_centers[own if rows is None else rows[own]].to(dtype)
    e = arguments.embeddings.to(dtype)
    cos = (e * own).sum(dim=1) * (inverse_norm(e) * inverse_norm(own)).squeeze(1)
    return torch.where(here, cos.clamp_(-1.0, 1.0), torch.zeros_like(cos))


class StatisticsGradients(NamedTuple):
    """Gradients of the loss in the statistics of each row, (B,) each."""

    log_sum_exp: torch.Tensor
    target_cosine: torch.Tensor
    cosine_sum: torch.Tensor | None  # None where the loss does not use it


class Implementation(Protocol):
    """Works through the classes, one block after another."""

    def statistics(self, with_cosine_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns log_sum_exp, nearest_other and cosine_sum of ``MarginSoftmaxStatistics``."""

    def gradients(
        self,
        grads: StatisticsGradients,
        log_sum_exp: torch.Tensor,
        skip_below: float,
        consume: ConsumeCenters | None,
        finish: FinishEmbeddings,
    ) -> None:
        """Runs the backward pass, as ``margin_softmax_gradients`` describes it; log_sum_exp is +inf in a row whose
        other classes have no gradient.
        """
