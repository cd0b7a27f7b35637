"""Margin softmax through the Triton kernels of ``_margin_softmax_kernels``: the path of CUDA tensors.
``margin_softmax`` has the formulas.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from scf_fast.kernels._common import slices
from scf_fast.kernels._margin_softmax_arguments import (
    NORM_FLOOR,
    ConsumeCenters,
    FinishEmbeddings,
    MarginSoftmaxArguments,
    StatisticsGradients,
)
from scf_fast.kernels._margin_softmax_kernels import (
    cosine_gradient_kernel,
    product_kernel,
    statistics_kernel,
    through_norm_kernel,
    unit_rows_kernel,
)

_LOG2_E = math.log2(math.e)
# Classes at a time: the gradient of the block's cosines has at most C D / 4 values, an eighth of the class centers'
# bytes in bf16, while C is large; a launch is then short beside its run time.
_BLOCK_CLASSES = (4096, 1 << 17)


class _Tiles(NamedTuple):
    rows: int  # of embeddings
    classes: int
    width: int  # of the embedding, per step
    num_warps: int
    num_stages: int


# The largest that compile without register spills for sm_80, sm_90 and sm_100; float32 products run outside the tensor
# cores unless TF32 is on.
_HALF_TILES = _Tiles(rows=128, classes=128, width=64, num_warps=8, num_stages=3)
_FLOAT_TILES = _Tiles(rows=64, classes=64, width=32, num_warps=4, num_stages=3)
# Registers of a thread: unless told, the assembler spills a few to have more programs at a time, products on sm_120,
# those of float32 statistics on sm_86 and sm_89, of float32 cosine gradients on sm_80.
PRODUCT_REGISTERS = STATISTICS_REGISTERS = 255
GRADIENT_REGISTERS = 168
# The classes of a block are split into independent partial sums until a launch has about this many programs: two for
# each of 132 multiprocessors.
_PROGRAMS = 264
_GRADIENT_SPLITS = 64  # at most: each is a (padded batch, D) gradient of its own


class _ScaledGradients(NamedTuple):
    """Gradients in the statistics as the kernel takes them, (padded batch,) each, in units of the largest that any row
    can have: half precision then holds them whatever the reduction and the loss scale are.
    """

    row: torch.Tensor
    target: torch.Tensor
    uniform: torch.Tensor | None
    log2_sum: torch.Tensor  # log_sum_exp over ln 2
    unit: torch.Tensor  # scalar, the largest


class TritonMarginSoftmax:
    """One batch against all classes, one block of classes after another, in float32."""

    def __init__(self, arguments: MarginSoftmaxArguments):
        self.source, self.class_centers = arguments.embeddings.contiguous(), arguments.class_centers.contiguous()
        self.class_rows, self.scale = arguments.class_rows, arguments.scale
        self.num_classes = arguments.num_classes
        self.compute_dtype = arguments.compute_dtype
        self.device = self.source.device
        tiles = self.tiles = _FLOAT_TILES if self.compute_dtype == torch.float32 else _HALF_TILES
        self.batch, dim = self.source.shape
        self.width = _round_up(dim, max(tiles.width, 64))
        self.padded_batch = _round_up(self.batch, tiles.rows)
        self.row_tiles = self.padded_batch // tiles.rows
        self.labels = self._pad(arguments.labels, -1)
        self.embeddings, self.embedding_norm = self._unit_rows(self.source, None, slice(0, self.batch), tiles.rows)
        tile_options = {
            "WIDTH": self.width,
            "STEP": tiles.width,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }
        cosine_options = {**tile_options, "ROWS": tiles.rows, "CLASSES": tiles.classes}
        single = self.compute_dtype == torch.float32
        self.statistics_options = {**cosine_options, "maxnreg": STATISTICS_REGISTERS if single else None}
        self.gradient_options = {**cosine_options, "maxnreg": GRADIENT_REGISTERS if single else None}
        self.product_options = {**tile_options, "maxnreg": PRODUCT_REGISTERS}

    def _blocks(self) -> Iterator[slice]:
        least, most = _BLOCK_CLASSES
        values = self.num_classes * self.source.shape[1]
        return slices(self.num_classes, min(most, max(least, values // (4 * max(self.batch, 1)))))

    def _pad(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        padded = values.new_full((self.padded_batch,), fill)
        padded[: len(values)] = values
        return padded

    def _unit_rows(
        self, source: torch.Tensor, rows: torch.Tensor | None, block: slice, multiple: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns unit rows of a block of source (of source[rows]), padded to a multiple, and 1 / norm."""
        count = _round_up(block.stop - block.start, multiple)
        unit = torch.empty((count, self.width), dtype=self.compute_dtype, device=self.device)
        inverse_norm = torch.empty(count, dtype=torch.float32, device=self.device)
        if rows is None:
            source = source[block]
        unit_rows_kernel[(count,)](
            source,
            None if rows is None else rows[block],
            unit,
            inverse_norm,
            block.stop - block.start,
            source.stride(0),
            source.shape[1],
            NORM_FLOOR,
            GATHER=rows is not None,
            WIDTH=self.width,
            BLOCK_D=min(triton.next_power_of_2(self.width), 1024),
        )
        return unit, inverse_norm

    def _statistics_splits(self) -> int:
        """Returns into how many partial sums, of three values a row, the classes of a block are split; one that has no
        tile of classes would be of no use.
        """
        largest_block = max((block.stop - block.start for block in self._blocks()), default=0)
        return max(1, min(_PROGRAMS // self.row_tiles, triton.cdiv(largest_block, self.tiles.classes)))

    def statistics(self, with_cosine_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (self._statistics_splits(), self.padded_batch)
        top = torch.full(shape, -math.inf, dtype=torch.float32, device=self.device)
        total = torch.zeros_like(top)
        cosine_sum = torch.zeros_like(top) if with_cosine_sum else None
        for block in self._blocks():
            centers, _ = self._unit_rows(self.class_centers, self.class_rows, block, self.tiles.classes)
            statistics_kernel[(self.row_tiles, shape[0])](
                self.embeddings,
                centers,
                self.labels,
                top,
                total,
                cosine_sum,
                self.padded_batch,
                block.start,
                block.stop - block.start,
                self.scale * _LOG2_E,
                WITH_SUM=with_cosine_sum,
                **self.statistics_options,
            )
        log_sum_exp = torch.logsumexp(top * self.scale + torch.log(total), dim=0)[: self.batch]
        sums = torch.zeros_like(log_sum_exp) if cosine_sum is None else cosine_sum.sum(dim=0)[: self.batch]
        return log_sum_exp, top.amax(dim=0)[: self.batch], sums

    def gradients(
        self,
        grads: StatisticsGradients,
        log_sum_exp: torch.Tensor,
        skip_below: float,
        consume: ConsumeCenters | None,
        finish: FinishEmbeddings,
    ) -> None:
        scaled = self._scale_gradients(grads, log_sum_exp)
        columns = 128 if self.width % 128 == 0 and self.compute_dtype != torch.float32 else 64
        splits = max(1, min(_GRADIENT_SPLITS, _PROGRAMS // (self.row_tiles * (self.width // columns))))
        grad_embeddings = torch.zeros((splits, self.padded_batch, self.width), dtype=torch.float32, device=self.device)
        for block in self._blocks():
            centers, inverse_norm = self._unit_rows(self.class_centers, self.class_rows, block, self.tiles.classes)
            grad, used = self._cosine_gradient(centers, block, scaled, skip_below)
            self._multiply(grad, centers, used, grad_embeddings, columns)
            if block.stop == self.num_classes:
                finish(
                    self._through_norm(grad_embeddings, self.source, None, self.embedding_norm, scaled.unit, self.batch)
                )
            if consume is not None:
                grad_centers = torch.empty((1, *centers.shape), dtype=torch.float32, device=self.device)
                self._multiply_transposed(grad, used, grad_centers, columns)
                source = self.class_centers[block] if self.class_rows is None else self.class_centers
                rows = None if self.class_rows is None else self.class_rows[block]
                count = block.stop - block.start
                consume(
                    block.start,
                    block.stop,
                    self._through_norm(grad_centers, source, rows, inverse_norm, scaled.unit, count),
                )

    def _scale_gradients(self, grads: StatisticsGradients, log_sum_exp: torch.Tensor) -> _ScaledGradients:
        largest = torch.stack([grads.log_sum_exp.abs().amax() * self.scale, grads.target_cosine.abs().amax()]).amax()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        row = self._pad(grads.log_sum_exp * (self.scale / largest), 0)
        uniform = None if grads.cosine_sum is None else self._pad(grads.cosine_sum / largest, 0)
        target = self._pad(grads.target_cosine / largest, 0)
        if uniform is not None:
            target += uniform
        return _ScaledGradients(row, target, uniform, self._pad(log_sum_exp * _LOG2_E, 0), largest)

    def _cosine_gradient(
        self, centers: torch.Tensor, block: slice, scaled: _ScaledGradients, skip_below: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns G of one block of classes, (padded batch, padded count), and which of its tiles are used, if any are
        skipped.
        """
        padded_count = len(centers)
        class_tiles = padded_count // self.tiles.classes
        skip = skip_below > 0
        grad = torch.empty((self.padded_batch, padded_count), dtype=self.compute_dtype, device=self.device)
        used = torch.empty((self.row_tiles, class_tiles), dtype=torch.int8, device=self.device) if skip else None
        cosine_gradient_kernel[(class_tiles, self.row_tiles)](
            self.embeddings,
            centers,
            self.labels,
            scaled.row,
            scaled.target,
            scaled.uniform,
            scaled.log2_sum,
            grad,
            used,
            padded_count,
            block.start,
            block.stop - block.start,
            self.scale * _LOG2_E,
            skip_below,
            UNIFORM=scaled.uniform is not None,
            SKIP=skip,
            **self.gradient_options,
        )
        return grad, used

    def _multiply(
        self, grad: torch.Tensor, centers: torch.Tensor, used: torch.Tensor | None, out: torch.Tensor, columns: int
    ) -> None:
        """out += G @ centers, in the splits of out."""
        padded_count = len(centers)
        class_tiles = padded_count // self.tiles.classes
        product_kernel[(self.row_tiles, self.width // columns, len(out))](
            grad,
            centers,
            used,
            out,
            padded_count,
            1,
            class_tiles,
            1,
            class_tiles,
            self.padded_batch,
            ADD=True,
            SKIP=used is not None,
            ROWS=self.tiles.rows,
            INNER=self.tiles.classes,
            COLUMNS=columns,
            **self.product_options,
        )

    def _multiply_transposed(
        self, grad: torch.Tensor, used: torch.Tensor | None, out: torch.Tensor, columns: int
    ) -> None:
        """out = G^T @ embeddings."""
        padded_count = grad.shape[1]
        class_tiles = padded_count // self.tiles.classes
        product_kernel[(class_tiles, self.width // columns, 1)](
            grad,
            self.embeddings,
            used,
            out,
            1,
            padded_count,
            1,
            class_tiles,
            self.row_tiles,
            padded_count,
            ADD=False,
            SKIP=used is not None,
            ROWS=self.tiles.classes,
            INNER=self.tiles.rows,
            COLUMNS=columns,
            **self.product_options,
        )

    def _through_norm(
        self,
        grad_unit: torch.Tensor,
        source: torch.Tensor,
        rows: torch.Tensor | None,
        inverse_norm: torch.Tensor,
        factor: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        """Returns the gradient of the first rows of source (of source[rows]), given that of their unit rows."""
        out = torch.empty((count, source.shape[1]), dtype=torch.float32, device=self.device)
        splits, padded_rows, _ = grad_unit.shape
        through_norm_kernel[(count,)](
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
