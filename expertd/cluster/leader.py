"""The leading host: admits hosts that are paired, and forms the epochs of the group.

How a group forms. A host calls (`_admit`): it is told what is served, gets the same checkpoint, loads it, and says
what its ranks are. If that is what ours are, it is ready. From then on one task, `_keep_formed`, compares the hosts
that are ready with those of the running epoch and sets up the next one in three rounds on all of them, our own
host first. A host that fails in this is left out and tried again after a pause; a link over verbs that fails is
tried over TCP, and the reason stays visible. However an epoch ends, the next begins with those who are left.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import expertd
from expertd.cluster.channel import Channel
from expertd.cluster.epoch import MAX_FRUITLESS, EpochEnded, Event, LocalCoordinator, RankDied
from expertd.cluster.host_messages import (
    PROTOCOL,
    Bye,
    Connect,
    Ended,
    Fetch,
    Join,
    Loaded,
    Prepare,
    Refused,
    Start,
    Welcome,
)
from expertd.cluster.member import FIRST_PAUSE_S, LONGEST_PAUSE_S, Member
from expertd.cluster.provide import Provider
from expertd.cluster.route_table import RouteTable, listen_address, peers_of
from expertd.cluster.site import LinkSettings, LocalSite, SetupFailed, Site
from expertd.cluster.supervisor import Cluster
from expertd.config import MAX_RANKS
from expertd.errors import ExpertdError

MAX_HOSTS = 4
MAX_JOIN_S = 10.0
# An epoch that lived this long went well: the next failure starts with a short pause again.
GOOD_EPOCH_S = 60.0
SHORT_EPOCH_S = 2.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Leader:
    """Host 0. `facts` is what our own ranks are, as a joining host would say it; `verbs` why we have no RDMA, or ""."""

    def __init__(
        self,
        cluster: Cluster,
        welcome: Welcome,
        facts: Loaded,
        provider: Provider,
        routes: RouteTable,
        verbs: str,
        settings: LinkSettings,
    ) -> None:
        self._cluster, self._welcome, self._facts = cluster, welcome, facts
        self._provider, self._routes, self._verbs = provider, routes, verbs
        self._local = LocalCoordinator(cluster)
        self._site = LocalSite(cluster, settings, lambda ended: self._on_ended(None, ended))
        self._members: dict[str, Member] = {}
        self._gone: dict[str, Member] = {}  # paired hosts that left, for people who ask why
        self._own_pause_s = FIRST_PAUSE_S  # after a failure of this host itself
        self._epoch, self._running = 0, 0
        self._formed: list[Member] = []
        self._formed_at = 0.0
        self._kind = "none"
        self._used_mlx = False
        self._last_change = "started"
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._former = asyncio.create_task(self._keep_formed())
        cluster.coordinator = self

    async def close(self, reason: str) -> None:
        """Say goodbye to every host and end the link processes of this one."""
        tasks = [self._former, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running = 0
        await asyncio.gather(*(self._part(m, reason) for m in self._members.values()))
        await self._site.close()

    async def _part(self, member: Member, reason: str) -> None:
        with contextlib.suppress(ExpertdError):  # it may be gone already
            await member.channel.send(Bye(reason))
        await member.channel.close()

    def describe(self) -> dict[str, Any]:
        """The hosts, their links and why they are as they are: for /health and `expertd topology`."""
        return {
            "role": "leader",
            "epoch": self._running,
            "link": self._cluster.mlx_link or self._kind,
            "verbs": self._verbs or "usable",
            "last_change": self._last_change,
            "hosts": [self._describe_member(m) for m in (self._gone | self._members).values()],
        }

    def _describe_member(self, m: Member) -> dict[str, Any]:
        route = self._routes.chosen(m.host_id)
        taken = {"route": asdict(route) if route else None}
        return m.describe() | taken | ({"state": "in the group"} if m in self._formed else {})

    # Admission.

    async def admit(self, channel: Channel) -> None:
        """Converse with one paired host until it leaves; called for each channel."""
        try:
            async with asyncio.timeout(MAX_JOIN_S):
                first = await channel.receive()
            if isinstance(first, Fetch):
                await self._provider.serve(channel, first)
            elif isinstance(first, Join):
                await self._converse(channel, first)
        except (ExpertdError, TimeoutError) as e:
            _log.info("host %s: %s", channel.peer.name, e)
        finally:
            await channel.close()

    async def _converse(self, channel: Channel, join: Join) -> None:
        if reason := self._objection(channel.peer.host_id, join):
            _log.warning("host %s may not join: %s", channel.peer.name, reason)
            await channel.send(Refused(reason))
            return
        member = Member(channel, join, self._cluster, self._wake.set, self._on_ended)
        if before := self._members.pop(member.host_id, None):
            self._leave(before, "it joined again")
            await before.channel.close()
        self._members[member.host_id] = member
        for other in self._members.values():  # it may have other addresses now
            other.paths.pop(member.host_id, None)
        reason = "it left"
        try:
            await channel.send(self._welcome)
            while True:
                message = await channel.receive()
                if isinstance(message, Bye):
                    reason = message.reason
                    return
                if isinstance(message, Loaded) and (
                    why := self._unlike(message) or self._too_many(member, message)
                ):
                    member.state, member.reason = "alone", why
                    _log.warning("host %s stays alone: %s", member.name, why)
                    await channel.send(Refused(why))
                else:
                    member.take(message)
                    if member.is_ready:  # why it left before is history
                        self._gone.pop(member.host_id, None)
        except ExpertdError as e:
            reason = str(e).removeprefix(f"host {member.name}: ")
            raise
        finally:
            if self._members.get(member.host_id) is member:
                del self._members[member.host_id]
                self._leave(member, reason)

    def _leave(self, member: Member, reason: str) -> None:
        text = f"host {member.name}: {reason}"
        before = self._gone.get(member.host_id)
        in_group = member in self._formed  # then the end of the epoch is told
        # Not when it is we who leave; and a host that tries again and again says the same only once.
        if not (in_group or self._former.done()) and (before is None or before.reason != text):
            _log.warning("host %s left: %s", member.name, reason)
        member.leave(text)
        self._gone[member.host_id] = member
        if in_group:
            self._on_ended(member, Ended(self._running, -1, "running", f"it left: {reason}"))
        self._wake.set()

    def _objection(self, host_id: str, join: Join) -> str:
        for what, theirs, ours in (
            ("protocol", join.protocol, PROTOCOL),
            ("expertd", join.version, expertd.__version__),
            ("mlx", join.mlx, self._facts.mlx),
        ):
            if theirs != ours:
                return f"it has {what} {theirs}, this host has {ours}. Install the same version on both."
        if len(self._members.keys() - {host_id}) >= MAX_HOSTS - 1:
            return f"{MAX_HOSTS} hosts are in this group already, the most there can be."
        return ""

    def _too_many(self, member: Member, loaded: Loaded) -> str:
        others = [m.num_ranks for m in self._members.values() if m is not member and m.state == "ready"]
        if (total := self._cluster.group.num_ranks + sum(others) + loaded.num_ranks) <= MAX_RANKS:
            return ""
        return f"with its {loaded.num_ranks} ranks the group has {total}, the most is {MAX_RANKS}. Use fewer --ranks."

    def _unlike(self, loaded: Loaded) -> str:
        """Why a host cannot share the work of a step: its bits could differ from ours."""
        for what in (
            "content_hash",
            "config_hash",
            "dtype",
            "mlx",
            "architecture",
            "kernels",
            "activation_bits",
        ):
            theirs, ours = getattr(loaded, what), getattr(self._facts, what)
            if theirs != ours:
                why = f"its {what.replace('_', ' ')} is {theirs}, the leader's is {ours}"
                if what == "architecture":
                    why += "; unlike processors differ in the last bit, so each computes its requests alone (solo)"
                return why + "."
        return ""

    # Epochs.

    def _on_ended(self, member: Member | None, ended: Ended) -> None:
        """An epoch ended somewhere; `member` None is this host."""
        if ended.epoch != self._running or not self._running:
            return
        where = f"host {member.name}" if member else "this host"
        self._last_change = f"epoch {ended.epoch} ended, says {where}: {ended.reason}"
        _log.warning("%s", self._last_change)
        if (blamed := self._blamed(member, ended)) and blamed.state != "gone":
            if time.monotonic() - self._formed_at > GOOD_EPOCH_S:
                blamed.went_well()
            self._hold(blamed, ended.reason)
        over, self._running = self._running, 0
        formed, self._formed = self._formed, []
        sites: list[Site] = [self._site, *formed]
        for site in sites:
            self._background(site.stop(over, ended.reason))
        self._wake.set()

    async def changed(self, event: Event) -> None:
        """A rank of this host died, or its epoch ended by itself (Coordinator of epoch.py)."""
        if not self._formed:
            await self._local.changed(event)
        elif isinstance(event, EpochEnded) and event.num_fruitless >= MAX_FRUITLESS:
            for member in self._formed:
                self._hold(member, f"{event.num_fruitless} epochs failed without a token: {event.reason}")
        if self._formed:
            self._on_ended(None, Ended(self._running, -1, "running", event.reason))
        if isinstance(event, RankDied) and not self._cluster.living:
            # Until our ranks are back, the others do better without us; they call again.
            for member in self._members.values():
                self._background(self._part(member, f"{event.reason}; no rank of it is left"))
        self._wake.set()

    def outlook(self) -> str | None:
        """Without ranks of its own this host cannot lead (Coordinator of epoch.py)."""
        return self._local.outlook()

    def _blamed(self, member: Member | None, ended: Ended) -> Member | None:
        """Whose link failed: the peer that was named, or who named us; else who reports an epoch that hardly lived."""
        if 0 < ended.host <= len(self._formed):
            return self._formed[ended.host - 1]
        short = time.monotonic() - self._formed_at < SHORT_EPOCH_S
        return member if ended.host == 0 or short else None

    def _fall_back(self, reason: str, member: Member | None = None) -> None:
        """Verbs failed with a host, or on this one (None): no more of them with it."""
        if self._kind == "verbs" and self._welcome.group.get("link", "auto") == "auto":
            reason = f"{reason} (TCP is used until expertd starts again)"
            if member:
                member.verbs = reason
            else:
                self._verbs = reason

    def _hold(self, member: Member, reason: str) -> None:
        self._fall_back(reason, member)
        member.paths.clear()  # a way that was the best may be gone: they are measured again
        pause_s = member.pause(reason)
        asyncio.get_running_loop().call_later(pause_s + 0.01, self._wake.set)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await work
            except ExpertdError as e:
                _log.info("%s", e)

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_formed(self) -> None:
        while True:
            self._wake.clear()
            ready = [m for m in self._members.values() if m.is_ready]
            if self._cluster.living:
                if not self._cluster.running:  # at once: whom the others are waiting for may take its time
                    await self._form([])
                if ready != self._formed:
                    await self._form(ready)
            await self._wake.wait()

    async def _form(self, members: list[Member]) -> None:
        """Set up the next epoch with these hosts; who is to blame for a failure is left out of the next try."""
        self._epoch += 1
        epoch = self._epoch
        try:
            await self._routes.measure(members)
            await (self._set_up(epoch, members) if members else self._be_alone(epoch))
            self._own_pause_s = FIRST_PAUSE_S
        except ExpertdError as e:
            self._last_change = f"epoch {epoch} was not set up: {e}"
            _log.warning("%s", self._last_change)
            await self._site.stop(epoch, str(e))
            for member in members:
                self._background(member.stop(epoch, str(e)))
            if epoch == self._running:
                self._running, self._formed = 0, []
            if blamed := self._blamed_for_setup(members, e):
                self._hold(blamed, str(e))
            else:
                self._fall_back(str(e))
                await asyncio.sleep(self._own_pause_s)
                self._own_pause_s = min(2 * self._own_pause_s, LONGEST_PAUSE_S)
            self._wake.set()

    async def _be_alone(self, epoch: int) -> None:
        group = self._cluster.group
        await self._site.alone(group.split, group.shares)
        self._running, self._formed, self._kind, self._formed_at = epoch, [], "none", time.monotonic()

    async def _set_up(self, epoch: int, members: list[Member]) -> None:
        """The three rounds. Raises SetupFailed or LinkDown, with the host that reported it as `site`."""
        self._kind = kind = self._choose_kind(members)
        sites: list[Site] = [self._site, *members]
        num_ranks = [self._site.num_ranks, *(m.num_ranks for m in members)]
        self._check_mlx(members, num_ranks)
        secret = secrets.token_bytes(32)
        routes = self._routes.routes(members)
        prepares = [
            Prepare(epoch, kind, i, num_ranks, secret, listen_address(i, len(sites), routes))
            for i in range(len(sites))
        ]
        ports = await _on_all([partial(s.prepare, p) for s, p in zip(sites, prepares, strict=True)])
        connects = [Connect(epoch, peers_of(i, ports, routes)) for i in range(len(sites))]
        await _on_all([partial(s.connect, c) for s, c in zip(sites, connects, strict=True)])
        # From here on an end of this epoch, reported by anyone, is news.
        self._running, self._formed, self._formed_at = epoch, members, time.monotonic()
        group = self._cluster.group
        self._used_mlx = group.link == "mlx"
        start = Start(epoch, group.split, list(group.shares) if len(group.shares) == sum(num_ranks) else [])
        await _on_all([partial(s.start, start) for s in sites])
        if self._running != epoch:
            return  # it ended meanwhile, and that was told
        for member in members:
            member.reason = ""
        names = ", ".join(m.name for m in members)
        self._last_change = (
            f"epoch {epoch} began with {sum(num_ranks)} ranks over {self._kind}: this host, {names}"
        )
        _log.warning("%s", self._last_change)

    def _choose_kind(self, members: list[Member]) -> str:
        """`auto` takes verbs when every host can and it has not failed with any of them; what failed stays visible."""
        wanted = self._cluster.group.link
        if wanted != "auto":
            # MLX carries plans and rows; its ranks meet, and are watched, over our own link.
            return "tcp" if wanted == "mlx" else wanted
        return "tcp" if self._verbs or any(m.verbs for m in members) else "verbs"

    def _check_mlx(self, members: list[Member], num_ranks: list[int]) -> None:
        """MLX lets a process join one group in its life: a rank cannot change its group. Raises SetupFailed."""
        if self._cluster.group.link != "mlx":
            return
        new = next((i for i, m in enumerate(members, 1) if m not in self._formed), 1)
        if max(num_ranks) > 1:
            many = ", ".join(map(str, num_ranks))
            reason = f"--link mlx: the hosts have {many} ranks, between hosts MLX takes one of each"
            raise SetupFailed(f"{reason}. Use --ranks 1 on every host, or --link tcp.", new)
        if self._used_mlx:
            reason = "--link mlx: MLX forms one group in the life of a process, and this one has had its own"
            raise SetupFailed(f"{reason}. Start `expertd serve` again, or use --link tcp.", new)

    def _blamed_for_setup(self, members: list[Member], error: Exception) -> Member | None:
        site, host = getattr(error, "site", 0), getattr(error, "host", -1)
        index = host if host > 0 else site
        return members[index - 1] if 0 < index <= len(members) else None


async def _on_all(calls: Sequence[Callable[[], Awaitable[_T]]]) -> list[_T]:
    """One round on every host at once. Raises the first failure, which then carries the host's index as `site`."""

    async def on_one(index: int) -> _T:
        try:
            return await calls[index]()
        except ExpertdError as e:
            e.site = index  # type: ignore[attr-defined]
            raise

    return await asyncio.gather(*(on_one(i) for i in range(len(calls))))
