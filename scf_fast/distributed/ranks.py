"""The ranks of a launch: their start and end, what they agree on, and the launcher's command.

Serves ``deepspeed``, ``torchrun``, ``srun``, plain variables and plain ``python``.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from scf_fast.command import INPUT_ERROR, INTERRUPTED
from scf_fast.distributed.heartbeat import FAILED, UNWATCHED, Heart
from scf_fast.distributed.meeting import Meeting, Member, choose_interface, exchange, meet
from scf_fast.distributed.place import Place, find_place
from scf_fast.errors import Incomplete, InputError

DEFAULT_TIMEOUT = 60.0  # seconds without a sign of life after which a rank is lost
JOIN = 10  # times the timeout, that the ranks may take to come
_GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # of a collective whose other ranks do not come
_MOST_WORKERS = 16
# What gloo, NCCL and the store say when another rank is gone; of torch 2.13.
_LOST_PEER = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (closed|reset|was)|[Bb]roken pipe|Socket|TCPStore")
_Value = TypeVar("_Value")
STOPPED = 75  # exit status of a rank that a signal has stopped, after its checkpoint: EX_TEMPFAIL, "try again later"


_meeting: Meeting | None = None
_heart: Heart | None = None


@dataclass(frozen=True)
class Runtime:
    """A rank's place in the launch."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment() -> tuple[int, int]:
    """Returns (rank, world size) as the launcher has set them; (0, 1) without one.

    Raises:
        InputError: its variables cannot be used, see :func:`scf_fast.distributed.place.find_place`.
    """
    place = find_place()
    return place.rank, place.world_size


def ranks_on_this_machine() -> int:
    """Returns how many ranks the launcher has started on this machine, as far as it says so; else how many in all."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, and deepspeed's
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    place = find_place()
    return place.local_size or place.world_size


def cores_per_rank() -> int:
    """Returns this rank's part of the CPU cores that it may run on, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_machine())


def decoding_workers(wanted: int | None) -> int:
    """Returns the number of a rank's decoding threads or processes: the one wanted, or one less than it has cores.

    The main thread needs that core. More than 16 workers decode more than a GPU takes, even on a CPU.
    """
    return min(_MOST_WORKERS, max(1, cores_per_rank() - 1)) if wanted is None else wanted


def free_port() -> int:
    """Returns a TCP port that nothing listens on now, so that two launches on one machine do not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(timeout: float = DEFAULT_TIMEOUT) -> Runtime:
    """Joins the other ranks and returns this one's place among them: on the GPU of its local rank, or on the CPU.

    From here on a rank that dies, hangs or is cut off ends them all, see :mod:`scf_fast.distributed.heartbeat`.

    Args:
        timeout: seconds without a sign of life after which a rank is lost; ten times as long may the ranks take to
            come. 0 is no limit.
    Raises:
        InputError: the launcher's variables cannot be used, or the ranks do not find each other.
    """
    global _meeting, _heart
    place = find_place()
    place.export(os.environ)
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler's library reports its start and stop on every rank
    _meeting = None if place.world_size == 1 else meet(place, JOIN * (timeout or DEFAULT_TIMEOUT))
    if _meeting is not None:
        neighbors = [member.rank for member in _meeting.neighbors]
        if place.local_rank is None:
            place = dataclasses.replace(place, local_rank=neighbors.index(place.rank), local_size=len(neighbors))
        place.export(os.environ)
        if timeout:
            _heart = Heart(_meeting, timeout)
            _heart.start()
    if not has_gpu and "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher sets no limit, and every rank would take every core.
        torch.set_num_threads(cores_per_rank())
    device = _choose_device(place, JOIN * (timeout or DEFAULT_TIMEOUT))
    if has_gpu:
        torch.cuda.set_device(device)
        # --precision fp32 is float32 in convolutions too, as it is in matrix products by default.
        torch.backends.cudnn.allow_tf32 = False
    _form_group("nccl" if has_gpu else "gloo", place)
    return Runtime(dist.get_rank(), dist.get_world_size(), device)


def gpu_number() -> int:
    """Returns this rank's GPU among those that it sees: that of its local rank, or the only one that its launcher shows
    it.
    """
    return 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", 0))


def _choose_device(place: Place, seconds: float) -> torch.device:
    """Returns the GPU of the local rank, where the launcher shows each rank one GPU that one; or the CPU.

    Raises:
        InputError: on all ranks: there are fewer GPUs than ranks on a node, two ranks have one, or only some have one.
    """
    count, local_rank, problem, gpu = torch.cuda.device_count(), place.local_rank or 0, "", ""
    number = 0 if count == 1 and (place.local_size or 2) > 1 else local_rank
    if torch.cuda.is_available() and number < count:
        gpu = str(torch.cuda.get_device_properties(number).uuid)
    elif torch.cuda.is_available():
        problem = (
            f"rank {place.rank} on {socket.gethostname()} is the node's number {local_rank} (LOCAL_RANK, from 0), and "
            f"there are {count} GPUs; start one rank a GPU"
        )
    if _meeting is not None:
        told = [json.loads(text) for text in exchange(_meeting, "gpu", json.dumps([gpu, problem]), seconds)]
        problems = [problem for _, problem in told if problem]
        problem = problems[0] if problems else device_problem(_meeting.members, [gpu for gpu, _ in told]) or ""
    if problem:
        shared = SharedInputError(problem)
        shared.told_by_another = _meeting is not None and not _meeting.is_first_on_node
        raise shared
    return torch.device("cuda", number) if gpu else torch.device("cpu")


def device_problem(members: Sequence[Member], gpus: Sequence[str]) -> str | None:
    """Returns what is wrong with the ranks' GPUs; None where all is well.

    Args:
        gpus: identity of each rank's, empty for a rank on the CPU.
    """
    owners: dict[tuple[str, str], Member] = {}
    for member, gpu in zip(members, gpus):
        if bool(gpu) != bool(gpus[0]):
            with_gpu, without = (member, members[0]) if gpu else (members[0], member)
            return (
                f"{without} has no GPU, and {with_gpu} has one; start one rank a GPU, or give --no_cuda to train on "
                "the CPU of all"
            )
        other = owners.setdefault((member.node, gpu), member)
        if gpu and other is not member:
            return (
                f"{member} has the same GPU as rank {other.rank} ({gpu}); start one rank a GPU, each with its own "
                "LOCAL_RANK (srun: --ntasks-per-node as many as --gpus-per-node)"
            )
    return None


def _form_group(backend: str, place: Place) -> None:
    if _meeting is None:
        store: dist.Store = dist.HashStore()  # needs no port
        # DeepSpeed wants them all, or looks for MPI.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    else:
        store = dist.PrefixStore("group", _meeting.store)
        interface = choose_interface(_meeting)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    mark("connecting the ranks")
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_GROUP_TIMEOUT
        )
    except RuntimeError as error:
        problem = (
            f"cannot be connected to the other ranks ({str(error).strip().splitlines()[0]}); set GLOO_SOCKET_IFNAME, "
            "on GPUs NCCL_SOCKET_IFNAME, to the interface between the nodes, which must be up (ip address lists them)"
        )
        if _heart is not None:
            _heart.report_failure(problem, INPUT_ERROR)
        raise InputError(f"rank {place.rank} on {socket.gethostname()} {problem}") from None
    mark(UNWATCHED)


def current_meeting() -> Meeting | None:
    """Returns who and where the ranks are; None for a process that is alone."""
    return _meeting


def mark(phase: str, is_step: bool = False) -> None:
    """Notes that this rank has come to another phase of its work; see ``Heart.mark``."""
    if _heart is not None:
        _heart.mark(phase, is_step)


def report_failure(error: BaseException, status: int) -> None:
    """Ends the other ranks too, with this rank's error; not for errors that all ranks have.

    Where the error is that another rank is gone, this one ends with the others' verdict instead, and never returns.
    """
    if _heart is None:
        return
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and _LOST_PEER.search(text):
        _heart.wait_for_verdict(_heart.longest_wait)
    _heart.report_failure(text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"[:300], status)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Leaves the group after the block, and ends the other ranks where it fails on this one alone."""
    try:
        yield
    except (SharedInputError, FloatingPointError, Incomplete):  # on all ranks
        finish()
        raise
    except KeyboardInterrupt as error:
        report_failure(error, INTERRUPTED)
        raise
    except (InputError, OSError) as error:
        report_failure(error, INPUT_ERROR)
        raise
    except Exception as error:
        report_failure(error, FAILED)
        raise
    finish()


def finish() -> None:
    """Leaves the process group; without it a rank that is done can abort at interpreter exit."""
    global _meeting, _heart
    if _heart is not None:
        _heart.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    _meeting = _heart = None


def all_ranks_agree(flag: bool) -> bool:
    """Returns whether ``flag`` is true on every rank of the process group, all of which have to ask; without a group,
    the flag itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    agreed = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def broadcast_from_main(value: _Value) -> _Value:
    """Returns the main rank's value, on every rank; collective; without a group, the value."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class SharedInputError(InputError):
    """An input error that every rank raises.

    Attributes:
        told_by_another: whether another rank of this node prints it.
    """

    told_by_another = False


@contextlib.contextmanager
def shared_input_errors(runtime: Runtime) -> Iterator[None]:
    """Ends every rank with the message of an input error that any rank has met in the block; collective.

    Raises:
        SharedInputError: on all ranks.
    """
    problem = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [problem] * runtime.world_size
    if runtime.world_size > 1:
        dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            where = "" if _meeting is None else f" on {_meeting.members[rank].host}"
            shared = SharedInputError(found if rank == 0 or found == problem else f"rank {rank}{where}: {found}")
            shared.told_by_another = _meeting is not None and not _meeting.is_first_on_node
            raise shared


def average_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Averages a small float tensor over the ranks, in place, and returns it; collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def leave(status: int) -> NoReturn:
    """Ends a rank that has closed everything, without the interpreter's own teardown.

    There a thread of the collective library sometimes aborts the process ("terminate called without an active
    exception", about 1 of 100 runs even after :func:`finish`), and the launcher would report a finished job as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launcher(ranks: int | None = None, *, devices: Sequence[int] = (), module: str = "scf_fast.train") -> list[str]:
    """Returns the command that starts training under the deepspeed launcher; the flags of train.py follow.

    Args:
        ranks: processes; default: one for each GPU, two on a machine without.
        devices: the GPUs to take, by the machine's numbers; none: the first ones.
        module: what is started, with its own flags.
    """
    if devices:
        count = ["--include", f"localhost:{','.join(map(str, devices))}"]
    elif ranks is None and torch.cuda.is_available():
        count = []
    else:
        count = ["--num_accelerators", str(ranks or 2)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "-q",
        *count,
        "--master_port",
        str(free_port()),
        "--module",
        module,
    ]
