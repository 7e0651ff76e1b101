"""`expertd serve`: the OpenAI-compatible HTTP server."""

import functools
import inspect
import json
import logging
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import click

from expertd.cli.door import door_config, door_options, warn_if_public
from expertd.cli.options import (
    draft_model_option,
    drain_option,
    find_draft,
    find_model,
    group_options,
    hosts_config,
    hosts_options,
    kv_bits_option,
    kv_cache_option,
    make_group,
    prefix_cache_options,
    warn_of_link,
)
from expertd.config import HostsConfig, ServerConfig

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from expertd.checkpoint.inspect import CheckpointInfo
    from expertd.cluster.supervisor import Cluster
    from expertd.server.generation import Lead, Renewal, Wishes


@click.command("serve", epilog="Example: expertd serve demo --ranks 2 --port 8080")
@click.argument("model")
@group_options
@click.option(
    "--max-streams", type=int, default=16, show_default=True, help="Requests that are answered at once."
)
@click.option(
    "--max-waiting", type=int, default=256, show_default=True, help="Requests that may wait; more get a 429."
)
@prefix_cache_options
@click.option(
    "--speculate/--no-speculate",
    default=True,
    show_default=True,
    help="Guess tokens from what came before, and check several in one step where that is faster.",
)
@draft_model_option
@kv_bits_option
@kv_cache_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any.")
@door_options
@drain_option
@hosts_options
def serve_command(model: str, host: str, port: int, drain_timeout_s: float, **options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API until Ctrl-C or SIGTERM.

    MODEL is `demo`, a folder, a hub id or an https:// URL of a folder. Prints the URL and a curl command once it can
    answer. Machines that were paired with this one (`expertd pair`) may then `expertd join` it. SIGTERM lets what runs
    come to its end (a second one does not), SIGHUP loads the checkpoint again without dropping a request.
    """
    from expertd.cluster.memory import fits, needed_memory, with_memory
    from expertd.server.generation import Wishes
    from expertd.server.serve import take_port

    names = inspect.signature(hosts_config).parameters
    hosts = hosts_config(**{name: options.pop(name) for name in names})
    names = inspect.signature(door_config).parameters
    door = door_config(**{name: options.pop(name) for name in names})
    make_group(Path(), **options)
    info = find_model(model)
    _verify(info.folder, hosts)
    options["draft_model"] = find_draft(options["draft_model"])
    asked = make_group(info.folder, **options)
    group = with_memory(info, asked)
    config = ServerConfig(host, port, model_id(model, info.folder), group, door)
    logging.basicConfig(format="expertd: %(message)s", level=logging.WARNING)

    def renew() -> "Renewal":
        new = find_model(model)
        _verify(new.folder, hosts)
        own = replace(asked, checkpoint=str(new.folder))
        group = with_memory(new, own, needed_memory(info, asked))
        return _renewal(replace(config, group=group), new, hosts, fits(new, own))

    with take_port(config) as listener:
        warn_if_public(host, door)
        warn_of_link(group)
        _serve(config, listener, info, hosts, Wishes(drain_timeout_s, renew))


def _verify(folder: Path, hosts: HostsConfig) -> None:
    """Compare the checkpoint with what the quantizer wrote, if that wrote it. Raises CheckpointError.

    It is read once per machine; who joins compares all its files with ours.
    """
    from expertd.checkpoint.manifest import verify
    from expertd.cli.output import Progress

    with Progress() as bytes_done:
        verify(folder, hosts.manifests, functools.partial(bytes_done, "verifying the checkpoint"))


def model_id(name: str, folder: Path) -> str:
    """The id that clients use: MODEL as typed for `demo` and hub ids, the folder's name for a folder or its URL."""
    if "://" in name:
        return unquote(name.rstrip("/").rpartition("/")[2])
    return folder.name if Path(name).expanduser().is_dir() and name != "demo" else name


def _serve(
    config: ServerConfig,
    listener: "socket.socket",
    info: "CheckpointInfo",
    hosts: HostsConfig,
    wishes: "Wishes",
) -> None:
    from expertd.cli.output import Progress, progress
    from expertd.cli.signals import TERMINATED, run_until_signal
    from expertd.server.serve import serve as serve_http

    async def work() -> None:
        with ExitStack() as loading, Progress() as bytes_done:
            what = f"loading {config.group.num_ranks} rank(s)"
            loading.enter_context(progress(what))

            def loaded(num_bytes: int, total_bytes: int) -> None:
                loading.close()  # the seconds: a bar says more
                bytes_done(what, num_bytes, total_bytes)

            def announce(cluster: "Cluster") -> None:
                loading.close()
                click.echo(greeting(config, listener.getsockname()[1]))

            lead = _leading(config, info, hosts, bytes_done)
            await serve_http(config, listener, announce, lead, wishes, loaded)

    try:
        run_until_signal(work(), wishes.take)
    except SystemExit as e:
        # For a server SIGTERM is the regular end; service managers read any other code as a failure.
        if e.code != TERMINATED:
            raise


def _renewal(config: ServerConfig, info: "CheckpointInfo", hosts: HostsConfig, fits: bool) -> "Renewal":
    """What the checkpoint is now; `fits` beside what runs."""
    from expertd.server.generation import Renewal

    lead = _leading(config, info, hosts, lambda what, done, total: None)
    return Renewal(config, lead, fits)


def _leading(
    config: ServerConfig,
    info: "CheckpointInfo",
    hosts: HostsConfig,
    progress: "Callable[[str, int, int], None]",
) -> "Lead | None":
    """How to let other hosts join; None when none is paired, and nothing listens for them."""
    from expertd.cluster.assemble import leading
    from expertd.cluster.identity import PeerStore, load_identity

    if not PeerStore(hosts.folder).peers():
        return None
    identity = load_identity(hosts.folder)
    return lambda cluster: leading(cluster, info, config.model_id, hosts, identity, progress)


def greeting(config: ServerConfig, port: int) -> str:
    """What to print when the server can answer: its URL, its page, and a command that can be pasted into a shell."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    root = f"{config.scheme}://[{host}]:{port}" if ":" in host else f"{config.scheme}://{host}:{port}"
    url = f"{root}/v1"
    message = {"role": "user", "content": "Once upon a time there was"}
    body = {"model": config.model_id, "stream": True, "temperature": 0.7, "messages": [message]}
    data = shlex.quote(json.dumps(body))
    key = " -H 'authorization: Bearer KEY'" if config.door.keys else ""
    curl = f"curl -N {url}/chat/completions{key} -H 'content-type: application/json' -d {data}"
    return f"serving {config.model_id} at {url}\nwatch: {root}/\ntry: {curl}"
