"""Starts commands and the ranks of launches by fork, from a process that has imported everything already.

Four fifths of a small launch are the imports of its launcher and its ranks. Tests of what ranks do, not of how they are
launched, start them here; the launchers themselves are tested with real launches. One JSON object a line comes in, one
line of JSON goes out:

    {"ranks", "command", "log", ...}                      -> the launch's process id, which is its process group's too
    {"wait", "seconds"}                                   -> the exit status of that launch, or null if it still runs

``ranks`` 0 is plain python, without a launcher's variables; ``launcher`` "srun" sets Slurm's, null torchrun's.
``command`` is ``["-m", module, ...]`` or ``[path, ...]``; ``file_bytes`` limits the size of any file it writes;
``variables`` are set, and ``node`` is a network namespace to enter, with the host's name there and ``mounts``, pairs of
folders. As under a launcher, a rank that fails ends the others.
"""

import ctypes
import functools
import gc
import json
import os
import resource
import runpy
import signal
import socket
import sys
import time

import deepspeed
import nvidia.dali.fn
import torch._dynamo
import torch.utils.tensorboard

from scf_fast import distributed, trainer
from scf_fast.engine.deepspeed_internals import DeepSpeedInternals

IMPORTED = deepspeed, nvidia.dali.fn, torch.utils.tensorboard, torch._dynamo, trainer
DeepSpeedInternals.leave_out_muon_compilation()
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000  # of <linux/sched.h>
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000  # of <linux/mount.h>
GRACE = 10.0  # seconds between asking the other ranks to stop and killing them


def become(command: list[str]) -> None:
    """Becomes ``python`` with this command line; never returns."""
    status = 1
    try:
        if command[0] == "-m":
            sys.argv, sys.path[0] = command[1:], os.getcwd()
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork(action) -> int:
    """Returns the id of a new process that does this and nothing else."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


def become_rank(rank: int, request: dict, port: str) -> None:
    size = str(request["ranks"])
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if request["launcher"] == "srun":
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_PORT": port}
        place |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_NUM_NODES": "1"}
        place |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_TASKS_PER_NODE": size}
    for name, value in (place | (request["variables"] or {})).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    become(request["command"])


def enter(node: dict) -> None:
    """Moves this process into a network namespace, with a host's name and mounts of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    with open(f"/run/netns/{node['namespace']}") as namespace:
        check(libc.setns(namespace.fileno(), _CLONE_NEWNET))
    check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS))
    check(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None))  # what is mounted here stays here
    socket.sethostname(node["host"])
    for source, target in node["mounts"]:
        check(libc.mount(source.encode(), target.encode(), None, _MS_BIND, None))


def become_launch(request: dict) -> None:
    """Becomes a process group of its own that ends with the status of the first rank that failed, or 0."""
    os.setsid()
    if request["node"]:
        enter(request["node"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(target, number)
    if request["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if not request["ranks"]:
        become(request["command"])
    port = str(distributed.free_port())
    ranks = {fork(functools.partial(become_rank, rank, request, port)) for rank in range(request["ranks"])}
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
    os._exit(first_failure & 0xFF)


def wait(launch: int, seconds: float) -> int | None:
    """Returns the exit status of a launch, or None where it is still running by then; kills what it has left behind."""
    deadline = time.monotonic() + seconds
    while True:
        child, wait_status = os.waitpid(launch, os.WNOHANG)
        if child:
            kill(launch)
            return os.waitstatus_to_exitcode(wait_status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.02)


def kill(launch: int) -> None:
    try:
        os.killpg(launch, signal.SIGKILL)
    except ProcessLookupError:
        pass


def serve() -> None:
    answers, running = os.fdopen(os.dup(1), "w"), set()  # a copy: imports and commands may print
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
            if answer is not None:
                running.discard(request["wait"])
        else:
            answer = fork(functools.partial(become_launch, request))
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for launch in running:
        kill(launch)
    os._exit(0)  # DALI and DeepSpeed take seconds to tear down


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # else every launch looks several times through all that is imported, and copies those pages
    serve()
