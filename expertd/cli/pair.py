"""`expertd pair`: make two machines know each other."""

import sys
from typing import TYPE_CHECKING

import click

from expertd.cli.options import config_folder
from expertd.config import PAIRING_PORT

if TYPE_CHECKING:
    from expertd.cluster.identity import Identity, Peer, PeerStore


@click.command("pair", epilog="Example: expertd pair 192.168.1.20 1234-5678")
@click.argument("host", required=False)
@click.argument("code", required=False)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PAIRING_PORT,
    show_default=True,
    help="Port of the pairing.",
)
def pair_command(host: str | None, code: str | None, port: int) -> None:
    """Make this machine and another one know each other.

    Without arguments: show a code, and the command to type on the other machine. With HOST and CODE: pair with the
    machine that shows this code.
    """
    if host and not code:
        raise click.UsageError(f"CODE is missing: run `expertd pair` on {host}, it shows one.")
    from expertd.cli.signals import run_until_signal
    from expertd.cluster.identity import PeerStore, load_identity

    folder = config_folder()
    identity, store = load_identity(folder), PeerStore(folder)
    store.peers()  # a damaged list is reported now, not after the code was typed
    work = _call(identity, store, host, port, code) if host and code else _offer(identity, store, port)
    peer = run_until_signal(work)
    click.echo(f"paired with {peer.name} ({peer.host_id})\nnext: expertd hosts")


async def _call(identity: "Identity", store: "PeerStore", host: str, port: int, code: str) -> "Peer":
    from expertd.cluster.pairing import pair_with

    return await pair_with(identity, store, host, port, code)


async def _offer(identity: "Identity", store: "PeerStore", port: int) -> "Peer":
    from expertd.cluster.discovery import own_addresses
    from expertd.cluster.pairing import VALID_S, Code, offer
    from expertd.cluster.tls import listen_on

    code = Code()
    with listen_on("", port) as listener:
        port = listener.getsockname()[1]
        click.echo(instructions(identity.name, own_addresses(), port, code.text, VALID_S))
        return await offer(identity, store, listener, code, _notice)


def instructions(name: str, addresses: list[str], port: int, code: str, valid_s: float) -> str:
    """What to do on the other machine; without a network only this machine itself can call."""
    first, *others = addresses or ["127.0.0.1"]
    flag = "" if port == PAIRING_PORT else f" --port {port}"
    lines = [
        f"This machine is {name}. On the other one, type:",
        "",
        f"  expertd pair {first} {code}{flag}",
        "",
    ]
    if others:
        lines.append(f"or the same with another address of this machine: {', '.join(others)}")
    lines.append(f"The code is valid once, for {valid_s / 60:g} minutes. Waiting; Ctrl-C ends it.")
    return "\n".join(lines)


def _notice(text: str) -> None:
    print("expertd:", text, file=sys.stderr, flush=True)
