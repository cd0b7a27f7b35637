"""Starts the ranks of a launch by fork, from a process that has imported everything already.

Four fifths of a small launch are the imports of its launcher and its ranks. Tests of what ranks do, not of how they are
launched, start them here; the launchers themselves are tested with real launches. One JSON object a line comes in,
{"ranks", "module", "arguments", "log"}; the exit status of the launch goes out. As under a launcher, a rank that fails
ends the others.
"""

import json
import os
import runpy
import signal
import sys
import time

import deepspeed
import nvidia.dali.fn
import torch.utils.tensorboard

from scf_fast import distributed, trainer

IMPORTED = deepspeed, nvidia.dali.fn, torch.utils.tensorboard, trainer
GRACE = 10.0  # seconds between asking the other ranks to stop and killing them


def run_rank(rank: int, request: dict, port: str) -> None:
    """Becomes a rank of the launch; never returns."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = str(request["ranks"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1"
    )
    os.environ["MASTER_PORT"] = port
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_launch(request: dict) -> int:
    """Runs all ranks to their end and returns the status of the first that failed, or 0."""
    port, ranks = str(distributed.free_port()), set()
    for rank in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            run_rank(rank, request, port)
        ranks.add(child)
    first_failure, deadline = 0, None
    while ranks:
        child, wait_status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if deadline and time.monotonic() > deadline:
                for rank in ranks:
                    os.kill(rank, signal.SIGKILL)
            time.sleep(0.02)
            continue
        ranks.discard(child)
        status = os.waitstatus_to_exitcode(wait_status)
        if status and not first_failure:
            first_failure, deadline = status, time.monotonic() + GRACE
            for rank in ranks:
                os.kill(rank, signal.SIGTERM)
    return first_failure


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # imports and ranks may print
    for line in sys.stdin:
        print(run_launch(json.loads(line)), file=answers, flush=True)
