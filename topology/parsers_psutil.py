"""What psutil gives of the interfaces -> values, on every system."""

import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from expertd.topology.values import Address, Interface, Kind


def parse_interfaces(
    addresses: Mapping[str, Iterable[Any]], stats: Mapping[str, Any], kind_of: Callable[[str], Kind]
) -> tuple[Interface, ...]:
    """Read psutil.net_if_addrs() and net_if_stats(), in their order, those without an address too.

    What is no address (a hardware address, a damaged one) is left out.
    """
    return tuple(
        _interface(name, addresses.get(name, ()), stats.get(name), kind_of(name))
        for name in dict.fromkeys([*addresses, *stats])
    )


def _interface(name: str, addresses: Iterable[Any], stats: Any, kind: Kind) -> Interface:
    found = tuple(a for a in map(_address, addresses) if a)
    if stats is None:
        return Interface(name, kind, found)
    return Interface(name, kind, found, mtu=stats.mtu, up=stats.isup, speed_mbps=max(0, stats.speed))


def _address(entry: Any) -> Address | None:
    if entry.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        ip = ipaddress.ip_address(str(entry.address).partition("%")[0])
        return Address(str(ip), _prefix_length(ip.max_prefixlen, entry.netmask))
    except ValueError:
        return None


def _prefix_length(longest: int, netmask: str | None) -> int:
    """Of "255.255.255.0" or "ffff:ffff::": its leading ones; without a mask the host alone."""
    if not netmask:
        return longest
    ones = int(ipaddress.ip_address(str(netmask).partition("/")[0]))
    return f"{ones:0{longest}b}".find("0") if ones != (1 << longest) - 1 else longest
