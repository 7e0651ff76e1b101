"""What is wrong with a host's cabling and settings, judged by its values alone, each with what to do about it."""

from dataclasses import dataclass

from expertd.topology.values import THUNDERBOLT_4_GBPS, Host, ThunderboltPort

ENABLE_RDMA = "start into Recovery (hold the power button), Utilities > Terminal: rdma_ctl enable; restart"


@dataclass(frozen=True)
class Problem:
    """`about` is "bridge", "address" or "rdma"; `found` what is wrong; `next` what to type or do."""

    about: str
    found: str
    next: str


def find_problems(host: Host) -> tuple[Problem, ...]:
    """Give what a user should mend, most harmful first."""
    return (*_bridge(host), *_addresses(host), *_rdma(host))


def _bridge(host: Host) -> list[Problem]:
    """Several cables on one bridge make a loop as soon as the other hosts are cabled to each other: packets then
    circle, and the network of all of them stands still (several reports; Apple TN3205 asks to turn the bridge off).
    """
    active = {p.interface for p in host.thunderbolt if p.connected}
    found = []
    for bridge in (i for i in host.interfaces if i.kind == "bridge" and i.up):
        cabled = [m for m in bridge.members if m in active]
        if len(cabled) > 1:
            found.append(
                Problem(
                    "bridge",
                    f"{bridge.name} joins {len(cabled)} Thunderbolt cables ({', '.join(cabled)}): hosts "
                    "cabled in a ring then flood each other",
                    f"sudo ifconfig {bridge.name} down; to keep it off: System Settings > Network > "
                    "Thunderbolt Bridge > Make Service Inactive",
                )
            )
    return found


def _addresses(host: Host) -> list[Problem]:
    """RDMA and our own routes need an IPv4 address on the port's interface; one on the bridge does not count."""
    found = []
    for port in host.cables:
        interface = host.interface(port.interface)
        if interface and not interface.ipv4:
            found.append(
                Problem(
                    "address",
                    f"{port.interface}, the cable to {port.peer_name or 'another host'}, has no IPv4 address",
                    address_command(port, host),
                )
            )
    return found


def address_command(port: ThunderboltPort, host: Host) -> str:
    """A command that gives the port an address in a /30 of its own; the two ends of a cable get .1 and .2.

    Which end is first, and which /30 it is, follow from the two identities: both hosts print fitting commands without
    having talked to each other.
    """
    ends = sorted((port.domain_uuid.lower(), port.peer_uuid.lower()))
    number = sum(map(ord, "".join(ends))) % 64
    last = 4 * number + 1 + ends.index(port.domain_uuid.lower())
    if host.system.startswith("Darwin"):
        return f"sudo ifconfig {port.interface} inet 10.87.64.{last} netmask 255.255.255.252"
    return f"sudo ip address add 10.87.64.{last}/30 dev {port.interface}"


def _rdma(host: Host) -> list[Problem]:
    found = []
    for port in host.cables:
        fast = port.speed_gbps > THUNDERBOLT_4_GBPS
        if host.rdma_switch == "enabled" and fast and not port.offers_rdma:
            found.append(
                Problem(
                    "rdma",
                    f"{port.peer_name or 'the other host'}, on {port.interface or port.receptacle}, offers no RDMA",
                    f"on that host: {ENABLE_RDMA}",
                )
            )
    return found


def has_thunderbolt_5(host: Host) -> bool:
    """Whether any port does more than Thunderbolt 4, by its cable's speed or, without a cable, by what it can do."""
    return any(p.speed_gbps > THUNDERBOLT_4_GBPS for p in host.thunderbolt)
