"""uvicorn's HTTP/1.1 protocol with deadlines: a connection that asks nothing must not be held for ever.

A client has HEAD_TIMEOUT_S for each request's head, from the connection's beginning or the last response's end, however
slowly its bytes come. Bodies have a deadline of their own (stream.py), and so has the sending of answers.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 60.0  # as nginx
# Names, values and the request line together; more than any client of ours sends, and not enough to fill memory.
MAX_HEAD_BYTES = 32 << 10
# Above this the oldest of those that wait for a request is closed for a new one.
MAX_CONNECTIONS = 10_000
# A process may often have 1024 descriptors, on a Mac 256; ranks, links and other hosts need some of them.
OWN_DESCRIPTORS = 124


class GuardedProtocol(H11Protocol):
    """One connection; `waiting` has all that wait for a request's head, the oldest first."""

    waiting: "dict[GuardedProtocol, None]"
    max_connections: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            oldest = next(iter(self.waiting), self)
            oldest.transport.abort()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:  # the head is there, or the connection is over
            self._stop_waiting()
        elif self not in self.waiting:  # the rest of a body came after the answer
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:  # else the next request is there already
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.waiting[self] = None
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


def guarded_protocol() -> type[GuardedProtocol]:
    """A protocol for one server."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(64, soft - OWN_DESCRIPTORS)
    most = min(MAX_CONNECTIONS, free)
    return type("ServerProtocol", (GuardedProtocol,), {"waiting": {}, "max_connections": most})
