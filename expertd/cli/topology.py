"""`expertd topology`: this machine's interfaces, ports and cables, the hosts it knows, and the routes between them."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.hosts import table
from expertd.cli.options import config_folder

if TYPE_CHECKING:
    from expertd.cluster.identity import Peer
    from expertd.topology.advice import Problem
    from expertd.topology.values import Host

SERVER = "http://127.0.0.1:8080"
SERVER_TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 1 << 20


@click.command("topology", epilog="Example: expertd topology --dot | dot -Tsvg > topology.svg")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--dot", is_flag=True, help="Print a graph for Graphviz.")
@click.option(
    "--server", default=SERVER, show_default=True, metavar="URL", help="A running server to ask for routes."
)
def topology_command(as_json: bool, dot: bool, server: str) -> None:
    """Show this machine's interfaces, Thunderbolt ports and RDMA devices, and what to mend.

    With a server running here, also the hosts of its group, each measured path to them and the chosen one.
    """
    from expertd.cluster.identity import PeerStore
    from expertd.topology.advice import find_problems
    from expertd.topology.collect import collect_host
    from expertd.topology.routes import format_dot
    from expertd.topology.values import as_json as plain

    host, group = collect_host(), ask_server(server)
    if dot:
        click.echo(format_dot([host], list(routes_of(group))), nl=False)
        return
    peers, problems = PeerStore(config_folder()).peers(), find_problems(host)
    if as_json:
        known = [{"name": p.name, "host_id": p.host_id, "address": p.address} for p in peers]
        warnings = [vars(p) for p in problems]
        click.echo(
            json.dumps({"host": plain(host), "warnings": warnings, "paired": known, "group": group}, indent=2)
        )
    else:
        click.echo(
            "\n\n".join(
                filter(None, (show_host(host), show_peers(peers), show_group(group), show_problems(problems)))
            )
        )


def ask_server(url: str) -> dict[str, Any] | None:
    """Give `hosts` of a server's /health, or None when none answers or it has no other hosts. Never fails."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=SERVER_TIMEOUT_S) as answer:
            body = json.loads(answer.read(MAX_ANSWER_BYTES))
    except (OSError, ValueError):
        return None
    hosts = body.get("hosts") if isinstance(body, dict) else None
    return hosts if isinstance(hosts, dict) else None


# Rendering: values in, text out.


def show_host(host: "Host") -> str:
    """This host, its interfaces, ports and devices as tables, and what could not be found out."""
    title = f"{host.name}: {host.processor}, {host.system}"
    if host.rdma_switch:
        title += f", RDMA {host.rdma_switch}"
    notes = "\n".join(f"could not find out: {note}" for note in host.notes)
    return "\n\n".join(filter(None, (title, _interfaces(host), _ports(host), _devices(host), notes)))


def _interfaces(host: "Host") -> str:
    """Those that are up, or have an address, or lead to a port: a Mac has a dozen others that say nothing."""
    ports = {p.interface for p in host.thunderbolt}
    shown = [i for i in host.interfaces if i.addresses or i.name in ports or (i.up and i.kind == "bridge")]
    rows = [
        (
            i.name,
            i.kind,
            "up" if i.up else "down",
            f"{i.speed_mbps} Mb/s" if i.speed_mbps else "-",
            str(i.mtu),
            ", ".join(f"{a.ip}/{a.prefix_length}" for a in i.addresses) or "-",
        )
        for i in shown
    ]
    return table(("INTERFACE", "KIND", "STATE", "SPEED", "MTU", "ADDRESSES"), rows) if rows else ""


def _ports(host: "Host") -> str:
    rows = [
        (
            p.receptacle or "-",
            p.interface or "-",
            f"{'' if p.connected else 'up to '}{p.speed_gbps} Gb/s" if p.speed_gbps else "-",
            p.peer_name or ("a device" if p.connected else "-"),
            ("yes" if p.offers_rdma else "no") if p.peer_uuid else "-",
        )
        for p in host.thunderbolt
    ]
    return table(("THUNDERBOLT", "INTERFACE", "SPEED", "OTHER END", "OFFERS RDMA"), rows) if rows else ""


def _devices(host: "Host") -> str:
    rows = [(d.name, d.interface or "-", d.port_state or "-", ", ".join(d.ipv4) or "-") for d in host.rdma]
    return table(("RDMA DEVICE", "INTERFACE", "PORT", "ADDRESSES"), rows) if rows else ""


def show_peers(peers: "Sequence[Peer]") -> str:
    rows = [(p.name, p.host_id, p.address) for p in peers]
    return table(("PAIRED HOST", "ID", "ADDRESS"), rows) if rows else "no paired hosts. Run: expertd pair"


def show_problems(problems: "Iterable[Problem]") -> str:
    return "\n".join(f"warning: {p.found}\n      -> {p.next}" for p in problems)


def show_group(group: dict[str, Any] | None) -> str:
    """The hosts of a running group and each path to them, as its leader describes them in /health."""
    if not group:
        return "no server with other hosts answers here. Run: expertd serve --help"
    parts = [
        f"group: {group.get('role', '?')}, epoch {group.get('epoch', '?')}, link {group.get('link', '?')}"
    ]
    for host in group.get("hosts") or ():
        parts.append(f"{host.get('name', '?')}: {host.get('state', '?')} {host.get('reason') or ''}".rstrip())
        if rows := [_path_row(path, path == host.get("route")) for path in _paths_of(host)]:
            parts.append(table(("ROUTE", "INTERFACE", "KIND", "FROM", "TO", "P50", "P99", "BANDWIDTH"), rows))
    return "\n".join(parts)


def _paths_of(host: dict[str, Any]) -> list[dict[str, Any]]:
    return [path for paths in (host.get("paths") or {}).values() for path in paths]


def _path_row(path: dict[str, Any], chosen: bool) -> tuple[str, ...]:
    """An asdict(PathReport), which is measured by the other host: its own end is `local`."""
    local, remote = path["local"], path["remote"]
    way = ("*" if chosen else "", local["interface"], local["kind"], local["address"], remote["address"])
    if path["error"]:
        return (*way, path["error"], "", "")
    return (
        *way,
        f"{path['p50_us']:.1f} us",
        f"{path['p99_us']:.1f} us",
        f"{path['bandwidth_mb_s']:.0f} MB/s",
    )


def routes_of(group: dict[str, Any] | None) -> "Iterable[Any]":
    """The measured paths of a running group as values, seen from this host, for the graph."""
    from expertd.topology.values import Measurement, Path, Route

    for host in (group or {}).get("hosts") or ():
        for path in _paths_of(host):
            ours, theirs = path["remote"], path["local"]
            way = Path(ours["interface"], ours["kind"], ours["address"], theirs["address"])
            measured = Measurement(
                path["p50_us"], path["p99_us"], path["bandwidth_mb_s"], path["payload_bytes"], 0
            )
            yield Route(way, () if path["error"] else (measured,), path["error"])
