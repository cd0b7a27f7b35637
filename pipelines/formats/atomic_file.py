"""Durable file writing for the whole project: a file appears complete under its name, or not at all.

    atomic_output(path)                    context manager: a binary file to write into
    atomic_path(path)                      context manager: a path, for libraries that open the file themselves
    write_bytes, write_text, write_json    the whole content at once
    aside_folder(path)                     context manager: a folder beside path, for what becomes several files
    publish(aside, path)                   gives a file that was finished elsewhere its name

All of them write aside, flush, sync the file, rename it, and sync its folder: after a power failure there is the old
file or the new one. On any exception what was written aside is removed. An ``OSError`` names the file that was to be
written. What a killed process has left aside is removed by the next one that writes into the folder, an hour later.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scf_fast.pipelines.aliases import StrPath

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some file systems and folders do not offer it
_ASIDE = re.compile(r"\..+\.(\d+)\.part")
_ABANDONED = 3600.0  # seconds
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def atomic_output(path: StrPath, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a binary, seekable file beside ``path``; on success it takes that name, on an exception it is removed.

    Args:
        path: replaced if it exists. Missing parent folders are created.
        sync: wait until the bytes are on the disk. False for many small files that can be made again: syncing each
            would take a hundred times as long.
    Raises:
        OSError: the file cannot be written, for instance because the disk is full; names ``path``.
    """
    with _set_aside(path, sync) as aside, open(aside, "wb") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Gives a path beside ``path``, for a library that opens and closes the file itself; see :func:`atomic_output`."""
    with _set_aside(path, sync=True) as aside:
        yield aside
        _sync(aside)


@contextlib.contextmanager
def aside_folder(path: StrPath) -> Iterator[Path]:
    """Makes an empty folder beside ``path`` that goes away at the end; missing parent folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path.parent)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: StrPath, content: bytes | bytearray | memoryview, sync: bool = True) -> None:
    """Writes a file; see :func:`atomic_output`."""
    with atomic_output(path, sync) as file:
        file.write(content)


def write_text(path: StrPath, text: str) -> None:
    """Writes a text file in UTF-8 with its line ends as they are; see :func:`atomic_output`."""
    write_bytes(path, text.encode())


def write_json(path: StrPath, value: Any, *, indent: int | None = None, end: str = "", allow_nan: bool = True) -> None:
    """Writes a JSON file that ends in ``end``; see :func:`atomic_output` and ``json.dumps``."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + end)


def publish(aside: StrPath, path: StrPath) -> None:
    """Gives a finished file the name ``path`` on the same file system, once its bytes are on the disk."""
    _sync(aside)
    os.replace(aside, path)
    _sync_folder(Path(path).parent)


@contextlib.contextmanager
def _set_aside(path: StrPath, sync: bool) -> Iterator[Path]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if sync:  # not for each of many small files
        _remove_left_over(path.parent)
    aside = _aside(path)
    try:
        yield aside
        os.replace(aside, path)
        if sync:
            _sync_folder(path.parent)
    except Exception as error:
        cause = _os_error_behind(error)
        if cause is None or (cause.filename is not None and os.fspath(cause.filename) != os.fspath(aside)):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Returns the name of what becomes ``path``; the process id keeps ranks that write the same cache apart."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@functools.cache
def _remove_left_over(folder: Path) -> None:
    """Removes what processes that were killed have left aside in a folder, once a process.

    A process of that number may run on another machine that shares the disk; it would have written in the last hour.
    """
    found_aside: list[Path] = []
    with contextlib.suppress(OSError):
        found_aside += folder.glob(".*.part")
    for path in found_aside:
        found = _ASIDE.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if found and not _is_alive(int(found[1])) and path.lstat().st_mtime < time.time() - _ABANDONED:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _os_error_behind(error: Exception) -> OSError | None:
    """Returns the ``OSError`` that an exception is or stands for; None where there is none with a number."""
    cause: BaseException | None = error
    if isinstance(error, RuntimeError):
        cause = error.__context__  # torch.save goes on to close its archive, and that fails in turn
    elif type(error).__module__.startswith("safetensors"):
        found = _RUST_OS_ERROR.search(str(error))
        cause = found and OSError(int(found[1]), os.strerror(int(found[1])))
    return cause if isinstance(cause, OSError) and cause.errno is not None else None


def _sync(path: StrPath) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # of the file, whoever has written it


def _sync_folder(folder: Path) -> None:
    """Syncs the names in a folder, else a power failure could lose a new one and bring an older file back."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
