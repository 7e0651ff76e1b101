"""Which hosts are near: announces a serving host by mDNS and finds others. A convenience, never a condition.

What is found is hearsay: anyone on the network may announce any name and id. It is shown to the user and saves typing an
address; whether a host is a paired one is decided by the certificates when a channel is opened.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import psutil
from zeroconf import Error, InterfaceChoice, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

import expertd
from expertd.cluster.identity import HOST_ID_DIGITS, Identity, PeerStore, clean_name

SERVICE = "_expertd._tcp.local."
MAX_FOUND = 64
MAX_VALUE_LENGTH = 200

Interfaces = InterfaceChoice | Sequence[str]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A host as it announces itself. `paired`: a paired host has this id (which a stranger may have copied)."""

    name: str
    host_id: str
    addresses: list[str]
    port: int
    version: str
    model: str
    paired: bool


@contextlib.asynccontextmanager
async def announce(
    identity: Identity, port: int, model: str, interfaces: Interfaces = InterfaceChoice.All
) -> AsyncIterator[None]:
    """Announce this host's control port during the block; where multicast does not work, only warn.

    In the background: mDNS first asks for over a second whether the name is free (RFC 6762, section 8.1).
    """
    zeroconf = await _open(interfaces)
    if not zeroconf:
        yield
        return
    task = asyncio.create_task(_register(zeroconf, _describe(identity, port, model, interfaces)))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await _close(zeroconf)


async def find(
    timeout_s: float,
    store: PeerStore,
    own_id: str = "",
    interfaces: Interfaces = InterfaceChoice.All,
) -> list[Found]:
    """Listen for `timeout_s` seconds and give the hosts that announced themselves, by name, without `own_id`."""
    zeroconf = await _open(interfaces)
    if not zeroconf:
        return []
    paired = {p.host_id for p in store.peers()}
    try:
        infos = await _browse(zeroconf, timeout_s)
    finally:
        await _close(zeroconf)
    found = [f for info in infos if (f := _read(info, paired)) and f.host_id != own_id]
    return sorted(found, key=lambda f: (f.name, f.host_id))


def own_addresses() -> list[str]:
    """Give the addresses under which other machines may reach this one: IPv4 first, a cable's own last."""
    status = psutil.net_if_stats()
    up = [
        a
        for name, all_ in psutil.net_if_addrs().items()
        if name in status and status[name].isup
        for a in all_
    ]
    found = {ipaddress.ip_address(a.address) for a in up if a.family in (socket.AF_INET, socket.AF_INET6)}
    usable = [a for a in found if not a.is_loopback and not (a.version == 6 and a.is_link_local)]
    return [str(a) for a in sorted(usable, key=lambda a: (a.version, a.is_link_local, int(a)))]


async def _open(interfaces: Interfaces) -> AsyncZeroconf | None:
    try:
        return AsyncZeroconf(interfaces=interfaces)
    except (OSError, Error, RuntimeError) as e:
        _log.warning("discovery: mDNS does not work here (%s); name hosts by their address", e)
        return None


async def _register(zeroconf: AsyncZeroconf, info: AsyncServiceInfo) -> None:
    try:
        await (await zeroconf.async_register_service(info, allow_name_change=True))
    except (OSError, Error, ValueError) as e:
        _log.warning("discovery: this host cannot be announced (%s); name it by its address", e)


async def _close(zeroconf: AsyncZeroconf) -> None:
    with contextlib.suppress(OSError, Error):
        await zeroconf.async_unregister_all_services()
    with contextlib.suppress(OSError, Error):
        await zeroconf.async_close()


def _describe(identity: Identity, port: int, model: str, interfaces: Interfaces) -> AsyncServiceInfo:
    addresses = own_addresses() if isinstance(interfaces, InterfaceChoice) else list(interfaces)
    return AsyncServiceInfo(
        SERVICE,
        f"{identity.name[:40]}-{identity.host_id[:6]}.{SERVICE}",
        port=port,
        server=f"expertd-{identity.host_id}.local.",
        parsed_addresses=addresses,
        properties={
            "id": identity.host_id,
            "name": identity.name,
            "version": expertd.__version__,
            "model": model[:MAX_VALUE_LENGTH],
        },
    )


async def _browse(zeroconf: AsyncZeroconf, timeout_s: float) -> list[AsyncServiceInfo]:
    names: dict[str, None] = {}

    def seen(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            names.pop(name, None)
        elif len(names) < MAX_FOUND:
            names[name] = None

    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[seen])
    try:
        await asyncio.sleep(timeout_s)
        infos = [AsyncServiceInfo(SERVICE, name) for name in names]
        asked = (info.async_request(zeroconf.zeroconf, 1000) for info in infos)
        answered = await asyncio.gather(*asked, return_exceptions=True)
        return [info for info, ok in zip(infos, answered, strict=True) if ok is True]
    finally:
        await browser.async_cancel()


def _read(info: AsyncServiceInfo, paired: set[str]) -> Found | None:
    values = {k: v or "" for k, v in info.decoded_properties.items()}
    host_id = values.get("id", "")
    addresses = [a for a in info.parsed_scoped_addresses() if a]
    if not re.fullmatch(rf"[0-9a-f]{{{HOST_ID_DIGITS}}}", host_id) or not addresses or not info.port:
        return None
    model = "".join(c for c in values.get("model", "")[:MAX_VALUE_LENGTH] if c.isprintable())
    version = clean_name(values.get("version", ""))
    name = clean_name(values.get("name", ""))
    return Found(name, host_id, addresses, info.port, version, model, host_id in paired)
