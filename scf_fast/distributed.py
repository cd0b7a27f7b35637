"""The ranks of a launch: their start and end, what they agree on, and the launcher's command.

Serves ``deepspeed``, ``torchrun`` and plain ``python``.
"""

import contextlib
import datetime
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from scf_fast.errors import InputError

_GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # of a collective whose other ranks do not come
_MOST_WORKERS = 16
_Value = TypeVar("_Value")
STOPPED = 75  # exit status of a rank that a signal has stopped, after its checkpoint: EX_TEMPFAIL, "try again later"


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
    """Returns (rank, world size) as the launcher has set them; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ranks_on_this_machine() -> int:
    """Returns how many ranks the launcher has started on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, and deepspeed's
        if name in os.environ:
            return int(os.environ[name])
    return environment()[1]


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


def start() -> Runtime:
    """Joins the process group and returns this rank's place in it: on the GPU of its local rank, or on the CPU."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # The deepspeed launcher sets no limit, and every rank would take every core.
            torch.set_num_threads(cores_per_rank())
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler's library reports its start and stop on every rank
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
        # --precision fp32 is float32 in convolutions too, as it is in matrix products by default.
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=_GROUP_TIMEOUT)
    return Runtime(dist.get_rank(), dist.get_world_size(), device)


def finish() -> None:
    """Leaves the process group; without it a rank that is done can abort at interpreter exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """Returns the main rank's value, on every rank; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def shared_input_errors(runtime: Runtime) -> Iterator[None]:
    """Ends every rank with the message of an input error that any rank has met in the block; collective.

    Raises:
        InputError: on all ranks.
    """
    problem = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise InputError(found if rank == 0 or found == problem else f"rank {rank}: {found}")


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
