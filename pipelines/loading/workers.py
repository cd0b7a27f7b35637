"""Processes that decode batches, for machines without DALI.

A batch is decoded straight into memory that all processes share, and only its number travels through a pipe. The memory
is an anonymous mapping: it takes nothing of /dev/shm, which has 64 MB in a container by default, and no file
descriptors, so that neither can run out. No lock is shared, so that a process may die at any moment without holding up
the others.
"""

import gc
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from typing import NamedTuple, Protocol

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.base import Request
from scf_fast.pipelines.memory import free_memory
from scf_fast.pipelines.waiting import Wait, promptly

_FACE_BYTES = FACE_SIZE * FACE_SIZE * 3
_ROW_BYTES = _FACE_BYTES + 8 + 8 + 1  # of an image: pixels, position asked for, position shown, flip
_JOIN = 5.0  # seconds that a killed process is given to end
_Reply = dict[int, str] | InputError | str  # broken images found; or the error of one; or the traceback of another
_WAYS_OUT = "take fewer --num_workers or a smaller --batch_size, or --loader dali, which needs no processes"


class Answer(NamedTuple):
    """A decoded batch."""

    faces: np.ndarray  # (B, 112, 112, 3) uint8, valid until the next answer is asked for
    shown: np.ndarray  # (B,) int64, positions of the images in the source
    found: dict[int, str]  # broken images that the process has just found: position -> message


class Decoder(Protocol):
    """Decodes a batch, in a process of its own."""

    def __call__(
        self, request: Request, faces: np.ndarray, shown: np.ndarray, note: Callable[[int], None]
    ) -> dict[int, str]:
        """Fills ``faces`` and ``shown``, and returns the broken images found.

        Args:
            note: to be called with the position of each image before it is loaded.
        Raises:
            InputError: an image is broken and not to be replaced.
        """


class _Stale(Exception):
    """The batch is no longer wanted."""


class _Slot(NamedTuple):
    """Memory of one batch on its way, shared by all processes."""

    faces: np.ndarray  # (rows, 112, 112, 3) uint8
    indices: np.ndarray  # (rows,) int64
    shown: np.ndarray  # (rows,) int64
    flips: np.ndarray  # (rows,) bool

    @classmethod
    def allocate(cls, rows: int) -> "_Slot":
        memory = mmap.mmap(-1, max(1, rows) * _ROW_BYTES)
        faces = np.frombuffer(memory, np.uint8, rows * _FACE_BYTES).reshape(rows, FACE_SIZE, FACE_SIZE, 3)
        indices = np.frombuffer(memory, np.int64, rows, offset=rows * _FACE_BYTES)
        shown = np.frombuffer(memory, np.int64, rows, offset=rows * (_FACE_BYTES + 8))
        return cls(faces, indices, shown, np.frombuffer(memory, np.bool_, rows, offset=rows * (_FACE_BYTES + 16)))


def _allocate(slots: int, rows: int) -> list[_Slot]:
    """Returns shared memory for batches.

    Raises:
        InputError: there is not enough of it.
    """
    size, free = slots * rows * _ROW_BYTES, free_memory()
    problem = f"{free / 1e9:.2f} GB are free" if size > free else None
    if problem is None:
        try:
            return [_Slot.allocate(rows) for _ in range(slots)]
        except OSError as error:  # a limit on address space, or a system that promises no more than it has
            problem = f"the system refuses it ({error.strerror})"
    raise InputError(
        f"{slots} batches of {rows} images on their way need {size / 1e9:.2f} GB of memory, but {problem}; {_WAYS_OUT}"
    )


class DecodingProcesses:
    """Processes that decode batches in turn; :meth:`receive` returns them in the order of :meth:`submit`.

    They are forked with the first batch, and end with :meth:`close` or with this process, however that ends.

    Args:
        decode: runs in them.
        name: returns the name of an image, for messages.
        workers: how many, at least 1.
        rows: the most images of a batch.
        ahead: the most batches on their way.
        timeout: seconds without progress, see :mod:`scf_fast.pipelines.waiting`.
    Attributes:
        closed: whether it is of no more use: after :meth:`close`, or an error of a process.
    Raises:
        InputError: there is not enough memory for the batches.
    """

    def __init__(
        self, decode: Decoder, name: Callable[[int], str], workers: int, rows: int, ahead: int, timeout: float
    ):
        self._decode, self._name, self._timeout, self.ahead = decode, name, timeout, ahead
        self._slots = _allocate(ahead + 1, rows)  # one more than are on their way: the one that the consumer has
        self._free = deque(range(len(self._slots)))
        # The number of the iteration that counts; then of each process the images begun and the last one's position.
        shared = np.frombuffer(mmap.mmap(-1, 8 * (1 + 2 * workers)), np.int64)
        self._iteration, self._progress = shared[:1], shared[1:].reshape(workers, 2)
        self._processes: list[ForkProcess] = []
        self._pipes: list[connection.Connection] = []
        self._under_way: deque[tuple[int, int, int]] = deque()  # (process, slot, images) of each batch
        self._turn = 0
        self._consumed: int | None = None  # the slot that the consumer has
        self._workers = workers
        self.closed = False

    @property
    def under_way(self) -> int:
        """Batches that have been submitted and not received."""
        return len(self._under_way)

    def submit(self, request: Request) -> None:
        """Hands the next batch over.

        Raises:
            InputError: the processes cannot be started, or one has died.
        """
        if not self._processes:
            self._start()
        count, slot = len(request.indices), self._free.popleft()
        memory = self._slots[slot]
        memory.indices[:count], memory.flips[:count] = request.indices, request.flips
        worker, self._turn = self._turn, (self._turn + 1) % self._workers
        try:
            self._pipes[worker].send((slot, count, int(self._iteration[0])))
        except OSError:
            error = self._death(self._processes[worker])
            self.close()
            raise error from None
        self._under_way.append((worker, slot, count))

    def receive(self) -> Answer:
        """Returns the oldest batch under way.

        Raises:
            InputError: an image of it is broken and not to be replaced; a process has died or has no memory left.
            TimedOut: there was no progress.
            RuntimeError: decoding has raised another error; the message has its traceback.
        """
        worker, slot, count = self._under_way[0]
        reply = self._await(worker)
        self._under_way.popleft()
        if self._consumed is not None:
            self._free.append(self._consumed)
        self._consumed = slot
        if isinstance(reply, InputError):
            raise reply
        if isinstance(reply, str):
            raise RuntimeError(f"in a process that decodes:\n{reply}")
        memory = self._slots[slot]
        return Answer(memory.faces[:count], memory.shown[:count].copy(), reply)

    def cancel(self) -> None:
        """Drops the batches under way; a process gives each up at its next image.

        Raises:
            InputError: as in :meth:`receive`.
        """
        self._iteration += 1
        while self._under_way:
            worker, slot, _ = self._under_way[0]
            self._await(worker)
            self._under_way.popleft()
            self._free.append(slot)

    def close(self) -> None:
        """Ends the processes and gives their memory back."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes):
            process.join(_JOIN)  # one that waits for a dead disk ends when that answers
            pipe.close()
        self._processes, self._pipes, self._slots = [], [], []
        self._under_way.clear()
        self.closed = True

    def _start(self) -> None:
        # A forked process that collected a DALI pipeline left over here would wait for its threads forever.
        gc.collect()
        context = multiprocessing.get_context("fork")
        try:
            for number in range(self._workers):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(
                    target=self._work, args=(number, theirs), name=f"decoder-{number}", daemon=True
                )
                process.start()
                self._processes.append(process)
                theirs.close()
        except OSError as error:
            self.close()
            raise InputError(
                f"{self._workers} processes that decode cannot be started: {os.strerror(error.errno or 0)}; take fewer "
                "--num_workers, or raise the limits of `ulimit -n` (open files) and `ulimit -u` (processes)"
            ) from error

    def _await(self, worker: int) -> _Reply:
        """Returns a process's next reply.

        Raises:
            InputError: none comes; all processes have been ended.
        """
        try:
            return self._next_reply(worker)
        except InputError:
            self.close()
            raise

    def _next_reply(self, worker: int) -> _Reply:
        pipe, process = self._pipes[worker], self._processes[worker]
        wait = Wait(
            "the torch loader", lambda: self._describe(worker), self._timeout, lambda: int(self._progress[worker, 0])
        )
        sentinels = {other.sentinel: other for other in self._processes}
        while True:
            ready = connection.wait([pipe, *sentinels], wait.seconds())
            if pipe in ready:  # first: a process may have died after its reply
                try:
                    return pipe.recv()
                except (EOFError, OSError):
                    process.join(_JOIN)
                    raise self._death(process) from None
            for sentinel in ready:
                if isinstance(sentinel, int):
                    raise self._death(sentinels[sentinel])

    def _describe(self, worker: int) -> str:
        """Names a process and what it is at."""
        begun, image = self._progress[worker].tolist()
        what = f"process {worker + 1} of {self._workers} that decode (pid {self._processes[worker].pid})"
        if not begun:
            return f"{what}, which has begun no image yet"
        name = promptly(lambda: self._name(image), f"image {image}")  # a tar is read for it, and may be what hangs
        return f"{what}, which is at {name}"

    def _death(self, process: ForkProcess) -> InputError:
        """Returns the error of a process that has ended by itself."""
        process.join(_JOIN)
        status = process.exitcode
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += ", as the system does when memory runs out (its log says so)"
        else:
            how = f"has ended with status {status}"
        return InputError(f"a process that decodes (pid {process.pid}) {how}; {_WAYS_OUT}")

    def _work(self, number: int, pipe: connection.Connection) -> None:
        """The life of a process."""
        gc.freeze()  # nothing that was inherited is collected here, where its threads do not exist
        # Whoever signals a run by its name means the process that trains; this one ends with it.
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(sign, signal.SIG_IGN)
        for ours in self._pipes:  # else it would not be noticed that they are closed
            ours.close()
        parent = multiprocessing.parent_process()
        assert parent is not None
        try:
            while pipe in connection.wait([pipe, parent.sentinel]):
                pipe.send(self._reply(number, *pipe.recv()))
        except (EOFError, OSError):  # the other end is closed
            pass
        finally:
            os._exit(0)

    def _reply(self, number: int, slot: int, count: int, iteration: int) -> _Reply:
        memory, progress = self._slots[slot], self._progress[number]

        def note(image: int) -> None:
            if self._iteration[0] != iteration:
                raise _Stale
            progress[1] = image
            progress[0] += 1

        try:
            request = Request(memory.indices[:count].copy(), memory.flips[:count])
            return self._decode(request, memory.faces[:count], memory.shown[:count], note)
        except InputError as error:
            return error
        except _Stale:
            return {}
        except MemoryError:
            return InputError(f"a process that decodes (pid {os.getpid()}) has no memory left; {_WAYS_OUT}")
        except Exception:
            return traceback.format_exc()
