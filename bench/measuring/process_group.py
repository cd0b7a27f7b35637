"""The process group that DeepSpeed's engine needs, one for a process: DeepSpeed holds on to the first one it meets."""

import atexit
import functools
import sys
from typing import NoReturn

import torch.distributed as dist

from scf_fast import distributed


@functools.cache
def join() -> distributed.Runtime:
    """Joins the group at the first call; the process leaves it at its end."""
    runtime = distributed.start()
    atexit.register(distributed.finish)  # of a process that does not end by end_process, as pytest's
    return runtime


def end_process(status: int) -> NoReturn:
    """Ends the process with this status, as :func:`scf_fast.distributed.leave` does where it has joined a group."""
    if dist.is_initialized():
        distributed.finish()
        distributed.leave(status)
    sys.exit(status)
