"""Keep a TCP connection on one interface, and check that it is there.

The system chooses where a connection leaves by its routing table, not by the address that the socket is bound to. With
a cable and Wi-Fi between the same two hosts, traffic then moves to the slow link without an error when a route
changes; systems that did not check served at a tenth of their speed and looked well (exo issue 1723). So a socket is
bound to its interface before it connects, and checked afterwards.
"""

import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable

import psutil

# <netinet/in.h> and <netinet6/in6.h> of macOS; Python does not export them.
IP_BOUND_IF, IPV6_BOUND_IF = 25, 125
DISCARD_PORT = 9  # any: a UDP socket that is connected sends nothing

Owner = Callable[[str], str]  # IP address -> the interface of this host that has it, "" for none


class RouteError(OSError):
    """A connection is not, or cannot be put, on the interface that was asked for."""


def bind_to_route(sock: socket.socket, local_address: str, interface: str) -> bool:
    """Bind a socket that is not connected yet to an address and, where the system lets us, to an interface.

    Gives whether it is bound to the interface: Linux refuses that to sockets of some containers; check_route then still
    finds a connection that left elsewhere. Raises RouteError when the address or the interface is not there.
    """
    bound = _bind_to_interface(sock, interface)
    try:
        sock.bind((local_address, 0))
    except OSError as e:
        raise RouteError(
            f"cannot bind to {local_address} on {interface}: {e.strerror}. "
            "Run `expertd topology` to see this host's addresses."
        ) from e
    return bound


def _bind_to_interface(sock: socket.socket, interface: str) -> bool:
    try:
        index = socket.if_nametoindex(interface)
    except OSError as e:
        raise RouteError(
            f"no interface {interface}. Run `expertd topology` to see this host's interfaces."
        ) from e
    ipv6 = sock.family == socket.AF_INET6
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            level = socket.IPPROTO_IPV6 if ipv6 else socket.IPPROTO_IP
            sock.setsockopt(level, IPV6_BOUND_IF if ipv6 else IP_BOUND_IF, struct.pack("I", index))
            return True
        if hasattr(socket, "SO_BINDTODEVICE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
            return True
    return False


def check_route(sock: socket.socket, local_address: str, interface: str, owner: Owner | None = None) -> None:
    """Check a connected socket, whichever end connected: it has `local_address`, which `interface` owns, and what it
    sends leaves there. To be called when it is connected and again when routes may have changed.

    Raises RouteError that says over which interface it leaves.
    """
    owner = owner or interface_of
    remote, local = sock.getpeername()[0].partition("%")[0], sock.getsockname()[0].partition("%")[0]
    if _same(local, local_address) and owner(local) == interface:
        if _bind_to_interface(sock, interface):
            return  # from now on the system itself keeps it there
        local = source_for(remote)
        if owner(local) == interface:
            return
    raise RouteError(
        f"the connection to {remote} leaves over {owner(local) or 'no interface'} ({local}), "
        f"wanted {interface} ({local_address})"
    )


def _same(a: str, b: str) -> bool:
    return ipaddress.ip_address(a) == ipaddress.ip_address(b.partition("%")[0])


def source_for(remote_address: str) -> str:
    """Give the address that the routing table would send from to `remote_address`, "" when there is no route."""
    family = socket.AF_INET6 if ":" in remote_address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((remote_address, DISCARD_PORT))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Give the interface of this host that has an address, "" when none has it. All of 127/8 is the loopback's."""
    for name, entries in psutil.net_if_addrs().items():
        own = [str(e.address).partition("%")[0] for e in entries]
        if address in own or (address.startswith("127.") and "127.0.0.1" in own):
            return name
    return ""
