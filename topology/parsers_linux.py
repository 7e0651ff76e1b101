"""What Linux shows under /sys -> values. Each function takes the root, so that a test can give a folder of samples.

A device may vanish while it is read (a cable is pulled), so a file that is not there or not readable counts as empty.
"""

import ipaddress
import re
from pathlib import Path

from expertd.topology.values import PORT_ACTIVE, Kind, RdmaDevice, ThunderboltPort

MAX_FILE_BYTES = 4096  # one page: no file of /sys that we read is longer
MAX_GIDS = 1024
# Hardware types of include/uapi/linux/if_arp.h: Ethernet, loopback; PPP, tunnels of IP in IP, GRE, none (tun).
ETHERNET, LOOPBACK, TUNNELS = "1", "772", ("512", "768", "769", "776", "778", "65534")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return f.read(MAX_FILE_BYTES).decode(errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_infiniband(root: Path) -> tuple[RdmaDevice, ...]:
    """Read /sys/class/infiniband under `root` (usually /sys): all devices with the state of their port 1."""
    return tuple(_rdma_device(d) for d in _entries(root / "class/infiniband") if (d / "ports").is_dir())


def _rdma_device(device: Path) -> RdmaDevice:
    port = device / "ports/1"
    state = re.fullmatch(r"(\d+): (\S+)", _read(port / "state"))
    gids = _entries(port / "gids")[:MAX_GIDS]
    # A device without an IPv4 address still says of which interface it is.
    names = [_read(port / "gid_attrs/ndevs" / gid.name) for gid in gids]
    found = dict.fromkeys(ip for gid in gids if (ip := mapped_ipv4(_read(gid))))
    return RdmaDevice(
        name=device.name,
        interface=next((name for name in names if name), ""),
        port_state=(PORT_ACTIVE if state[1] == "4" else state[2].lower()) if state else "",
        ipv4=tuple(found),
    )


def mapped_ipv4(gid: str) -> str:
    """The IPv4 address that a GID maps ("::ffff:a.b.c.d" in any spelling), else ""."""
    try:
        mapped = ipaddress.IPv6Address(gid).ipv4_mapped
    except ValueError:
        return ""
    return str(mapped) if mapped else ""


def read_thunderbolt(root: Path) -> tuple[ThunderboltPort, ...]:
    """Read /sys/bus/thunderbolt/devices under `root`: one port for each other host.

    Named after the kernel's Documentation/ABI/testing/sysfs-bus-thunderbolt: `0-0` is our own router of domain 0,
    `0-1` a device or a host on its port 1 (a host has no `authorized`), `0-1.0` a service of that host. A port without
    a cable is not shown there.
    """
    devices = root / "bus/thunderbolt/devices"
    return tuple(
        _thunderbolt_port(devices, d)
        for d in _entries(devices)
        if re.fullmatch(r"\d+-[1-9a-f][0-9a-f]*", d.name) and not (d / "authorized").exists()
    )


def _thunderbolt_port(devices: Path, host: Path) -> ThunderboltPort:
    domain = host.name.partition("-")[0]
    services = [d for d in _entries(devices) if d.name.startswith(f"{host.name}.")]
    lanes = re.match(r"\d{1,2}", _read(host / "rx_lanes"))
    speed = re.match(r"\d{1,4}", _read(host / "rx_speed"))  # of one lane
    return ThunderboltPort(
        receptacle=host.name,
        interface=next((net.name for s in services for net in _entries(s / "net")), ""),
        domain_uuid=_read(devices / f"{domain}-0" / "unique_id"),
        speed_gbps=int(speed[0]) * int(lanes[0] if lanes else 1) if speed else 0,
        connected=True,
        peer_uuid=_read(host / "unique_id"),
        peer_name=_read(host / "device_name"),
        offers_rdma=any(_read(s / "key") == "rdma" for s in services),
    )


def read_interface_kind(root: Path, name: str) -> Kind:
    """What an interface is, from /sys/class/net/<name> under `root`."""
    net = root / "class/net" / name
    kind = _read(net / "type")
    if (net / "bridge").is_dir():
        return "bridge"
    if (net / "wireless").is_dir() or (net / "phy80211").exists():
        return "wifi"
    if "thunderbolt" in _driver(net):
        return "thunderbolt"
    if kind == LOOPBACK:
        return "loopback"
    if kind in TUNNELS or (net / "tun_flags").exists():
        return "vpn"
    return "ethernet" if kind == ETHERNET and (net / "device").exists() else "other"


def _driver(net: Path) -> str:
    """The driver and the bus, by the names of the folders that the links lead to."""
    try:
        return " ".join((net / "device" / link).resolve().name for link in ("driver", "subsystem"))
    except (OSError, RuntimeError):
        return ""


def read_bridge_members(root: Path, name: str) -> tuple[str, ...]:
    return tuple(p.name for p in _entries(root / "class/net" / name / "brif"))
