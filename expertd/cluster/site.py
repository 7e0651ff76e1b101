"""One host's part in the epochs of a group: its mailbox, its link process, its ranks.

The leader sets an epoch up on every host in three rounds (host_messages.py), and does not care which host is its own:
`LocalSite` here and `Member` in leader.py have the same four calls. The epoch that runs goes on until `start`, so a
host that fails to come up costs the running streams nothing.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from expertd.cluster.epoch import Layout
from expertd.cluster.host_messages import Connect, Ended, Prepare, Start
from expertd.cluster.process import ChildProcess
from expertd.cluster.requests import Leader
from expertd.cluster.supervisor import Cluster, load_mailbox
from expertd.errors import ClusterError, ExpertdError
from expertd.link import messages as wire

LINK_MODULE = "expertd.link.process"
PULSE_LOOK_S = 0.1
KILL_AFTER_S = 1.0
REAP_TIMEOUT_S = 5.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class SetupFailed(ExpertdError):
    """A host could not set an epoch up. `host` is the peer that it could not reach (index in the epoch) or -1."""

    def __init__(self, reason: str, host: int = -1) -> None:
        super().__init__(reason)
        self.host = host


class Site(Protocol):
    """A host as the leader sets epochs up on it. Every call may raise SetupFailed or LinkDown."""

    async def prepare(self, prepare: Prepare) -> int:
        """Make a mailbox and a link process; gives the port on which the latter listens (0: it does not)."""
        ...

    async def connect(self, connect: Connect) -> list[wire.LinkReport]:
        """Let the link process meet the others and test each link."""
        ...

    async def start(self, start: Start) -> None:
        """Leave the epoch that runs and begin this one."""
        ...

    async def stop(self, epoch: int, reason: str) -> None:
        """End an epoch, whatever its state; does nothing for one that is over."""
        ...


@dataclass(frozen=True)
class LinkSettings:
    """How link processes of this host work. `silence_s`: a peer of which nothing is heard for so long is gone."""

    silence_s: float = 0.8
    setup_s: float = 20.0
    verbs_library: str = ""
    lint: bool = False


@dataclass
class _Epoch:
    """An epoch of this host from Prepare to its end. `mailbox_fd` is a descriptor of our own."""

    prepare: Prepare
    mailbox_fd: int
    link: ChildProcess
    listening: "asyncio.Future[int]"
    up: "asyncio.Future[list[wire.LinkReport]]"
    peers: list[wire.LinkPeer] = field(default_factory=list)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    is_over: bool = False


class LocalSite:
    """This host. `ended` is told of the end of each started epoch, and of none that never started."""

    def __init__(self, cluster: Cluster, settings: LinkSettings, ended: Callable[[Ended], None]) -> None:
        self._cluster, self._settings, self._ended = cluster, settings, ended
        self._mailbox = load_mailbox()
        self._epochs: dict[int, _Epoch] = {}
        self._started: int | None = None
        self._reapers: set[asyncio.Task[None]] = set()

    @property
    def num_ranks(self) -> int:
        """Ranks of this host that live."""
        return len(self._cluster.living)

    @property
    def started(self) -> int | None:
        """The number of the epoch that runs with other hosts."""
        return self._started

    async def prepare(self, prepare: Prepare) -> int:
        fd = self._mailbox.create(sum(prepare.num_ranks), self._cluster.group.slot_bytes)
        try:
            child = await ChildProcess.spawn("link", LINK_MODULE, wire.codec, (fd,))
        except BaseException:
            os.close(fd)
            raise
        loop = asyncio.get_running_loop()
        epoch = _Epoch(prepare, fd, child, loop.create_future(), loop.create_future())
        self._epochs[prepare.epoch] = epoch
        for future in (epoch.listening, epoch.up):  # a failure that nobody waits for yet is no news
            future.add_done_callback(lambda f: f.cancelled() or f.exception())
        epoch.tasks.append(asyncio.create_task(self._listen(epoch)))
        child.send_nowait(self._link_setup(prepare, fd, child.lifeline_fd))
        return await self._within_setup(epoch, epoch.listening)

    def _link_setup(self, prepare: Prepare, fd: int, lifeline_fd: int) -> wire.LinkSetup:
        return wire.LinkSetup(
            epoch=prepare.epoch,
            kind=prepare.kind,
            host=prepare.host,
            num_ranks=prepare.num_ranks,
            secret=prepare.secret,
            listen=prepare.listen,
            mailbox_fd=fd,
            lifeline_fd=lifeline_fd,
            silence_s=self._settings.silence_s,
            setup_s=self._settings.setup_s,
            verbs_library=self._settings.verbs_library,
            lint=self._settings.lint,
        )

    async def connect(self, connect: Connect) -> list[wire.LinkReport]:
        epoch = self._known(connect.epoch)
        epoch.peers = connect.peers
        epoch.link.send_nowait(wire.LinkConnect(connect.peers))
        return await self._within_setup(epoch, epoch.up)

    async def start(self, start: Start, leader: Leader | None = None) -> None:
        """As Site.start; `leader` answers the requests of this host's clients when rank 0 is elsewhere."""
        epoch = self._known(start.epoch)
        num_ranks, host = epoch.prepare.num_ranks, epoch.prepare.host
        living = tuple(rank.id for rank in self._cluster.living)
        if len(living) < num_ranks[host]:
            raise SetupFailed("a rank of this host died meanwhile")
        before, self._started = self._started, start.epoch
        layout = Layout(
            epoch=self._cluster.epoch + 1,  # the cluster counts its own, which are more
            first_rank=sum(num_ranks[:host]),
            local=living[: num_ranks[host]],
            num_ranks=sum(num_ranks),
            split=start.split,
            shares=tuple(start.shares) or (1.0,) * sum(num_ranks),
            mailbox_fd=os.dup(epoch.mailbox_fd),
            **_own_end(host, len(num_ranks), epoch.peers),
        )
        await self._cluster.begin(layout, leader)
        epoch.tasks.append(asyncio.create_task(self._watch_pulse(epoch)))
        if before is not None:
            self._close(before)

    async def alone(self, split: str, shares: Sequence[float] = ()) -> None:
        """Begin an epoch of this host's ranks by themselves: no link."""
        before, self._started = self._started, None
        ids = tuple(rank.id for rank in self._cluster.living)
        own = tuple(shares) if len(shares) == len(ids) else (1.0,) * len(ids)
        await self._cluster.begin(Layout(self._cluster.epoch + 1, 0, ids, len(ids), split, own))
        if before is not None:
            self._close(before)

    async def stop(self, epoch: int, reason: str) -> None:
        if epoch == self._started:
            self._cluster.end_epoch(reason)
            self._started = None
        self._close(epoch)

    async def close(self) -> None:
        """End every epoch and reap every link process."""
        for number in list(self._epochs):
            self._close(number)
        if self._reapers:
            await asyncio.wait(self._reapers, timeout=KILL_AFTER_S + REAP_TIMEOUT_S)

    def _known(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None or epoch.is_over:
            raise SetupFailed(f"epoch {number} is over on this host")
        return epoch

    async def _within_setup(self, epoch: _Epoch, future: "asyncio.Future[_T]") -> _T:
        """Wait for the link process; one that does not answer in time is killed, wherever it hangs."""
        try:
            async with asyncio.timeout(self._settings.setup_s + KILL_AFTER_S):
                return await asyncio.shield(future)
        except TimeoutError:
            epoch.link.kill()
            raise SetupFailed(
                f"the link process did not come up within {self._settings.setup_s:g} s and was killed: "
                f"a call into the {epoch.prepare.kind} driver hangs"
            ) from None

    async def _listen(self, epoch: _Epoch) -> None:
        """Take what the link process says until it is gone; its last word, or its end, is the reason."""
        down: wire.LinkDown | None = None
        try:
            async for message in epoch.link.messages():
                if isinstance(message, wire.LinkListening) and not epoch.listening.done():
                    epoch.listening.set_result(message.port)
                elif isinstance(message, wire.LinkUp) and not epoch.up.done():
                    epoch.up.set_result(message.reports)
                elif isinstance(message, wire.LinkDown):
                    down = message
        except ExpertdError as e:
            down = wire.LinkDown(-1, "running", "XD_CORRUPT", f"the link process broke the protocol: {e}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_AFTER_S):
                await epoch.link.wait_exit()
        if down is None:
            down = wire.LinkDown(-1, "running", "XD_CLOSED", f"the link process {epoch.link.describe_end()}")
        self._link_ended(epoch, down)

    def _link_ended(self, epoch: _Epoch, down: wire.LinkDown) -> None:
        failure = SetupFailed(down.reason, down.host)
        for future in (epoch.listening, epoch.up):
            if not future.done():
                future.set_exception(failure)
        number = epoch.prepare.epoch
        if number == self._started:
            self._started = None
            self._cluster.end_epoch(down.reason)
            self._ended(Ended(number, down.host, "running", down.reason))
        self._close(number)

    async def _watch_pulse(self, epoch: _Epoch) -> None:
        """A link process that is stopped, or stuck in its driver, is killed: `_listen` then sees its end."""
        loop = asyncio.get_running_loop()
        beat, since, looked = -1, loop.time(), loop.time()
        while not epoch.is_over:
            await asyncio.sleep(PULSE_LOOK_S)
            now = loop.time()
            current = self._mailbox.pulses(epoch.mailbox_fd)[1]
            if current != beat or now - looked > 3 * PULSE_LOOK_S:  # we were held up ourselves
                beat, since = current, now
            looked = now
            if now - since > self._settings.silence_s:
                _log.warning("the link process shows no pulse for %.1f s and is killed", now - since)
                epoch.link.kill()
                return

    def _close(self, number: int) -> None:
        """Let go of an epoch: nothing of it is used again."""
        epoch = self._epochs.pop(number, None)
        if epoch is None:
            return
        epoch.is_over = True
        for future in (epoch.listening, epoch.up):
            if not future.done():
                future.set_exception(SetupFailed(f"epoch {number} was given up"))
        with contextlib.suppress(ClusterError):
            self._mailbox.poison(epoch.mailbox_fd, "this epoch is over")
        reaper = asyncio.create_task(self._reap(epoch))
        self._reapers.add(reaper)
        reaper.add_done_callback(self._reapers.discard)

    async def _reap(self, epoch: _Epoch) -> None:
        epoch.link.hang_up()
        for end in (epoch.link.terminate, epoch.link.kill):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_AFTER_S if epoch.link.running else 0):
                    await epoch.link.wait_exit()
            if epoch.link.running:
                end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_TIMEOUT_S):
                await epoch.link.wait_exit()
        if epoch.link.running:
            _log.error(
                "link process %d is stuck in the kernel; this machine may need a restart", epoch.link.pid
            )
        for task in epoch.tasks:
            task.cancel()
        os.close(epoch.mailbox_fd)


def _own_end(host: int, num_hosts: int, peers: Sequence[wire.LinkPeer]) -> dict[str, str]:
    """This host's address and interface towards the host before it, which is the one that calls it in a ring."""
    before = (host - 1) % num_hosts
    ends = [p for p in peers if p.host == before]
    return {"address": ends[0].local_address, "interface": ends[0].interface} if ends else {}
