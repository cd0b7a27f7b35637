"""state.json of a checkpoint: the progress of the run, and size and CRC-32 of every other file.

The file has a CRC-32 of its own, over its content in a canonical form, so that spaces do not matter. Older versions
wrote none; theirs is read too. In either case every entry is checked for what it can be: a flipped bit must not turn
into another step, another file or another schedule.
"""

import dataclasses
import json
import logging
import math
import os
import re
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scf_fast.engine.class_centers import ClassCenters
from scf_fast.pipelines.formats.atomic_file import write_json

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
_READ_BYTES = 1 << 24
_CHECKSUM, _FILES = "crc32", "files"
_MOST_BYTES = 1 << 26  # of the file: 500,000 ranks
_TAG = re.compile(r"step(\d{8}|[1-9]\d{8,})")
_OBJECTIVES_MOST = 16

Fingerprint = list[int]  # bytes and CRC-32 of a file


class DamagedStateError(ValueError):
    """A state.json that cannot be used; the message says why, without the file's name."""


def tag_of(step: int) -> str:
    """Returns the name of the checkpoint of a step."""
    return f"step{step:08d}"


def step_of(name: str) -> int | None:
    """Returns the step of a checkpoint's name; None for a name that is none, which is no folder of ours."""
    found = _TAG.fullmatch(name)
    return int(found[1]) if found else None


def rank_file(rank: int) -> str:
    """Returns the name of a rank's pieces."""
    return f"rank{rank}.pt"


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


def _is_count(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: Any, is_entry: Any, lengths: range) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(is_entry, value))


_CHECKS: dict[str, Any] = {
    "step": _is_count,
    "schedule": lambda value: isinstance(value, dict),
    "num_classes": _is_count,
    "num_images": _is_count,
    "metric": lambda value: value is None or _is_number(value),
    "epoch_loss": lambda value: _is_list(value, _is_number, range(2, 4)),
    "world_size": lambda value: _is_count(value) and value > 0,
    "zero_stage": lambda value: _is_count(value, 3),
    "objective": lambda value: (
        value is None or _is_list(value, lambda entry: isinstance(entry, str), range(1, _OBJECTIVES_MOST))
    ),
    "patience": lambda value: value is None or _is_list(value, _is_number, range(2, 3)),
    "slope": lambda value: value is None or isinstance(value, str),
}
_OPTIONAL = {field.name for field in dataclasses.fields(RunState) if field.default is None}


@dataclass(frozen=True)
class SavedState:
    """A state.json that has been read and checked.

    Attributes:
        files: bytes and CRC-32 of every other file, by its name.
        has_checksum: False of an older version's file, of which a wrong number may go unnoticed.
    """

    state: RunState
    files: dict[str, Fingerprint]
    has_checksum: bool


def write_state(folder: Path, state: RunState, files: dict[str, Fingerprint]) -> None:
    """Writes state.json, with which a checkpoint is complete.

    Raises:
        OSError: it cannot be written.
    """
    content = json.loads(json.dumps({**dataclasses.asdict(state), _FILES: files}))  # as it will be read
    write_json(folder / STATE_FILE, {**content, _CHECKSUM: _checksum(content)}, indent=1)


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def read_state(folder: Path) -> SavedState:
    """Reads and checks state.json.

    Raises:
        OSError: it cannot be read.
        DamagedStateError: it is not what was written, or not of this folder.
    """
    path = folder / STATE_FILE
    facts = os.lstat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise DamagedStateError(f"{STATE_FILE} is no regular file")
    if facts.st_size > _MOST_BYTES:
        raise DamagedStateError(f"{STATE_FILE} has {facts.st_size} bytes, more than any that is written")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedStateError(f"{STATE_FILE} is no JSON") from None
    if not isinstance(content, dict):
        raise DamagedStateError(f"{STATE_FILE} has no entries")
    checksum = content.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(content):
        raise DamagedStateError(f"{STATE_FILE} has other entries than were written")
    files = content.pop(_FILES, None)
    for name, check in _CHECKS.items():
        if name not in content and name in _OPTIONAL:
            content[name] = None
        elif name not in content or not check(content[name]):
            raise DamagedStateError(f"{STATE_FILE} has no {name}" if name not in content else _wrong(name))
    unknown = sorted(content.keys() - _CHECKS.keys())
    if unknown:
        raise DamagedStateError(f"{STATE_FILE} has an entry {unknown[0]!r}, which this version does not know")
    state = RunState(**content)
    if tag_of(state.step) != folder.name:
        raise DamagedStateError(f"{STATE_FILE} is of step {state.step}")
    _check_files(files, state.world_size)
    return SavedState(state, files, checksum is not None)


def _wrong(name: str) -> str:
    return f"{name} in {STATE_FILE} is none"


def _check_files(files: Any, world_size: int) -> None:
    """
    Raises:
        DamagedStateError: these are not the files of that many ranks: no other name is ever opened.
    """
    if not isinstance(files, dict) or not all(
        _is_list(entry, _is_count, range(2, 3)) and entry[1] < 1 << 32 for entry in files.values()
    ):
        raise DamagedStateError(_wrong(_FILES))
    if len(files) not in (world_size, 2 * world_size):  # before names of a wrong number of ranks are made
        raise DamagedStateError(f"{STATE_FILE} has {len(files)} files of {world_size} ranks")
    ranks = [rank_file(rank) for rank in range(world_size)]
    centers = [ClassCenters.file_name(rank) for rank in range(world_size)]
    if files.keys() not in (set(ranks), {*ranks, *centers}):
        foreign = sorted(files.keys() - {*ranks, *centers}) or sorted({*ranks, *centers} - files.keys())
        raise DamagedStateError(f"{STATE_FILE} has other files than those of {world_size} ranks: {foreign[0]!r}")


def fingerprint_of(path: Path, read: Callable[[int], object] = lambda count: None) -> Fingerprint:
    """Returns [bytes, CRC-32] of a file; calls ``read`` with the number of bytes of each piece."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
            read(len(block))
    return [size, checksum]


def read_intact(folder: Path) -> RunState:
    """Returns the state of a checkpoint, all files of which have been compared with it.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not as it was written; the message says which, and what is wrong.
    """
    saved = read_state(folder)
    for name, fingerprint in saved.files.items():
        facts = os.lstat(folder / name)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{name} is no regular file")
        if facts.st_size != fingerprint[0]:
            raise ValueError(f"{name} has {facts.st_size} bytes, not {fingerprint[0]}")
        if fingerprint_of(folder / name) != fingerprint:
            raise ValueError(f"{name} has other bytes than were written")
    if not saved.has_checksum:
        log.info(
            "checkpoint %s is of an older version, without a checksum of its numbers; its files are intact", folder.name
        )
    return saved.state
