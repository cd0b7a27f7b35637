"""Steps of a command that starts others: each is done once, and a later call goes on where an earlier one stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scf_fast.pipelines.command import print_lines
from scf_fast.pipelines.formats.atomic_file import write_json


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the file of seconds.
        command: made when the step starts: a launcher's port must be free then.
        environment: on top of this process's own.
        arguments: what decides the result; a step that was done with others is started again, and its own program says
            whether it can go on from there. None: once done, it stays done.
    """

    name: str
    title: str
    command: Callable[[], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] | None = None


class DoneSteps:
    """The steps that are done, kept in a JSON file of seconds by name; their arguments are in ``arguments.json`` beside
    it.
    """

    def __init__(self, seconds_file: Path):
        self._seconds_file, self._arguments_file = seconds_file, seconds_file.with_name("arguments.json")
        self.seconds: dict[str, float] = self._read(self._seconds_file)
        self._arguments: dict[str, list[str]] = self._read(self._arguments_file)

    @staticmethod
    def _read(path: Path) -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    def has(self, step: Step) -> bool:
        """Returns whether a step is done, with these arguments."""
        return step.name in self.seconds and step.arguments in (None, self._arguments.get(step.name))

    def add(self, step: Step, seconds: float) -> None:
        """Notes that a step is done."""
        if step.arguments is not None:
            self._arguments[step.name] = step.arguments
            write_json(self._arguments_file, self._arguments, indent=2, end="\n")
        self.seconds[step.name] = seconds
        write_json(self._seconds_file, self.seconds)


_END_SECONDS = 60.0  # a launcher gives its ranks half of that
_PRINT_SECONDS = 5.0


class _Process:
    """A command that is running, in a session of its own.

    Args:
        prefix: before each line that it prints; None leaves its output alone.
    """

    def __init__(self, step: Step, prefix: str | None = None):
        self._began = time.monotonic()
        piped = None if prefix is None else subprocess.PIPE
        self._process = subprocess.Popen(
            step.command(),
            start_new_session=True,
            env={**os.environ, **step.environment},
            stdout=piped,
            stderr=None if piped is None else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._seconds: float | None = None
        self._printer = threading.Thread(target=self._print_lines, args=(prefix,), daemon=True)
        if piped is not None:
            self._printer.start()

    def _print_lines(self, prefix: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{prefix}{line}", end="", flush=True)

    def poll(self) -> int | None:
        """Returns the exit status, or None while it runs."""
        status = self._process.poll()
        if status is not None and self._seconds is None:
            self._seconds = time.monotonic() - self._began
        return status

    @property
    def seconds(self) -> float:
        """Seconds that it took, once it has ended."""
        assert self._seconds is not None
        return self._seconds

    def end(self) -> None:
        """Ends the command and all its children, where they still run; kills those that do not end by themselves."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._printer.is_alive():
            self._printer.join(_PRINT_SECONDS)  # a child that has left the session may hold the pipe

    def _signal(self, sign: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, sign)


_POLL_SECONDS = 0.05


def run_steps(steps: Sequence[Step | Sequence[Step]], seconds_file: Path) -> tuple[int, dict[str, float]]:
    """Runs the steps that are not done yet, one after the other.

    On Ctrl-C or failure the running ones and all their children are ended.

    Args:
        steps: in order; those of an inner sequence run at the same time, each line of their output named.
        seconds_file: records the steps that are done.
    Returns:
        The exit status of the step that failed, or 0; seconds of each step that is done.
    """
    done = DoneSteps(seconds_file)
    for group in ([entry] if isinstance(entry, Step) else list(entry) for entry in steps):
        status = _run_group(group, done)
        if status:
            return status, done.seconds
    return 0, done.seconds


def _run_group(group: list[Step], done: DoneSteps) -> int:
    """Runs steps at the same time; returns the first exit status that is not 0, after ending the others."""
    waiting = []
    for step in group:
        if done.has(step):
            print_lines(f"== {step.title}: there already ({done.seconds[step.name]:.0f} s)")
        else:
            print_lines(f"== {step.title}")
            waiting.append(step)
    running = {step.name: _Process(step, f"[{step.name}] " if len(group) > 1 else None) for step in waiting}
    try:
        while running:
            for step in waiting:
                process = running.get(step.name)
                status = None if process is None else process.poll()
                if process is None or status is None:
                    continue
                if status:
                    return status
                running.pop(step.name).end()
                done.add(step, process.seconds)
            time.sleep(_POLL_SECONDS)
        return 0
    finally:
        for process in running.values():
            process.end()


def module_command(name: str, *arguments: str | Path) -> list[str]:
    """Returns the command that runs a module of this package."""
    return [sys.executable, "-m", f"scf_fast.{name}", *map(str, arguments)]
