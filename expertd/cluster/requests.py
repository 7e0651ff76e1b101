"""The requests of a supervisor. Each outlives its leader: it goes on with the next one, after the last token it has.

A task per request asks whoever leads and writes what comes into the request's transcript; its reader reads there. If
the leader is lost, the task waits for the next one and submits the request again, with the tokens that it has. The
engine there feeds them to sampler, detokenizer and stop strings and gives only what follows, so none is repeated and
none is missing: which token comes next depends on logits, seed, position and the tokens before it.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from expertd.cluster.reply import LeaderLost
from expertd.cluster.transcripts import Event, Transcript
from expertd.engine.messages import Done, Submit
from expertd.errors import ClusterError, ExpertdError

MAX_OPEN_REQUESTS = 64
# A request that has lost so many leaders without a token between them may be what kills them.
MAX_LOST_LEADERS = 5
# From the second on: a leader that refuses everything must not be asked in a hot loop.
FIRST_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


class Leader(Protocol):
    """Whoever answers requests: a local rank 0, or a way to the host that has it."""

    def generate(self, submit: Submit, /) -> AsyncGenerator[Event, None]: ...


class Requests:
    """`find_leader` waits for whoever answers requests at the moment, and raises ClusterError when nobody will."""

    def __init__(self, find_leader: Callable[[], Awaitable[Leader]]) -> None:
        self._find_leader = find_leader
        self._open: dict[Transcript, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def generate(self, submit: Submit) -> AsyncGenerator[Event, None]:
        """As Cluster.generate."""
        if self.num_open >= MAX_OPEN_REQUESTS:
            raise ClusterError(f"{MAX_OPEN_REQUESTS} requests are open, the most at a time. Try again later.")
        transcript = Transcript(_seeded(submit))
        task = self._start(transcript)
        try:
            async for event in self._read(transcript):
                yield event
        finally:
            task.cancel()

    async def close(self) -> None:
        """End every request."""
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, transcript: Transcript) -> "asyncio.Task[None]":
        task = self._open[transcript] = asyncio.create_task(self._run(transcript))
        task.add_done_callback(lambda _: self._open.pop(transcript, None))  # one that never ran
        return task

    async def _run(self, transcript: Transcript) -> None:
        """See a request to its end, by as many leaders as that takes."""
        try:
            await self._answer(transcript)
        except ExpertdError as e:
            transcript.fail(e)
        except Exception as e:
            transcript.fail(ClusterError(f"{type(e).__name__}: {e}. This is a bug of expertd."))
        finally:
            self._open.pop(transcript, None)

    async def _answer(self, transcript: Transcript) -> None:
        submit, num_resumed, num_lost = transcript.submit, 0, 0
        while True:
            before = transcript.num_tokens
            try:
                await self._ask(await self._find_leader(), submit, transcript)
                return
            except LeaderLost as e:
                num_lost = 1 if transcript.num_tokens > before else num_lost + 1
                self._check_resumable(transcript, num_lost, e)
                _log.info("request %s lost its leader: %s", transcript.request_id, e)
            if num_lost > 1:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (num_lost - 2))
            num_resumed += 1
            submit = transcript.resumed(num_resumed)

    def _check_resumable(self, transcript: Transcript, num_lost: int, error: LeaderLost) -> None:
        """Raise ClusterError when no other leader may take this request up."""
        if transcript.submit.logits_file:
            raise ClusterError(f"{error}; the logits of the answer so far are gone with it. Ask again.")
        if num_lost >= MAX_LOST_LEADERS:
            raise ClusterError(
                f"{error}; that was the leader no. {num_lost} in a row without a token. Ask again."
            )

    async def _ask(self, leader: Leader, submit: Submit, transcript: Transcript) -> None:
        async with aclosing(leader.generate(submit)) as events:
            async for event in events:
                if submit.resumed:
                    event = replace(event, request_id=transcript.request_id)
                transcript.add(event)
                transcript.commit(len(transcript.events))
        if transcript.end is None:
            raise ClusterError("the answer has no end. This is a bug of expertd.")

    async def _read(self, transcript: Transcript, at: int = 0) -> AsyncGenerator[Event, None]:
        """Give the events from number `at` on, as they come. Raises what ended the request."""
        while True:
            while at < transcript.num_committed:
                event = transcript.events[at]
                yield event
                if isinstance(event, Done):
                    return
                at += 1
            if isinstance(transcript.end, ExpertdError):
                raise transcript.end
            await transcript.wait_news()


def _seeded(submit: Submit) -> Submit:
    """The same with a seed: a request that goes on elsewhere goes on with the same draws."""
    if submit.sampling.seed is not None:
        return submit
    return replace(submit, sampling=replace(submit.sampling, seed=secrets.randbits(32)))
