"""Files of lines that a run adds to: one JSON object a line, or text. They survive a full disk and damage.

What cannot be written is kept in memory and written with the next line. Whoever reads such a file leaves out the lines
that are damaged, and counts them: one flipped bit must not cost the others.
"""

import contextlib
import errno
import json
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_MOST_PENDING = 100_000  # lines in memory; older ones are given up


class LineFile:
    """A file of lines that is added to.

    Args:
        path: a last line without an end, which a dead process has left, stays a line of its own.
        is_quiet: whether nobody is told that the disk is full: for the files of the log itself.
    """

    def __init__(self, path: Path, is_quiet: bool = False):
        self._file = open(path, "ab", buffering=0)  # a buffer would try again by itself, and write twice
        self._pending: deque[bytes] = deque(maxlen=_MOST_PENDING)
        self._size, self._warned, self._mid_line = self._file.tell(), is_quiet, not _ends_a_line(path)

    def add_line(self, line: str) -> None:
        """Adds a line, given without its end."""
        self._pending.append(line.encode(errors="backslashreplace") + b"\n")
        self._flush()

    def _flush(self) -> None:
        data = (b"\n" if self._mid_line and self._pending else b"") + b"".join(self._pending)
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            try:
                self._file.truncate(self._size)
            except OSError:
                self._mid_line = True
            if not self._warned:
                self._warned = True
                log.warning(
                    "%s: %s; its lines are kept in memory and written when there is room",
                    self._file.name,
                    error.strerror,
                )
            return
        self._pending.clear()
        self._size, self._mid_line = self._file.tell(), False

    def sync(self) -> None:
        """Waits until the lines are on the disk, as far as they can be."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is still in memory, if there is room now."""
        self._flush()
        self._file.close()


class StepLines(LineFile):
    """JSON objects with a ``step``."""

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        self.add_line(json.dumps(record))


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _step(line: bytes) -> int | None:
    """Returns the step of a line; None for a damaged one."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def read_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the records of a file of :class:`StepLines`, and how many lines are left out because they are damaged."""
    with open(path, "rb") as file:
        lines = list(file)
    intact = [json.loads(line) for line in lines if _step(line) is not None]
    return intact, len(lines) - len(intact)


def forget_after(path: Path, step: int) -> None:
    """Drops what follows the last line of an earlier step, or of this one, from a file of :class:`StepLines`: a run
    that died had made it after its last checkpoint, and makes it again.

    Damaged lines before that stay as they are; the log counts them.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        place = kept = damaged = kept_damaged = 0
        for line in file:
            place += len(line)
            found = _step(line)
            damaged += found is None
            if found is not None and found <= step:
                kept, kept_damaged = place, damaged
        file.truncate(kept)
    if kept_damaged:
        log.warning("%s: %d damaged lines are left out by whoever reads it", path, kept_damaged)


class LineHandler(logging.Handler):
    """Writes log records into a :class:`LineFile`."""

    def __init__(self, path: Path):
        super().__init__()
        self._lines = LineFile(path, is_quiet=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.add_line(self.format(record))
        except Exception:  # as every handler: the log ends no run
            self.handleError(record)

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()
        super().close()
