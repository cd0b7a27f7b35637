"""Durable file writing for the whole project: a file appears complete under its name, or not at all.

    atomic_output(path)                    context manager: a binary file to write into
    atomic_path(path)                      context manager: a path, for libraries that open the file themselves
    folder_aside(path)                     context manager: a folder beside it, for what becomes several files
    write_bytes, write_text, write_json    the whole content at once
    publish(aside, path)                   gives a file that was finished elsewhere its name

All of them write aside, flush, sync the file, rename it, and sync its folder: after a power failure there is the old
file or the new one. On any exception what was written aside is removed. An ``OSError`` names the file that was to be
written.

The file aside is new, ``.NAME.RANDOM.part`` in the same folder: no link that somebody has planted is followed. It is
locked while it is written, so that what a killed process has left can be told from what a living one is writing:

    remove_leftovers(folder, name)   removes the former; done for a file before it is written durably
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scf_fast.pipelines.aliases import StrPath

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some file systems and folders do not offer it
_LONGEST_NAME, _TOKEN_BYTES = 200, 6
_ASIDE = re.compile(  # older versions had the number of the process
    rf"\.(?P<name>.*)\.(?:(?P<token>[0-9a-f]{{{2 * _TOKEN_BYTES}}})|\d+)\.part", re.DOTALL
)
_DAY = 24 * 3600.0
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
    with _set_aside(path, sync) as (_, descriptor), open(descriptor, "wb", closefd=False) as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Gives a path beside ``path``, for a library that opens and closes the file itself; see :func:`atomic_output`."""
    with _set_aside(path, sync=True) as (aside, _):
        yield aside
        _sync(aside)


def write_bytes(path: StrPath, content: bytes | bytearray | memoryview, sync: bool = True) -> None:
    """Writes a file; see :func:`atomic_output`."""
    with atomic_output(path, sync) as file:
        file.write(content)


def write_text(path: StrPath, text: str) -> None:
    """Writes a text file in UTF-8 with its line ends as they are; see :func:`atomic_output`. Bytes of file names that
    are not UTF-8, as os.fsdecode keeps them, are written as they were.
    """
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_json(path: StrPath, value: Any, *, indent: int | None = None, end: str = "", allow_nan: bool = True) -> None:
    """Writes a JSON file that ends in ``end``; see :func:`atomic_output` and ``json.dumps``."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + end)


def publish(aside: StrPath, path: StrPath) -> None:
    """Gives a finished file the name ``path`` on the same file system, once its bytes are on the disk."""
    _sync(aside)
    os.replace(aside, path)
    _sync_folder(Path(path).parent)


def remove_leftovers(folder: StrPath, name: str | None = None) -> int:
    """Removes what killed processes have left of files written aside, and returns how many there were.

    Args:
        name: of the file that they were to become; None: any.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _ASIDE.fullmatch(entry.name)
            if found and (name is None or found["name"] == _shortened(name)):
                removed += _remove_if_left(entry.path, found["token"] is None)
    return removed


@contextlib.contextmanager
def folder_aside(path: StrPath) -> Iterator[Path]:
    """Makes a locked folder beside ``path``, which must have a parent; it is removed after the block, and by whoever
    writes ``path`` next where this process is killed in it.

    Raises:
        OSError: it cannot be made; names ``path``.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    aside = _aside(path)
    try:
        aside.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def _remove_if_left(path: str, is_unlocked: bool) -> bool:
    """Removes a file or folder that nobody is writing; of an older version, which locked none, a file of a day ago."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        facts = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(facts.st_mode) and not is_unlocked  # of folder_aside, which older versions had not
        is_file = stat.S_ISREG(facts.st_mode) and not (is_unlocked and time.time() - facts.st_mtime < _DAY)
        if not is_folder and not is_file:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_folder:
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError:  # somebody is writing it, or the file system has no locks: it stays
        return False
    finally:
        os.close(descriptor)
    return True


def _shortened(name: str) -> str:
    """Returns as much of a name as leaves room, in the 255 bytes of a name, for what is added to it."""
    return os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])


def _aside(path: Path) -> Path:
    """Returns a new name beside a path."""
    return path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(_TOKEN_BYTES)}.part")


def _new_aside(path: Path) -> tuple[Path, int]:
    """Makes a locked file beside ``path``, with the permissions that the umask gives; returns it open for writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    while True:
        aside = _aside(path)
        try:
            descriptor = os.open(aside, flags, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return aside, descriptor


@contextlib.contextmanager
def _set_aside(path: StrPath, sync: bool) -> Iterator[tuple[Path, int]]:
    path, aside, descriptor = Path(path), Path(), -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sync:
            remove_leftovers(path.parent, path.name)
        aside, descriptor = _new_aside(path)
        yield aside, descriptor
        os.replace(aside, path)
        if sync:
            _sync_folder(path.parent)
    except Exception as error:
        cause = _os_error_behind(error)
        if cause is None or (cause.filename is not None and os.fspath(cause.filename) != os.fspath(aside)):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # its folder is gone, for one: that has been raised already
                aside.unlink(missing_ok=True)
            os.close(descriptor)


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
