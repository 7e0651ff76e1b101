"""`expertd hosts`: which machines this one knows, and which are near."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.options import config_folder

if TYPE_CHECKING:
    from expertd.cluster.discovery import Found

# mDNS answers come within a second of a query, and the second query goes out after one second.
FIND_S = 2.5


def list_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and --find."""
    near = click.option(
        "--find", is_flag=True, help=f"Also look for hosts that serve near by ({FIND_S:g} s)."
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    return as_json(near(command))


@click.group("hosts", invoke_without_command=True, epilog="Example: expertd hosts --find")
@list_options
@click.pass_context
def hosts_command(context: click.Context, as_json: bool, find: bool) -> None:
    """List the paired hosts, or remove one."""
    if context.invoked_subcommand is None:
        _list(as_json, find)


@hosts_command.command("list", epilog="Example: expertd hosts list --json")
@list_options
def list_command(as_json: bool, find: bool) -> None:
    """List the paired hosts."""
    _list(as_json, find)


@hosts_command.command("remove", epilog="Example: expertd hosts remove studio")
@click.argument("name")
def remove_command(name: str) -> None:
    """Forget the host with this NAME or id; it can no longer join."""
    from expertd.cluster.identity import PeerStore

    peer = PeerStore(config_folder()).remove(name)
    click.echo(f"removed {peer.name} ({peer.host_id}). To pair again: expertd pair")


def _list(as_json: bool, find: bool) -> None:
    from expertd.cluster.identity import PeerStore

    logging.basicConfig(format="expertd: %(message)s", level=logging.WARNING)
    peers = PeerStore(config_folder()).peers()
    found = _find() if find else []
    if as_json:
        keys = ("name", "host_id", "fingerprint", "address", "paired")
        lists: dict[str, Any] = {"paired": [{k: getattr(p, k) for k in keys} for p in peers]}
        click.echo(json.dumps(lists | ({"found": [vars(f) for f in found]} if find else {})))
        return
    rows = [(p.name, p.host_id, p.address, p.paired) for p in peers]
    click.echo(
        table(("NAME", "ID", "ADDRESS", "PAIRED"), rows) if rows else "no paired hosts. Run: expertd pair"
    )
    if find:
        near = [(f.name, f.host_id, f.addresses[0], f.model, "yes" if f.paired else "no") for f in found]
        click.echo(
            "\n" + (table(("NEAR BY", "ID", "ADDRESS", "MODEL", "PAIRED"), near) if near else "none found")
        )


def _find() -> "list[Found]":
    from expertd.cli.signals import run_until_signal
    from expertd.cluster.discovery import find
    from expertd.cluster.identity import PeerStore, load_identity

    folder = config_folder()
    return run_until_signal(find(FIND_S, PeerStore(folder), load_identity(folder).host_id))


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Lay out columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)
