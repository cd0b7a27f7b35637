"""Faults of ``bench.chaos`` that come from the machine: processes that die or stand still, and disks.

Disks are real ones, mounted for the time of the fault: a tmpfs, of a size or with a number of files, or ext4 in a file.
That needs root; :func:`can_mount` tells whether there is.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.robustness.faults import Chaos, Job, kill_all, wait_until

_STANDS_STILL = 10  # --timeout of a launch in which a rank is stopped
_ENDS_WITHIN = 90.0  # seconds: the launcher kills the stopped rank 30 s later
_DISK_BYTES = 64 << 20


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def _unmount(folder: Path, *, lazily: bool = True) -> None:
    subprocess.run(["umount", *(["-l"] if lazily else []), str(folder)], check=True, capture_output=True)


def can_mount() -> bool:
    """Tells whether a file system can be mounted here."""
    with tempfile.TemporaryDirectory() as name:
        try:
            _mount("-t", "tmpfs", "none", name)
            _unmount(Path(name))
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


@contextlib.contextmanager
def _disk_below(job: Job, options: str) -> Iterator[None]:
    """Puts a tmpfs below a job's folder, with what is in it, for the time of the block; what it holds is kept."""
    kept = job.out.with_name(f"{job.out.name}.kept")
    job.out.mkdir(exist_ok=True)
    job.out.rename(kept)
    job.out.mkdir()
    _mount("-t", "tmpfs", "-o", options, "none", job.out)
    try:
        shutil.copytree(kept, job.out, dirs_exist_ok=True, symlinks=True)
        yield
        if os.path.ismount(job.out):
            shutil.rmtree(kept)
            shutil.copytree(job.out, kept, symlinks=True)
    finally:
        if os.path.ismount(job.out):
            _unmount(job.out)
        shutil.rmtree(job.out)
        kept.rename(job.out)


@contextlib.contextmanager
def _with_flags(job: Job, *flags: object) -> Iterator[None]:
    """Launches with more flags for the time of the block."""
    before = job.arguments
    job.arguments = [*before, *map(str, flags)]
    try:
        yield
    finally:
        job.arguments = before


def _told(job: Job, text: str) -> int:
    """Returns how often a text is in the output of a job's launches."""
    return job.log.read_text().count(text) if job.log.exists() else 0


def _is_calm(job: Job, status: int | None, text: str, before: int, tracebacks: int) -> bool:
    """Tells whether a launch has failed with a line, and without a traceback of ours."""
    return bool(status) and _told(job, text) > before and _told(job, "Traceback") == tracebacks


class MachineFaults(Chaos):
    """The faults; see :class:`Chaos`."""

    def kill_decoding_process(self, job: Job, steps: int) -> bool:
        """Kills a process that decodes; the run must end at once, and say so."""
        text = "was killed by SIGKILL"
        before, tracebacks = _told(job, text), _told(job, "Traceback")
        with _with_flags(job, "--num_workers", 2):
            process = job.start()
            if not self._advance(job, process, steps) or not (workers := job.workers_of(process)):
                kill_all(process)
                return False
            os.kill(self.rng.choice(workers), signal.SIGKILL)
            return _is_calm(job, job.finish(process), text, before, tracebacks)

    def stop_one_rank(self, job: Job, steps: int) -> bool:
        """Stops a rank for good; the others must end, and name it."""
        with _with_flags(job, "--timeout", _STANDS_STILL):
            process = job.start()
            if not self._advance(job, process, steps) or len(ranks := job.ranks_of(process)) != 2:
                kill_all(process)
                return False
            began = time.monotonic()
            os.kill(self.rng.choice(ranks), signal.SIGSTOP)
            return job.finish(process) != 0 and time.monotonic() - began < _ENDS_WITHIN

    def launch_twice(self, job: Job, steps: int) -> bool:
        """Launches two runs in one folder at once; one of them must go on, and the other end and name it."""
        text = "another run is writing to it"
        before, tracebacks = _told(job, text), _told(job, "Traceback")
        started = job.step
        launches = [job.start(), job.start()]
        try:
            wait_until(lambda: job.step > started, launches[0])
            winner = next((launch for launch in launches if len(self._training(job, launch)) == 2), None)
            if winner is None:
                return False
            for rank in job.ranks_of(winner):  # or it would be done before the other gives up
                os.kill(rank, signal.SIGSTOP)
            (other,) = (launch for launch in launches if launch is not winner)
            return _is_calm(job, job.finish(other), text, before, tracebacks) and winner.poll() is None
        finally:
            for launch in launches:
                kill_all(launch)

    def _training(self, job: Job, process: subprocess.Popen) -> list[int]:
        """Returns a launch's ranks if it holds the lock of the job's folder."""
        ranks = job.ranks_of(process)
        lock = (job.out / ".lock").read_text() if (job.out / ".lock").exists() else ""
        return ranks if any(f'"pid": {rank},' in lock for rank in ranks) else []

    def full_file_system(self, job: Job, steps: int) -> bool:
        """Fills the disk while training goes on, and makes room again: checkpoints fail, and then do not."""
        return self._without_room(job, steps, "size", lambda used: used.total - used.free + (16 << 10))

    def no_files_left(self, job: Job, steps: int) -> bool:
        """The same with the number of files."""
        return self._without_room(job, steps, "nr_inodes", None)

    def _without_room(self, job: Job, steps: int, what: str, needed) -> bool:
        failed, written = "could not be written", "checkpoint: step"
        tracebacks = _told(job, "Traceback")
        with _disk_below(job, f"size={_DISK_BYTES},nr_inodes=10000"):
            process = job.start()
            try:
                if not self._advance(job, process, steps):
                    return False
                before = _told(job, failed)
                facts = os.statvfs(job.out)
                limit = needed(shutil.disk_usage(job.out)) if needed else facts.f_files - facts.f_ffree + 1
                _mount("-o", f"remount,{what}={limit}", job.out)
                if not wait_until(lambda: _told(job, failed) > before, process):
                    return False
                _mount("-o", f"remount,size={_DISK_BYTES},nr_inodes=10000", job.out)
                complete = _told(job, written)
                recovered = wait_until(lambda: _told(job, written) > complete, process) or job.finish(process) == 0
                return recovered and _told(job, "Traceback") == tracebacks
            finally:
                kill_all(process)

    def output_unmounted(self, job: Job, steps: int) -> bool:
        """Takes the disk below the output away; the run must say so, and write nothing into the folder below."""
        text = "is no longer the folder that this run began in"
        before, tracebacks = _told(job, text), _told(job, "Traceback")
        with _disk_below(job, f"size={_DISK_BYTES}"):
            process = job.start()
            if not self._advance(job, process, steps):
                kill_all(process)
                return False
            _unmount(job.out)
            calm = _is_calm(job, job.finish(process), text, before, tracebacks)
            return calm and not any(job.out.iterdir())

    def output_read_only(self, job: Job, steps: int) -> bool:
        """An error of the disk makes it read-only, as ext4 does; the run must end with a line that says what is
        missing.
        """
        text = "could not be written"
        before, tracebacks = _told(job, text), _told(job, "Traceback")
        image = job.out.with_name("ext4.image")
        with _disk_below(job, f"size={_DISK_BYTES}"), _ext4(image, job.out) as device:
            process = job.start()
            if not self._advance(job, process, steps):
                kill_all(process)
                return False
            Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("1")
            return _is_calm(job, job.finish(process), text, before, tracebacks)

    def data_gone(self, job: Job, steps: int) -> bool:
        """Hides the data behind an empty disk: a run that has them open goes on or ends with a line, and a launch ends
        with one.
        """
        tracebacks = _told(job, "Traceback")
        data = Path(job.arguments[job.arguments.index("--data") + 1])
        process = job.start()
        try:
            if not self._advance(job, process, steps):
                return False
            _mount("-t", "tmpfs", "none", data.parent)
            try:
                time.sleep(1)
                kill_all(process)
                process, before = job.start(), _told(job, "error: ")
                return _is_calm(job, job.finish(process), "error: ", before, tracebacks)
            finally:
                _unmount(data.parent)
        finally:
            kill_all(process)


@contextlib.contextmanager
def _ext4(image: Path, folder: Path) -> Iterator[Path]:
    """Mounts an ext4 file system that an error makes read-only, with what is in the folder; yields its device."""
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, Path(aside, "content"), symlinks=True)
        with open(image, "wb") as file:
            file.truncate(_DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-e", "remount-ro", str(image)], check=True, capture_output=True)
        found = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
        device = Path(found.stdout.strip())
        try:
            _mount(device, folder)
            shutil.copytree(Path(aside, "content"), folder, dirs_exist_ok=True, symlinks=True)
            yield device
            _unmount(folder)
        finally:
            subprocess.run(["losetup", "-d", str(device)], check=True)
            image.unlink()


PROCESSES = ["kill_decoding_process", "stop_one_rank", "launch_twice"]
DISKS = ["full_file_system", "no_files_left", "output_unmounted", "output_read_only", "data_gone"]
