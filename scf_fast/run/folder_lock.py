"""The lock of a run's folder: one run at a time writes to it, on whichever machine.

    OUTPUT/.lock               who holds it: host, process, when it began; its date moves on every few seconds
    OUTPUT/.lock-TOKEN-taken   who took it over from the dead holder with this token

A lock is taken by linking a finished file to the name, which only one can do, on NFS too, where ``flock`` may be
missing or be kept by a host that is gone. A holder on this machine is dead if there is no process with its number and
start time; one on another machine is dead if the date of its file stands still, by this machine's own clock. The lock
of a dead holder is not deleted but taken over, by a link to a name that belongs to that holder alone: of several that
find it dead only one can.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scf_fast.errors import InputError

log = logging.getLogger(__name__)
_leave, _LOST = os._exit, 1  # nothing may be written any more

PREFIX = ".lock"  # of every file here
PATIENCE = 15.0  # seconds that a holder may take to end; workers of a run that was killed notice within 5
_BEAT_SECONDS = 5.0
_DEAD_SECONDS = 30.0  # without a beat
_POLL_SECONDS = 0.5
_READ_TRIES = 20  # of a file that is just being written, where there are no links
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """The contents of a lock's file.

    Attributes:
        machine: boot and process namespace, within which a process number means something.
        process_start: in ticks since the boot: a number that is used again has another.
        since: local time, for people.
    """

    token: str
    host: str
    pid: int
    machine: str
    process_start: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Returns an entry with a new token."""
        return cls(
            secrets.token_hex(8),
            socket.gethostname(),
            os.getpid(),
            _machine(),
            _process_start(os.getpid()) or 0,
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_running(self) -> bool | None:
        """Returns whether the process is there; None where this machine cannot know."""
        if not self.machine or self.machine != _machine():
            return None
        return _process_start(self.pid) == self.process_start


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """Returns when a process began, in ticks since the boot; None where there is none, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextlib.contextmanager
def locked(folder: Path) -> Iterator["FolderLock"]:
    """Holds the lock of a folder, which is there.

    Raises:
        InputError: another run holds it, and does not end within 15 seconds.
        OSError: the folder cannot be written.
    """
    lock = FolderLock(folder)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


class FolderLock:
    """The lock of one folder; see the module. Made by :func:`locked`.

    Attributes:
        lost_to: who has taken the lock though this process lives; None as long as it is held.
    """

    def __init__(self, folder: Path):
        self.folder, self.own = folder, Holder.of_this_process()
        self.lost_to: Holder | None = None
        self._path = folder / PREFIX
        self._file = folder / f"{PREFIX}-{self.own.token}"  # the finished file that is linked to the name
        self._held = self._path  # the name that it was linked to
        self._handle = -1
        self._flock = -1
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="folder-lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock."""
        began = time.monotonic()
        self._file.write_text(json.dumps(asdict(self.own)))
        try:
            seen: dict[str, tuple[int, float]] = {}  # token: date of the file, and since when it is that
            spoken = False
            while not self._try_to_take(seen):
                holder = self._holder()
                waited = time.monotonic() - began
                if holder is not None and waited > PATIENCE and not self._may_be_dead(holder, seen):
                    raise InputError(_message(self.folder, holder))
                if waited > PATIENCE + 2 * _DEAD_SECONDS:
                    raise InputError(_message(self.folder, holder))
                if holder is not None and not spoken and waited > 1:
                    spoken = True
                    log.info("--output_dir %s: waiting whether %s still writes to it", self.folder, holder)
                time.sleep(_POLL_SECONDS)
            self._wait_for_flock(began)
        except BaseException:
            self._file.unlink(missing_ok=True)
            raise
        self._handle = os.open(self._held, os.O_WRONLY)
        self._file.unlink()  # its other name stays
        self._beats.start()

    def _may_be_dead(self, holder: Holder, seen: dict[str, tuple[int, float]]) -> bool:
        """Returns whether nobody knows yet if a holder lives: it is elsewhere, and its date has not moved so far."""
        return holder.is_running() is None and holder.token in seen and seen[holder.token][1] > 0

    def _try_to_take(self, seen: dict[str, tuple[int, float]]) -> bool:
        if self._publish(self._path):
            return True
        chain = self._chain()
        if not chain or not self._is_dead(*chain[-1], seen):
            return False
        dead, _ = chain[-1]
        taken = self._taken(dead.token)
        if not self._publish(taken):
            return False  # another one was faster
        chain = self._chain()
        if chain and chain[-1][0].token == self.own.token:
            log.warning("--output_dir %s: its lock was left by %s, which is dead; taken over", self.folder, dead)
            return True
        taken.unlink(missing_ok=True)  # the holder was released and its lock is gone, or another's
        return False

    def _publish(self, path: Path) -> bool:
        """Gives the finished file a name; returns whether that was free."""
        self._held = path
        try:
            os.link(self._file, path)
            return True
        except FileExistsError:
            return os.stat(self._file).st_nlink > 1  # NFS may lose the answer and repeat the question
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        try:
            with open(path, "x") as file:
                file.write(json.dumps(asdict(self.own)))
            return True
        except FileExistsError:
            return False

    def _taken(self, token: str) -> Path:
        return self.folder / f"{PREFIX}-{token}-taken"

    def _chain(self) -> list[tuple[Holder, int]]:
        """Returns the lock's first holder, who took it over from it, and so on, with the dates of their files."""
        found: list[tuple[Holder, int]] = []
        path = self._path
        while True:
            for last in (False,) * _READ_TRIES + (True,):
                try:
                    with open(path) as file:
                        found.append((Holder(**json.load(file)), os.fstat(file.fileno()).st_mtime_ns))
                    break
                except FileNotFoundError:
                    return found
                except (ValueError, TypeError):
                    if last:
                        raise InputError(f"{path}: is damaged; delete it if no run writes to {self.folder}") from None
                    time.sleep(_POLL_SECONDS / 5)
            path = self._taken(found[-1][0].token)

    def _holder(self) -> Holder | None:
        chain = self._chain()
        return chain[-1][0] if chain else None

    def _is_dead(self, holder: Holder, date: int, seen: dict[str, tuple[int, float]]) -> bool:
        running = holder.is_running()
        if running is not None:
            return not running
        now = time.monotonic()
        if holder.token not in seen:
            seen[holder.token] = (date, now)
        elif seen[holder.token][0] != date:
            seen[holder.token] = (date, -1.0)  # it has moved: alive
        since = seen[holder.token][1]
        return since > 0 and now - since > _DEAD_SECONDS

    def _wait_for_flock(self, began: float) -> None:
        """Takes the folder's ``flock`` too, which older versions of this program hold, and which workers of a dead run
        hold for some seconds. A dead host's may stay forever: where the file's holder was dead it is no reason to wait
        longer.
        """
        self._flock = os.open(self.folder, os.O_RDONLY)
        while True:
            try:
                fcntl.flock(self._flock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() - began > PATIENCE:
                    if self._holder_path_is_taken():
                        return
                    self._drop()
                    raise InputError(_message(self.folder, None)) from None
                time.sleep(_POLL_SECONDS)
            except OSError:  # a file system without locks
                return

    def _holder_path_is_taken(self) -> bool:
        return len(self._chain()) > 1

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError, InputError):  # a disk that is full or away for a while
                os.utime(self._handle)
                holder = self._holder()
                if holder is not None and holder.token != self.own.token and self.lost_to is None:
                    self.lost_to = holder
                    log.critical(
                        "--output_dir %s: this process stood still, and %s has taken its place; it ends here",
                        self.folder,
                        holder,
                    )
                    _leave(_LOST)

    def release(self) -> None:
        """Gives the lock back."""
        self._released.set()
        self._beats.join(_BEAT_SECONDS)
        if self.lost_to is None:
            self._drop()
        if self._handle >= 0:
            os.close(self._handle)
        if self._flock >= 0:
            os.close(self._flock)

    def _drop(self) -> None:
        """Deletes the lock's files: the end of the chain last, so that nobody finds a dead holder at its end."""
        with contextlib.suppress(OSError, InputError):
            chain = self._chain()
            if chain and chain[-1][0].token == self.own.token:
                # Nobody takes over from a holder who is alive, so the first name can go at once.
                self._path.unlink(missing_ok=True)
                for holder, _ in chain:
                    self._taken(holder.token).unlink(missing_ok=True)


def _message(folder: Path, holder: Holder | None) -> str:
    if holder is None:
        return (
            f"--output_dir {folder}: another process holds the folder, an older version of this program or a worker of "
            f"a run that was killed{_named(folder)}; wait for its end"
        )
    return (
        f"--output_dir {folder}: another run is writing to it: {holder}; wait for its end, or stop it there: kill "
        f"{holder.pid}"
    )


def _named(folder: Path) -> str:
    """Returns the processes of this machine that hold the folder's ``flock``, in words."""
    with contextlib.suppress(OSError, ValueError):
        node, found = os.stat(folder).st_ino, []
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
            if "FLOCK" in fields and "->" not in fields and fields[5].rpartition(":")[2] == str(node):
                found.append(fields[4])
        if found:
            return f" (process {', '.join(found)} on {socket.gethostname()})"
    return ""
