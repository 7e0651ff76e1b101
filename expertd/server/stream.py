"""HTTP details that starlette leaves to us: limits, deadlines, and clients that go away."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertd.server.errors import ApiError

MAX_BODY_BYTES = 16 << 20
# Of all bodies that are being read: 10,000 connections must not bring 160 GB.
MAX_BODIES_BYTES = 256 << 20
BODY_TIMEOUT_S = 60.0
# A client that takes none of its answer for this long, or at most twice that, is gone in all but name.
SEND_TIMEOUT_S = 60.0

T = TypeVar("T")

_num_bytes = 0  # of all bodies that are being read


async def read_body(request: Request) -> bytes:
    """Read a request's body. Raises ApiError: 413 over MAX_BODY_BYTES, 408 after BODY_TIMEOUT_S seconds, 429 while
    others fill MAX_BODIES_BYTES, 415 for a compressed one, which may be far larger than it looks."""
    global _num_bytes
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"content-encoding: {coding[:40]!r} is not supported. Send the body as it is.")
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            _check_size(int(announced) if announced.isdecimal() else 0)
            async for piece in request.stream():
                body += piece
                _num_bytes += len(piece)
                _check_size(len(body))
    except TimeoutError as e:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s. Send it again.") from e
    finally:
        _num_bytes -= len(body)
    return bytes(body)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(413, f"The body exceeds {MAX_BODY_BYTES >> 20} MiB. Send a shorter prompt.")
    if _num_bytes > MAX_BODIES_BYTES:
        message = (
            f"others are sending more than {MAX_BODIES_BYTES >> 20} MiB just now. Send it again in a moment."
        )
        raise ApiError(429, message, code="rate_limit_exceeded")


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], is_stuck: Callable[[], bool] = lambda: False
) -> T:
    """Run `work` to its end, or cancel it when the client leaves or `is_stuck`, asked now and then, says so. Raises
    ClientDisconnect then."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_wait_disconnect(receive))
    try:
        ended: set[asyncio.Task[Any]] = set()
        while not ended and not is_stuck():
            ended, _ = await asyncio.wait(
                {working, leaving}, timeout=SEND_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator, which is closed whatever happens to the connection."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        # A send that is under way, counted; 0 between two. One timer for all: one for each token costs a tenth of it.
        self._num_sent = self._sending = self._seen_sending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            # Nobody is left to be told; closing the events cancels the request.
            with suppress(ClientDisconnect, OSError):
                await while_connected(receive, self._send_all(send), self._is_stuck)

    def _is_stuck(self) -> bool:
        """Whether one send has not ended since the last time that this was asked."""
        last, self._seen_sending = self._seen_sending, self._sending
        return last == self._sending != 0

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send_body(send, self._first, True)
        async for event in self._events:
            await self._send_body(send, event, True)
        await self._send_body(send, b"", False)

    async def _send_body(self, send: Send, body: bytes, more: bool) -> None:
        self._num_sent += 1
        self._sending = self._num_sent
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = 0
