"""What macOS prints -> values. Pure functions over text.

The text comes from another program of another version, so each parser takes what it knows and leaves out the rest;
UnreadableError when nothing of it is as expected. `system_profiler` prints one entry per port, its receptacle under a
key `receptacle_<n>_tag`, attached devices under `_items`. Another *host* is a device with a `domain_uuid_key` of
its own; a dock or a drive has none.
"""

import ipaddress
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from expertd.topology.values import Address, Interface, Kind, ThunderboltPort, UnreadableError

RDMA_PROTOCOL = (
    64087  # the service by which a host offers RDMA; its key is "rdma", but some versions garble it
)
MAX_DEPTH = 16  # of nested devices: Thunderbolt allows six in a chain


def parse_thunderbolt(text: str, ports: dict[str, str] | None = None) -> tuple[ThunderboltPort, ...]:
    """Read `system_profiler SPThunderboltDataType -json`, by receptacle.

    `ports` (from parse_hardware_ports) tells the interface of each. Raises UnreadableError.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UnreadableError(f"system_profiler: wanted JSON, found {text[:40]!r}") from e
    entries = data.get("SPThunderboltDataType") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise UnreadableError("system_profiler: wanted the key SPThunderboltDataType with a list")
    found = [_port(entry, ports or {}) for entry in entries if isinstance(entry, dict)]
    return tuple(sorted((p for p in found if p), key=lambda p: (len(p.receptacle), p.receptacle)))


def _port(entry: dict[str, Any], ports: dict[str, str]) -> ThunderboltPort | None:
    """One bus; None for one that is no port of ours (no identity and no receptacle)."""
    tag = next((v for k, v in sorted(entry.items()) if _is_receptacle(k) and isinstance(v, dict)), {})
    receptacle, uuid = _text(tag, "receptacle_id_key"), _text(entry, "domain_uuid_key")
    if not (receptacle or uuid):
        return None
    peer = next((d for d in _devices(entry) if _text(d, "domain_uuid_key")), {})
    return ThunderboltPort(
        receptacle=receptacle,
        interface=ports.get(f"Thunderbolt {receptacle}", ""),
        domain_uuid=uuid,
        speed_gbps=_gbps(_text(tag, "current_speed_key")),
        connected=_text(tag, "receptacle_status_key") == "receptacle_connected" or bool(peer),
        peer_uuid=_text(peer, "domain_uuid_key"),
        peer_name=_text(peer, "_name") or _text(peer, "device_name_key"),
        offers_rdma=any(_is_rdma(s) for s in _dicts(peer.get("services_title"))),
    )


def _is_receptacle(key: str) -> bool:
    return re.fullmatch(r"receptacle_\d+_tag", key) is not None


def _devices(entry: dict[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """All devices behind a port, nearest first; a host may sit behind a dock."""
    for item in _dicts(entry.get("_items")):
        yield item
        if depth < MAX_DEPTH:
            yield from _devices(item, depth + 1)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_rdma(service: dict[str, Any]) -> bool:
    return (
        _text(service, "protocol_id_key") == str(RDMA_PROTOCOL) or _text(service, "service_key_key") == "rdma"
    )


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    return str(value).strip()[:200] if isinstance(value, str | int) else ""


def _gbps(text: str) -> int:
    """ "80 Gb/s", "Up to 120 Gb/s", "Up to 40 Gb/s x1" -> 80, 120, 40."""
    found = re.search(r"(\d{1,4})(?:\.\d+)?\s*Gb/s", text)
    return int(found[1]) if found else 0


def parse_hardware_ports(text: str) -> dict[str, str]:
    """Read `networksetup -listallhardwareports`: name of the port -> interface, such as "Thunderbolt 1" -> "en1".

    Raises UnreadableError when there is not one port.
    """
    ports, name = {}, ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Hardware Port":
            name = value.strip()
        elif key.strip() == "Device" and name and value.strip():
            ports[name], name = value.strip(), ""
    if not ports:
        raise UnreadableError(
            f"networksetup: wanted lines of `Hardware Port:` and `Device:`, found {text[:40]!r}"
        )
    return ports


def kind_of(name: str, ports: dict[str, str]) -> Kind:
    """What an interface of macOS is, by its hardware port, else by the name that the system gives to such ones."""
    port = next((p for p, device in ports.items() if device == name), "")
    if re.fullmatch(r"Thunderbolt \d+", port):
        return "thunderbolt"
    if port in ("Wi-Fi", "AirPort") or name.startswith(("awdl", "llw")):
        return "wifi"
    if name.startswith("bridge"):
        return "bridge"
    if name.startswith(("utun", "ipsec", "ppp", "tun", "tap", "feth", "zt")):
        return "vpn"
    if name.startswith("lo"):
        return "loopback"
    return "ethernet" if port or name.startswith("en") else "other"


def parse_ifconfig(text: str, ports: dict[str, str] | None = None) -> tuple[Interface, ...]:
    """Read macOS' `ifconfig`: all interfaces in their order.

    `up` means the flag UP and, where a status is printed, `status: active`. Raises UnreadableError.
    """
    blocks = re.split(r"^(?=[^\s:]+: flags=)", text, flags=re.MULTILINE)
    found = [_interface(block, ports or {}) for block in blocks if re.match(r"[^\s:]+: flags=", block)]
    if not found:
        raise UnreadableError(f"ifconfig: wanted lines such as `en0: flags=...`, found {text[:40]!r}")
    return tuple(found)


def _interface(block: str, ports: dict[str, str]) -> Interface:
    head, _, rest = block.partition("\n")
    name = head.partition(":")[0]
    flags = re.search(r"<([^>]*)>", head)
    mtu = re.search(r"\bmtu (\d{1,6})\b", head)
    status = re.search(r"^\s*status: (\S+)", rest, flags=re.MULTILINE)
    return Interface(
        name=name,
        kind=kind_of(name, ports),
        addresses=tuple(_addresses(rest)),
        mtu=int(mtu[1]) if mtu else 0,
        up="UP" in (flags[1].split(",") if flags else ()) and (not status or status[1] == "active"),
        members=tuple(re.findall(r"^\s*member: (\S+)", rest, flags=re.MULTILINE)),
    )


def _addresses(block: str) -> Iterator[Address]:
    for line in block.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] in ("inet", "inet6"):
            keys = dict(itertools.pairwise(words))
            address = _address(words[1], keys.get("netmask", ""), keys.get("prefixlen", ""))
            if address:
                yield address


def _address(ip: str, netmask: str, prefix_length: str) -> Address | None:
    ip = ip.partition("%")[0].partition("/")[0]
    try:
        if netmask.startswith("0x"):
            netmask = str(ipaddress.IPv4Address(int(netmask, 16)))
        network = ipaddress.ip_network(f"{ip}/{netmask or int(prefix_length)}", strict=False)
    except ValueError:
        return None
    return Address(ip, network.prefixlen)


def parse_rdma_ctl(text: str) -> str:
    """Read `rdma_ctl status`: "enabled" or "disabled". Raises UnreadableError."""
    found = re.search(r"\b(enabled|disabled)\b", text.lower())
    if not found:
        raise UnreadableError(f"rdma_ctl status: wanted `enabled` or `disabled`, found {text[:40]!r}")
    return found[1]


def parse_sleep_minutes(text: str) -> int:
    """Read `pmset -g`: minutes of idleness until the system sleeps, 0 for never. Raises UnreadableError."""
    found = re.search(r"^\s*sleep\s+(\d{1,6})\b", text, flags=re.MULTILINE)
    if not found:
        raise UnreadableError(f"pmset -g: wanted a line such as `sleep 1`, found {text[:40]!r}")
    return int(found[1])


def parse_wired_memory(text: str) -> tuple[int, int]:
    """Read `sysctl -n hw.memsize iogpu.wired_limit_mb`: bytes of memory, and MB that the GPU may wire, 0 for the
    system's own limit. Raises UnreadableError."""
    found = re.fullmatch(r"(\d{1,16})\s+(\d{1,9})\s*", text)
    if not found:
        raise UnreadableError(f"sysctl: wanted two numbers, found {text[:40]!r}")
    return int(found[1]), int(found[2])


def parse_firewall(text: str) -> bool:
    """Read `socketfilterfw --getglobalstate`: whether the firewall is on. Raises UnreadableError."""
    found = re.search(r"State = (\d)", text) or re.search(r"\b(enabled|disabled)\b", text)
    if not found:
        raise UnreadableError(f"socketfilterfw: wanted `(State = 0)` or the like, found {text[:40]!r}")
    return found[1] not in ("0", "disabled")
