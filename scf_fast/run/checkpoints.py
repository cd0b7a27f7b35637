"""Run checkpoints: one folder each, written by all ranks, complete or absent, read by any number of ranks and any ZeRO
stage.

    checkpoints/latest            name of the newest one
    checkpoints/step00001234/
        rank0.pt ...              each rank's pieces of weights and optimizer state, and its random state
        class_centers_rank0.pt    stage 1: each rank's rows
        state.json                see :mod:`scf_fast.run.run_state`; written last

The pieces are those of :mod:`scf_fast.engine.partitions`. A folder with a ``state.json`` is complete. Whether it is
intact is found by reading it, before a run starts from it. Folders of any other name are nobody's business here.
"""

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
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
from scf_fast.run.run_state import (
    STATE_FILE,
    DamagedStateError,
    RunState,
    fingerprint_of,
    rank_file,
    read_intact,
    read_state,
    step_of,
    tag_of,
    write_state,
)
from scf_fast.weights.files import save_torch_file

log = logging.getLogger(__name__)

_LATEST = "latest"
_LATEST_MOST_BYTES = 1 << 10
_OURS = re.compile(r"(class_centers_)?rank\d+\.(pt|json)|.*\.part")  # names in a half-written checkpoint


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
        tag = tag_of(state.step)
        self._pending = _Pending(tag, state, self._writer.submit(self._write, tag, content, rows))
        if not self.background:
            self.finish()

    def _write(self, tag: str, content: dict[str, Any], rows: dict[str, Any] | None) -> None:
        folder, rank = self.folder / tag, self.runtime.rank
        folder.mkdir(exist_ok=True)  # in a folder that is there: it is not made anew where a disk was
        files = {rank_file(rank): content}
        if rows is not None:
            files[ClassCenters.file_name(rank)] = rows
        for name, value in files.items():
            save_torch_file(value, folder / name, self._count)
        write_json(folder / f"rank{rank}.json", {name: fingerprint_of(folder / name, self._count) for name in files})

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
        write_state(self.folder / tag, state, files)
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
        """Clears away what a dead run has left, see :func:`clear_away`."""
        if self.runtime.is_main:
            clear_away(self.folder, tag)
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
    named = _read_latest(folder)
    problems = []
    for tag in complete[complete.index(named) if named in complete else 0 :]:
        try:
            return ResumePoint(folder / tag, read_intact(folder / tag))
        except (OSError, ValueError) as error:
            problem = str(error) if isinstance(error, ValueError) else f"{error.filename}: {error.strerror}"
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


def clear_away(folder: Path, tag: str | None) -> None:
    """Clears away what a dead run has left after the checkpoint that the next one starts from: half-written ones go;
    complete ones, and folders that have anything else in them, are set aside.

    Args:
        tag: None: the run starts anew.
    """
    start = -1 if tag is None else int(tag.removeprefix("step"))
    for step, path in sorted(_folders(folder)):
        is_complete = (path / STATE_FILE).exists()
        if not is_complete and all(_OURS.fullmatch(file.name) for file in path.iterdir()):
            shutil.rmtree(path)
        elif step > start or not is_complete:
            aside = _free_name(path.with_name(f"aside-{path.name}"))
            log.warning(
                "checkpoint %s, which this run does not start from, is now %s and can be deleted", path, aside.name
            )
            path.rename(aside)


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


def _open(point: ResumePoint) -> list[dict[str, Any]]:
    """Returns all ranks' files, memory-mapped: what this rank does not need is not read."""
    return [
        torch.load(point.folder / rank_file(rank), map_location="cpu", mmap=True, weights_only=True)
        for rank in range(point.state.world_size)
    ]


def _pieces(ranks: list[dict]) -> list[Piece]:
    return [Piece(*piece) for content in ranks for piece in content["pieces"]]


def _random_state() -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}


def _folders(folder: Path) -> list[tuple[int, Path]]:
    """Returns step and folder of all checkpoints, complete or not; other names, files and links are not ours."""
    found = [(step_of(path.name), path) for path in folder.glob("step*") if path.is_dir() and not path.is_symlink()]
    return [(step, path) for step, path in found if step is not None]


def _complete_ones(folder: Path) -> list[str]:
    """Returns the tags of the complete checkpoints, newest first."""
    found = [(step, path.name) for step, path in _folders(folder) if (path / STATE_FILE).exists()]
    return [tag for _, tag in sorted(found, reverse=True)]


def _read_latest(folder: Path) -> str:
    """Returns what ``latest`` names; "" where there is no such file, or it is no text."""
    try:
        with open(folder / _LATEST, "rb") as file:
            return file.read(_LATEST_MOST_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _metric(folder: Path) -> float | None:
    """Returns the metric of a complete checkpoint; None too where it is damaged."""
    try:
        return read_state(folder).state.metric
    except (OSError, DamagedStateError):
        return None


def _free_name(path: Path) -> Path:
    """Returns the path, with a number behind it if something has that name."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _delete(folder: Path) -> None:
    """Deletes a checkpoint as far as can be; one that cannot be deleted is no reason to end a run."""
    try:
        # First, so that what an interrupted deletion leaves is not taken for complete.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        log.warning("checkpoint %s could not be deleted: %s", folder, error)
