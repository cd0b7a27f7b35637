"""The faults of ``bench.chaos``, and the launches of a training command that they strike."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from scf_fast.distributed import STOPPED, launcher
from scf_fast.features.store import read_meta

_LAUNCH_SECONDS = 240  # a launch that is not over by then counts as hung


class Job:
    """One stage's command, launched again and again with ``--resume``."""

    def __init__(self, arguments: Iterable[object], out: Path) -> None:
        self.arguments, self.out = list(map(str, arguments)), out

    @property
    def log(self) -> Path:
        """The file that holds the output of all launches."""
        return self.out.with_name(f"{self.out.name}.log")

    def start(self, ranks: int = 2, zero_stage: int = 2, file_bytes: int | None = None) -> subprocess.Popen:
        """Launches the command; with ``file_bytes``, writing any file beyond that size fails."""

        def limit() -> None:
            if file_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        with open(self.log, "a") as log:
            return subprocess.Popen(
                [
                    *launcher(ranks),
                    *self.arguments,
                    "--zero_stage",
                    str(zero_stage),
                    "--output_dir",
                    str(self.out),
                    "--resume",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit if file_bytes else None,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )

    def finish(self, process: subprocess.Popen) -> int:
        """Waits for a launch to end and returns its exit status; nothing of it is left running.

        Raises:
            SystemExit: it hung.
        """
        try:
            return process.wait(_LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"a launch hung; see {self.log}") from None
        finally:
            kill_all(process)

    @property
    def step(self) -> int:
        """The last step logged."""
        try:
            return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):  # not there yet, or a line is being written
            return 0

    def ranks_of(self, process: subprocess.Popen) -> list[int]:
        """Returns the process ids of a launch's ranks."""
        parents = _of_launch(process)
        return [found for found, parent in parents.items() if parent not in parents]

    def workers_of(self, process: subprocess.Popen) -> list[int]:
        """Returns the process ids of what the ranks of a launch have forked: processes that decode."""
        parents = _of_launch(process)
        return [found for found, parent in parents.items() if parent in parents]


def _of_launch(process: subprocess.Popen) -> dict[int, int]:
    """Returns the ranks of a launch and what they have forked, each with its parent, by process id."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            folder = Path("/proc", entry)
            if (
                os.getpgid(int(entry)) == process.pid
                and b"\0RANK=" in (folder / "environ").read_bytes()
                and b"scf_fast.train" in (folder / "cmdline").read_bytes()
            ):
                found[int(entry)] = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
    return found


def kill_all(process: subprocess.Popen) -> None:
    """Kills all processes of a launch."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_until(condition: Callable[[], object], process: subprocess.Popen, pause: float = 0.01) -> bool:
    """Waits for the condition and returns whether it came true while the launch was running."""
    deadline = time.monotonic() + _LAUNCH_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause)
    return False


class Chaos:
    """The faults.

    Each method without an underscore takes a job and the most steps to let it make first, and returns whether the fault
    struck; it leaves the job killed or stopped.
    """

    def __init__(self, rng: random.Random, cache: Path) -> None:
        self.rng, self.cache = rng, cache

    def _advance(self, job: Job, process: subprocess.Popen, steps: int) -> bool:
        """Lets a launch make up to ``steps`` steps and part of another; returns whether it got that far."""
        target = job.step + self.rng.randint(1, steps)
        came = wait_until(lambda: job.step >= target, process)
        time.sleep(self.rng.uniform(0, 0.2))
        return came

    def kill_all_ranks(self, job: Job, steps: int) -> bool:
        process = job.start()
        struck = self._advance(job, process, steps)
        kill_all(process)
        return struck

    def kill_one_rank(self, job: Job, steps: int) -> bool:
        """Kills one rank of two; the launch must fail within a minute."""
        process = job.start()
        struck = self._advance(job, process, steps) and len(ranks := job.ranks_of(process)) == 2
        if struck:
            began = time.monotonic()
            os.kill(self.rng.choice(ranks), signal.SIGKILL)
            status = job.finish(process)
            struck = status != 0 and time.monotonic() - began < 60
        kill_all(process)
        return struck

    def kill_at_start(self, job: Job, steps: int) -> bool:
        process = job.start()
        time.sleep(self.rng.uniform(2, 8))
        struck = process.poll() is None
        kill_all(process)
        return struck

    def kill_in_checkpoint(self, job: Job, steps: int) -> bool:
        """Kills while a file of a checkpoint is being written; it gets its name only once it is whole."""
        process = job.start()
        started = job.step
        wait_until(lambda: job.step > started, process)  # the next condition takes a core while it is waited for
        struck = wait_until(lambda: any((job.out / "checkpoints").glob("step*/*.part")), process, pause=0)
        kill_all(process)
        return struck

    def kill_before_complete(self, job: Job, steps: int) -> bool:
        """Kills when a checkpoint's files are there, but not the list of them, which is written last."""

        def half() -> bool:
            return any(
                not (folder / "state.json").exists() and any(folder.glob("*.pt"))
                for folder in (job.out / "checkpoints").glob("step*")
            )

        process = job.start()
        started = job.step
        wait_until(lambda: job.step > started, process)
        struck = wait_until(half, process, pause=0)
        kill_all(process)
        return struck

    def kill_in_cache_write(self, job: Job, steps: int) -> bool:
        """Kills while features are being stored: the cache is marked as being written to, and grows."""
        process = job.start()
        before = self._cached()
        struck = wait_until(lambda: self._cached() > before, process, pause=0)
        kill_all(process)
        return struck

    def _cached(self) -> int:
        return len(self._present())

    def _present(self) -> list[int]:
        """Returns the images whose features the cache holds in both orientations."""
        sums = self.cache / "checksums.bin"
        views = memoryview(sums.read_bytes()).cast("I") if sums.exists() else []
        return [i for i in range(len(views) // 2) if views[2 * i] and views[2 * i + 1]]

    def corrupt_cache(self, job: Job, steps: int) -> bool:
        """Corrupts a stored record while no run is active. The mark that a killed run leaves behind makes the next
        launch check every record.
        """
        layout = read_meta(self.cache).layout
        shard, row = divmod(self.rng.choice(self._present()), layout.rows_per_shard)
        with open(self.cache / f"rows-{shard:05d}.bin", "r+b") as file:
            file.seek(row * layout.record_bytes + self.rng.randrange(layout.record_bytes - 64))
            file.write(b"\xa5" * 64)
        (self.cache / "writing-0").touch()
        found = "1 were damaged"
        before = job.log.read_text().count(found)
        return self.kill_all_ranks(job, steps) and job.log.read_text().count(found) == before + 1

    def corrupt_checkpoint(self, job: Job, steps: int) -> bool:
        """Flips a bit of the newest complete checkpoint, once there is another to fall back on."""

        def resumable() -> list[Path]:
            latest = job.out / "checkpoints" / "latest"
            newest = latest.read_text().strip() if latest.exists() else ""
            return sorted(
                folder
                for folder in latest.parent.glob("step*")
                if folder.name <= newest and (folder / "state.json").exists()
            )

        process = job.start()
        self._advance(job, process, steps)
        wait_until(lambda: len(resumable()) > 1, process)
        kill_all(process)
        if len(resumable()) < 2:
            return False
        path = self.rng.choice([path for path in resumable()[-1].iterdir() if path.suffix == ".pt"])
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        return True

    def full_disk(self, job: Job, steps: int) -> bool:
        """Lets a checkpoint fail in the middle of writing, through a limit on the size of any file."""
        process = job.start(file_bytes=50_000)
        failed = len(self._events(job, "checkpoint_failed"))
        struck = wait_until(lambda: len(self._events(job, "checkpoint_failed")) > failed, process)
        kill_all(process)
        return struck

    def _events(self, job: Job, name: str) -> list[str]:
        path = job.out / "events.jsonl"
        return [line for line in path.read_text().splitlines() if f'"event": "{name}"' in line] if path.exists() else []

    def scheduler_signal(self, job: Job, steps: int) -> bool:
        """Sends one rank a scheduler's signal, on which all of them must stop in order."""
        process = job.start()
        struck = self._advance(job, process, steps) and bool(ranks := job.ranks_of(process))
        if struck:
            os.kill(self.rng.choice(ranks), self.rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            struck = job.finish(process) == STOPPED
        kill_all(process)
        return struck

    def other_zero_stage(self, job: Job, steps: int) -> bool:
        return self._other_layout(job, steps, 2, self.rng.choice([0, 1, 3]))

    def other_world_size(self, job: Job, steps: int) -> bool:
        return self._other_layout(job, steps, 1, self.rng.choice([1, 2, 3]))

    def _other_layout(self, job: Job, steps: int, ranks: int, zero_stage: int) -> bool:
        while not any((job.out / "checkpoints").glob("step*/state.json")):  # there must be a checkpoint to resume from
            process = job.start()
            wait_until(lambda: any((job.out / "checkpoints").glob("step*/state.json")), process)
            kill_all(process)
        process = job.start(ranks, zero_stage)
        struck = self._advance(job, process, steps)
        kill_all(process)
        return struck


EVERYWHERE = [
    "kill_all_ranks",
    "kill_one_rank",
    "kill_at_start",
    "kill_in_checkpoint",
    "kill_before_complete",
    "corrupt_checkpoint",
    "full_disk",
    "scheduler_signal",
    "other_zero_stage",
]
STAGE_2 = ["kill_in_cache_write", "corrupt_cache", "other_world_size"]
