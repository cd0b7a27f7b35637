"""Class centers of stage 1, their rows spread over the ranks: margin softmax, SGD, checkpoints and export without all
rows on any one rank.

Every rank holds a contiguous block of rows and its momentum, and computes the loss of the whole batch against its rows:

    embeddings, labels  --all-gather-->  statistics of the own rows  --two all-reduces of (B,)-->  loss
    loss  --backward, reduce-scatter-->  gradient of the features

Communication runs beside computation where there is any that does not wait for it: before the backbone runs the labels
are gathered, find their rows and the sample is drawn, and the gradient of the features is scattered while the last
block of class centers (on a GPU often the only one) gets its gradient and update. The order of sums does not change.

The class centers live outside the DeepSpeed engine, which would give every rank the rows of rank 0. It averages the
backbone's gradients over ranks, while this loss is already the mean over all ranks' images: the gradient of the
features is multiplied by the world size. The gradient of the class centers needs neither: it does not see the engine's
loss scale and is divided by the accumulation steps here.

Clipping: --max_grad_norm bounds the norm of the backbone's gradient alone, as arcface_torch does. --max_grad_clip
bounds each value here too.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.class_sampling import ClassSelection
from scf_fast.errors import InputError
from scf_fast.kernels.margin_softmax import (
    MarginSoftmaxStatistics,
    margin_softmax_gradients,
    margin_softmax_rows,
    margin_softmax_statistics,
    mean_over_labeled,
)
from scf_fast.networks.precision import PRECISION_DTYPES
from scf_fast.weights.files import save_torch_file

_INITIAL_STD = 0.01  # as arcface_torch
_INITIAL_ROWS = 4096  # rows that one seed makes: the same rows come out at any world size
_UPDATE_ROWS = 16384  # rows of one step of an update: its temporaries stay small
_EXPORT_BYTES = 64 * 2**20  # of one message to rank 0


def rows_of(rank: int, world_size: int, num_classes: int) -> tuple[int, int]:
    """Returns [start, stop) of a rank's rows: contiguous, of lengths that differ by one at most, empty where there are
    more ranks than classes.
    """
    size, longer = divmod(num_classes, world_size)
    start = rank * size + min(rank, longer)
    return start, start + size + (rank < longer)


class ClassCenters:
    """This rank's share of the class centers.

    Attributes:
        weight: (C_local, D) float32.
        momentum: the same, bfloat16 with ``centers_state="bf16"``: rounded stochastically, so that its expectation is
            that of float32.
        start, stop: the rows' place among all ``num_classes``.
        lr: learning rate of the next update; whoever trains sets it.
        fused: whether the update happens in the backward pass, block by block, so that no (C_local, D) gradient is
            stored.
    Args:
        config: reads seed, scale, margins, margin_gradient, label_smoothing, sample_rate, skip_below, momentum,
            weight_decay, max_grad_clip, gradient_accumulation_steps, centers_state and fused_center_update.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` for the matrix products; class centers, momentum, cosines and
            the loss are float32.
    """

    def __init__(self, num_classes: int, width: int, config: BackboneConfig, runtime: Runtime, precision: str = "fp32"):
        self.num_classes, self.width, self.config, self.runtime = num_classes, width, config, runtime
        self.start, self.stop = rows_of(runtime.rank, runtime.world_size, num_classes)
        self.compute_dtype = PRECISION_DTYPES[precision]
        self.fused = fuses(config, precision)
        self.lr = config.lr
        self._draw = 0  # batches seen: what samples and the rounding are drawn from
        self._noise = torch.Generator(runtime.device)
        self.weight = torch.empty(self.stop - self.start, width, device=runtime.device)
        self._initialize()
        self.momentum = torch.zeros_like(self.weight, dtype=PRECISION_DTYPES[config.centers_state])
        self._gradient = None if self.fused else torch.zeros_like(self.weight)
        self._touched = (
            torch.zeros(len(self.weight), dtype=torch.bool, device=runtime.device)
            if self._samples and not self.fused
            else None
        )

    @property
    def _samples(self) -> bool:
        return self.config.sample_rate < 1

    def _initialize(self) -> None:
        for first in range(self.start - self.start % _INITIAL_ROWS, self.stop, _INITIAL_ROWS):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + first)
            block = torch.empty(_INITIAL_ROWS, self.width).normal_(std=_INITIAL_STD, generator=generator)
            low, high = max(first, self.start), min(first + _INITIAL_ROWS, self.stop)
            self.weight[low - self.start : high - self.start] = block[low - first : high - first].to(self.weight.device)

    def select(self, labels: torch.Tensor) -> ClassSelection:
        """Returns the classes that take part in the next batch; collective.

        Asked for before the backbone gets the images, a sample costs the host no wait for the backbone.

        Args:
            labels: (B,) int64 of this rank's images, as many on every rank.
        """
        of_all_ranks = _start_gather(labels, self.runtime.world_size)()
        if not self._samples:
            return ClassSelection.of_all(of_all_ranks, self.start, self.stop)
        config = self.config
        return ClassSelection.of_sample(
            of_all_ranks, self.start, self.stop, config.sample_rate, config.seed, self._draw
        )

    def loss(
        self, features: torch.Tensor, labels: torch.Tensor, selection: ClassSelection | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean margin-softmax loss over the images of all ranks; collective, and so is its backward pass.

        Args:
            features: (B, D) float32 of this rank's images, as many on every rank.
            labels: (B,) int64; -1 leaves an image out, any other label outside [0, num_classes) makes the loss NaN.
            selection: :meth:`select` of these labels, since the last loss; None: made here.
        Returns:
            (loss, correct): the scalar loss, equal on all ranks and differentiable in features; (B,) bool whether the
            own class center is the nearest of all (of those sampled). The backward pass also updates the class centers
            where ``fused``, else adds to their gradient.
        """
        self._noise.manual_seed(((self.config.seed * 1_000_003 + self._draw) * 1_000_003 + self.start) % 2**63)
        result = _ShardedLoss.apply(features, labels, selection, self)
        self._draw += 1
        return result

    def step(self, applied: bool = True) -> None:
        """Ends an optimizer step: updates from the gradients since the last one, or drops them where the engine has
        skipped its step.
        """
        if self._gradient is None:
            return
        for rows in self._changed_rows() if applied else ():
            self._update_rows(rows, self._gradient[rows])
        self._gradient.zero_()
        if self._touched is not None:
            self._touched.zero_()

    def _changed_rows(self) -> Iterator[slice | torch.Tensor]:
        if self._touched is None:
            return (slice(at, at + _UPDATE_ROWS) for at in range(0, len(self.weight), _UPDATE_ROWS))
        return iter(self._touched.nonzero().squeeze(1).split(_UPDATE_ROWS))

    def _update(self, start: int, active: torch.Tensor | None, gradient: torch.Tensor) -> None:
        """Updates the rows from ``start`` on, or those that ``active`` lists from there on, as many as ``gradient``
        has.
        """
        for at in range(0, len(gradient), _UPDATE_ROWS):
            piece = gradient[at : at + _UPDATE_ROWS]
            rows = slice(start + at, start + at + len(piece))
            self._update_rows(rows if active is None else active[rows], piece)

    def _update_rows(self, rows: slice | torch.Tensor, gradient: torch.Tensor) -> None:
        """Makes a step of SGD with momentum and the L2 term in the gradient, as torch.optim.SGD; overwrites
        ``gradient``. Rows that were not sampled keep their momentum.
        """
        weight, stored = self.weight[rows], self.momentum[rows]
        momentum = stored.float()
        if self.config.max_grad_clip > 0:
            gradient.clamp_(-self.config.max_grad_clip, self.config.max_grad_clip)
        gradient.add_(weight, alpha=self.config.weight_decay)
        momentum.mul_(self.config.momentum).add_(gradient)
        weight.add_(momentum, alpha=-self.lr)
        if stored.dtype == torch.bfloat16:
            stored.copy_(_stochastic_bfloat16(momentum, self._noise))
        if not isinstance(rows, slice):  # copies, then
            self.weight[rows], self.momentum[rows] = weight, stored

    # ---- checkpoints

    @staticmethod
    def file_name(rank: int) -> str:
        """Returns the name of the file with a rank's rows in a checkpoint folder."""
        return f"class_centers_rank{rank}.pt"

    def state(self) -> dict:
        """Returns what :meth:`load` reads: this rank's rows and momentum, not copied."""
        return {"num_classes": self.num_classes, "draw": self._draw, "weight": self.weight, "momentum": self.momentum}

    def load(self, folder: Path, written_by: int) -> None:
        """Loads this rank's rows from a checkpoint folder that ``written_by`` ranks, any number, have written.

        The files are memory-mapped: what other ranks hold is not read.

        Raises:
            InputError: a rank's file is missing or damaged, or holds other class centers.
        """
        for rank in range(written_by):
            path = folder / self.file_name(rank)
            try:
                shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # on a damaged file the unpickler fails in any way there is
                raise InputError(
                    f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); give --resume "
                    "another checkpoint, or use --overwrite"
                ) from None
            if (shard["num_classes"], shard["weight"].shape[1]) != (self.num_classes, self.width):
                raise InputError(
                    f"{path}: holds class centers of {shard['num_classes']} identities, width "
                    f"{shard['weight'].shape[1]}, but this run has {self.num_classes}, width {self.width}; resume with "
                    "the data and --z_dim of the checkpoint"
                )
            first, last = rows_of(rank, written_by, self.num_classes)
            low, high = max(first, self.start), min(last, self.stop)
            if low < high:
                for name in ("weight", "momentum"):
                    getattr(self, name)[low - self.start : high - self.start] = shard[name][
                        low - first : high - first
                    ].to(self.weight.device)
            self._draw = shard["draw"]

    def export(self, path: Path, facts: dict) -> None:
        """Writes all rows as the published code has them, ``['arc_face_state_dict']['weight']``, beside ``facts``;
        collective.

        Rank 0 receives them in blocks and holds them in a memory-mapped file, so that they need disk, not memory. If it
        cannot write, it receives them all the same, so that no rank is left waiting, and raises at the end.

        Raises:
            OSError: on rank 0, the file could not be written.
        """
        for_all = problem = None
        rows_file = path.with_name(path.name + ".rows")
        if self.runtime.is_main:
            try:
                # On a full disk the mapping of a sparse file would be a fatal signal, not an error.
                rows_file.unlink(missing_ok=True)  # of a run that was killed, or a link
                with open(rows_file, "xb") as file:
                    os.posix_fallocate(file.fileno(), 0, 4 * self.num_classes * self.width)
            except OSError as error:
                problem = error
        if self.runtime.is_main and problem is None:
            for_all = torch.from_file(str(rows_file), shared=True, size=self.num_classes * self.width).view(
                self.num_classes, self.width
            )
        block = max(1, _EXPORT_BYTES // (4 * self.width))
        for rank in range(self.runtime.world_size):
            start, stop = rows_of(rank, self.runtime.world_size, self.num_classes)
            for low in range(start, stop, block):
                high = min(low + block, stop)
                if rank == self.runtime.rank:
                    rows = self.weight[low - start : high - start]
                    if rank:
                        dist.send(rows.contiguous(), 0)
                elif self.runtime.is_main:
                    rows = torch.empty(high - low, self.width, device=self.weight.device)
                    dist.recv(rows, rank)
                if for_all is not None:
                    for_all[low:high] = rows.cpu()
        try:
            if problem is not None:
                raise problem
            if for_all is not None:
                save_torch_file({"arc_face_state_dict": {"weight": for_all}, **facts}, path)
        finally:
            if self.runtime.is_main:
                rows_file.unlink(missing_ok=True)


def fuses(config: BackboneConfig, precision: str) -> bool:
    """Returns whether the class centers are updated in the backward pass: by default wherever they can be.

    With accumulation the gradients of several backward passes make one update, and with fp16 the engine says only after
    the backward pass whether its step counts.
    """
    possible = config.gradient_accumulation_steps == 1 and precision != "fp16"
    return possible if config.fused_center_update is None else config.fused_center_update


class _ShardedLoss(torch.autograd.Function):
    """The loss over all ranks as a function of this rank's features."""

    @staticmethod
    def forward(ctx, features, labels, selection, centers):
        config, world_size = centers.config, centers.runtime.world_size
        embeddings = _start_gather(features.float(), world_size)
        selection = selection or centers.select(labels)
        labels, local, rows = selection.labels, selection.position, selection.rows()
        embeddings = embeddings()
        smoothing = config.label_smoothing > 0
        own = margin_softmax_statistics(
            embeddings,
            centers.weight,
            local,
            config.scale,
            class_rows=rows,
            compute_dtype=centers.compute_dtype,
            with_cosine_sum=smoothing,
        )
        count = len(centers.weight) if rows is None else len(rows)
        whole, classes = _combine(own, count, world_size)
        leaves = [
            value.detach().requires_grad_() for value in (whole.log_sum_exp, whole.target_cosine, whole.cosine_sum)
        ]
        outside = (labels < -1) | (labels >= centers.num_classes)
        with torch.enable_grad():
            statistics = MarginSoftmaxStatistics(leaves[0], leaves[1], whole.nearest_other, leaves[2])
            per_row = margin_softmax_rows(
                statistics, classes, config.scale, config.margins, config.margin_gradient, config.label_smoothing
            )
            loss = mean_over_labeled(per_row, labels, outside)
            grads = torch.autograd.grad(loss, leaves if smoothing else leaves[:2])
        ctx.centers, ctx.rows, ctx.grads = centers, rows, grads
        ctx.save_for_backward(embeddings, local, leaves[0].detach())
        correct = (labels >= 0) & (whole.target_cosine > whole.nearest_other)
        mine = slice(centers.runtime.rank * len(features), (centers.runtime.rank + 1) * len(features))
        correct = correct[mine].clone()
        ctx.mark_non_differentiable(correct)
        return loss.detach(), correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        centers, rows, world_size = ctx.centers, ctx.rows, ctx.centers.runtime.world_size
        scattered = None
        embeddings, local, log_sum_exp = ctx.saved_tensors
        accumulation = centers.config.gradient_accumulation_steps

        def consume(start, stop, gradient):
            if centers.fused:
                centers._update(start, rows, gradient)
            else:
                block = slice(start, stop) if rows is None else rows[start:stop]
                centers._gradient[block] += gradient.div_(accumulation)
                if rows is not None:
                    centers._touched[block] = True

        def finish(gradient):
            nonlocal scattered
            scattered = _start_reduce_scatter(gradient, world_size)

        margin_softmax_gradients(
            embeddings,
            centers.weight,
            local,
            log_sum_exp,
            *ctx.grads,
            scale=centers.config.scale,
            finish=finish,
            consume=consume,
            class_rows=rows,
            compute_dtype=centers.compute_dtype,
            skip_below=centers.config.skip_below,
        )
        return scattered() * (grad_loss * world_size), None, None, None


def _combine(
    own: MarginSoftmaxStatistics, count: int, world_size: int
) -> tuple[MarginSoftmaxStatistics, int | torch.Tensor]:
    """Returns the statistics over the classes of all ranks, and the number of these classes."""
    if world_size == 1:
        return own, count
    highest = torch.stack([own.log_sum_exp, own.nearest_other])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    shift = highest[0].clamp_min(torch.finfo(highest.dtype).min)  # where no rank has another class
    sums = torch.stack(
        [torch.exp(own.log_sum_exp - shift), own.target_cosine, own.cosine_sum, torch.full_like(shift, count)]
    )
    dist.all_reduce(sums)
    return MarginSoftmaxStatistics(highest[0] + torch.log(sums[0]), sums[1], highest[1], sums[2]), sums[3]


# PyTorch 2.13 has new names for these and warns of the old ones in every call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _start_gather(local: torch.Tensor, world_size: int) -> Callable[[], torch.Tensor]:
    """Starts to gather; the function returned waits for all ranks' tensors, stacked along the first dimension."""
    if world_size == 1:
        return lambda: local
    local = local.contiguous()
    return _started(_all_gather, local.new_empty(world_size * len(local), *local.shape[1:]), local)


def _start_reduce_scatter(whole: torch.Tensor, world_size: int) -> Callable[[], torch.Tensor]:
    """Starts to add up over ranks; the function returned waits for this rank's part of the sum."""
    if world_size == 1:
        return lambda: whole
    return _started(_scatter_sums, whole.new_empty(len(whole) // world_size, *whole.shape[1:]), whole)


def _started(collective, output: torch.Tensor, source: torch.Tensor) -> Callable[[], torch.Tensor]:
    work = collective(output, source, async_op=True)  # it holds both tensors until it is done

    def wait():
        work.wait()
        return output

    return wait


def _stochastic_bfloat16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 to one of its two bfloat16 neighbors, to the nearer with the higher probability: right on average.
    Overwrites ``values``.

    Rounding to nearest would hold a momentum still once a step changes it by less than 1/512.
    """
    bits = values.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return (bits & -65536).view(torch.float32).bfloat16()
