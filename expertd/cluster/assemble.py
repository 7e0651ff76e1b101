"""Putting the two sides of a group together: `leading` for `expertd serve`, `following` for `expertd join`."""

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint
from expertd.checkpoint.locate import demo_folder
from expertd.checkpoint.manifest import FileEntry, Manifest, check_manifest, make_manifest
from expertd.checkpoint.store import Incoming, find_same
from expertd.cluster import channel as channels
from expertd.cluster.channel import Channel
from expertd.cluster.discovery import find
from expertd.cluster.host_messages import FileInfo, Loaded, Welcome, codec
from expertd.cluster.identity import Identity, Peer, PeerStore
from expertd.cluster.joiner import Joiner
from expertd.cluster.leader import Leader
from expertd.cluster.memory import with_memory
from expertd.cluster.paths import Paths
from expertd.cluster.provide import Provider, fetch
from expertd.cluster.route_table import RouteTable
from expertd.cluster.site import LinkSettings
from expertd.cluster.supervisor import Cluster
from expertd.cluster.verbs_check import why_no_verbs
from expertd.config import GroupConfig, HostsConfig
from expertd.errors import CheckpointError, ClusterError, ConfigError, LinkDown
from expertd.topology.collect import collect_host

Progress = Callable[[str, int, int], None]
_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# mDNS answers come within a second.
FIND_S = 1.2

# What of a GroupConfig is the leader's own: where its files lie, and what it may use of its machine.
_OWN = ("checkpoint", "num_ranks", "cpus", "draft_model")


def settings_of(hosts: HostsConfig) -> LinkSettings:
    return LinkSettings(hosts.silence_s, hosts.setup_s, hosts.verbs_library, hosts.lint)


@asynccontextmanager
async def leading(
    cluster: Cluster,
    info: CheckpointInfo,
    model_id: str,
    hosts: HostsConfig,
    identity: Identity,
    progress: Progress,
) -> AsyncIterator[Leader]:
    """Let paired hosts join `cluster` during the block. Raises ConfigError when the control port cannot be had."""
    manifest = await _in_thread(
        functools.partial(make_manifest, info.folder, hosts.manifests), progress, "hashing the checkpoint"
    )
    paths = await _open_paths(hosts, hosts.control_host)
    paths.secret = secrets.token_bytes(32)
    group = {k: v for k, v in asdict(cluster.group).items() if k not in _OWN}
    files = [FileInfo(**asdict(f)) for f in manifest.files]
    welcome = Welcome(model_id, manifest.content_hash, config_hash(info), files, group, paths.secret)
    leader = Leader(
        cluster,
        welcome,
        facts_of(cluster, info, manifest),
        Provider(info.folder, manifest),
        RouteTable(paths, identity.host_id, identity.name),
        paths.verbs,
        settings_of(hosts),
    )
    store = PeerStore(hosts.folder)
    try:
        async with channels.listen(
            hosts.control_host,
            hosts.control_port,
            identity,
            store,
            codec,
            leader.admit,
            silence_s=hosts.silence_s,
        ):
            try:
                yield leader
            finally:
                await leader.close("expertd is stopping there")
    finally:
        await paths.close()


@asynccontextmanager
async def following(
    address: str,
    port: int,
    peer: Peer,
    own: GroupConfig,
    places: list[Path],
    hosts: HostsConfig,
    identity: Identity,
    show: Callable[[Cluster | None, str], None],
    progress: Progress,
) -> AsyncIterator[Joiner]:
    """Be ready to follow the leader at address:port during the block; `Joiner.run` does it.

    `own` says how many ranks this host runs and where, their kernels ("auto": the leader's choice) and the draft with
    which they guess when they lead. `places` are folders in which the checkpoint may be already.
    """
    paths = await _open_paths(hosts, "0.0.0.0")
    store = PeerStore(hosts.folder)

    async def call() -> Channel:
        return await _call(address, port, peer, hosts, identity, store)

    load = functools.partial(_load, call, own, [*places, demo_folder()], hosts, progress)
    joiner = Joiner(call, load, show, paths, settings_of(hosts), identity.name)
    try:
        yield joiner
    finally:
        await paths.close()


async def _call(
    address: str, port: int, peer: Peer, hosts: HostsConfig, identity: Identity, store: PeerStore
) -> Channel:
    """Call the leader where it was last, else where mDNS says that it is now: the certificate decides who answers."""
    try:
        channel = await channels.connect(address, port, identity, peer, codec, silence_s=hosts.silence_s)
    except LinkDown:
        near = [f for f in await find(FIND_S, store, identity.host_id) if f.host_id == peer.host_id]
        for found, where in ((f, a) for f in near for a in f.addresses if (a, f.port) != (address, port)):
            with contextlib.suppress(LinkDown, ClusterError):  # anybody may announce anything
                return await channels.connect(
                    where, found.port, identity, peer, codec, silence_s=hosts.silence_s
                )
        raise
    with contextlib.suppress(ConfigError):  # a convenience
        store.note_address(peer.host_id, address)
    return channel


async def _open_paths(hosts: HostsConfig, address: str) -> Paths:
    host = await asyncio.to_thread(collect_host)
    paths = Paths(host.interfaces, await why_no_verbs(hosts.verbs_library))
    paths.open(address)
    return paths


async def _load(
    call: Callable[[], Any],
    own: GroupConfig,
    places: list[Path],
    hosts: HostsConfig,
    progress: Progress,
    welcome: Welcome,
    stack: AsyncExitStack,
) -> tuple[Cluster, Loaded]:
    """Have the leader's checkpoint here, and ranks that hold it."""
    manifest = check_manifest([FileEntry(f.name, f.size, f.sha256) for f in welcome.files])
    if manifest.content_hash != welcome.content_hash:
        raise CheckpointError(
            "the leader's manifest does not have the hash that it says. Update expertd on both hosts."
        )
    folder = await _find_or_copy(call, manifest, places, hosts, progress)
    info = await asyncio.to_thread(check_checkpoint, folder)
    group = msgspec.convert(
        {
            **welcome.group,
            "checkpoint": str(folder),
            "num_ranks": own.num_ranks,
            "cpus": own.cpus,
            "draft_model": own.draft_model,
            **({} if own.kernels == "auto" else {"kernels": own.kernels}),
            "shares": (),
            "ignore_memory": own.ignore_memory,
            "kv_cache_bytes": own.kv_cache_bytes,
        },
        GroupConfig,
    )
    group = with_memory(info, group)
    loading = functools.partial(progress, f"loading {group.num_ranks} rank(s)")
    cluster = await stack.enter_async_context(Cluster.open(group, restart=True, loading=loading))
    return cluster, facts_of(cluster, info, manifest)


async def _find_or_copy(
    call: Callable[[], Any], manifest: Manifest, places: list[Path], hosts: HostsConfig, progress: Progress
) -> Path:
    search = functools.partial(find_same, manifest, places, hosts.store, hosts.manifests)
    if found := await _in_thread(search, progress, "hashing the checkpoint"):
        return found
    incoming = await asyncio.to_thread(Incoming, manifest, hosts.store)
    channel: Channel = await call()
    try:
        began = time.monotonic()
        await fetch(channel, incoming, functools.partial(progress, "copying the checkpoint"))
        _log.info("copied %.1f GB in %.0f s", manifest.total_bytes / 1e9, time.monotonic() - began)
    finally:
        with contextlib.suppress(Exception):
            await channel.close()
    return await _in_thread(
        functools.partial(incoming.finish, hosts.manifests), progress, "verifying the checkpoint"
    )


class _Stopped(Exception):
    """Nobody waits for this work any longer."""


async def _in_thread(work: Callable[[Callable[[int, int], None]], _T], progress: Progress, what: str) -> _T:
    """Run `work(progress)` in a thread that ends soon when we are cancelled: 100 GB may be left to read."""
    stopped = threading.Event()

    def report(done: int, total: int) -> None:
        if stopped.is_set():
            raise _Stopped
        progress(what, done, total)

    try:
        return await asyncio.to_thread(work, report)
    finally:
        stopped.set()


def facts_of(cluster: Cluster, info: CheckpointInfo, manifest: Manifest) -> Loaded:
    """What this host's ranks are: hosts must agree in all of it to share the work of a step."""
    ready = cluster.ready
    return Loaded(
        num_ranks=cluster.group.num_ranks,
        content_hash=manifest.content_hash,
        config_hash=config_hash(info),
        mlx=ready.mlx_version,
        architecture=f"{ready.device}: {ready.architecture}",
        kernels=ready.kernels,
        activation_bits=ready.activation_bits,
        dtype=str(info.config.get("torch_dtype") or info.config.get("dtype") or "as stored"),
    )


def config_hash(info: CheckpointInfo) -> str:
    """SHA-256 of the config as this version reads it: two versions may read one file differently."""
    text = json.dumps(info.config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
