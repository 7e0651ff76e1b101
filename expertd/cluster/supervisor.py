"""The supervisor's half of a group: this host's ranks, the present epoch, and the way of a request to its leader.

How a group lives. `Cluster.open` spawns every rank, sends each its Setup and waits for each one's Ready; then the
coordinator begins the first epoch. From then on one task per rank reads its control socket and waits for its exit,
one looks at the ranks' pulses, and one hands changes to the coordinator, one at a time.

How an epoch ends. A rank dies (`_died`: an exit, a Fatal, garbage, a pulse that stands still, a silence that is too
long) or a living one reports that its epoch failed (Ended). Either way `end_epoch` poisons the mailbox, so that no
rank stays inside an exchange, and the coordinator gets an event. A dead rank is killed and reaped; if it was the
leader, its open requests are lost to it, and go on with the next one (requests.py). In a group that is to last, a fresh
process takes its place (restarts.py), loads, and joins the next epoch; until then the others go on.

How the group ends. When nobody goes on, or the owner leaves the `async with`, `_end` happens once and in this order:
the epoch is poisoned; every open request gets its Failed; a task hangs up on all ranks, sends SIGTERM, a second later
SIGKILL, and reaps every one.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, Self

from expertd import errors
from expertd.cluster.epoch import (
    Coordinator,
    Epoch,
    EpochEnded,
    Event,
    Layout,
    LocalCoordinator,
    RankDied,
    RankReturned,
    RanksReady,
)
from expertd.cluster.local import LOOK_S, LocalRank, wait_exits
from expertd.cluster.probe import Probe
from expertd.cluster.record import Record
from expertd.cluster.reply import Event as Answer
from expertd.cluster.requests import Leader, Requests
from expertd.cluster.restarts import Restarts
from expertd.config import GroupConfig
from expertd.engine.messages import (
    Choice,
    Done,
    Ended,
    Fatal,
    Joined,
    Loading,
    Message,
    Observe,
    Ready,
    Started,
    Stats,
    Submit,
    Token,
)
from expertd.errors import ClusterError, ConfigError, ExpertdError, RemoteProtocolError

RANK_MODULE = "expertd.cluster.rank"
LOAD_TIMEOUT_S = 600.0
# A request that comes while nobody leads waits this long for the next epoch.
LEADER_TIMEOUT_S = 10.0
# An epoch that fails this soon counts as fruitless even if nobody asked anything (see EpochEnded).
FRUITLESS_S = 10.0
# The last frame of a rank (its Fatal) and its exit come in either order; each waits so long for the other.
LAST_WORDS_S = 0.5
KILL_AFTER_S = 1.0
REAP_TIMEOUT_S = 5.0
WHAT_NEXT = "look above and in the system log for the cause (out of memory?), then start expertd again"

_log = logging.getLogger(__name__)


class MailboxModule(Protocol):
    """What the supervisor needs from `expertd.link.mailbox`; tests have a fake of this shape."""

    def create(self, num_ranks: int, slot_bytes: int, /) -> int: ...

    def poison(self, fd: int, reason: str, /) -> None: ...

    def pulses(self, fd: int, /) -> tuple[tuple[int, ...], int]:
        """The beats of every rank and of the link; 0 until one has begun to beat."""


def load_mailbox() -> MailboxModule:
    """Import the mailbox, late: it is compiled code, which most of the command line does without."""
    from expertd.link import mailbox

    return mailbox


class Cluster:
    """A running group of ranks; `async with Cluster.open(group) as cluster` is the only way to get one."""

    def __init__(
        self,
        group: GroupConfig,
        coordinator: "Callable[[Cluster], Coordinator]",
        restarts: Restarts | None,
        loading: Callable[[int, int], None],
    ) -> None:
        self.group = group
        self._loading = loading
        self._restarts = restarts
        self._restarting: set[int] = set()  # ids of ranks whose place is empty, or whose process loads
        self._rank_module = RANK_MODULE
        self._mailbox = load_mailbox()
        self.coordinator = coordinator(self)
        self.record = Record()
        self._ranks: list[LocalRank] = []
        self._epochs: list[Epoch] = []  # the present one last; before it, those that a rank has not left yet
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._choices: dict[str, Choice] = {}  # of the present epoch's planner, by work
        self._leader: Leader | None = None
        self._led = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._last_ready = Ready(0)
        self.requests = Requests(self._find_leader)
        self.probe = Probe(self.requests)
        self._num_observed = 0
        self._num_fruitless = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._teardown: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[ExpertdError] = asyncio.get_running_loop().create_future()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        group: GroupConfig,
        rank_module: str | None = None,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        coordinator: "Callable[[Cluster], Coordinator]" = LocalCoordinator,
        restart: bool = False,
        loading: Callable[[int, int], None] = lambda num_bytes, total_bytes: None,
    ) -> AsyncIterator[Self]:
        """Start the ranks of `group`, wait until all are ready, and end all of them at the exit.

        `loading` is told meanwhile how much of all ranks' weights is in memory.

        What `coordinator` makes of the cluster decides about its epochs. With `restart`, a rank that dies later is
        started again. Raises what a rank names when it cannot
        start (CheckpointError, ConfigError, ...), ClusterError when one dies or is not ready within
        `load_timeout_s` seconds.
        """
        cluster = cls(group, coordinator, Restarts() if restart else None, loading)
        try:
            cluster._rank_module = rank_module or RANK_MODULE
            await cluster._start(load_timeout_s)
            yield cluster
        finally:
            await cluster._close()

    # What is known of the group.

    @property
    def ready(self) -> Ready:
        """What this host's first living rank said when it was ready (the last one's words when none lives)."""
        said = [rank.ready for rank in self.living or self._ranks if rank.ready]
        return said[0] if said else self._last_ready

    @property
    def failure(self) -> str | None:
        """Why the group ended, or None while it lives."""
        return str(self._ended.result()) if self._ended.done() else None

    @property
    def ailment(self) -> str:
        """Why requests cannot be answered just now, or will not be in time; "" when all is well."""
        if self._leader is None and not self._ended.done():
            return f"{self.describe()['reason'] or 'the group is not complete yet'}; nobody answers at the moment"
        return self.failure or self.probe.failure

    async def wait_failed(self) -> str:
        """Wait for the end of the group, however long it lives, and give the reason in one line."""
        return str(await asyncio.shield(self._ended))

    @property
    def living(self) -> list[LocalRank]:
        """The ranks that have loaded and live, in the order of the last epoch; who comes back does not lead at once,
        because every stream would have to be read again."""
        found = [rank for rank in self._ranks if rank.ready and not rank.dead]
        return sorted(found, key=lambda rank: (not rank.seats, rank.number))

    @property
    def epoch(self) -> int:
        """The number of the latest epoch; 0 before the first."""
        return self._epochs[-1].layout.epoch if self._epochs else 0

    @property
    def running(self) -> bool:
        """Whether the latest epoch goes on."""
        return bool(self._epochs) and self._epochs[-1].over is None

    @property
    def mlx_link(self) -> str:
        """Which of MLX's back ends the present epoch's rows travel by, "" for our own link."""
        return self._epochs[-1].link if self.running else ""

    def describe(self) -> dict[str, Any]:
        """The state of the group in plain values: epoch, split, reason (of the last change), ranks of this host, and
        what the planner of a leader on this host has chosen for each kind of work.

        A rank's state is "loading", "waiting" (for an epoch), "joining" (one), "running" or "dead"; its id never
        changes, its number `rank` is that in the present epoch.
        """
        epoch = self._epochs[-1] if self._epochs else None
        split = None
        if epoch:
            split = epoch.layout.split if epoch.layout.num_ranks > 1 else "solo"
        return {
            "epoch": self.epoch,
            "split": split,
            "reason": (epoch.over or epoch.reason or None) if epoch else None,
            "ranks": [self._describe_rank(rank) for rank in self._ranks],
            "planner": {work: _describe_choice(c) for work, c in sorted(self._choices.items())},
        }

    def _describe_rank(self, rank: LocalRank) -> dict[str, Any]:
        state = self._state(rank)
        number = rank.number if state in ("joining", "running") else None
        return {"id": rank.id, "pid": rank.pid, "rank": number, "state": state}

    def _state(self, rank: LocalRank) -> str:
        if rank.dead:
            return "dead"
        if not rank.ready:
            return "loading"
        if not (self.running and rank.sits_in(self._epochs[-1])):
            return "waiting"
        return "running" if rank.seats[-1].joined else "joining"

    # Requests.

    def generate(self, submit: Submit) -> AsyncGenerator[Started | Token | Done, None]:
        """Run one request: Started, Token..., Done, whichever leaders die meanwhile. Leaving early cancels it.

        Raises ConfigError when the rank rejects the request, BusyError when too many are open, ClusterError when
        the group is dead, has no leader for LEADER_TIMEOUT_S seconds, or lost too many (requests.py).
        """
        return self.requests.generate(submit)

    def resume(self, request_id: str) -> AsyncGenerator[Started | Token | Done, None]:
        """Give all events of a request with `keep`, from its first on; those to come, too. Leaving ends nothing.

        Raises NotFoundError when it is not known here, or not any more; what ended it; else as `generate`.
        """
        return self.requests.resume(request_id)

    async def observe(self, observe: Observe) -> Done:
        """Let the ranks read whole windows, for evaluation; rank 0 must be this host's.

        Raises ConfigError when the rank rejects it or is another host's, ClusterError as `generate`.
        """
        leader = await self._find_leader()
        if not isinstance(leader, LocalRank):
            raise ConfigError("another host leads this group, and windows stay on their host.")
        self._num_observed += 1
        try:
            events: list[Started | Token | Done] = []
            await leader.answer(observe, events.append)
        finally:
            self._num_observed -= 1
        done = events[-1]
        assert isinstance(done, Done)
        return done

    async def _find_leader(self, patient: bool = False) -> Leader:
        """Whoever leads, or will in LEADER_TIMEOUT_S seconds. Raises ClusterError when nobody does.

        The `patient` also wait for a rank that is started again.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOAD_TIMEOUT_S if patient and self._restarting else LEADER_TIMEOUT_S):
                while self._leader is None and not self._ended.done():
                    await self._led.wait()  # whoever came may be gone again before this task's turn
        if self._ended.done():
            raise ClusterError(str(self._ended.result()))
        if self._leader is None:
            reason = self.describe()["reason"] or "the group is not complete yet"
            raise ClusterError(f"{reason}; nobody answers requests at the moment. Try again later.")
        return self._leader

    def lead_by(self, leader: Leader | None) -> None:
        """From now on requests go to `leader`; None: they wait for the next one."""
        self._leader = leader
        if not isinstance(leader, LocalRank):
            self.record.latest = None  # what is open elsewhere, this host does not know
        if leader or self._ended.done():
            self._led.set()
        else:
            self._led.clear()

    # Epochs.

    async def begin(self, layout: Layout, leader: Leader | None = None) -> None:
        """Begin an epoch, ending the one before it; requests go to its local rank 0, or to `leader`.

        Raises ClusterError when there is no memory for a mailbox. If a rank of the layout is dead, the epoch is over
        as soon as it has begun.
        """
        assert layout.epoch > self.epoch and len(layout.shares) == layout.num_ranks
        self.end_epoch("another epoch begins")
        fd = layout.mailbox_fd
        if fd is None:
            fd = self._mailbox.create(layout.num_ranks, self.group.slot_bytes)
        epoch = Epoch(layout, fd, reason=(self._epochs[-1].over or "") if self._epochs else "")
        self._epochs.append(epoch)
        self._choices.clear()
        if self._ended.done():
            self.end_epoch(str(self._ended.result()))
            return
        members = [self._ranks[i] for i in layout.local]
        for number, rank in enumerate(members, start=layout.first_rank):
            if rank.dead:
                self.end_epoch(f"rank {number} {rank.dead}")
            else:
                rank.join(epoch, number)
        first = members[0] if members and layout.first_rank == 0 and not members[0].dead else None
        self.lead_by(first or leader)
        self.record.happened("begun", f"epoch {layout.epoch} began with {layout.num_ranks} rank(s)")

    def end_epoch(self, reason: str) -> None:
        """Poison the present epoch, if it is not over yet; its ranks wait for the next one."""
        if self.running:
            epoch = self._epochs[-1]
            epoch.over = reason
            self.record.happened("ended", reason)
            self._mailbox.poison(epoch.mailbox_fd, reason)

    async def _coordinate(self) -> None:
        while True:
            event = await self._events.get()
            try:
                await self.coordinator.changed(event)
            except ExpertdError as e:
                self._end(e)

    def _died(self, rank: LocalRank, what: str, error: ExpertdError | None = None) -> None:
        """Bury a rank, once: `what` it did ("died: ..."). `error` ends the group if nobody goes on without it."""
        if rank.dead or self._ended.done():
            return
        number = rank.number
        rank.dead, reason = what, f"rank {number} {what}"
        self.record.happened("died", reason)
        loaded = self._all_ready.is_set()
        pause_s = self._restarts.pause_s(rank.id) if self._restarts and loaded else None
        self._restarting.discard(rank.id)
        outlook = self.coordinator.outlook() if loaded else None
        if pause_s is not None:
            self._restarting.add(rank.id)
            self._watch_over(self._restart(rank, pause_s))
        elif outlook is None and not self._restarting:
            self._end(error or ClusterError(f"{reason}; {WHAT_NEXT}"))
            return
        if self._leader is rank:
            self.lead_by(None)
        rank.replies.fail(reason, lost=True)
        if self._epochs and rank.sits_in(self._epochs[-1]):
            self.end_epoch(reason)
        rank.seats.clear()
        rank.hang_up()
        rank.process.kill()
        if rank.ready:
            self._events.put_nowait(RankDied(number, reason))

    def _epoch_failed(self, rank: LocalRank, ended: Ended) -> None:
        """A living rank found its epoch broken; late reports of an epoch that is over change nothing."""
        if not self.running or ended.epoch != self.epoch or not rank.sits_in(self._epochs[-1]):
            return
        self.record.happened("failed", ended.message)
        epoch = self._epochs[-1]
        young = time.monotonic() - epoch.began < FRUITLESS_S
        fruitless = not epoch.fruitful and (young or self.requests.num_open + self._num_observed > 0)
        self._num_fruitless = self._num_fruitless + 1 if fruitless else 0
        self.end_epoch(ended.message)
        self._events.put_nowait(EpochEnded(ended.epoch, ended.message, self._num_fruitless))

    # Ranks.

    async def _start(self, load_timeout_s: float) -> None:
        self._watch_over(self._coordinate())
        for r in range(self.group.num_ranks):
            rank = await LocalRank.spawn(r, self._rank_module, self.group)
            self._ranks.append(rank)
            self._watch_over(self._watch(rank))
        self._watch_over(self._look_after())
        await self._wait_for(self._all_ready, load_timeout_s)
        if not self._all_ready.is_set():
            missing = [str(r.id) for r in self._ranks if not r.ready]
            raise ClusterError(
                f"rank {', '.join(missing)}: not ready after {load_timeout_s:g} s. "
                "Is the checkpoint on a slow disk, or memory short? Try again with fewer --ranks."
            )
        self._events.put_nowait(RanksReady())
        await self._wait_for(self._led, LEADER_TIMEOUT_S)
        if self._restarts:
            self._watch_over(self.probe.run())

    async def _restart(self, dead: LocalRank, pause_s: float) -> None:
        """Put a fresh process in the place of a dead one, when that is reaped and its memory free."""
        await asyncio.sleep(pause_s)
        await dead.process.wait_exit()
        assert self._restarts
        self._restarts.started(dead.id)
        rank = await LocalRank.spawn(dead.id, self._rank_module, self.group)
        if self._ended.done():
            rank.hang_up()
            rank.process.kill()
            await rank.process.wait_exit()
            return
        self._ranks[dead.id] = rank
        self._watch_over(self._watch(rank))

    def _took_place(self, rank: LocalRank) -> None:
        self._restarting.discard(rank.id)
        reason = f"rank {rank.id} is back"
        self.record.happened("back", reason)
        self._events.put_nowait(RankReturned(rank.id, reason))

    async def _wait_for(self, event: asyncio.Event, timeout_s: float) -> None:
        """Wait for an event or the time. Raises what ended the group."""
        happened = asyncio.create_task(event.wait())
        try:
            either: set[asyncio.Future[Any]] = {happened, self._ended}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            happened.cancel()
        if self._ended.done():
            raise self._ended.result()

    def _watch_over(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that lives as long as the group; if it fails, by a bug of ours, so does the group."""

        def check(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (e := task.exception()):
                bug = ClusterError(f"{type(e).__name__}: {e}. This is a bug of expertd.")
                self._end(e if isinstance(e, ExpertdError) else bug)

        task = asyncio.create_task(work)
        task.add_done_callback(check)
        self._tasks.add(task)

    async def _watch(self, rank: LocalRank) -> None:
        """Hand on what the rank says until it is gone."""
        said = asyncio.create_task(self._read_all(rank))
        gone = asyncio.create_task(rank.process.wait_exit())
        try:
            await asyncio.wait({said, gone}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({said, gone}, timeout=LAST_WORDS_S)
        finally:
            said.cancel()
            gone.cancel()
        self._died(rank, f"died: {rank.process.describe_end()}")

    async def _read_all(self, rank: LocalRank) -> None:
        try:
            async for message in rank.process.messages():
                if rank.dead:
                    return
                self._hear(rank, message)
        except RemoteProtocolError as e:
            self._died(rank, f"broke the protocol: {e} (a bug of expertd)")

    def _hear(self, rank: LocalRank, message: Message) -> None:
        rank.last_word = time.monotonic()
        if isinstance(message, Answer):
            if isinstance(message, (Token, Done)) and self.running:
                self._epochs[-1].fruitful = True
            rank.replies.hear(message)
        elif isinstance(message, Fatal):
            self._died(rank, f"died: {message.message}", _error_named(message.kind, message.message))
        elif isinstance(message, Loading):
            rank.num_loaded = message.num_bytes
            if not self._all_ready.is_set():
                all_loaded = sum(r.num_loaded for r in self._ranks)
                self._loading(all_loaded, message.total_bytes * self.group.num_ranks)
        elif isinstance(message, Ready) and not rank.ready:
            rank.ready = self._last_ready = message
            if self._all_ready.is_set():
                self._took_place(rank)
            elif all(r.ready for r in self._ranks) and len(self._ranks) == self.group.num_ranks:
                self._all_ready.set()
        elif isinstance(message, Joined):
            rank.had_mlx_group = True
            if self.running and message.epoch == self.epoch:
                self._epochs[-1].link = message.link
        elif isinstance(message, Choice):
            self._choices[message.work] = message
            _log.info("%s: split %s, %s", message.work, message.split, message.reason)
            self.record.happened("plan", f"{message.work}: {message.split}, {message.reason}")
        elif isinstance(message, Stats):
            if rank is self._leader:
                self.record.hear(message)
                if message.steps:
                    self.probe.stepped()
        elif isinstance(message, Ended):
            self._epoch_failed(rank, message)
        else:
            raise RemoteProtocolError(f"unexpected {type(message).__name__}")

    async def _look_after(self) -> None:
        """Find the ranks that are stopped, stuck or silent though their sockets are open."""
        while not self._ended.done():
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for rank in self.living:
                if what := rank.ailment(self._mailbox.pulses, now, self.group.exchange_timeout_s):
                    self._died(rank, what)
            for rank in [r for r in self._ranks if not (r.ready or r.dead) and self._all_ready.is_set()]:
                if now - rank.last_word > LOAD_TIMEOUT_S:
                    self._died(rank, f"had not loaded after {LOAD_TIMEOUT_S:g} s")
            self._forget_epochs()

    def _forget_epochs(self) -> None:
        """Give back the memory of epochs that all their ranks have left."""
        for epoch in self._epochs[:-1]:
            if not any(rank.sits_in(epoch) for rank in self.living):
                self._epochs.remove(epoch)
                os.close(epoch.mailbox_fd)

    # The end.

    def _end(self, error: ExpertdError) -> None:
        """End the group, once: what the later callers found is a consequence of the first."""
        if self._ended.done():
            return
        self._ended.set_result(error)
        self.end_epoch(str(error))
        self._led.set()  # whoever waits for a leader looks again
        for rank in self._ranks:
            rank.replies.fail(str(error))
        self._teardown = asyncio.create_task(self._stop_ranks())

    async def _stop_ranks(self) -> None:
        for rank in self._ranks:
            rank.hang_up()
            rank.process.terminate()
        await wait_exits(self._ranks, KILL_AFTER_S)
        for rank in self._ranks:
            rank.process.kill()
        await wait_exits(self._ranks, REAP_TIMEOUT_S)
        for rank in self._ranks:
            if rank.process.running:
                _log.error(
                    "rank %d (process %d) is stuck in the kernel and cannot be killed", rank.id, rank.pid
                )

    async def _close(self) -> None:
        self._end(ClusterError("expertd is stopping"))
        assert self._teardown is not None
        try:
            await asyncio.shield(self._teardown)
        except asyncio.CancelledError:
            # The second Ctrl-C: no more grace, but still no process left behind.
            for rank in self._ranks:
                rank.process.kill()
            await self._teardown
            raise
        finally:
            await self.requests.close()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for epoch in self._epochs:
                os.close(epoch.mailbox_fd)
            self._epochs.clear()


def _describe_choice(choice: Choice) -> dict[str, Any]:
    return {"split": choice.split, "reason": choice.reason, "costs_ms": choice.costs_ms}


def _error_named(kind: str, message: str) -> ExpertdError | None:
    """The user's error that a rank named; None for a failure of its own."""
    cls = getattr(errors, kind, ClusterError)
    if isinstance(cls, type) and issubclass(cls, ExpertdError) and cls is not ClusterError:
        return cls(message)
    return None
