"""The requests that a leader has open, and the way of each one's events to whoever asked."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from expertd.engine.messages import Cancel, Done, Failed, Observe, Rejected, Started, Submit, Token
from expertd.errors import BusyError, ClusterError, ConfigError

Event = Started | Token | Done | Rejected | Failed
LAST = (Done, Rejected, Failed)
Take = Callable[[Started | Token | Done], None]

_Asked = TypeVar("_Asked", Submit, Submit | Observe)


class LeaderLost(ClusterError):
    """Whoever answered does not lead any more. The request itself is well: the next leader may resume it."""


class _Reply:
    """`end` gets what ended the request, None when it was its Done; `is_over` says that no more comes of it."""

    def __init__(self, take: Take) -> None:
        self.take = take
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.is_over = False


class Replies:
    """What one leader has to answer. `cancel` tells it that nobody waits for a request any longer.

    An event goes on in the task that heard it: a queue, and a task that waits there, took a tenth of the instructions
    of a token. So a request's `take` never waits, and what it raises ends that request alone.
    """

    def __init__(self, cancel: Callable[[Cancel], None]) -> None:
        self._cancel = cancel
        self._open: dict[str, _Reply] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def answer(self, submit: _Asked, send: Callable[[_Asked], Awaitable[None]], take: Take) -> None:
        """Send a request and give its events to `take`, up to its Done. Leaving early cancels it.

        Raises what a refusal means (ConfigError, BusyError, LeaderLost or ClusterError), and what `send` and `take` do.
        The watch over the leader guarantees that an end comes.
        """
        assert submit.request_id not in self._open, "request ids are unique"
        reply = self._open[submit.request_id] = _Reply(take)
        try:
            await send(submit)
            if error := await reply.end:
                raise error
        finally:
            del self._open[submit.request_id]
            if not reply.is_over:
                self._cancel(Cancel(submit.request_id))

    def hear(self, event: Event) -> None:
        """Give an event to its request, unless that has ended here and its Cancel is still on the way."""
        reply = self._open.get(event.request_id)
        if reply is None:
            return
        reply.is_over = reply.is_over or isinstance(event, LAST)
        if reply.end.done():
            return
        try:
            reply.take(_accepted(event))
        except Exception as e:
            reply.end.set_result(e)
        else:
            if reply.is_over:
                reply.end.set_result(None)

    def fail(self, reason: str, lost: bool = False) -> None:
        """End every request; `lost`: whoever leads next may resume them."""
        for request_id in self._open:
            self.hear(Failed(request_id, reason, lost))


def _accepted(event: Event) -> Started | Token | Done:
    """Give an event back; raises what a refusal means."""
    if isinstance(event, Rejected):
        raise BusyError(event.message) if event.busy else ConfigError(event.message)
    if isinstance(event, Failed):
        raise LeaderLost(event.message) if event.lost else ClusterError(event.message)
    return event
