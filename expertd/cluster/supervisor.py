"""The supervisor's half of a group of ranks on this host: start them, talk to rank 0, end them all.

How a group lives. `Cluster.open` creates the mailbox, spawns every rank, sends each its Setup and waits
for each one's Ready. From then on one task per rank reads its control socket and waits for its exit.
Whatever ends the group first (a death, a Fatal, garbage on a socket, a silence that is too long, or the
owner leaving the `async with`) goes through `_end`, which happens once and in this order: the mailbox's
epoch is poisoned, so that no rank stays inside an exchange; every open request gets its Failed; a task
hangs up on all ranks, sends SIGTERM, a second later SIGKILL, and reaps every one. For now one dead rank
ends the whole group.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Protocol, Self

from expertd import errors
from expertd.cluster.process import RankProcess
from expertd.cluster.reply import Reply
from expertd.config import GroupConfig
from expertd.engine.messages import (
    Cancel,
    Done,
    Failed,
    Fatal,
    Message,
    Ready,
    Rejected,
    Setup,
    Started,
    Submit,
    Token,
)
from expertd.errors import ClusterError, ConfigError, ExpertdError, RemoteProtocolError

RANK_MODULE = "expertd.cluster.rank"
LOAD_TIMEOUT_S = 600.0
# A rank says nothing while it reads a long prompt, so this must exceed the longest prefill.
SILENCE_TIMEOUT_S = 1800.0
MAX_OPEN_REQUESTS = 64
# The last frame of a rank (its Fatal) and its exit come in either order; each waits so long for the other.
LAST_WORDS_S = 0.5
KILL_AFTER_S = 1.0
REAP_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class MailboxModule(Protocol):
    """What the supervisor needs from `expertd.link.mailbox`; tests have a fake of this shape."""

    def create(self, num_ranks: int, slot_bytes: int, /) -> int: ...

    def poison(self, fd: int, /) -> None: ...


def load_mailbox() -> MailboxModule:
    """Import the mailbox, late: it is compiled code, which most of the command line does without."""
    from expertd.link import mailbox

    return mailbox


class Cluster:
    """A running group of ranks; `async with Cluster.open(group) as cluster` is the only way to get one."""

    def __init__(self, group: GroupConfig) -> None:
        self.group = group
        self._mailbox = load_mailbox()
        self._mailbox_fd = self._mailbox.create(group.num_ranks, group.slot_bytes)
        self._ranks: list[RankProcess] = []
        self._readies: dict[int, Ready] = {}
        self._replies: dict[str, Reply] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._teardown: asyncio.Task[None] | None = None
        self._all_ready = asyncio.Event()
        self._ended: asyncio.Future[ExpertdError] = asyncio.get_running_loop().create_future()
        self._last_word = time.monotonic()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, group: GroupConfig, rank_module: str | None = None, load_timeout_s: float = LOAD_TIMEOUT_S
    ) -> AsyncIterator[Self]:
        """Start the ranks of `group`, wait until all are ready, and end all of them at the exit.

        Raises what a rank names when it cannot start (CheckpointError, ConfigError, ...), ClusterError
        when one dies or is not ready within `load_timeout_s` seconds.
        """
        cluster = cls(group)
        try:
            await cluster._start(rank_module or RANK_MODULE, load_timeout_s)
            yield cluster
        finally:
            await cluster._close()

    @property
    def ready(self) -> Ready:
        """What rank 0 said when it was ready."""
        return self._readies[0]

    @property
    def failure(self) -> str | None:
        """Why the group ended, or None while it lives."""
        return str(self._ended.result()) if self._ended.done() else None

    async def wait_failed(self) -> str:
        """Wait for the end of the group, however long it lives, and give the reason in one line."""
        return str(await asyncio.shield(self._ended))

    async def generate(self, submit: Submit) -> AsyncGenerator[Started | Token | Done, None]:
        """Run one request: Started, Token..., Done. Leaving early cancels it on the rank.

        Raises ConfigError when the rank rejects the request, ClusterError when the group fails, is dead
        already, or has MAX_OPEN_REQUESTS open.
        """
        reply = self._open_reply(submit.request_id)
        try:
            await self._ranks[0].send(submit)
            while True:
                event = await reply.get()
                if isinstance(event, Rejected):
                    raise ConfigError(event.message)
                if isinstance(event, Failed):
                    raise ClusterError(event.message)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            del self._replies[submit.request_id]
            if not reply.ended:
                self._ranks[0].send_nowait(Cancel(submit.request_id))

    def _open_reply(self, request_id: str) -> Reply:
        if self._ended.done():
            raise ClusterError(str(self._ended.result()))
        if len(self._replies) >= MAX_OPEN_REQUESTS:
            raise ClusterError(f"{MAX_OPEN_REQUESTS} requests are open, the most at a time. Try again later.")
        assert request_id not in self._replies, "request ids are unique"
        if not self._replies:
            self._last_word = time.monotonic()
        reply = self._replies[request_id] = Reply(request_id)
        return reply

    async def _start(self, rank_module: str, load_timeout_s: float) -> None:
        group = asdict(self.group)
        for r in range(self.group.num_ranks):
            rank = await RankProcess.spawn(r, rank_module, self._mailbox_fd)
            self._ranks.append(rank)
            rank.send_nowait(Setup(r, self._mailbox_fd, rank.lifeline_fd, group))
            self._watches.append(asyncio.create_task(self._watch(rank)))
        self._watches.append(asyncio.create_task(self._watch_silence()))
        await self._wait_ready(load_timeout_s)

    async def _wait_ready(self, load_timeout_s: float) -> None:
        ready = asyncio.create_task(self._all_ready.wait())
        try:
            either: set[asyncio.Future[Any]] = {ready, self._ended}
            await asyncio.wait(either, timeout=load_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._ended.done():
            raise self._ended.result()
        if not self._all_ready.is_set():
            missing = [r.rank for r in self._ranks if r.rank not in self._readies]
            raise ClusterError(
                f"rank {', '.join(map(str, missing))}: not ready after {load_timeout_s:g} s. "
                "Is the checkpoint on a slow disk, or memory short? Try again with fewer --ranks."
            )

    async def _watch(self, rank: RankProcess) -> None:
        """Hand on what the rank says until it is gone, then end the group."""
        said = asyncio.create_task(self._read_all(rank))
        gone = asyncio.create_task(rank.wait_exit())
        try:
            await asyncio.wait({said, gone}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({said, gone}, timeout=LAST_WORDS_S)
        finally:
            said.cancel()
            gone.cancel()
        self._end(
            ClusterError(
                f"rank {rank.rank} died: {rank.describe_end()}; "
                "look above and in the system log for the cause (out of memory?), then start expertd again"
            )
        )

    async def _read_all(self, rank: RankProcess) -> None:
        try:
            async for message in rank.messages():
                self._dispatch(rank.rank, message)
        except RemoteProtocolError as e:
            self._end(ClusterError(f"rank {rank.rank} broke the protocol: {e}. This is a bug of expertd."))

    def _dispatch(self, rank: int, message: Message) -> None:
        if rank == 0:
            self._last_word = time.monotonic()
        if isinstance(message, Fatal):
            self._end(_error_named(message.kind, message.message))
        elif isinstance(message, Ready) and rank not in self._readies:
            self._readies[rank] = message
            if len(self._readies) == self.group.num_ranks:
                self._all_ready.set()
        elif rank == 0 and isinstance(message, Started | Token | Done | Rejected | Failed):
            # Events of a request that its reader has left are on their way until Cancel arrives.
            if reply := self._replies.get(message.request_id):
                reply.put(message)
        else:
            raise RemoteProtocolError(f"unexpected {type(message).__name__}")

    async def _watch_silence(self) -> None:
        while not self._ended.done():
            await asyncio.sleep(SILENCE_TIMEOUT_S / 100)
            if self._replies and time.monotonic() - self._last_word > SILENCE_TIMEOUT_S:
                self._end(
                    ClusterError(
                        f"rank 0 has said nothing for {SILENCE_TIMEOUT_S:g} s with {len(self._replies)} "
                        "requests open. Start expertd again."
                    )
                )

    def _end(self, error: ExpertdError) -> None:
        """End the group, once: what the later callers found is a consequence of the first."""
        if self._ended.done():
            return
        self._ended.set_result(error)
        self._mailbox.poison(self._mailbox_fd)
        for reply in self._replies.values():
            reply.put(Failed(reply.request_id, str(error)))
        self._teardown = asyncio.create_task(self._stop_ranks())

    async def _stop_ranks(self) -> None:
        for rank in self._ranks:
            rank.hang_up()
            rank.terminate()
        await self._wait_exits(KILL_AFTER_S)
        for rank in self._ranks:
            rank.kill()
        await self._wait_exits(REAP_TIMEOUT_S)
        for rank in self._ranks:
            if rank.running:
                _log.error(
                    "rank %d (process %d) is stuck in the kernel and cannot be killed", rank.rank, rank.pid
                )

    async def _wait_exits(self, timeout_s: float) -> None:
        exits = [asyncio.create_task(rank.wait_exit()) for rank in self._ranks if rank.running]
        if exits:
            await asyncio.wait(exits, timeout=timeout_s)
        for task in exits:
            task.cancel()

    async def _close(self) -> None:
        self._end(ClusterError("expertd is stopping"))
        assert self._teardown is not None
        try:
            await asyncio.shield(self._teardown)
        except asyncio.CancelledError:
            # The second Ctrl-C: no more grace, but still no process left behind.
            for rank in self._ranks:
                rank.kill()
            await self._teardown
            raise
        finally:
            for task in self._watches:
                task.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)
            os.close(self._mailbox_fd)


def _error_named(kind: str, message: str) -> ExpertdError:
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, ExpertdError):
        return cls(message)
    return ClusterError(message)
