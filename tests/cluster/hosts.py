"""Machines for tests: identities in temporary folders, paired with one another or not."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertd.cluster import tls
from expertd.cluster.identity import Identity, PeerStore, load_identity, make_peer

LOOPBACK = "127.0.0.1"
# For what takes milliseconds, on a machine that others keep busy: reaching it means that something never comes.
LIMIT_S = 60.0


@dataclass(frozen=True)
class Host:
    identity: Identity
    store: PeerStore


def make_host(folder: Path, name: str) -> Host:
    return Host(load_identity(folder / name, name), PeerStore(folder / name))


def pair(a: Host, b: Host) -> None:
    for one, other in ((a, b), (b, a)):
        one.store.add(make_peer(other.identity.name, other.identity.certificate, LOOPBACK))


def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, which must end and leave no task behind."""

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work
        await asyncio.sleep(0)
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        assert left == [], "a test left tasks behind"

    asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S / 2):
        while not condition():
            await asyncio.sleep(0.01)


def unchecked_context() -> ssl.SSLContext:
    """A caller that takes any certificate and shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def call(port: int, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await tls.call(LOOPBACK, port, context, timeout_s=5, remedy="")


@asynccontextmanager
async def sockets(port: int, number: int, data: bytes = b"") -> AsyncIterator[list[socket.socket]]:
    """Plain connections that send `data` and then say nothing."""
    loop, found = asyncio.get_running_loop(), [socket.socket() for _ in range(number)]
    try:
        for s in found:
            s.setblocking(False)
            await loop.sock_connect(s, (LOOPBACK, port))
            if data:
                await loop.sock_sendall(s, data)
        yield found
    finally:
        for s in found:
            s.close()


@dataclass
class Proxy:
    """A machine in the middle: TLS with its own certificate on either side; records or alters what passes."""

    identity: Identity
    to_port: int
    alter: Callable[[str, bytes], bytes] = lambda direction, data: data
    seen: dict[str, bytes] = field(default_factory=lambda: {"up": b"", "down": b""})

    @asynccontextmanager
    async def run(self) -> AsyncIterator[int]:
        context = tls.make_context(True, self.identity, [])
        context.verify_mode = ssl.CERT_NONE
        listener = tls.listen_on(LOOPBACK, 0)
        async with tls.Door(listener, lambda: context, self._serve, lambda a, e: None) as door:
            yield door.port

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: str, admit: tls.Admit
    ) -> None:
        up_reader, up_writer = await call(self.to_port, unchecked_context())
        try:
            both = (self._pump("up", reader, up_writer), self._pump("down", up_reader, writer))
            tasks = [asyncio.create_task(p) for p in both]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await tls.close(up_writer)

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            self.seen[way] += data
            writer.write(self.alter(way, data))
            await writer.drain()


def logged(records: list[logging.LogRecord]) -> str:
    return "\n".join(r.getMessage() + "".join(map(str, r.exc_info or ())) for r in records)
