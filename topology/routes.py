"""Which paths lead to another host, and which of them to take: by measurement alone, never by an interface's name.

A label says little: a Thunderbolt cable may run at a tenth of its speed, and a VPN may look like any other link.
Systems that chose by name were seen to stay on a 40 ms VPN path after a restart (exo issue 1723). So every path that
may work is measured over the code that decoding uses, and the measurement decides.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from expertd.topology.values import Host, Interface, Measurement, Path, Route

# A new route must be twice as good, and by enough to matter: 50 us on each of 60 exchanges are 3 ms of a token. Below
# that the medians of one idle path differ from run to run, and each change costs an epoch.
CHANGE_RATIO = 2.0
CHANGE_MARGIN_US = 50.0


def candidate_paths(interfaces: Iterable[Interface], remote_addresses: Sequence[str]) -> tuple[Path, ...]:
    """Pair each remote address with each of our addresses on the same subnet, in the order given.

    Link-local IPv6 is left out, because every interface has it and the subnet tells nothing apart; an IPv4 address in
    169.254/16 may pair with several interfaces, and the wrong pairs then fail when they are measured.
    """
    found = (
        Path(interface.name, interface.kind, local.ip, remote)
        for remote in remote_addresses
        for interface in interfaces
        if interface.up
        for local in interface.addresses
        if local.ip != remote and not _is_link_local_ipv6(remote) and local.holds(remote)
    )
    return tuple(dict.fromkeys(found))


def _is_link_local_ipv6(ip: str) -> bool:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    return address.version == 6 and address.is_link_local


def exchange_us(measurements: Sequence[Measurement], payload_bytes: int) -> float:
    """Predict one exchange of `payload_bytes` each way: the median of the next smaller measured payload, and the bytes
    beyond it at the measured bandwidth. Infinite when nothing was measured.
    """
    if not measurements:
        return float("inf")
    by_size = sorted(measurements, key=lambda m: m.payload_bytes)
    base = next((m for m in reversed(by_size) if m.payload_bytes <= payload_bytes), by_size[0])
    beyond = max(0, payload_bytes - base.payload_bytes)
    # One MB/s is one byte per microsecond.
    return base.p50_us + (beyond / base.bandwidth_mb_s if base.bandwidth_mb_s > 0 else 0.0)


def choose_route(routes: Sequence[Route], payload_bytes: int) -> Route | None:
    """Give the route on which an exchange of `payload_bytes` is fastest, of equals the first; None: none answered."""
    answered = [r for r in routes if r.measurements]
    return min(answered, key=lambda r: exchange_us(r.measurements, payload_bytes), default=None)


def should_change(
    current_us: float, other_us: float, ratio: float = CHANGE_RATIO, margin_us: float = CHANGE_MARGIN_US
) -> bool:
    """Whether another route is so much better than the current one that a change pays (see CHANGE_RATIO)."""
    return current_us > ratio * other_us and current_us - other_us > margin_us


def keep_or_change(
    current: Route | None, routes: Sequence[Route], payload_bytes: int, ratio: float = CHANGE_RATIO
) -> Route | None:
    """Choose among fresh measurements, staying on the path of `current` unless another is much better."""
    best = choose_route(routes, payload_bytes)
    same = next((r for r in routes if current and r.path == current.path and r.measurements), None)
    if best is None or same is None:
        return best
    now, then = (exchange_us(r.measurements, payload_bytes) for r in (same, best))
    return best if should_change(now, then, ratio) else same


def format_dot(hosts: Sequence[Host], routes: Sequence[Route] = ()) -> str:
    """Give hosts and the cables between them as a graph for `dot -Tsvg`, and measured routes from the first host.

    Hosts are joined by the identities of their ports, which every cable shows at both ends.
    """
    owners = {
        p.domain_uuid: (n, p) for n, host in enumerate(hosts) for p in host.thunderbolt if p.domain_uuid
    }
    lines = ["graph topology {", "  node [shape=box];"]
    lines += [
        f"  h{n} [label={_quote(host.name + chr(10) + host.processor)}];" for n, host in enumerate(hosts)
    ]
    for n, host in enumerate(hosts):
        for port in host.cables:
            label = f"{port.interface or port.receptacle} {port.speed_gbps} Gb/s"
            other = owners.get(port.peer_uuid)
            if other is None:  # a host that we know from its cable only
                lines.append(f"  {_quote(port.peer_uuid)} [label={_quote(port.peer_name)} style=dashed];")
                lines.append(f"  h{n} -- {_quote(port.peer_uuid)} [label={_quote(label)}];")
            elif (n, port.domain_uuid) < (other[0], other[1].domain_uuid):
                lines.append(f"  h{n} -- h{other[0]} [label={_quote(label)}];")
    for route in routes:
        lines.append(
            f"  h0 -- {_quote(route.path.remote_address)} [style=dotted label={_quote(_route_label(route))}];"
        )
    return "\n".join([*lines, "}", ""])


def _route_label(route: Route) -> str:
    first = f"{route.path.interface} ({route.path.kind})"
    return (
        f"{first} {route.measurements[0].p50_us:.0f} us" if route.measurements else f"{first} {route.failure}"
    )


def _quote(text: str) -> str:
    """A quoted string of the DOT language; control characters other than a line's end are dropped."""
    clean = "".join(c for c in text if c == "\n" or c.isprintable())
    return '"' + clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
