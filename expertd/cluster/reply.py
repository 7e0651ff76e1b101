"""The events of one request on their way from rank 0 to whoever reads the answer."""

import asyncio
from collections import deque

from expertd.engine.messages import Done, Failed, Rejected, Started, Token
from expertd.errors import BusyError, ClusterError, ConfigError

Event = Started | Token | Done | Rejected | Failed

MAX_PENDING_EVENTS = 256


class LeaderLost(ClusterError):
    """Whoever answered does not lead any more. The request itself is well: the next leader may resume it."""


def accepted(event: Event) -> Started | Token | Done:
    """Give an event back; raises what a refusal means: ConfigError, BusyError, LeaderLost or ClusterError."""
    if isinstance(event, Rejected):
        raise BusyError(event.message) if event.busy else ConfigError(event.message)
    if isinstance(event, Failed):
        raise LeaderLost(event.message) if event.lost else ClusterError(event.message)
    return event


class Reply:
    """A queue for one reader that a slow reader cannot fill without limit, and that never blocks rank 0.

    Past MAX_PENDING_EVENTS, new tokens join the last pending one. So a request holds at most its own
    answer, which the context length bounds, and no event is lost.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = False
        self._pending: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event without waiting; whatever comes after the last one of a request is dropped."""
        if self.ended:
            return
        self.ended = isinstance(event, Done | Rejected | Failed)
        last = self._pending[-1] if self._pending else None
        if len(self._pending) >= MAX_PENDING_EVENTS and isinstance(event, Token) and isinstance(last, Token):
            last.token_ids.extend(event.token_ids)
            text, logprobs = last.text + event.text, [*last.logprobs, *event.logprobs]
            event = Token(event.request_id, last.token_ids, text, logprobs)
            self._pending.pop()
        self._pending.append(event)
        self._arrived.set()

    async def get(self) -> Event:
        """Wait for the next event. The group's watch over rank 0 guarantees that one comes."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()
