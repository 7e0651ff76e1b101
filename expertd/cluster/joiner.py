"""A host that has joined another: it keeps its ranks loaded, follows the leader while there is one, else answers alone.

States. `looking`: no leader answers; our ranks are an epoch by themselves and our clients are answered by them.
`loading`: the leader told us what it serves, and our ranks read it. `following`: the leader forms epochs with our
ranks; requests of our clients go to it. `alone`: the leader refused our ranks (unlike processors), its model is
served by us alone. Nothing here gives up: a leader that is gone is called again, with pauses up to 10 s, for as
long as this process lives.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import expertd
from expertd.cluster.channel import Channel
from expertd.cluster.epoch import Event, LocalCoordinator, RanksReady
from expertd.cluster.host_messages import (
    PROTOCOL,
    Bye,
    Connect,
    Ended,
    Join,
    Linked,
    Loaded,
    Measure,
    Measured,
    Prepare,
    Prepared,
    Ranks,
    Refused,
    Running,
    Start,
    Stop,
    Welcome,
)
from expertd.cluster.paths import Paths
from expertd.cluster.reply import Reply
from expertd.cluster.site import LinkSettings, LocalSite, SetupFailed
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Cancel, Done, Failed, Rejected, Started, Submit, Token
from expertd.errors import (
    ClusterError,
    ConfigError,
    ExpertdError,
    LinkDown,
    RemoteProtocolError,
    TransportError,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
WELCOME_TIMEOUT_S = 10.0

Events = AsyncGenerator[Started | Token | Done, None]
_log = logging.getLogger(__name__)


class Joiner:
    """`call` opens a channel to the leader; `load` turns its Welcome into a running cluster (and its facts), copying
    the checkpoint if it must; `show` gets that cluster, or None while there is none, for the HTTP server."""

    def __init__(
        self,
        call: Callable[[], Awaitable[Channel]],
        load: Callable[[Welcome, AsyncExitStack], Awaitable[tuple[Cluster, Loaded]]],
        show: Callable[[Cluster | None, str], None],
        paths: Paths,
        settings: LinkSettings,
        name: str,
    ) -> None:
        self._call, self._load, self._show = call, load, show
        self._paths, self._settings, self._name = paths, settings, name
        self._channel: Channel | None = None
        self._welcome: Welcome | None = None
        self._cluster: Cluster | None = None
        self._site: LocalSite | None = None
        self._ranks = AsyncExitStack()
        self._facts: Loaded | None = None
        self._replies: dict[str, Reply] = {}
        self._session_tasks: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # those that outlive a session
        self.state, self.reason = "looking", "no leader has answered yet"

    def describe(self) -> dict[str, Any]:
        """For /health."""
        leader = self._channel.peer.name if self._channel else None
        return {"role": "joined", "state": self.state, "reason": self.reason, "leader": leader}

    async def run(self) -> None:
        """Follow the leader, whenever there is one, until cancelled. Raises ConfigError when it refuses this host."""
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                try:
                    await self._session()
                except (TransportError, ClusterError) as e:
                    if self.state in ("following", "alone"):
                        pause_s = FIRST_PAUSE_S
                    await self._lose(str(e))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            await self._let_go()

    # One session with a leader.

    async def _session(self) -> None:
        channel = await self._call()
        try:
            await channel.send(
                Join(
                    PROTOCOL,
                    expertd.__version__,
                    self._paths.mlx_version,
                    self._name,
                    self._paths.addresses(channel.local_address),
                    self._paths.probe_port,
                    self._paths.verbs,
                )
            )
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                welcome = await channel.receive()
            if isinstance(welcome, Refused):
                raise ConfigError(f"host {channel.peer.name} refused this host: {welcome.reason}")
            if not isinstance(welcome, Welcome):
                raise RemoteProtocolError(
                    f"host {channel.peer.name} sent {type(welcome).__name__}, wanted Welcome"
                )
            self._channel, self._paths.secret = channel, welcome.probe_secret
            self._start(self._be_loaded(welcome, channel))
            while True:
                await self._take(await channel.receive())
        except TimeoutError:
            raise LinkDown(
                f"host {channel.peer.name} did not say within {WELCOME_TIMEOUT_S:g} s what it serves"
            ) from None
        finally:
            self._channel = None
            await channel.close()

    async def _be_loaded(self, welcome: Welcome, channel: Channel) -> None:
        if (
            self._cluster is None
            or self._welcome is None
            or welcome.content_hash != self._welcome.content_hash
        ):
            self.state, self.reason = "loading", f"loading {welcome.model_id}"
            await self._let_go()
            self._show(None, welcome.model_id)
            cluster, self._facts = await self._load(welcome, self._ranks)
            self._cluster = cluster
            self._site = LocalSite(cluster, self._settings, lambda ended: self._start(self._say(ended)))
            cluster.coordinator = self
            self._start(self._watch_end(cluster), self._tasks)
            self._show(cluster, welcome.model_id)
        self._welcome = welcome
        assert self._facts is not None and self._site is not None
        self.state, self.reason = "following", f"following {channel.peer.name}"
        await channel.send(replace(self._facts, num_ranks=self._site.num_ranks))

    async def _let_go(self) -> None:
        """End our ranks, if there are any."""
        if self._site:
            await self._site.close()
        self._cluster = self._site = None
        await self._ranks.aclose()
        self._ranks = AsyncExitStack()

    async def _lose(self, reason: str) -> None:
        """The leader is gone: its answers to our clients end, our ranks go on by themselves."""
        if self.state != "looking":
            _log.warning("%s; this host goes on alone and calls again", reason)
        for task in list(self._session_tasks):
            task.cancel()
        self.state, self.reason = "looking", reason
        for reply in self._replies.values():
            reply.put(Failed(reply.request_id, f"{reason}. Ask again: this host answers by itself now."))
        await self._be_alone()

    async def _be_alone(self) -> None:
        if self._cluster is None or self._site is None:
            return
        if self._cluster.living:
            await self._site.alone(self._cluster.group.split)

    # What the leader says.

    async def _take(self, message: Any) -> None:
        if isinstance(message, Started | Token | Done | Rejected | Failed):
            if reply := self._replies.get(message.request_id):
                reply.put(message)
        elif isinstance(message, Prepare | Connect | Start):
            self._start(self._obey(message))
        elif isinstance(message, Stop):
            if self._site:
                await self._site.stop(message.epoch, message.reason)
        elif isinstance(message, Measure):
            self._start(self._measure(message))
        elif isinstance(message, Refused):
            _log.warning("this host stays alone: %s", message.reason)
            await self._be_alone()
            self.state, self.reason = "alone", message.reason
        elif isinstance(message, Bye):
            raise LinkDown(f"the leader left: {message.reason}")
        else:
            raise RemoteProtocolError(f"the leader sent {type(message).__name__}, which has no place here")

    async def _obey(self, message: Prepare | Connect | Start) -> None:
        """One round of an epoch's set-up, and its answer."""
        try:
            if self._site is None:
                raise SetupFailed("this host has no ranks yet")
            if isinstance(message, Prepare):
                await self._say(Prepared(message.epoch, await self._site.prepare(message)))
            elif isinstance(message, Connect):
                await self._say(Linked(message.epoch, await self._site.connect(message)))
            else:
                await self._site.start(message, leader=self)
                await self._say(Running(message.epoch))
        except SetupFailed as e:
            await self._say(Ended(message.epoch, e.host, "setup", str(e)))
        except ClusterError as e:
            await self._say(Ended(message.epoch, -1, "setup", str(e)))

    async def _measure(self, message: Measure) -> None:
        await self._say(Measured(message.host_id, await self._paths.measure_to(message)))

    async def _say(self, message: Any) -> None:
        if self._channel:
            try:
                await self._channel.send(message)
            except ExpertdError as e:  # whoever reads the channel sees it too, and acts
                _log.debug("not said: %s", e)

    def _start(self, work: Any, tasks: set["asyncio.Task[None]"] | None = None) -> None:
        """Run a task of this session, or one of `tasks`."""
        tasks = self._session_tasks if tasks is None else tasks
        task = asyncio.create_task(self._guard(work))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except ExpertdError as e:
            _log.warning("%s", e)
            self.reason = str(e)
            if self._channel:  # without our ranks there is nothing to follow with: begin again
                await self._channel.close()

    # The coordinator of our cluster (epoch.py).

    async def changed(self, event: Event) -> None:
        """A rank of ours died or an epoch ended: the leader decides what follows, we do when there is none."""
        if isinstance(event, RanksReady) or self._cluster is None or not self._cluster.living:
            return
        if self._channel and self.state == "following" and self._site:
            await self._say(Ended(self._site.started or 0, -1, "running", event.reason))
            await self._say(Ranks(len(self._cluster.living), event.reason))
        else:
            await self._be_alone()

    def outlook(self) -> str | None:
        return LocalCoordinator(self._cluster).outlook() if self._cluster else None

    async def _watch_end(self, cluster: Cluster) -> None:
        """When the last of our ranks is dead they are loaded again, and meanwhile the leader is told."""
        reason = await cluster.wait_failed()
        if self._cluster is not cluster:
            return
        _log.warning("%s; loading again", reason)
        await self._say(Ended(self._site.started or 0 if self._site else 0, -1, "running", reason))
        await self._say(Ranks(0, reason))
        self._cluster, welcome, channel = None, self._welcome, self._channel
        if welcome and channel:
            await self._be_loaded(welcome, channel)

    # What our HTTP server asks of the group while we follow.

    async def generate(self, submit: Submit) -> Events:
        """As Cluster.generate: the leader answers."""
        channel = self._channel
        if channel is None:
            raise ClusterError("the leader is gone. Ask again.")
        reply = self._replies[submit.request_id] = Reply(submit.request_id)
        try:
            await channel.send(submit)
            while True:
                event = await reply.get()
                if isinstance(event, Rejected):
                    raise ConfigError(event.message)
                if isinstance(event, Failed):
                    raise ClusterError(event.message)
                yield event
                if isinstance(event, Done):
                    return
        except TransportError as e:
            raise ClusterError(str(e)) from e
        finally:
            del self._replies[submit.request_id]
            if not reply.ended:
                self._start(self._say(Cancel(submit.request_id)))
