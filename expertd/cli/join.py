"""`expertd join`: lend this machine to a model that another one serves, and serve it here, too."""

import inspect
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.door import door_config, door_options, warn_if_public
from expertd.cli.options import (
    allowed_cpus,
    draft_model_option,
    drain_option,
    find_draft,
    hosts_config,
    hosts_options,
    ignore_memory_option,
    kernels_option,
)
from expertd.config import GroupConfig, HostsConfig, ServerConfig
from expertd.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from expertd.cluster.identity import Identity, Peer
    from expertd.server.generation import Wishes


@click.command("join", epilog="Example: expertd join studio.local")
@click.argument("address", metavar="HOST", required=False)
@click.option("--ranks", default=1, show_default=True, help="Processes on this machine.")
@click.option("--pin", is_flag=True, help="Give each rank one processor of its own (Linux).")
@kernels_option("Who computes on a CPU; auto: as the other machine has it.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address of the HTTP API of this machine."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any.")
@click.option(
    "--checkpoint",
    "places",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder where the checkpoint may be; may be given again.",
)
@draft_model_option
@door_options
@ignore_memory_option
@drain_option
@hosts_options
def join_command(
    address: str | None,
    ranks: int,
    pin: bool,
    kernels: str,
    host: str,
    port: int,
    places: tuple[Path, ...],
    draft_model: str,
    ignore_memory: bool,
    drain_timeout_s: float,
    **options: Any,
) -> None:
    """Join the machine HOST, which runs `expertd serve`, until Ctrl-C or SIGTERM.

    HOST is the name of a paired machine, or its address. Without HOST the only paired one is taken. The checkpoint
    is found here by its content or copied from there. If HOST goes away, this machine answers alone and calls again.
    """
    from expertd.cluster.identity import PeerStore, load_identity
    from expertd.server.generation import Wishes
    from expertd.server.serve import take_port

    names = inspect.signature(door_config).parameters
    door = door_config(**{name: options.pop(name) for name in names})
    hosts = hosts_config(**options)
    identity, store = load_identity(hosts.folder), PeerStore(hosts.folder)
    peer, address = choose_peer(store.peers(), address)
    own = GroupConfig(
        "",
        ranks,
        draft_model=find_draft(draft_model),
        cpus=allowed_cpus(ranks) if pin else (),
        kernels=kernels,
        ignore_memory=ignore_memory,
    )
    config = ServerConfig(host, port, "", own, door)
    logging.basicConfig(format="expertd: %(message)s", level=logging.WARNING)
    with take_port(config) as listener:
        warn_if_public(host, door)
        _join(config, listener, peer, address, list(places), hosts, identity, Wishes(drain_timeout_s))


def choose_peer(peers: "list[Peer]", wanted: str | None) -> "tuple[Peer, str]":
    """The paired host that is meant, and where to call it. Raises ConfigError."""
    if not peers:
        raise ConfigError(
            "no paired host. Run `expertd pair` on the other machine, and here the command it prints."
        )
    if wanted is None and len(peers) > 1:
        names = ", ".join(p.name for p in peers)
        raise ConfigError(
            f"HOST: {len(peers)} hosts are paired ({names}). Say which one, as in `expertd join NAME`."
        )
    if wanted is None:
        return peers[0], peers[0].address
    for peer in peers:
        if wanted in (peer.name, peer.host_id):
            return peer, peer.address
    by_address = [p for p in peers if p.address == wanted]
    if len(by_address) == 1 or len(peers) == 1:
        return (by_address or peers)[0], wanted
    names = ", ".join(p.name for p in peers)
    raise ConfigError(
        f"HOST {wanted}: not the name or known address of a paired host ({names}). Run `expertd hosts`."
    )


def _join(
    config: ServerConfig,
    listener: "socket.socket",
    peer: "Peer",
    address: str,
    places: list[Path],
    hosts: HostsConfig,
    identity: "Identity",
    wishes: "Wishes",
) -> None:
    from expertd.cli.output import Progress
    from expertd.cli.signals import TERMINATED, run_until_signal
    from expertd.cluster.assemble import following
    from expertd.server.serve import join as join_http

    async def work() -> None:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress())
            await join_http(
                config,
                listener,
                lambda show: following(
                    address, hosts.control_port, peer, config.group, places, hosts, identity, show, progress
                ),
                lambda text: click.echo(text),
                wishes,
            )

    try:
        run_until_signal(work(), wishes.take)
    except SystemExit as e:
        if e.code != TERMINATED:  # for a server SIGTERM is the regular end
            raise
