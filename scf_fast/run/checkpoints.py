"""Run checkpoints: one folder each, written by all ranks, complete or absent, read by any number of ranks and any ZeRO
stage.

    checkpoints/latest            name of the newest one
    checkpoints/step00001234/
        rank0.pt ...              each rank's pieces of weights and optimizer state, and its random state
        class_centers_rank0.pt    stage 1: each rank's rows
        state.json                step, schedule, layout, and size and CRC-32 of every other file; written last

The pieces are those of :mod:`scf_fast.engine.partitions`. A folder with a ``state.json`` is complete. Whether it is
intact is found by reading it, before a run starts from it.
"""

import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scf_fast.distributed import Runtime, all_ranks_agree
from scf_fast.engine import partitions
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.engine import Engine
from scf_fast.engine.partitions import Piece
from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import write_json, write_text
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads, Wait, result_of
from scf_fast.weights.files import save_torch_file

log = logging.getLogger(__name__)

_STATE = "state.json"
_LATEST = "latest"
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class RunState:
    """Progress of a run at a checkpoint, as state.json has it beside the files.

    Attributes:
        step: optimizer steps made.
        schedule: state of the learning rate.
        num_classes, num_images: of the data.
        metric: mean training loss of the epoch that ends here, or the loss of people held out; None elsewhere.
        epoch_loss: sum of the losses since the last epoch's end, their number, and steps that changed the weights.
        world_size, zero_stage: layout of the ranks that wrote it.
        objective: of stage 2, by the names in its options; None in stage 1 and of older versions, which had SCF alone.
        patience: lowest loss of people held out, and epochs since then; None where nobody waits for it.
        slope: of stage 2, as --slope has it; None in stage 1 and of older versions.
    """

    step: int
    schedule: dict[str, Any]
    num_classes: int
    num_images: int
    metric: float | None
    epoch_loss: list[float]
    world_size: int
    zero_stage: int
    objective: list[str] | None = None
    patience: list[float] | None = None
    slope: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """
        Raises:
            KeyError: an entry is missing that every version writes.
        """
        values = {"objective": None, "patience": None, "slope": None, **values}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to start from: its folder, named by its tag, and its state."""

    folder: Path
    state: RunState

    @property
    def tag(self) -> str:
        """The folder's name."""
        return self.folder.name

    def check_data(self, data: str, num_classes: int, num_images: int) -> None:
        """Checks that the data are still those that the checkpoint was trained on.

        Args:
            data: what the user named them with, for the message.
        Raises:
            InputError: they have other identities or images.
        """
        for what, before, now in (
            ("identities", self.state.num_classes, num_classes),
            ("images", self.state.num_images, num_images),
        ):
            if before != now:
                raise InputError(
                    f"--resume: the checkpoint was trained on {before} {what}, but --data {data} now has {now}; give "
                    "the data set of that run"
                )

    def check_objective(self, objective: Sequence[str]) -> None:
        """Checks that stage 2 goes on with what the checkpoint was trained for.

        Raises:
            InputError: it does not.
        """
        before = ",".join(self.state.objective or ["scf"])
        if before != ",".join(objective):
            raise InputError(
                f"--resume: the checkpoint was trained with --objective {before}, this is {','.join(objective)}; give "
                "that objective, or another --output_dir"
            )


class Checkpoints:
    """Writes a run's checkpoints; all methods are collective.

    Args:
        keep: number of the newest that stay.
        keep_best: whether the one with the lowest ``metric`` stays too.
        background: whether files are written while training goes on, from a copy of the state in host memory.
        timeout: seconds that writing may take without progress, see :mod:`scf_fast.pipelines.waiting`.
    Attributes:
        written: name of the newest complete checkpoint, equal on all ranks; None before the first.
        failed: whether the last one could not be written, equal on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        keep: int,
        keep_best: bool,
        background: bool,
        timeout: float = DEFAULT_TIMEOUT,
    ):
        self.folder, self.keep, self.keep_best = folder, keep, keep_best
        self.runtime, self.background = runtime, background
        self.written: str | None = None
        self.failed = False
        self._writer = DaemonThreads(1, "checkpoint")
        self._timeout, self._bytes_written = timeout, 0
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """True while a checkpoint waits for :meth:`finish`; equal on all ranks."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """True while this rank's files are not yet on the disk."""
        return self._pending is not None and not self._pending.future.done()

    def save(self, engine: Engine, state: RunState, centers: ClassCenters | None = None) -> None:
        """Takes the state of this moment; it is on the disk after :meth:`finish`, in the foreground after this call.

        Args:
            state: the same on all ranks.
        Raises:
            FloatingPointError: a weight is not finite: no run should ever resume from that.
        """
        self.finish()
        pieces = [
            Piece(name, start, {key: value.to("cpu", copy=True) for key, value in values.items()})
            for name, start, values in partitions.owned_pieces(engine)
        ]
        finite = all(  # NaN goes through aminmax
            bool(torch.stack(torch.aminmax(piece.values[partitions.WEIGHT])).isfinite().all()) for piece in pieces
        )
        if not all_ranks_agree(finite):
            raise FloatingPointError(
                f"step {state.step}: weights are not finite; --resume continues from {self.written or 'the start'}; "
                "lower --lr"
            )
        content: dict[str, Any] = {
            "pieces": [tuple(piece) for piece in pieces],
            "shared": partitions.shared_state(engine),
            "random": _random_state(),
        }
        if self.runtime.is_main:
            trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
            content["buffers"] = {
                name: value.to("cpu", copy=True)
                for name, value in engine.module.state_dict().items()
                if name not in trained
            }
        rows = None
        if centers is not None:
            rows = {
                name: value.to("cpu", copy=self.background) if torch.is_tensor(value) else value
                for name, value in centers.state().items()
            }
        tag = f"step{state.step:08d}"
        self._pending = _Pending(tag, state, self._writer.submit(self._write, tag, content, rows))
        if not self.background:
            self.finish()

    def _write(self, tag: str, content: dict[str, Any], rows: dict[str, Any] | None) -> None:
        folder, rank = self.folder / tag, self.runtime.rank
        folder.mkdir(parents=True, exist_ok=True)
        files = {_rank_file(rank): content}
        if rows is not None:
            files[ClassCenters.file_name(rank)] = rows
        for name, value in files.items():
            save_torch_file(value, folder / name, self._count)
        write_json(folder / f"rank{rank}.json", {name: _fingerprint(folder / name, self._count) for name in files})

    def _count(self, size: int) -> None:
        self._bytes_written += size

    def finish(self) -> None:
        """Waits until the last checkpoint is on every rank's disk, then makes it count: no other moment leaves a folder
        that is taken for complete.

        A disk that is full, or gone, is logged and remembered in ``failed``, and the half checkpoint deleted: the run
        goes on with the older ones.

        Raises:
            TimedOut: the disk takes nothing and says nothing.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        tag, state = pending.tag, pending.state
        wait = Wait(
            f"rank {self.runtime.rank}",
            f"the background writer of checkpoint {self.folder / tag}",
            self._timeout,
            lambda: self._bytes_written,
        )
        error: OSError | None = None
        try:
            result_of(pending.future, wait)
        except OSError as problem:
            error = problem
        complete = all_ranks_agree(error is None)
        if complete and self.runtime.is_main:
            try:
                self._complete(tag, state)
            except OSError as problem:
                error = problem
        complete = complete and all_ranks_agree(error is None)
        self.failed = not complete
        if error is not None:
            log.error(
                "checkpoint of step %d could not be written: %s; training goes on, a resume would start from %s",
                state.step,
                str(error).splitlines()[0],
                self.written or "the beginning",
                extra={"event": "checkpoint_failed", "step": state.step},
            )
        if complete:
            self.written = tag
        if self.runtime.is_main:
            if complete:
                self._prune()
            else:
                _delete(self.folder / tag)

    def _complete(self, tag: str, state: RunState) -> None:
        parts = [self.folder / tag / f"rank{rank}.json" for rank in range(self.runtime.world_size)]
        files = {name: fingerprint for part in parts for name, fingerprint in json.loads(part.read_text()).items()}
        write_json(self.folder / tag / _STATE, {**dataclasses.asdict(state), "files": files}, indent=1)
        write_text(self.folder / _LATEST, tag)
        for part in parts:
            part.unlink()
        log.info(
            "checkpoint: %s, %.2f GB",
            tag,
            sum(size for size, _ in files.values()) / 1e9,
            extra={"event": "checkpoint", "step": state.step},
        )

    def _prune(self) -> None:
        complete = _complete_ones(self.folder)
        kept = complete[: self.keep]
        if self.keep_best:
            metrics = {tag: _metric(self.folder / tag) for tag in complete}
            known = {tag: metric for tag, metric in metrics.items() if metric is not None}
            kept += sorted(known, key=known.__getitem__)[:1]
        for tag in complete:
            if tag not in kept:
                _delete(self.folder / tag)

    def resume_from(self, tag: str | None) -> None:
        """Clears away what a dead run has left after ``tag``: incomplete folders go, complete ones are set aside."""
        if self.runtime.is_main:
            for folder in self.folder.glob("step*"):
                if not (folder / _STATE).exists():
                    shutil.rmtree(folder)
                elif tag is None or folder.name > tag:
                    aside = folder.with_name(f"aside-{folder.name}")
                    log.warning(
                        "checkpoint %s, which this run does not start from, is now %s and can be deleted",
                        folder,
                        aside.name,
                    )
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
        self.written = tag
        dist.barrier()

    def close(self) -> None:
        """Ends the writing thread; :meth:`finish` has completed what was being written, or not."""
        self._writer.shutdown()


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    tag: str
    state: RunState
    future: Future[None]


def newest_intact(folder: Path) -> ResumePoint | None:
    """Returns the newest checkpoint whose every file is as it was written, of those up to ``latest``; None where there
    are none.

    Reads all of it, at 1 GB/s or more. Damaged ones are named in the log.

    Raises:
        InputError: there are checkpoints, all damaged.
    """
    complete = _complete_ones(folder)
    latest = folder / _LATEST
    named = latest.read_text().strip() if latest.exists() else ""
    problems = []
    for tag in [tag for tag in complete if named not in complete or tag <= named]:
        problem = _damage(folder / tag)
        if problem is None:
            return ResumePoint(folder / tag, RunState.from_json(_read_json(folder / tag)))
        log.warning(
            "checkpoint %s is damaged (%s); trying the one before it",
            folder / tag,
            problem,
            extra={"event": "checkpoint_damaged"},
        )
        problems.append(f"{tag}: {problem}")
    if problems:
        raise InputError(
            f"--resume: no checkpoint in {folder} is intact ({'; '.join(problems)}); --overwrite starts again"
        )
    return None


def load_weights(module: torch.nn.Module, point: ResumePoint) -> None:
    """Copies weights and buffers of a checkpoint into a module that no engine has divided yet."""
    ranks = _open(point)
    partitions.load_weights(module, _pieces(ranks), ranks[0]["buffers"])


def load(engine: Engine, point: ResumePoint, centers: ClassCenters | None = None) -> None:
    """Loads the rest of a checkpoint, into an engine made of a module that has its weights, and the class centers;
    collective.

    With as many ranks as wrote it, each goes on with its own random state; otherwise these start from the seed.
    """
    ranks, state = _open(point), point.state
    partitions.restore(engine, _pieces(ranks), ranks[0]["shared"], state.step)
    if state.world_size == dist.get_world_size():
        random = ranks[dist.get_rank()]["random"]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    else:
        torch.manual_seed(torch.initial_seed() + state.step)
    if centers is not None:
        centers.load(point.folder, state.world_size)


def _rank_file(rank: int) -> str:
    return f"rank{rank}.pt"


def _open(point: ResumePoint) -> list[dict[str, Any]]:
    """Returns all ranks' files, memory-mapped: what this rank does not need is not read."""
    return [
        torch.load(point.folder / _rank_file(rank), map_location="cpu", mmap=True, weights_only=True)
        for rank in range(point.state.world_size)
    ]


def _pieces(ranks: list[dict]) -> list[Piece]:
    return [Piece(*piece) for content in ranks for piece in content["pieces"]]


def _random_state() -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}


def _complete_ones(folder: Path) -> list[str]:
    """Returns the tags of the complete checkpoints, newest first."""
    return sorted((path.parent.name for path in folder.glob(f"step*/{_STATE}")), reverse=True)


def _read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _STATE).read_text())


def _metric(folder: Path) -> float | None:
    """Returns the metric of a complete checkpoint; None too where it is damaged."""
    try:
        return _read_json(folder)["metric"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _delete(folder: Path) -> None:
    """Deletes a checkpoint as far as can be; one that cannot be deleted is no reason to end a run."""
    try:
        # First, so that what an interrupted deletion leaves is not taken for complete.
        (folder / _STATE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        log.warning("checkpoint %s could not be deleted: %s", folder, error)


def _fingerprint(path: Path, read: Callable[[int], object] = lambda count: None) -> list[int]:
    """Returns [bytes, CRC-32] of a file; calls ``read`` with the number of bytes of each piece."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
            read(len(block))
    return [size, checksum]


def _damage(folder: Path) -> str | None:
    """Returns what is wrong with a complete checkpoint; None if nothing is."""
    try:
        content = _read_json(folder)
        RunState.from_json(content)
        for name, fingerprint in content["files"].items():
            if os.path.getsize(folder / name) != fingerprint[0]:
                return f"{name} has {os.path.getsize(folder / name)} bytes, not {fingerprint[0]}"
            if _fingerprint(folder / name) != fingerprint:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return None
