"""uvicorn's HTTP/1.1 protocol with deadlines: a connection that asks nothing must not be held for ever.

A client has HEAD_TIMEOUT_S for each request's head, from the connection's beginning or the last response's end, however
slowly its bytes come. Bodies have a deadline of their own (stream.py), and so has the sending of answers.
"""

import asyncio
import contextlib
import errno
import logging
import resource
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 60.0  # as nginx
# Names, values and the request line together; more than any client of ours sends, and not enough to fill memory.
MAX_HEAD_BYTES = 32 << 10
# Above this the oldest of those that wait for a request is closed for a new one.
MAX_CONNECTIONS = 10_000
# What ranks, links and other hosts need. All three together are the 10,240 that an older macOS gives a process at most.
OWN_DESCRIPTORS = 112
# So many connections one turn of the loop takes, before those that are closed for them are gone.
BACKLOG = 128
# asyncio tries again a second after `accept` failed. Until then it has told us BACKLOG times (Python 3.11 and 3.12).
NEWS_S = 0.5
LOG_EVERY_S = 60.0
NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger(__name__)

# What h11 says of a body in pieces, among the bytes of a response's head.
CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"

Handler = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]


class _Connection(h11.Connection):
    """h11's, with a short way for what goes out once a token: a piece of a chunked body, which changes no state."""

    _chunked = False

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        if self._chunked and type(event) is h11.Data and event.data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        sent: bytes | None = super().send(event)
        if type(event) is h11.Response and sent:
            self._chunked = CHUNKED in sent.lower()
        return sent


class GuardedProtocol(H11Protocol):
    """One connection; `waiting` has all that wait for a request's head, the oldest first."""

    waiting: "dict[GuardedProtocol, None]"
    max_connections: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Connection(h11.SERVER, MAX_HEAD_BYTES)
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


def raise_descriptor_limit() -> int:
    """Let this process open what MAX_CONNECTIONS need, if the system does; gives how many descriptors it may have.

    A shell gives 1024, macOS 256, for programs that use select(), which takes no more; a supervisor does not use it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OWN_DESCRIPTORS + BACKLOG
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def guarded_protocol() -> type[GuardedProtocol]:
    """A protocol for one server."""
    free = raise_descriptor_limit() - OWN_DESCRIPTORS - BACKLOG
    most = min(MAX_CONNECTIONS, max(64, free))
    return type("ServerProtocol", (GuardedProtocol,), {"waiting": {}, "max_connections": most})


def handler_of(protocol: type[GuardedProtocol]) -> Handler:
    """What the loop does with errors that nobody waits for: when no descriptor is left, idle connections are closed.

    Then the next try finds some. asyncio by itself would fail again, and print 128 tracebacks a second.
    """
    failed_at = logged_at = float("-inf")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal failed_at, logged_at
        if "socket" not in context or getattr(context.get("exception"), "errno", None) not in NO_DESCRIPTORS:
            loop.default_exception_handler(context)
            return
        if loop.time() - failed_at < NEWS_S:
            return
        failed_at = loop.time()
        oldest = list(protocol.waiting)[:BACKLOG]
        for connection in oldest:
            connection.transport.abort()
        if failed_at - logged_at >= LOG_EVERY_S:
            logged_at = failed_at
            _log.warning(
                "no descriptor is left for another connection: %d idle ones are closed. `ulimit -n` raises the limit.",
                len(oldest),
            )

    return handle
