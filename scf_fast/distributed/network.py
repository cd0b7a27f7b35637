"""What this node's network says: names, addresses, interfaces, and whether a port answers."""

import fcntl
import socket
import struct
import time
from collections.abc import Iterator

from scf_fast.errors import InputError

_RESOLVE_SECONDS = 10.0  # for a name server that does not answer at once
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 1  # of <linux/sockios.h> and <net/if.h>


def check_resolves(address: str) -> None:
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


def connect(address: str, port: int, seconds: float = 5.0) -> OSError | None:
    """Returns why a connection cannot be made; None where it can."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return None
    except OSError as error:
        return error


def unreachable(address: str, reason: str) -> InputError:
    return InputError(
        f"MASTER_ADDR={address} cannot be reached from {socket.gethostname()} ({reason}); check the routes and the "
        "interfaces of this node (ip address)"
    )


def check_loopback(address: str) -> None:
    """Checks that the loopback interface is up where the ranks meet there: one that is down swallows everything."""
    if not str(socket.getaddrinfo(address, None)[0][4][0]).startswith(("127.", "::1")):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            flags = fcntl.ioctl(probe.fileno(), _SIOCGIFFLAGS, struct.pack("256s", b"lo"))
        except OSError:  # it has another name
            return
    if not struct.unpack_from("H", flags, 16)[0] & _IFF_UP:
        raise InputError(
            f"MASTER_ADDR={address} cannot be reached from {socket.gethostname()}: its loopback interface is down (ip "
            "link set lo up)"
        )


def own_address(address: str) -> str:
    """Returns the address of this node from which another one is reached; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return ""


def interfaces() -> Iterator[tuple[str, str]]:
    """Yields name and IPv4 address of this node's network interfaces, without those that have none."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
        yield name, socket.inet_ntoa(found[20:24])
