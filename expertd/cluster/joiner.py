"""A host that has joined another: it keeps its ranks loaded, follows the leader while there is one, else answers alone.

States. `looking`: no leader answers; our ranks are an epoch by themselves and our clients are answered by them.
`loading`: the leader told us what it serves, and our ranks read it. `following`: the leader forms epochs with our
ranks; requests of our clients go to it. `alone`: the leader refused our ranks (unlike processors), its model is
served by us alone. Nothing here gives up: a leader that is gone is called again, with pauses up to 10 s, for as
long as this process lives; ranks that all died are loaded again.

Tasks. `run` calls, reads the channel and is the only one that opens and ends sessions; what takes time in a session
(loading, measuring, a round of a set-up) is a task of that session and is over before the next one begins. So ranks
are loaded by one task at a time.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

import expertd
from expertd.cluster.channel import Channel
from expertd.cluster.epoch import Event, LocalCoordinator, RanksReady
from expertd.cluster.host_messages import (
    PROTOCOL,
    Bye,
    Connect,
    Ended,
    Held,
    Hold,
    Join,
    Linked,
    Loaded,
    Measure,
    Measured,
    PathReport,
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
from expertd.cluster.reply import LeaderLost, Replies, Take
from expertd.cluster.site import LinkSettings, LocalSite, SetupFailed
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Done, Failed, Rejected, Started, Submit, Token
from expertd.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    ExpertdError,
    LinkDown,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from expertd.link.messages import LinkPeer, LinkReport

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
WELCOME_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class Joiner:
    """`call` opens a channel to the leader; `load` turns its Welcome into a running cluster (and its facts), copying
    the checkpoint if it must; `show` gets that cluster, or None while there is none, for the HTTP server.
    """

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
        self._met = False  # a leader let us in, at some time
        self._tasks: set[asyncio.Task[None]] = set()  # of this session
        self._failure: ExpertdError | None = None  # why we ended the session ourselves
        self._replies = Replies(lambda cancel: self._start(self._say(cancel)))
        self._said = ""
        self.state, self.reason = "looking", "no leader has answered yet"
        # Our ranks, and what they hold.
        self._ranks = AsyncExitStack()
        self._welcome: Welcome | None = None
        self._facts: Loaded | None = None
        self._cluster: Cluster | None = None
        self._local: LocalCoordinator | None = None
        self._site: LocalSite | None = None
        self._watch: asyncio.Task[None] | None = None
        self._is_led = False  # our clients' requests go to the leader
        # What the leader had us measure and link to, for `describe`.
        self._measured: dict[str, tuple[str, list[PathReport]]] = {}
        self._kind = "none"
        self._peers: list[LinkPeer] = []
        self._links: list[LinkReport] = []

    def describe(self) -> dict[str, Any]:
        """For /health and `expertd topology`, in the shape of Leader.describe."""
        epoch = self._site.started if self._site else None
        return {
            "role": "joined",
            "state": self.state,
            "reason": self.reason,
            "leader": self._channel.peer.name if self._channel else None,
            "epoch": epoch or 0,
            "link": self._link if epoch else "none",
            "verbs": self._paths.verbs or "usable",
            "links": [asdict(r) for r in self._links] if epoch else [],
            "hosts": [self._describe_host(i, *found) for i, found in self._measured.items()],
        }

    @property
    def _link(self) -> str:
        return (self._cluster.mlx_link if self._cluster else "") or self._kind

    def _describe_host(self, host_id: str, name: str, paths: list[PathReport]) -> dict[str, Any]:
        taken = {(p.local_address, p.address) for p in self._peers}
        route = next((p for p in paths if (p.local.address, p.remote.address) in taken), None)
        leader = self._channel.peer if self._channel else None
        leads = leader is not None and leader.host_id == host_id
        return {
            "name": leader.name if leader and leads else name,  # by the name that it is paired under
            "host_id": host_id,
            "state": "leads" if leads else "joined",
            "route": asdict(route) if route else None,
            "paths": {host_id: [asdict(p) for p in paths]},
        }

    async def run(self) -> None:
        """Follow the leader, whenever there is one, until cancelled.

        Raises ConfigError when it refuses this host; ClusterError when the first answer is not that of the paired host,
        or that it does not know us. Later, these may pass, and the leader is called again.
        """
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                try:
                    await self._session()
                except (TransportError, ClusterError, CheckpointError) as e:
                    if isinstance(e, ClusterError) and not self._met:
                        raise
                    if self.state in ("following", "alone"):
                        pause_s = FIRST_PAUSE_S
                    await self._lose(str(e))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            await self._end_tasks()
            await self._let_go()

    # One session with a leader.

    async def _session(self) -> None:
        channel = await self._call()
        try:
            welcome = await self._introduce(channel)
            self._met, self._failure = True, None
            self._channel, self._paths.secret = channel, welcome.probe_secret
            self._start(self._be_loaded(welcome, channel))
            while True:
                await self._take(await channel.receive())
        except LinkDown as e:
            raise self._failure or e from None
        except asyncio.CancelledError:
            with contextlib.suppress(ExpertdError):
                await channel.send(Bye("expertd is stopping there"))
            raise
        finally:
            self._channel = None
            await channel.close()

    async def _introduce(self, channel: Channel) -> Welcome:
        """Say who we are. Raises ConfigError when the leader does not want us."""
        name = channel.peer.name
        join = Join(
            PROTOCOL,
            expertd.__version__,
            self._paths.mlx_version,
            self._name,
            self._paths.addresses(channel.local_address),
            self._paths.probe_port,
            self._paths.verbs,
        )
        await channel.send(join)
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                welcome = await channel.receive()
        except TimeoutError:
            raise LinkDown(f"host {name} did not say within {WELCOME_TIMEOUT_S:g} s what it serves") from None
        if isinstance(welcome, Refused):
            raise ConfigError(f"host {name} refused this host: {welcome.reason}")
        if not isinstance(welcome, Welcome):
            raise RemoteProtocolError(f"host {name} sent {type(welcome).__name__}, wanted Welcome")
        return welcome

    async def _be_loaded(self, welcome: Welcome, channel: Channel) -> None:
        same = self._welcome and replace(welcome, probe_secret=self._welcome.probe_secret) == self._welcome
        if not same or self._cluster is None or self._cluster.failure:
            await self._load_ranks(welcome)
        assert self._facts is not None and self._site is not None and self._cluster is not None
        self.state, self.reason = "following", f"following {channel.peer.name}"
        self._said = ""
        await channel.send(replace(self._facts, num_ranks=self._site.num_ranks))
        for (
            copy
        ) in self._cluster.requests.snapshot():  # a leader that was started again knows nothing of these
            await channel.send(Hold(0, [copy]))

    async def _load_ranks(self, welcome: Welcome) -> None:
        self.state, self.reason = "loading", f"loading {welcome.model_id}"
        await self._let_go()
        self._show(None, welcome.model_id)
        cluster, self._facts = await self._load(welcome, self._ranks)
        self._welcome, self._cluster, self._is_led = welcome, cluster, False
        self._local = LocalCoordinator(cluster)
        self._site = LocalSite(cluster, self._settings, lambda ended: self._start(self._say(ended)))
        cluster.coordinator = self
        cluster.requests.tell_leader = lambda request_id: self._start(self._say(Hold(0, [], [request_id])))
        self._watch = asyncio.create_task(self._watch_end(cluster))
        self._show(cluster, welcome.model_id)

    async def _let_go(self) -> None:
        """End our ranks, if there are any."""
        if self._watch:
            self._watch.cancel()
        if self._site:
            await self._site.close()
        self._cluster = self._site = self._watch = None
        ranks, self._ranks = self._ranks, AsyncExitStack()
        await ranks.aclose()

    async def _lose(self, reason: str) -> None:
        """The leader is gone: our ranks go on by themselves, and with what it had of our clients' answers."""
        await self._end_tasks()
        if reason != self._said:
            self._said = reason
            then = (
                "This host goes on alone and calls again"
                if self._cluster
                else "Calling again until it answers"
            )
            _log.warning("%s %s.", reason if reason.endswith((".", "?")) else f"{reason}.", then)
        self.state, self.reason = "looking", reason
        if self._cluster:
            self._cluster.requests.lose_leaders()
            if self._is_led:
                self._cluster.lead_by(None)
        self._replies.fail(reason, lost=True)
        try:
            await self._be_alone()
        except ExpertdError as e:
            _log.warning("%s", e)
            self.reason = str(e)

    async def _be_alone(self) -> None:
        """Answer by ourselves, with ranks that are loaded again if they all died."""
        if self._cluster and self._cluster.failure and self._welcome:
            await self._load_ranks(self._welcome)
            self.state = "looking"
        self._is_led = False
        if self._cluster and self._site and self._cluster.living:
            await self._site.alone(self._cluster.group.split)

    # What the leader says.

    async def _take(self, message: Any) -> None:
        if isinstance(message, Started | Token | Done | Rejected | Failed):
            self._replies.hear(message)
        elif isinstance(message, Prepare | Connect | Start):
            self._start(self._obey(message))
        elif isinstance(message, Hold):
            if self._cluster:
                self._cluster.requests.hold(message)
                await self._say(Held(message.number))
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
            await self._say(await self._do(message))
        except SetupFailed as e:
            await self._say(Ended(message.epoch, e.host, "setup", str(e)))
        except ClusterError as e:
            await self._say(Ended(message.epoch, -1, "setup", str(e)))

    async def _do(self, message: Prepare | Connect | Start) -> Prepared | Linked | Running:
        if self._site is None:
            raise SetupFailed("this host has no ranks yet")
        if isinstance(message, Prepare):
            self._kind = message.kind
            return Prepared(message.epoch, await self._site.prepare(message))
        if isinstance(message, Connect):
            self._peers = message.peers
            self._links = await self._site.connect(message)
            return Linked(message.epoch, self._links)
        await self._site.start(message, leader=self)
        self._is_led = True
        return Running(message.epoch)

    async def _measure(self, message: Measure) -> None:
        paths = await self._paths.measure_to(message)
        self._measured[message.host_id] = message.name, paths
        await self._say(Measured(message.host_id, paths))

    async def _say(self, message: Any) -> None:
        if self._channel:
            try:
                await self._channel.send(message)
            except ExpertdError as e:  # whoever reads the channel sees it too, and acts
                _log.debug("not said: %s", e)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task of this session."""
        task = asyncio.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ExpertdError as e:
            await self._give_up(e)
        except Exception as e:
            await self._give_up(ClusterError(f"{type(e).__name__}: {e}. This is a bug of expertd."))

    async def _give_up(self, error: ExpertdError) -> None:
        """End this session: without our ranks there is nothing to follow with. The next one begins from the start."""
        self._failure = error
        await self._say(Bye(str(error)))
        if self._channel:
            await self._channel.close()

    async def _end_tasks(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The coordinator of our cluster (epoch.py).

    async def changed(self, event: Event) -> None:
        """A rank of ours died or an epoch ended: the leader decides what follows, we do when there is none."""
        if isinstance(event, RanksReady) or not (self._cluster and self._local and self._site):
            return
        if self.state == "following":
            await self._say(
                Ranks(len(self._cluster.living), event.reason)
            )  # first, for the next epoch counts on it
            await self._say(Ended(self._site.started or 0, -1, "running", event.reason))
        if not self._is_led:
            await self._local.changed(event)

    def outlook(self) -> str | None:
        return self._local.outlook() if self._local else None

    async def _watch_end(self, cluster: Cluster) -> None:
        """When the last of our ranks is dead the session ends, and the next one loads them again."""
        error = ClusterError(f"{await cluster.wait_failed()}; loading again")
        if self._channel:
            await self._give_up(error)

    # What our HTTP server asks of the group while we follow.

    async def answer(self, submit: Submit, take: Take) -> None:
        """As Replies.answer: the leader answers."""
        channel = self._channel
        if channel is None:
            raise LeaderLost("the leader is gone")
        try:
            await self._replies.answer(submit, channel.send, take)
        except LocalProtocolError as e:
            raise ClusterError(str(e)) from e
        except TransportError as e:
            raise LeaderLost(str(e)) from e
