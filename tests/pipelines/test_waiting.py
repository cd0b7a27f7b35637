"""Waits end: with an error that names both sides where nothing moves, and not at all where something does."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from scf_fast.pipelines import waiting
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.waiting import DaemonThreads, TimedOut, Wait, in_processes, promptly, result_of


def test_a_wait_without_progress_warns_and_ends_with_both_names(caplog):
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"^stage 2 has waited 0 s for the disk, and there was no progress; .*--input_"):
        result_of(Future(), Wait("stage 2", lambda: "the disk", timeout=0.2))
    assert 0.15 < time.monotonic() - began < 5
    (warning,) = caplog.messages
    assert "stage 2 has waited 0 s for the disk without progress; it waits up to 0.2 s (--input_timeout)" in warning


def test_what_is_slow_and_moves_is_waited_for():
    """Six times as long as the limit."""
    moved = [0]

    def slow():
        for _ in range(12):
            time.sleep(0.05)
            moved[0] += 1
        return "done"

    threads = DaemonThreads(1, "slow")
    assert result_of(threads.submit(slow), Wait("a", "b", timeout=0.4, progress=lambda: moved[0])) == "done"
    with pytest.raises(TimedOut):
        result_of(threads.submit(time.sleep, 0.6), Wait("a", "b", timeout=0.4, progress=lambda: moved[0]))
    threads.shutdown()


def test_no_limit_still_warns(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_WARN_AFTER", 0.05)
    threads = DaemonThreads(1, "slow")
    assert result_of(threads.submit(lambda: time.sleep(0.2)), Wait("a", "b", timeout=0)) is None
    assert "it waits for ever" in caplog.messages[0] and len(caplog.messages) <= 3  # each at twice the time
    threads.shutdown()


def test_threads_that_hang_hold_nothing_up(monkeypatch):
    monkeypatch.setattr(waiting, "_JOIN", 0.1)
    ever, threads = threading.Event(), DaemonThreads(2, "stuck")
    stuck = [threads.submit(ever.wait) for _ in range(3)]
    began = time.monotonic()
    threads.shutdown(cancel_futures=True)
    assert time.monotonic() - began < 2
    with pytest.raises(CancelledError):
        stuck[2].result(0)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("stuck"))
    assert promptly(ever.wait, otherwise=False, seconds=0.05) is False
    ever.set()
    assert promptly(lambda: 1 // 0, otherwise=7) == 7 and promptly(lambda: 3, otherwise=7) == 3


def _task(kind):
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(60)
    return kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("die", "a process that should do things has died, perhaps because memory ran out"),
        ("hang", r"the test has waited 2 s for 2 processes that do things \([012] of 3 tasks are done\)"),
    ],
)
def test_processes_that_die_or_hang_end_the_work(kind, message, monkeypatch):
    began, results = time.monotonic(), []
    with pytest.raises(InputError, match=message):
        for result in in_processes(_task, ["a", kind, "b"], 2, who="the test", doing="do things", timeout=2):
            results.append(result)
    assert time.monotonic() - began < 20
    assert set(results) <= {"a", "b"}


_MASTER = """
import time
from multiprocessing import resource_tracker
from scf_fast.pipelines.waiting import in_processes
if __name__ == "__main__":
    register = resource_tracker.register
    resource_tracker.register = lambda name, kind: (print(name, flush=True), register(name, kind))
    next(in_processes(time.sleep, [60, 60], 2, who="a", doing="b"))
"""


def test_processes_of_a_killed_command_end_and_leave_no_locks(tmp_path):
    """They waited for ever for their next task, and their locks lay in /dev/shm."""
    script = tmp_path / "master.py"
    script.write_text(_MASTER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    output = tmp_path / "locks.txt"
    with open(output, "w") as file:
        master = subprocess.Popen([sys.executable, script], env=environment, stdout=file)

    def children():
        try:
            return Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
        except FileNotFoundError:
            return []

    def wait_for(condition):
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        return condition()

    assert wait_for(lambda: len(children()) == 3)  # two, and the one that keeps account of locks
    time.sleep(0.5)  # the two are at work
    pids = children()
    locks = {f"sem.{name.strip('/')}" for name in output.read_text().split()}
    assert locks and locks <= set(os.listdir("/dev/shm"))
    master.kill()
    master.wait()
    assert wait_for(lambda: not any(_runs(pid) for pid in pids))
    assert wait_for(lambda: not locks & set(os.listdir("/dev/shm")))


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_one_worker_takes_no_process(monkeypatch):
    monkeypatch.setattr(waiting, "_JOIN", 0.1)
    here, seen = os.getpid(), []
    work = in_processes(
        lambda task: (task, os.getpid()), [1, 2], 1, who="a", doing="b", initializer=seen.append, initargs=("begun",)
    )
    assert sorted(work) == [(1, here), (2, here)] and seen == ["begun"]
    ever = threading.Event()
    with pytest.raises(TimedOut):
        next(in_processes(lambda task: ever.wait(), [1], 1, who="a", doing="b", timeout=0.2))
    ever.set()


def test_a_machine_without_shared_memory_is_told_what_helps(monkeypatch):
    """Python's locks between processes are files in /dev/shm."""

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(waiting, "ProcessPoolExecutor", refuse)
    expected = (
        r"^2 processes that b cannot be started \(Read-only file system\): .* /dev/shm .*; --workers 1 does without$"
    )
    with pytest.raises(InputError, match=expected):
        next(in_processes(len, ["x"], 2, who="a", doing="b"))


def test_seconds_of_the_flag():
    assert waiting.timeout_seconds("0") == 0 and waiting.timeout_seconds("1e3") == 1000
    for text in ("-1", "nan", "inf"):
        with pytest.raises(Exception, match="0 or more seconds"):
            waiting.timeout_seconds(text)


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
