"""What a host, its ports and links are: plain frozen values that know nothing of how they were found."""

import ipaddress
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["thunderbolt", "ethernet", "wifi", "vpn", "bridge", "loopback", "other"]

# RDMA over Thunderbolt needs Thunderbolt 5; a port of version 4 gives at most 40 Gb/s (Apple TN3205).
THUNDERBOLT_4_GBPS = 40
PORT_ACTIVE = "active"


class UnreadableError(ValueError):
    """What a parser was given is not what its command prints; the message says what was found and wanted."""


@dataclass(frozen=True)
class Address:
    ip: str
    prefix_length: int

    def holds(self, ip: str) -> bool:
        """Whether `ip` is on the same subnet; what is no address is on none."""
        try:
            return ipaddress.ip_address(ip) in ipaddress.ip_network(
                f"{self.ip}/{self.prefix_length}", strict=False
            )
        except ValueError:
            return False


@dataclass(frozen=True)
class Interface:
    """A network interface. `up`: set up and with a carrier. `speed_mbps` is 0 when the system does not say.

    `members` are the interfaces that a bridge joins.
    """

    name: str
    kind: Kind
    addresses: tuple[Address, ...] = ()
    mtu: int = 0
    up: bool = False
    speed_mbps: int = 0
    members: tuple[str, ...] = ()

    @property
    def ipv4(self) -> tuple[str, ...]:
        return tuple(a.ip for a in self.addresses if ":" not in a.ip)


@dataclass(frozen=True)
class ThunderboltPort:
    """A receptacle, and the host at the other end of its cable, if there is one.

    `domain_uuid` names this port to the other host: two ports are joined when each names the other. `speed_gbps` is
    what the cable runs at, or the most that the port can do when it has none; 0 is unknown. `offers_rdma` says
    whether the *other* host offers RDMA on it.
    """

    receptacle: str
    interface: str = ""
    domain_uuid: str = ""
    speed_gbps: int = 0
    connected: bool = False
    peer_uuid: str = ""
    peer_name: str = ""
    offers_rdma: bool = False


@dataclass(frozen=True)
class RdmaDevice:
    """`port_state` is "active", "down" or the system's own word; `ipv4` the addresses in its GID table."""

    name: str
    interface: str = ""
    port_state: str = ""
    ipv4: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Host:
    """One machine as it was found. `rdma_switch` is what `rdma_ctl status` prints, "" where there is none.

    `notes` are what could not be found out and why.
    """

    host_id: str
    name: str
    processor: str
    system: str
    interfaces: tuple[Interface, ...] = ()
    thunderbolt: tuple[ThunderboltPort, ...] = ()
    rdma: tuple[RdmaDevice, ...] = ()
    rdma_switch: str = ""
    notes: tuple[str, ...] = ()

    def interface(self, name: str) -> Interface | None:
        return next((i for i in self.interfaces if i.name == name), None)

    @property
    def cables(self) -> tuple[ThunderboltPort, ...]:
        """The Thunderbolt ports that lead to another host."""
        return tuple(p for p in self.thunderbolt if p.peer_uuid)


@dataclass(frozen=True)
class Path:
    """A way to another host: out of `interface` with `local_address`, to `remote_address`."""

    interface: str
    kind: Kind
    local_address: str
    remote_address: str


@dataclass(frozen=True)
class Measurement:
    """`num` symmetric exchanges of `payload_bytes` each way; `bandwidth_mb_s` each way, both ways at once."""

    p50_us: float
    p99_us: float
    bandwidth_mb_s: float
    payload_bytes: int
    num: int


@dataclass(frozen=True)
class Route:
    """A path as it was measured, one measurement per size of payload; none: it did not answer, see `failure`."""

    path: Path
    measurements: tuple[Measurement, ...] = ()
    failure: str = ""


def as_json(value: Any) -> dict[str, Any]:
    """Give any of these values as what json.dumps takes."""
    return asdict(value)
