"""How the ranks of a launch find each other: the store, who is where, and the network interface between them.

Whatever is missing or in the way is one line, on the node that sees it, within a stated time.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scf_fast.distributed import network
from scf_fast.distributed.place import Place
from scf_fast.errors import InputError

log = logging.getLogger(__name__)

_SPEAK_SECONDS = 10.0  # between lines about what is waited for
_RETRY_SECONDS = 0.2
_TELL_SECONDS = 3.0  # that the others may take to hear of it
_EVERYBODY, _TOLD, _NONCE, _ENDPOINT = "everybody", "told", "nonce", "scf_fast/endpoint"


@dataclass(frozen=True)
class Member:
    """One rank as the others know it.

    Attributes:
        node: tells machines apart, and containers or network namespaces on one.
        host: the machine's name.
        address: that it reaches the store from.
    """

    rank: int
    pid: int
    node: str
    host: str
    address: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Meeting:
    """A launch whose ranks have found each other.

    Attributes:
        members: by rank; hosts of one name carry their addresses.
        store: for the process group.
        address, port: of the store, for further clients.
    """

    place: Place
    members: tuple[Member, ...]
    store: dist.Store
    address: str
    port: int

    @property
    def own(self) -> Member:
        return self.members[self.place.rank]

    @property
    def neighbors(self) -> list[Member]:
        """The ranks on this node, this one among them, in order."""
        return [member for member in self.members if member.node == self.own.node]

    @property
    def is_first_on_node(self) -> bool:
        return self.neighbors[0].rank == self.place.rank

    @property
    def num_nodes(self) -> int:
        return len({member.node for member in self.members})


def node_identity() -> str:
    """Returns a text that tells this machine, or its container, from every other one."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/net"),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:  # not Linux, or not readable
            parts.append("")
    return " ".join(parts)


def meet(place: Place, seconds: float) -> Meeting:
    """Finds the other ranks of the launch.

    Args:
        seconds: that the others may take to come.
    Raises:
        InputError: the address does not resolve, cannot be reached, or its port is in use; ranks have not come; or two
            have the same number.
    """
    assert place.master_address is not None and place.master_port is not None, "the place has been checked"
    address, port = place.master_address, place.master_port
    deadline = time.monotonic() + seconds
    network.check_resolves(address)
    network.check_loopback(address)
    if place.rank == 0 and not place.has_agent:
        _check_port_is_free(address, port)
    else:
        _wait_for_store(place, address, port, deadline)
    while True:
        try:
            if place.has_agent:
                store, address, port = _meet_beside_agent(place, deadline)
            else:
                store = _open_store(address, port, place, place.rank == 0, seconds)
            own = Member(place.rank, os.getpid(), node_identity(), socket.gethostname(), network.own_address(address))
            return Meeting(place, _call_roll(place, store, own, deadline), store, address, port)
        except _OverError:  # ranks that were started again come while those before them end
            if time.monotonic() > deadline:
                raise InputError(
                    f"another launch with rank {place.rank} is still running at MASTER_ADDR={address}, port {port}; "
                    "wait for its end, or give each launch its own MASTER_PORT"
                ) from None
            time.sleep(_RETRY_SECONDS)
            _wait_for_store(place, address, port, deadline)
        except dist.DistError as error:
            raise InputError(
                f"rank {place.rank} on {socket.gethostname()} has lost the connection to MASTER_ADDR={address}, port "
                f"{port}, while the ranks were meeting ({_first_line(error)}); its own last line may say why"
            ) from None


class _OverError(Exception):
    """The ranks that meet here have all come already."""


def _open_store(address: str, port: int, place: Place, keeps: bool, seconds: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            address, port, place.world_size, keeps, timedelta(seconds=max(1.0, seconds)), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise _in_use(port) from None
        raise InputError(
            f"the ranks cannot meet at MASTER_ADDR={address}, port {port}, as {socket.gethostname()} sees it "
            f"({_first_line(error)}); check that no firewall is between the nodes"
        ) from None


def _meet_beside_agent(place: Place, deadline: float) -> tuple[dist.TCPStore, str, int]:
    """Returns a store that rank 0 keeps, and where it is; rank 0 says so in the store of torchrun's agents.

    That one outlives the ranks: after a restart it still has what the ranks before have written, so that a rank could
    not tell these from its own.
    """
    assert place.master_address is not None and place.master_port is not None, "the place has been checked"
    left = max(1.0, deadline - time.monotonic())
    agent = _open_store(place.master_address, place.master_port, place, False, left)
    if place.rank == 0:
        nonce, own = secrets.token_hex(8), network.own_address(place.master_address)
        store = _open_store(own or "127.0.0.1", 0, place, True, left)
        store.set(_NONCE, nonce)
        addresses = [own, *(address for _, address in network.interfaces() if address != own)]
        agent.set(_ENDPOINT, json.dumps({"addresses": addresses, "port": store.port, "nonce": nonce}))
        return store, own or "127.0.0.1", store.port
    while time.monotonic() < deadline:
        if agent.check([_ENDPOINT]):
            told = json.loads(agent.get(_ENDPOINT))
            for address in told["addresses"]:
                if network.connect(address, told["port"], 2.0) is None:
                    with contextlib.suppress(dist.DistError):  # it was the store of ranks that end
                        store = _open_store(address, told["port"], place, False, left)
                        if store.check([_NONCE]) and store.get(_NONCE).decode() == told["nonce"]:
                            return store, address, told["port"]
        time.sleep(_RETRY_SECONDS)
    raise InputError(
        f"rank 0 has not been reached from {socket.gethostname()} within the time that the ranks have to join; check "
        "that no firewall is between the nodes"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _in_use(port: int) -> InputError:
    return InputError(
        f"MASTER_PORT={port} is in use on {socket.gethostname()}, maybe by another launch; give each launch its own "
        "(--master_port of deepspeed and torchrun, or MASTER_PORT)"
    )


def _check_port_is_free(address: str, port: int) -> None:
    """Checks what would else be a long wait, on the rank that keeps the store."""
    error = network.connect(address, port)
    if error is None:
        raise _in_use(port)
    if error.errno == errno.EACCES:
        raise InputError(f"MASTER_PORT={port} may not be used here ({error.strerror}); give one above 1023")
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
        raise network.unreachable(address, error.strerror or str(error))


def _wait_for_store(place: Place, address: str, port: int, deadline: float) -> None:
    """Waits until rank 0, or its launcher, listens."""
    keeper = "the launcher of rank 0" if place.has_agent else "rank 0"
    began = spoken = time.monotonic()
    while (error := network.connect(address, port)) is not None:
        now = time.monotonic()
        if place.has_agent and error.errno == errno.ECONNREFUSED and now - began > (deadline - began) / 5 + 5:
            # Of a fixed rendezvous: it told this rank the store of the round before. Rank 0 needs that long to end too.
            raise InputError(
                f"torchrun's store at {address}, port {port}, is gone: the agents have started their ranks again one "
                "after the other; torchrun starts this one again, as often as --max_restarts allows"
            )
        if now > deadline:
            raise InputError(
                f"{keeper} has not been reached from {socket.gethostname()} at MASTER_ADDR={address}, port {port}, "
                f"within {now - began:.0f} s ({error.strerror or error}); check that its node has been started, and "
                "that no firewall is between the nodes"
            )
        if now - spoken > _SPEAK_SECONDS:
            spoken = now
            log.warning(
                "rank %d on %s waits for %s at %s, port %d (%s)",
                place.rank,
                socket.gethostname(),
                keeper,
                address,
                port,
                error.strerror or error,
            )
        time.sleep(_RETRY_SECONDS)


def _call_roll(place: Place, store: dist.Store, own: Member, deadline: float) -> tuple[Member, ...]:
    """Enters this rank, and returns all ranks once they have come."""
    if store.check([_EVERYBODY]):
        raise _OverError
    if store.add(f"joined/{place.rank}", 1) > 1:
        raise InputError(
            f"RANK={place.rank} has joined already at port {place.master_port}: two processes have the same RANK, or "
            "two launches the same MASTER_PORT"
        )
    store.set(f"member/{place.rank}", json.dumps(asdict(own)))
    if place.rank == 0:
        try:
            members = _told_apart(_wait_for_all(place, store, deadline))
        except InputError as error:
            store.set(_EVERYBODY, json.dumps({"problem": str(error)}))
            time.sleep(_TELL_SECONDS)  # the store ends with this process
            raise
        store.set(_EVERYBODY, json.dumps({"members": [asdict(member) for member in members]}))
        tell_until = time.monotonic() + _TELL_SECONDS
        while store.add(_TOLD, 0) < place.world_size - 1 and time.monotonic() < tell_until:
            time.sleep(_RETRY_SECONDS / 10)
        return members
    while not store.check([_EVERYBODY]):
        if time.monotonic() > deadline + 2 * _SPEAK_SECONDS:
            raise InputError(f"rank 0 has not told {own} within the time that all ranks had to join; start again")
        time.sleep(_RETRY_SECONDS / 4)
    told = json.loads(store.get(_EVERYBODY))
    store.add(_TOLD, 1)
    if "problem" in told:
        raise InputError(told["problem"])
    return tuple(Member(**member) for member in told["members"])


def _wait_for_all(place: Place, store: dist.Store, deadline: float) -> list[Member]:
    waiting = list(range(place.world_size))
    members: dict[int, Member] = {}
    began = spoken = time.monotonic()
    while True:
        for rank in list(waiting):
            if store.check([f"member/{rank}"]):
                members[rank] = Member(**json.loads(store.get(f"member/{rank}")))
                waiting.remove(rank)
        if not waiting:
            return [members[rank] for rank in range(place.world_size)]
        now = time.monotonic()
        named = f"rank{'s' * (len(waiting) > 1)} {spans(waiting)} of {place.world_size}"
        if now > deadline:
            raise InputError(
                f"{named} have not joined at MASTER_ADDR={place.master_address}, port {place.master_port}, within "
                f"{now - began:.0f} s; {_here(members)}; start the other nodes too, with the same MASTER_ADDR and "
                "MASTER_PORT, which their firewall must let through"
            )
        if now - spoken > _SPEAK_SECONDS:
            spoken = now
            log.warning("waiting for %s; %s", named, _here(members))
        time.sleep(_RETRY_SECONDS / 4)


def _here(members: dict[int, Member]) -> str:
    hosts: dict[str, list[int]] = {}
    for rank, member in sorted(members.items()):
        hosts.setdefault(member.host, []).append(rank)
    return "here: " + ", ".join(f"{spans(ranks)} on {host}" for host, ranks in hosts.items())


def spans(numbers: Sequence[int]) -> str:
    """Returns ascending numbers in words: ``0-3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in found)


def _told_apart(members: list[Member]) -> tuple[Member, ...]:
    """Adds addresses to the names of hosts that several nodes share, as containers may."""
    nodes: dict[str, set[str]] = {}
    for member in members:
        nodes.setdefault(member.host, set()).add(member.node)
    return tuple(
        Member(m.rank, m.pid, m.node, f"{m.host} ({m.address})" if len(nodes[m.host]) > 1 else m.host, m.address)
        for m in members
    )


def exchange(meeting: Meeting, key: str, value: str, seconds: float) -> list[str]:
    """Returns what each rank has given, by rank, through the store alone; every rank has to ask.

    Raises:
        InputError: some have not, within this time.
    """
    store, keys = meeting.store, [f"{key}/{rank}" for rank in range(len(meeting.members))]
    store.set(keys[meeting.place.rank], value)
    store.add(f"{key}/given", 1)
    deadline = time.monotonic() + seconds
    while store.add(f"{key}/given", 0) < len(keys):  # one number, however many ranks ask
        if time.monotonic() > deadline:
            missing = [rank for rank, name in enumerate(keys) if not store.check([name])]
            raise InputError(f"ranks {spans(missing)} have joined, and not gone on within {seconds:.0f} s; start again")
        time.sleep(_RETRY_SECONDS / 10)
    return [found.decode() for found in store.multi_get(keys)]


def choose_interface(meeting: Meeting) -> str | None:
    """Returns the network interface through which this rank reaches the others; None where none is found.

    Without it gloo takes the interface that the host's own name resolves to, which on many systems is the loopback: the
    ranks of other nodes then connect to themselves.
    """
    address = meeting.own.address
    others = [member for member in meeting.members if member.node != meeting.own.node]
    if others and meeting.own.node == meeting.members[0].node:
        # Here the store's name may resolve to the loopback.
        address = network.own_address(others[0].address)
    return next((name for name, found in network.interfaces() if found == address), None)
