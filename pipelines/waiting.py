"""Bounded waiting: what waits for a thread, a process or a disk says for which, warns, and gives up.

The clock of a wait starts again whenever there is progress, so that a source that is slow is never taken for one that
is dead. Threads that may hang are daemons: they keep no command from ending.
"""

import argparse
import concurrent.futures
import functools
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import connection
from typing import Any, TypeVar

from scf_fast.pipelines.errors import InputError

_LOG = logging.getLogger(__name__)
# Seconds without progress. Other ranks wait half an hour for one that stalls, so its own error comes first.
DEFAULT_TIMEOUT = 600.0
TIMEOUT_HELP = (
    "seconds that reading, decoding or writing may take without any progress before the command ends and says what it "
    "has waited for; 0 waits for ever"
)
_WARN_AFTER = 60.0  # seconds
_POLL = 1.0  # seconds between two looks at the progress
_JOIN = 5.0  # seconds that threads and processes are given to end
_Result = TypeVar("_Result")
_Task = TypeVar("_Task")


class TimedOut(InputError):
    """A wait has ended without what it was for."""


class Wait:
    """The clock of one wait.

    Args:
        who: waits, as in "the training loop".
        what: what it waits for, or a function that says so when it is asked.
        timeout: seconds without progress until it is given up; 0 is never.
        progress: returns another value whenever something has moved on; None: nothing does before the end.
    """

    def __init__(
        self,
        who: str,
        what: str | Callable[[], str],
        timeout: float = DEFAULT_TIMEOUT,
        progress: Callable[[], object] | None = None,
    ):
        self._who, self._what, self._progress = who, what, progress or (lambda: None)
        self._timeout = timeout or math.inf
        self._seen, self._since = self._progress(), time.monotonic()
        self._warn_after = min(_WARN_AFTER, self._timeout / 2)
        self._warn_at = self._warn_after

    def seconds(self) -> float:
        """Returns how long to wait before the next call; to be called before each wait.

        Raises:
            TimedOut: there has been no progress for too long.
        """
        now, seen = time.monotonic(), self._progress()
        if seen != self._seen:
            self._seen, self._since, self._warn_at = seen, now, self._warn_after
        waited = now - self._since
        if waited >= self._timeout:
            raise TimedOut(
                f"{self._who} has waited {waited:.0f} s for {self._describe()}, and there was no progress; see whether "
                "its disk, mount or process still answers (a slow one that does is waited for); --input_timeout sets "
                "the limit, 0 is none"
            )
        if waited >= self._warn_at:
            limit = "for ever" if math.isinf(self._timeout) else f"up to {self._timeout:g} s (--input_timeout)"
            _LOG.warning(
                "%s has waited %.0f s for %s without progress; it waits %s",
                self._who,
                waited,
                self._describe(),
                limit,
                extra={"event": "waiting"},
            )
            self._warn_at *= 2
        return min(_POLL, self._warn_after / 5, self._timeout - waited)

    def _describe(self) -> str:
        return self._what if isinstance(self._what, str) else self._what()


def result_of(future: "Future[_Result]", wait: Wait) -> _Result:
    """Returns a future's result, or raises its exception.

    Raises:
        TimedOut: neither came.
    """
    try:
        while not future.done():
            concurrent.futures.wait([future], wait.seconds())
        return future.result()
    finally:
        del future  # its error holds this frame, which would hold it


def promptly(function: Callable[[], _Result], otherwise: _Result, seconds: float = 2.0) -> _Result:
    """Returns what a function returns, or ``otherwise`` where it raises or takes longer, as on a disk that is gone."""
    threads = DaemonThreads(1, "promptly")
    future = threads.submit(function)
    concurrent.futures.wait([future], seconds)
    threads.shutdown(wait=False)
    return future.result() if future.done() and future.exception() is None else otherwise


class DaemonThreads(Executor):
    """Threads that keep neither :meth:`shutdown` nor the interpreter's end waiting if they hang.

    Args:
        count: at most so many; each starts when there is work for it.
        name: what their names begin with.
    """

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> "Future[_Result]":
        future: Future[_Result] = Future()
        self._tasks.put((future, functools.partial(function, *arguments, **options)))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del task, future, function  # else an error and what it holds would live until the next task

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Lets the threads end after their work, and waits for that at most some seconds."""
        while cancel_futures:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _JOIN
        for thread in self._threads if wait else ():
            thread.join(max(0.0, deadline - time.monotonic()))


def in_processes(
    function: Callable[[_Task], _Result],
    tasks: Iterable[_Task],
    workers: int,
    *,
    who: str,
    doing: str,
    timeout: float = DEFAULT_TIMEOUT,
    initializer: Callable[..., object] | None = None,
    initargs: tuple = (),
) -> Generator[_Result, None, None]:
    """Yields the results of tasks as they are done, in processes that end with the iteration; with one worker in a
    thread of this process, which takes no processes and none of the shared memory that their locks need.

    Processes start anew ("spawn"), so that they share no lock with threads of this one. They ignore an interrupt, which
    reaches every process of a terminal, and finish what they are at.

    Args:
        who: waits for them, in messages.
        doing: what they do, as in "decode images".
        timeout: seconds in which none of them finishes a task.
        initializer, initargs: called in each before its first task.
    Raises:
        InputError: processes cannot be started, or one has died, as by the hand of a system without memory.
        TimedOut: none of them has finished a task for too long.
    """
    before = set(multiprocessing.active_children())
    pool = _start_pool(workers, doing, initializer, initargs)
    done: queue.SimpleQueue[Future[_Result]] = queue.SimpleQueue()
    try:
        futures = [pool.submit(function, task) for task in tasks]
        for future in futures:
            future.add_done_callback(done.put)
        for number in range(len(futures)):
            wait = Wait(who, f"{workers} processes that {doing} ({number} of {len(futures)} tasks are done)", timeout)
            yield _next(done, wait).result()
    except BrokenExecutor as error:
        raise InputError(
            f"a process that should {doing} has died, perhaps because memory ran out ({error}); take fewer --workers, "
            "or see what the system's log says of it"
        ) from error
    except TimedOut:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool(workers: int, doing: str, initializer: Callable[..., object] | None, initargs: tuple) -> Executor:
    if workers == 1:
        if initializer is not None:
            initializer(*initargs)
        return DaemonThreads(1, "task")
    try:
        return ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_process, (initializer, initargs)
        )
    except OSError as error:
        raise InputError(
            f"{workers} processes that {doing} cannot be started ({error.strerror or error}): their locks need a "
            "/dev/shm that can be written, and open files; --workers 1 does without"
        ) from error


def _next(done: "queue.SimpleQueue[_Result]", wait: Wait) -> _Result:
    """Returns the next element of a queue.

    Raises:
        TimedOut: none came.
    """
    while True:
        try:
            return done.get(timeout=wait.seconds())
        except queue.Empty:
            continue


def _start_process(initializer: Callable[..., object] | None, initargs: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Else it would wait for tasks for ever, and keep the locks in /dev/shm, where this process's parent is killed.
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def add_timeout_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--input-timeout``, the same flag in every command."""
    parser.add_argument(
        "--input-timeout",
        type=timeout_seconds,
        default=DEFAULT_TIMEOUT,
        metavar="S",
        help=f"{TIMEOUT_HELP} (default: %(default)g)",
    )


def timeout_seconds(text: str) -> float:
    """Converts a command-line word to seconds."""
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {text}")
    return seconds
