"""The requests of a supervisor. Each outlives its leader: it goes on with the next one, after the last token it has.

What a leader says of a request is written into its transcript as it comes; readers read there. A task per request asks
whoever leads. If the leader is lost, the task waits for the next one and submits the request again, with the tokens
that it has. The engine there feeds them to sampler, detokenizer and stop strings and gives only what follows, so none
is repeated and none is missing: which token comes next depends on logits, seed, position and the tokens before it.

A request with `keep` may be read again, from its first event on, and by several readers (`resume`). It goes on without
any, and the leading host sends what comes of it to every other host (copies.py), which `hold`s it. When the host that
saw to it is gone, whichever host is asked for it goes on with it.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from expertd.cluster.copies import Copies, copy_of
from expertd.cluster.host_messages import Copy, Hold
from expertd.cluster.reply import LeaderLost, Take
from expertd.cluster.transcripts import Event, Kept, Transcript
from expertd.engine.messages import Done, Submit
from expertd.errors import BusyError, ClusterError, ExpertdError, NotFoundError

# Above what an engine takes and lets wait (GroupConfig): that refuses first, with its numbers.
MAX_OPEN_REQUESTS = 1024
# A request that has lost so many leaders without a token between them may be what kills them.
MAX_LOST_LEADERS = 5
# From the second on: a leader that refuses everything must not be asked in a hot loop.
FIRST_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


class Leader(Protocol):
    """Whoever answers requests: a local rank 0, or a way to the host that has it."""

    async def answer(self, submit: Submit, take: Take, /) -> None: ...


class Requests:
    """`find_leader` waits for whoever answers requests at the moment, longer for a request that was accepted (True),
    and raises ClusterError when nobody will. On a host that joined, `tell_leader` has the leader forget a request."""

    def __init__(self, find_leader: Callable[[bool], Awaitable[Leader]]) -> None:
        self.kept, self.copies = Kept(), Copies()
        self.tell_leader: Callable[[str], None] = lambda request_id: None
        self._find_leader = find_leader
        self._open: dict[Transcript, asyncio.Task[None]] = {}
        self._is_closed = False
        self.last_token_at = time.monotonic()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def generate(self, submit: Submit) -> AsyncGenerator[Event, None]:
        """As Cluster.generate."""
        return self._read(Transcript(_seeded(submit)), is_new=True)

    async def carry(self, submit: Submit, host_id: str) -> AsyncGenerator[Event, None]:
        """The same for a client of another host, which sees to it: the request ends here when that host leaves."""
        transcript = Transcript(submit, host_id)
        known = self.kept.find(transcript.request_id)
        if known and not (known in self._open or known.end) and known.token_ids == submit.generated:
            transcript, known.origin, known.is_led = known, host_id, True
        at = len(transcript.events)
        self._start(transcript, submit)
        try:
            async for event in self._read(transcript, at):
                yield _named(event, submit.request_id)
        finally:
            self._stop(transcript)

    async def resume(self, request_id: str) -> AsyncGenerator[Event, None]:
        """As Cluster.resume."""
        transcript = self.kept.find(request_id)
        if transcript is None:
            raise NotFoundError(f"request {request_id}: not known here, or not any more. Send it again.")
        async for event in self._read(transcript):
            yield event

    def forget(self, request_id: str) -> None:
        """End a kept request, if it still runs, and forget it on every host. Raises NotFoundError."""
        if not self.kept.find(request_id):
            raise NotFoundError(f"request {request_id}: not known here, or not any more.")
        self._forget(request_id)
        self.tell_leader(request_id)

    def _forget(self, request_id: str) -> None:
        if transcript := self.kept.find(request_id):
            transcript.fail(ClusterError(f"request {request_id} was cancelled."))
            self._stop(transcript)
            self.kept.remove(request_id)
        self.copies.forget(request_id)

    async def finish(self, timeout_s: float, reason: str) -> None:
        """Wait until the requests of this host's own clients are over; after the time they end with the reason."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while own := [task for transcript, task in self._open.items() if not transcript.origin]:
                    await asyncio.wait(own)
        for transcript, task in list(self._open.items()):
            if not transcript.origin:
                transcript.fail(ClusterError(reason))
                task.cancel()

    async def close(self) -> None:
        """End every request."""
        self._is_closed = True
        self.copies.close()
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for transcript in self.kept.all():
            transcript.tell()

    # What other hosts tell of theirs.

    def snapshot(self) -> list[Copy]:
        """All that is kept and does not run here, for a leader that may know nothing of it."""
        idle = (t for t in self.kept.all() if t not in self._open and t.events)
        return [copy_of(t) for t in idle]

    def hold(self, hold: Hold) -> None:
        """Write down what is new of requests that other hosts see to."""
        for copy in hold.copies:
            transcript = self.kept.find(copy.request_id)
            if transcript is None and copy.submit:
                transcript = Transcript(copy.submit)
                self.kept.put(transcript)
            if transcript and transcript not in self._open and not transcript.end:
                _write(transcript, copy)
        for request_id in hold.forgotten:
            self._forget(request_id)

    def lose_leaders(self) -> None:
        """Nobody that we hear of sees to the requests of other hosts: whoever is asked for one goes on with it."""
        for transcript in self.kept.all():
            if transcript not in self._open:
                transcript.is_led = False
                transcript.tell()

    # From a Submit to its end.

    def _start(self, transcript: Transcript, submit: Submit | None = None) -> None:
        if self.num_open >= MAX_OPEN_REQUESTS:
            raise BusyError(f"{MAX_OPEN_REQUESTS} requests are open, the most at a time. Try again later.")
        transcript.is_led = True
        if transcript.submit.keep and transcript.is_whole:
            self.kept.put(transcript)
        task = asyncio.create_task(self._run(transcript, submit or transcript.submit))
        self._open[transcript] = task
        task.add_done_callback(lambda _: self._ended(transcript))  # for one that never ran

    def _stop(self, transcript: Transcript) -> None:
        if task := self._open.get(transcript):
            task.cancel()

    async def _run(self, transcript: Transcript, submit: Submit) -> None:
        """See a request to its end, by as many leaders as that takes."""
        try:
            await self._answer(transcript, submit)
        except ExpertdError as e:
            transcript.fail(e)
        except Exception as e:
            transcript.fail(ClusterError(f"{type(e).__name__}: {e}. This is a bug of expertd."))
        finally:
            self._ended(transcript)

    def _ended(self, transcript: Transcript) -> None:
        if self._open.pop(transcript, None):
            transcript.is_led, transcript.origin = False, ""
            self.copies.offer(transcript)

    async def _answer(self, transcript: Transcript, submit: Submit) -> None:
        num_lost = 0
        while True:
            before = transcript.num_tokens
            try:
                await self._ask(await self._find_leader(bool(transcript.events)), submit, transcript)
                return
            except LeaderLost as e:
                num_lost = 1 if transcript.num_tokens > before else num_lost + 1
                self._check_resumable(transcript, num_lost, e)
                _log.info("request %s lost its leader: %s", transcript.request_id, e)
            if num_lost > 1:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (num_lost - 2))
            submit = transcript.resumed()

    def _check_resumable(self, transcript: Transcript, num_lost: int, error: LeaderLost) -> None:
        """Raise ClusterError when no other leader may take this request up."""
        if transcript.submit.logits_file:
            raise ClusterError(f"{error}; the logits of the answer so far are gone with it. Ask again.")
        if num_lost >= MAX_LOST_LEADERS:
            raise ClusterError(
                f"{error}; that was the leader no. {num_lost} in a row without a token. Ask again."
            )

    async def _ask(self, leader: Leader, submit: Submit, transcript: Transcript) -> None:
        def take(event: Event) -> None:
            transcript.add(_named(event, transcript.request_id))
            self.last_token_at = time.monotonic()
            self.copies.offer(transcript)

        await leader.answer(submit, take)
        if transcript.end is None:
            raise ClusterError("the answer has no end. This is a bug of expertd.")

    # Readers.

    async def _read(
        self, transcript: Transcript, at: int = 0, is_new: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Give the events from number `at` on, as they come. Raises what ended the request.

        One that `is_new` begins with its reader and, unless it is kept, ends with it.
        """
        if is_new:
            self._start(transcript)
        try:
            while True:
                while at < transcript.num_committed:
                    event = transcript.events[at]
                    yield event
                    if isinstance(event, Done):
                        return
                    at += 1
                if isinstance(transcript.end, ExpertdError):
                    raise transcript.end
                if self._is_closed:
                    raise ClusterError("expertd is stopping")
                if not (transcript.is_led or transcript.end):
                    self._start(transcript, transcript.resumed())
                await transcript.news()
        finally:
            if is_new and not transcript.submit.keep:
                self._stop(transcript)


def _seeded(submit: Submit) -> Submit:
    """The same with a seed: a request that goes on elsewhere goes on with the same draws."""
    if submit.sampling.seed is not None:
        return submit
    return replace(submit, sampling=replace(submit.sampling, seed=secrets.randbits(32)))


def _named(event: Event, request_id: str) -> Event:
    """The event under another try's name."""
    return event if event.request_id == request_id else replace(event, request_id=request_id)


def _write(transcript: Transcript, copy: Copy) -> None:
    """Add what a copy has that the transcript lacks.

    If pieces do not meet, because two leaders cut the answer in other places, nobody leads it here: whoever is asked
    for it goes on from what there is.
    """
    if copy.started:
        transcript.add(copy.started)
    num_tokens = copy.num_tokens
    for token in copy.tokens:
        if num_tokens == transcript.num_tokens:
            transcript.add(token)
        num_tokens += len(token.token_ids)
    transcript.is_led = copy.is_led and num_tokens <= transcript.num_tokens
    if copy.done and num_tokens == transcript.num_tokens:
        transcript.add(copy.done)
    transcript.commit(len(transcript.events))
    if copy.error:
        transcript.fail(ClusterError(copy.error))
