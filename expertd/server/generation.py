"""One generation of what a server serves: the ranks of a checkpoint and the hosts that joined them.

A reload makes the next one beside it if both fit in memory, swaps it in between two requests, and lets the old one
finish its streams; if they do not fit, the old one finishes and ends first. The listener knows nothing of it.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Self

from expertd.cluster.leader import Leader
from expertd.cluster.supervisor import Cluster
from expertd.config import ServerConfig
from expertd.errors import ExpertdError
from expertd.server.service import Service

Lead = Callable[[Cluster], contextlib.AbstractAsyncContextManager[Leader]]

RELOADED = "the checkpoint was loaded again before this ended. Ask again."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Renewal:
    """What to serve from now on; `fits` says whether its ranks fit in memory beside those that run."""

    config: ServerConfig
    lead: Lead | None
    fits: bool


@dataclass
class Wishes:
    """What signals ask of a running server: to end when its streams have, within `drain_timeout_s`; to load the
    checkpoint again, of which `renew` gives what it is now, and raises ExpertdError when that cannot be served."""

    drain_timeout_s: float = 30.0
    renew: Callable[[], Renewal] | None = None
    drain: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, number: int) -> bool:
        """Take a signal; False for one that ends everything at once: Ctrl-C, and a second SIGTERM."""
        if number == signal.SIGTERM and not self.drain.is_set():
            self.drain.set()
            return True
        if number == signal.SIGHUP and self.renew:
            self.reload.set()
            return True
        return False


class Generation:
    """Made by `open`; `cluster` answers until `close`."""

    def __init__(self, cluster: Cluster, ranks: AsyncExitStack, hosts: AsyncExitStack) -> None:
        self.cluster = cluster
        self._ranks, self._hosts = ranks, hosts

    @classmethod
    async def open(
        cls, config: ServerConfig, loading: Callable[[int, int], None] = lambda num_bytes, total_bytes: None
    ) -> Self:
        """Load the ranks. `loading` and what is raised: as Cluster.open."""
        ranks = AsyncExitStack()
        opening = Cluster.open(config.group, restart=True, loading=loading)
        cluster = await ranks.enter_async_context(opening)
        return cls(cluster, ranks, AsyncExitStack())

    async def show(self, service: Service, config: ServerConfig, lead: Lead | None) -> None:
        """Requests go here from now on, and hosts may join."""
        service.config, service.cluster, service.hosts = config, self.cluster, None
        if lead:
            service.hosts = (await self._hosts.enter_async_context(lead(self.cluster))).describe

    async def part(self) -> None:
        """Let the hosts that joined go; they go on by themselves, with the streams of their own clients."""
        await self._hosts.aclose()

    async def close(self) -> None:
        try:
            await self.part()
        finally:
            await self._ranks.aclose()


async def reload(service: Service, old: Generation, wishes: Wishes, retired: AsyncExitStack) -> Generation:
    """Load what `wishes.renew` gives and swap it in; the old generation if that cannot be.

    Generations that finish their streams end with `retired`. Raises what loading raises if the old one had to end
    first.
    """
    assert wishes.renew
    try:
        renewal = await asyncio.to_thread(wishes.renew)
        if renewal.fits:
            _log.warning("reload: loading beside what runs")
            new = await Generation.open(renewal.config)
            await old.part()
        else:
            _log.warning("reload: both do not fit in memory: what runs ends first")
            await _end_first(service, old, wishes)
            new = await Generation.open(renewal.config)
    except ExpertdError as e:
        if service.cluster is None:
            raise
        _log.warning("reload: %s What was served goes on.", e)
        return old
    new.cluster.requests.kept.share(old.cluster.requests.kept)
    await new.show(service, renewal.config, renewal.lead)
    _log.warning("reload: serving %s from new ranks", renewal.config.model_id)
    if renewal.fits:
        _retire(old, wishes, retired)
    return new


async def _end_first(service: Service, old: Generation, wishes: Wishes) -> None:
    service.cluster = service.hosts = None
    await old.part()
    await old.cluster.requests.finish(wishes.drain_timeout_s, RELOADED)
    await old.close()


def _retire(old: Generation, wishes: Wishes, retired: AsyncExitStack) -> None:
    async def finish() -> None:
        try:
            await old.cluster.requests.finish(wishes.drain_timeout_s, RELOADED)
        finally:
            await old.close()

    task = asyncio.create_task(finish())

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    retired.push_async_callback(end)
