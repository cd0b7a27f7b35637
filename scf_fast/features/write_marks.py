"""Who writes to a feature cache: marks of living processes, told from those that dead ones have left.

A mark, ``writing-R`` of rank R, is a file that its process keeps locked; the system unlocks it when that process ends,
however it does. On a file system without locks every mark counts as left by a dead one.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from scf_fast.errors import InputError

_MAKING = 60.0  # seconds that another process is given to make the files of a cache
_PAUSE = 0.1


class WriteMark:
    """The mark of one rank."""

    def __init__(self, folder: Path, rank: int):
        self._folder, self._path = folder, folder / f"writing-{rank}"
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Marks the cache.

        Raises:
            InputError: another process has this mark.
        """
        self._file = open(self._path, "ab")
        if _is_locked(self._file.fileno()):
            self._file.close()
            self._file = None
            raise _in_use(self._folder)

    def remove(self) -> None:
        """Takes the mark away."""
        self._path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
            self._file = None


def dead_marks(folder: Path) -> list[Path]:
    """Returns the marks that dead processes have left.

    Raises:
        InputError: a living process has one.
    """
    found = []
    for path in folder.glob("writing-*"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if _is_locked(file.fileno()):
                raise _in_use(folder)
            found.append(path)
    return found


def is_marked(folder: Path) -> bool:
    """Tells whether a run has the cache open for writing, or died while it had."""
    return any(folder.glob("writing-*"))


@contextlib.contextmanager
def only_maker(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes that would make its files too.

    Raises:
        InputError: another process takes longer than a minute for it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _MAKING
        while _is_locked(descriptor):
            if time.monotonic() > deadline:
                raise _in_use(folder)
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Tells whether another process has a file locked; locks it otherwise, as far as the file system has locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _in_use(folder: Path) -> InputError:
    return InputError(
        f"--feature_cache {folder}: another run is writing to it; wait for its end, or give another folder (a complete "
        "cache can be read by several runs at once)"
    )
