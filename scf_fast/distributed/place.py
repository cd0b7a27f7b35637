"""A process's place in a launch, from the variables that its launcher has set.

``torchrun`` and ``deepspeed`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; so does whoever starts the
ranks by hand. ``srun`` sets ``SLURM_*``: one task is one rank. Without any of them a process is alone.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from scf_fast.errors import InputError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # of mpirun's
_FIRST_PORT, _PORTS = 20_000, 12_000  # below those that Linux gives to connections, from 32768 on


@dataclass(frozen=True)
class Place:
    """A process's place in its launch.

    Attributes:
        launcher: who has set the variables: ``"torchrun"``, ``"srun"``, ``"variables"`` (``deepspeed``, or a user), or
            ``"python"`` for a process that is alone.
        local_rank, local_size: among the ranks of its node; None where nobody has said so.
        master_address, master_port: where the ranks meet; None for a process that is alone.
        has_agent: whether the launcher keeps the store there, not rank 0.
        restarts: how often the launcher has started the ranks again.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_size: int | None = None
    master_address: str | None = None
    master_port: int | None = None
    has_agent: bool = False
    restarts: int = 0

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variables as torchrun has them, for libraries that read them."""
        environment.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size))
        for name, value in (
            ("LOCAL_RANK", self.local_rank),
            ("LOCAL_WORLD_SIZE", self.local_size if self.world_size > 1 else None),  # launches from here set it or not
            ("MASTER_ADDR", self.master_address),
            ("MASTER_PORT", self.master_port),
        ):
            if value is not None:
                environment[name] = str(value)


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Returns this process's place.

    Args:
        environment: default: the process's own.
    Raises:
        InputError: variables are empty, no numbers, incomplete, or contradict each other; or several processes were
            started that would not know of each other.
    """
    environment = os.environ if environment is None else environment
    for name in _NAMES:
        if environment.get(name, "set").strip() == "":
            raise InputError(f"the variable {name} is empty; unset it, or let a launcher set it")
    if "RANK" in environment:
        return _of_variables(environment)
    if _number(environment, "WORLD_SIZE", 1) not in (None, 1):
        raise InputError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set and RANK is not; start with torchrun, deepspeed or srun, "
            "or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each rank"
        )
    if "SLURM_PROCID" in environment:
        return _of_slurm(environment)
    for name in _MPI_SIZES:
        if _number(environment, name, 1) not in (None, 1):
            raise InputError(
                f"{name}={environment[name]}: mpirun has started several processes, and each would train alone; start "
                "with srun, torchrun or deepspeed, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
    return Place("python", local_rank=0, local_size=1)


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    """Returns a variable's number; None where it is not set.

    Raises:
        InputError: it is no number, or below ``least``.
    """
    text = environment.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+", text.strip()) or int(text) < least:
        raise InputError(
            f"the variable {name} must be a whole number, {least} or more, got {text!r}; unset or correct it"
        )
    return int(text)


def _of_variables(environment: Mapping[str, str]) -> Place:
    rank, world_size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    assert rank is not None, "the caller has looked"
    if world_size is None:
        raise InputError(
            f"RANK={rank} is set and WORLD_SIZE is not; set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
            "for each rank, or start with torchrun, deepspeed or srun"
        )
    if rank >= world_size:
        raise InputError(f"RANK={rank} must be below WORLD_SIZE={world_size}: ranks count from 0")
    local_rank, local_size = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1)
    if local_size is None:
        local_size = _number(environment, "LOCAL_SIZE", 1)  # deepspeed's name
    if local_size is not None and local_size > world_size:
        raise InputError(f"LOCAL_WORLD_SIZE={local_size} must be at most WORLD_SIZE={world_size}")
    if local_rank is not None and local_rank >= (local_size or world_size):
        raise InputError(
            f"LOCAL_RANK={local_rank} must be below the number of ranks, {local_size or world_size}"
            f"{' on this node' if local_size else ''}: it counts the ranks of a node from 0"
        )
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    tasks, task = _number(environment, "SLURM_STEP_NUM_TASKS", 1), _number(environment, "SLURM_PROCID", 0)
    if not by_torchrun and tasks == world_size > 1 and task != rank:
        raise InputError(
            f"RANK={rank} contradicts SLURM_PROCID={task}, as if every task of srun had the same RANK; unset RANK and "
            "WORLD_SIZE: srun's own variables are enough"
        )
    address, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT", 1)
    if world_size > 1 and (address is None or port is None):
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise InputError(
            f"RANK and WORLD_SIZE={world_size} are set and {missing} is not; set MASTER_ADDR to the node of rank 0 and "
            "MASTER_PORT to a free port of it, the same for all ranks"
        )
    if port is not None and port > 65535:
        raise InputError(f"the variable MASTER_PORT must be at most 65535, got {port}")
    return Place(
        "torchrun" if by_torchrun else "variables",
        rank,
        world_size,
        0 if world_size == 1 and local_rank is None else local_rank,
        1 if world_size == 1 else local_size,
        address,
        port,
        has_agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0) or 0,
    )


def _of_slurm(environment: Mapping[str, str]) -> Place:
    """Returns the place of a task of ``srun``: one task is one rank."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1) or _number(environment, "SLURM_NTASKS", 1) or 1
    if tasks == 1:
        return Place("python", local_rank=0, local_size=1)
    if "SLURM_STEP_ID" not in environment and environment.get("ENVIRONMENT") == "BATCH":
        raise InputError(
            f"this job has {tasks} tasks, but the batch script has started the program once, outside of them; put srun "
            "before it"
        )
    rank, local_rank = _number(environment, "SLURM_PROCID", 0), _number(environment, "SLURM_LOCALID", 0)
    assert rank is not None, "the caller has looked"
    if rank >= tasks:
        raise InputError(f"SLURM_PROCID={rank} must be below the number of tasks, {tasks}; start the program with srun")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "")
    address, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT", 1)
    if address is None:
        one_node = (_number(environment, "SLURM_STEP_NUM_NODES", 1) or _number(environment, "SLURM_NNODES", 1)) == 1
        address = "127.0.0.1" if one_node or not nodes else first_node(nodes)
    if port is None:
        # The same for all tasks, another one for most other jobs.
        job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        port = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    node, local_size = _number(environment, "SLURM_NODEID", 0), None
    if counts and node is not None:
        per_node = tasks_per_node(counts)
        local_size = per_node[node] if node < len(per_node) else None
    return Place("srun", rank, tasks, local_rank, local_size, address, port)


def first_node(nodes: str) -> str:
    """Returns the first name of a Slurm node list, such as ``gpu[007-012,020],login1``."""
    found = re.match(r"([^,\[]+)(?:\[([^\],\-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise InputError(f"the Slurm node list {nodes!r} names no node; set MASTER_ADDR to the node of task 0")
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + (suffix or "")


def tasks_per_node(counts: str) -> list[int]:
    """Returns the tasks of each node from Slurm's short form, such as ``4(x2),1``.

    Raises:
        InputError: it is no such text.
    """
    found: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if match is None:
            raise InputError(f"SLURM_TASKS_PER_NODE must be a list like 4(x2),1, got {counts!r}")
        found += [int(match[1])] * int(match[2] or 1)
    return found
