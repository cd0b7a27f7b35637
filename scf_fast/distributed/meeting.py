"""How the ranks of a launch find each other: the store, who is where, and the network interface between them.

Whatever is missing or in the way is one line, on the node that sees it, within a stated time.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scf_fast.distributed.place import Place
from scf_fast.errors import InputError

log = logging.getLogger(__name__)

_SPEAK_SECONDS = 10.0  # between lines about what is waited for
_RETRY_SECONDS = 0.2
_RESOLVE_SECONDS = 10.0  # for a name server that does not answer at once
_EVERYBODY = "everybody"
_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: an interface's address


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
    _check_resolves(address)
    keeps_store = place.rank == 0 and not place.has_agent
    if keeps_store:
        _check_port_is_free(address, port)
    else:
        _wait_for_store(place, address, port, deadline)
    try:
        store = dist.TCPStore(
            address, port, place.world_size, keeps_store, timedelta(seconds=seconds), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise _in_use(port) from None
        raise InputError(
            f"the ranks cannot meet at MASTER_ADDR={address}, port {port}, as {socket.gethostname()} sees it "
            f"({_first_line(error)}); check that no firewall is between the nodes"
        ) from None
    own = Member(place.rank, os.getpid(), node_identity(), socket.gethostname(), _own_address(address))
    try:
        members = _call_roll(place, store, own, deadline)
    except dist.DistError as error:
        raise InputError(
            f"rank {place.rank} on {own.host} has lost the connection to MASTER_ADDR={address}, port {port}, while the "
            f"ranks were meeting ({_first_line(error)}); its own last line may say why"
        ) from None
    return Meeting(place, members, store, address, port)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check_resolves(address: str) -> None:
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            if getattr(error, "errno", None) == socket.EAI_AGAIN and time.monotonic() < deadline:
                time.sleep(1)
                continue
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"MASTER_ADDR={address} does not resolve on {socket.gethostname()} ({reason}); give a name or number "
                "that every node knows"
            ) from None


def _connect(address: str, port: int) -> OSError | None:
    """Returns why a connection cannot be made; None where it can."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return None
    except OSError as error:
        return error


def _in_use(port: int) -> InputError:
    return InputError(
        f"MASTER_PORT={port} is in use on {socket.gethostname()}, maybe by another launch; give each launch its own "
        "(--master_port of deepspeed and torchrun, or MASTER_PORT)"
    )


def _check_port_is_free(address: str, port: int) -> None:
    """Checks what would else be a long wait, on the rank that keeps the store."""
    error = _connect(address, port)
    if error is None:
        raise _in_use(port)
    if error.errno == errno.EACCES:
        raise InputError(f"MASTER_PORT={port} may not be used here ({error.strerror}); give one above 1023")
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
        raise InputError(_unreachable(address, error))


def _unreachable(address: str, error: OSError) -> str:
    way = "check the routes and the interfaces of this node (ip address)"
    if address.startswith("127.") or address == "localhost":
        way = "its loopback interface is down (ip link set lo up)"
    return f"MASTER_ADDR={address} cannot be reached from {socket.gethostname()} ({error.strerror or error}); {way}"


def _wait_for_store(place: Place, address: str, port: int, deadline: float) -> None:
    """Waits until rank 0, or its launcher, listens."""
    keeper = "the launcher of rank 0" if place.has_agent else "rank 0"
    began = spoken = time.monotonic()
    while (error := _connect(address, port)) is not None:
        now = time.monotonic()
        loopback = address.startswith("127.") or address == "localhost"
        if loopback and error.errno == errno.ENETUNREACH:
            raise InputError(_unreachable(address, error))
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
            raise
        store.set(_EVERYBODY, json.dumps({"members": [asdict(member) for member in members]}))
        return members
    while not store.check([_EVERYBODY]):
        if time.monotonic() > deadline + 2 * _SPEAK_SECONDS:
            raise InputError(f"rank 0 has not told {own} within the time that all ranks had to join; start again")
        time.sleep(_RETRY_SECONDS / 4)
    told = json.loads(store.get(_EVERYBODY))
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


def _own_address(address: str) -> str:
    """Returns the address of this node from which another one is reached; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return ""


def choose_interface(meeting: Meeting) -> str | None:
    """Returns the network interface through which this rank reaches the others; None where none is found.

    Without it gloo takes the interface that the host's own name resolves to, which on many systems is the loopback: the
    ranks of other nodes then connect to themselves.
    """
    address = meeting.own.address
    others = [member for member in meeting.members if member.node != meeting.own.node]
    if others and meeting.own.node == meeting.members[0].node:
        # Here the store's name may resolve to the loopback.
        address = _own_address(others[0].address)
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no IPv4 address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None
