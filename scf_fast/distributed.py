"""Start of a rank: environment, device, process group; and its end. Serves ``deepspeed``, ``torchrun`` and plain
``python`` alike.
"""

import logging
import os
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

STOPPED = 75  # exit status of a rank that a signal has stopped, after its checkpoint: EX_TEMPFAIL, "try again later"


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment() -> tuple[int, int]:
    """(rank, world size) as the launcher has set them; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def free_port() -> int:
    """A TCP port that nothing listens on now, so that two launches on one machine do not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start() -> Runtime:
    """Join the process group; the GPU of this local rank, or the CPU."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if (
            "OMP_NUM_THREADS" not in os.environ
        ):  # the deepspeed launcher sets no limit, and every rank would take every core
            torch.set_num_threads(
                max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
            )
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler's library says on every rank that it starts and stops
    import deepspeed

    # Used for inference only, this op takes 30 s to compile and leaves 66 MiB a rank in shared memory for ever.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = (
        False  # set, not asked for: that would try every op's compiler
    )
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = (
            False  # --precision fp32 is float32 in convolutions too, as matrix products are by default
        )
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return Runtime(dist.get_rank(), dist.get_world_size(), device)


def finish(engine=None) -> None:
    """Leave the process group; without it a rank that is done can abort at interpreter exit."""
    if engine is not None:
        engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


def average_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean over ranks of a small float tensor."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def leave(status: int) -> NoReturn:
    """End a rank that has closed everything, without the interpreter's own teardown.

    There a thread of the collective library sometimes aborts the process ("terminate called without an active
    exception", about 1 of 100 runs even after :func:`finish`), and the launcher would report a finished job as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launcher(ranks: int | None = None) -> list[str]:
    """``deepspeed`` with so many processes; by default one for each GPU, two on a machine without; a free port, so that
    two launches can run at once.
    """
    count = [] if ranks is None and torch.cuda.is_available() else ["--num_accelerators", str(ranks or 2)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "-q",
        *count,
        "--master_port",
        str(free_port()),
        "--module",
        "scf_fast.train",
    ]


def on_every_rank(flag: bool) -> bool:
    """Whether it is true on every rank of the process group, which all of them have to ask; without a group, here."""
    if not dist.is_initialized():
        return flag
    agreed = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)
