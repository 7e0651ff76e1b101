"""The events of one request on their way from rank 0 to whoever reads the answer."""

import asyncio
from collections import deque

from expertd.engine.messages import Done, Failed, Rejected, Started, Token
from expertd.errors import BusyError, ClusterError, ConfigError

Event = Started | Token | Done | Rejected | Failed
LAST = (Done, Rejected, Failed)

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
        self._reader: asyncio.Future[None] | None = None  # waits

    def put(self, event: Event) -> None:
        """Add an event without waiting; whatever comes after the last one of a request is dropped."""
        if self.ended:
            return
        self.ended = isinstance(event, LAST)
        if len(self._pending) >= MAX_PENDING_EVENTS and isinstance(event, Token):
            event = self._joined(event)
        self._pending.append(event)
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Event:
        """Wait for the next event. The group's watch over rank 0 guarantees that one comes."""
        if not self._pending:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._pending.popleft()

    def _joined(self, token: Token) -> Token:
        """A token with what pends last, if that is one."""
        last = self._pending[-1]
        if not isinstance(last, Token):
            return token
        self._pending.pop()
        last.token_ids.extend(token.token_ids)
        return Token(
            token.request_id, last.token_ids, last.text + token.text, [*last.logprobs, *token.logprobs]
        )
