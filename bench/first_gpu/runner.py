"""Nine minutes on a GPU that may not come back: ``python -m bench.first_gpu --out DIR [--minutes 9] [--tiny]``.

The most valuable evidence comes first. Each part has a limit of its own and writes its files as soon as it has
anything; what is out of time is ended and keeps what it wrote. After every part DIR/first_gpu.tar.gz holds all files so
far, at most 16 MiB, and DIR/first_gpu.json says how each part ended; DIR/report.txt sets what was measured against what
was predicted. ``bench.gpu`` is the full suite of the same cases.

It needs PyTorch, Triton, NumPy and SciPy; for the tests pytest and mpmath. What DeepSpeed or DALI are needed for is
left out without them, and the report says so. ``--tiny`` tries the whole plan out on a CPU in under three minutes; its
figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from bench.first_gpu import workers
from bench.first_gpu.plan import PARTS, Part, Task
from bench.first_gpu.report import write_report
from bench.measuring.environment import DEVICE, ROOT, environment
from bench.measuring.results import write_json
from scf_fast.command import Parser, run, split_commas
from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output

ARCHIVE, SUMMARY, REPORT = "first_gpu.tar.gz", "first_gpu.json", "report.txt"
_ARCHIVE_BYTES = 16 * 2**20  # of what comes back from a lent machine, a file
_LOG_BYTES = 200_000  # of each log that the archive keeps: its end
_CLOSING_SECONDS = 8  # kept free for the report and the archive


@dataclass(frozen=True)
class TaskOutcome:
    """How a process ended: "ok", "failed", "out of time", or what it lacked."""

    command: str
    status: str
    seconds: float
    tests: dict[str, int] | None = None  # of pytest: tests, failures, errors, skipped


class _Running:
    """A process with its log file, in a session of its own so that its children end with it."""

    def __init__(self, task: Task, out: Path):
        self.task, self._began = task, time.monotonic()
        self._log: IO[bytes] = (out / f"{task.name}.log").open("wb")
        threads = {} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *task.words],
            cwd=ROOT,
            env=threads | dict(os.environ),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_done(self) -> bool:
        return self._process.poll() is not None

    def finish(self, out: Path) -> TaskOutcome:
        """Ends it if it still runs, and says how it went."""
        timed_out = not self.is_done()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # of a finished one, children that it left
        except ProcessLookupError:
            pass
        code = self._process.wait()
        self._log.close()
        status = "out of time" if timed_out else "failed" if code else "ok"
        seconds = round(time.monotonic() - self._began, 1)
        return TaskOutcome(f"python -m {' '.join(self.task.words)}", status, seconds, _test_counts(self.task, out))


def _test_counts(task: Task, out: Path) -> dict[str, int] | None:
    """Returns what pytest counted, from the file that it writes at its end; None without one."""
    for word in task.words:
        path = Path(word.removeprefix("--junitxml="))
        if word.startswith("--junitxml=") and path.is_relative_to(out) and path.exists():
            try:
                suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
            except xml.etree.ElementTree.ParseError:  # it was ended while it wrote
                return None
            if suite is not None:
                return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return None


def run_part(part: Part, out: Path, tiny: bool, seconds: float) -> list[TaskOutcome]:
    """Runs the processes of one part, as many at once as it says, until they are done or out of time."""
    deadline = time.monotonic() + seconds
    outcomes: list[TaskOutcome] = []
    waiting: list[Task] = []
    running: list[_Running] = []
    for task in part.tasks(out, tiny):
        missing = task.missing()
        if missing:
            command = f"python -m {' '.join(task.words)}"
            outcomes.append(TaskOutcome(command, f"left out: needs {', '.join(missing)}", 0.0))
        else:
            waiting.append(task)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < part.at_once:
                running.append(_Running(waiting.pop(0), out))
            for process in [process for process in running if process.is_done()]:
                running.remove(process)
                outcomes.append(process.finish(out))
            time.sleep(0.05)
    finally:
        outcomes += [process.finish(out) for process in running]
    return outcomes + [TaskOutcome(f"python -m {' '.join(task.words)}", "out of time", 0.0) for task in waiting]


def write_archive(out: Path) -> None:
    """Packs the files of the folder, of logs the end, smallest first, as long as the archive stays within its limit."""
    with atomic_output(out / ARCHIVE) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in sorted(out.iterdir(), key=lambda path: path.stat().st_size):
            if not path.is_file() or path.name.startswith((ARCHIVE, ".")):
                continue
            if path.suffix == ".log" and path.stat().st_size > _LOG_BYTES:
                path.write_bytes(path.read_bytes()[-_LOG_BYTES:])
            if file.tell() + path.stat().st_size < _ARCHIVE_BYTES:  # uncompressed, so never too much
                archive.add(path, path.name)


def run_plan(parts: Sequence[Part], out: Path, tiny: bool, minutes: float) -> int:
    """Runs the parts in order and returns the exit status: 1 where a process failed."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes - _CLOSING_SECONDS
    ended: dict[str, list[dict]] = {}
    content = {"section": "first_gpu", "environment": environment(DEVICE), "tiny": tiny, "parts": ended}
    for part in parts:
        seconds = min(part.seconds, deadline - time.monotonic())
        print(f"{part.name}: {part.shows} ({max(0.0, seconds):.0f} s at most)", flush=True)
        outcomes = run_part(part, out, tiny, seconds) if seconds > 0 else []
        for outcome in outcomes:
            counts = "" if outcome.tests is None else f", {json.dumps(outcome.tests)}"
            print(f"  {outcome.status} after {outcome.seconds:.0f} s: {outcome.command}{counts}", flush=True)
        ended[part.name] = [asdict(outcome) for outcome in outcomes]
        write_json(out / SUMMARY, content)
        write_report(out, out / REPORT)
        write_archive(out)
    print((out / REPORT).read_text(), end="")
    print(f"Written: {out / ARCHIVE}")
    return int(any(outcome["status"] == "failed" for outcomes in ended.values() for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.first_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; made if missing")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, on any machine; the figures mean nothing")
    parser.add_argument(
        "--parts",
        default=",".join(part.name for part in PARTS),
        help="parts to run, separated by commas (default: all, %(default)s)",
    )
    parser.add_argument("--worker", choices=list(workers.WORKERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def act() -> int:
        if options.minutes <= 0:
            raise InputError(f"--minutes must be positive, got {options.minutes:g}")
        chosen = split_commas(options.parts)
        unknown = [name for name in chosen if name not in [part.name for part in PARTS]]
        if unknown:
            raise InputError(
                f"--parts must be some of {', '.join(part.name for part in PARTS)}, got {', '.join(unknown)}"
            )
        if DEVICE != "cuda" and not options.tiny:
            raise InputError("a CUDA device is needed, and none was found; --tiny tries the plan out on the CPU")
        out = options.out.resolve()
        if options.worker:
            return workers.WORKERS[options.worker](out, options.tiny)
        return run_plan([part for part in PARTS if part.name in chosen], out, options.tiny, options.minutes)

    return run(parser.prog, act)
