"""The control channel: messages between the supervisors of two paired hosts, over TLS with both certificates pinned.

How a channel lives. The caller connects, and each side accepts only a certificate that a pairing has stored. In
TLS 1.3 the caller's handshake is over before the listener has looked at the caller's certificate, so the listener
speaks first: its first heartbeat says "you are in". From then on each side sends a heartbeat when it had nothing
else to say for HEARTBEAT_S, and takes silence for death.

Silence is judged by the task that beats, from the time at which bytes arrived at the socket. So it does not matter
whether the owner is inside `receive` just then; and if our own loop stood still (a stopped process, a
machine that slept), the beat itself came late, and the peer gets its full time again.
"""

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from expertd.cluster import tls
from expertd.cluster.identity import Identity, Peer, PeerStore, fingerprint_of
from expertd.errors import ClusterError, ExpertdError, LinkDown, LocalProtocolError, RemoteProtocolError
from expertd.wire import Codec

HEARTBEAT_S = 0.1
SILENCE_S = 0.8
SEND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
# How soon a host that was removed from the list is cut off.
REVIEW_S = 0.5
READ_BYTES = 1 << 16
# One warning per address and minute; a stranger who has many addresses gets no memory from us.
WARN_EVERY_S = 60.0
MAX_WARNED = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heartbeat:
    """Nothing to say."""


class _Reader(asyncio.StreamReader):
    """Knows when something last arrived, read or not, and whether the peer has ended."""

    def __init__(self) -> None:
        super().__init__(limit=READ_BYTES)
        self.heard = asyncio.get_running_loop().time()
        self.has_ended = False

    def feed_data(self, data: Any) -> None:
        self.heard = asyncio.get_running_loop().time()
        super().feed_data(data)

    def feed_eof(self) -> None:
        self.has_ended = True
        super().feed_eof()


class Channel:
    """An open channel to `peer`; a context manager. One task receives, any number send.

    After the first failure every call raises LinkDown with its reason.
    """

    def __init__(
        self, peer: Peer, codec: Codec, reader: _Reader, writer: asyncio.StreamWriter, silence_s: float
    ) -> None:
        self.peer = peer
        self.local_address = tls.plain_address(writer.get_extra_info("sockname")[0])
        self.remote_address = tls.plain_address(writer.get_extra_info("peername")[0])
        self._codec = codec.extended(Heartbeat)
        self._decoder = self._codec.decoder()
        self._arrived: deque[Any] = deque()
        self._reader, self._writer = reader, writer
        self._silence_s = silence_s
        self._down = ""
        self._spoke = False
        self._pulse: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, message: Any) -> None:
        """Send one message and wait until most of it is on its way.

        Raises LinkDown when the channel is down or the peer does not take it for SEND_TIMEOUT_S seconds,
        LocalProtocolError when it is longer than the peer accepts.
        """
        frame = self._codec.encode(message)
        if len(frame) - 4 > self._codec.max_frame_bytes:
            size = f"{len(frame) - 4} bytes, at most {self._codec.max_frame_bytes}"
            raise LocalProtocolError(
                f"host {self.peer.name}: a {type(message).__name__} has {size} are allowed"
            )
        self._write(frame)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            self.disconnect(f"took nothing for {SEND_TIMEOUT_S:g} s")
            raise LinkDown(self._down) from None
        except OSError:
            raise LinkDown(self._closed()) from None  # `receive` still gives its last words

    async def receive(self) -> Any:
        """Wait for the next message; may be cancelled without losing one.

        Raises LinkDown when the peer is silent, gone or was disconnected, RemoteProtocolError for bytes that
        are no message.
        """
        while not self._arrived:
            self._arrived.extend(m for m in await self._read() if not isinstance(m, Heartbeat))
        return self._arrived.popleft()

    def disconnect(self, reason: str) -> None:
        """End the channel at once; `receive` and `send` then raise LinkDown("host NAME: REASON")."""
        if not self._down:
            self._down = f"host {self.peer.name}: {reason}"
            self._writer.transport.abort()

    async def close(self) -> None:
        """Send what was accepted and end the channel; may be called twice."""
        if self._pulse:
            self._pulse.cancel()
        self._down = self._down or f"host {self.peer.name}: this side closed the channel"
        await tls.close(self._writer)

    def _closed(self) -> str:
        return self._down or f"host {self.peer.name}: closed the connection"

    def _is_over(self) -> bool:
        """Nothing more can be sent. TLS has no half-open connections, and asyncio warns of each message that is written
        after the peer's end: dozens, where a host was stopped meanwhile."""
        return bool(self._down) or self._writer.is_closing() or self._reader.has_ended

    def _write(self, frame: bytes) -> None:
        if self._is_over():
            raise LinkDown(self._closed())
        self._writer.write(frame)
        self._spoke = True

    async def _read(self) -> list[Any]:
        try:
            data = b"" if self._down else await self._reader.read(READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._down = self._closed()
            raise LinkDown(self._down)
        try:
            return list(self._decoder.feed(data))
        except RemoteProtocolError as e:
            self.disconnect(f"sent what is {e}")
            raise RemoteProtocolError(self._down) from None

    async def _welcome(self, timeout_s: float) -> None:
        """Wait until the listener has let us in."""
        async with asyncio.timeout(timeout_s):
            for message in await self._read():
                if not isinstance(message, Heartbeat):
                    self._arrived.append(message)

    def _start(self) -> None:
        self._write(self._codec.encode(Heartbeat()))
        self._pulse = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        loop, frame = asyncio.get_running_loop(), self._codec.encode(Heartbeat())
        last = loop.time()
        while not self._is_over():
            await asyncio.sleep(HEARTBEAT_S)
            now = loop.time()
            # Late ourselves, or not reading because the owner is slow: then its silence says nothing.
            if now - last > self._silence_s / 2 or not self._reading():
                self._reader.heard = now
            if now - self._reader.heard > self._silence_s:
                return self.disconnect(f"nothing heard for {self._silence_s:g} s")
            last = now
            # What is still unsent will be heard as well; adding to it would only fill memory.
            unsent = self._writer.transport.get_write_buffer_size()
            if not (self._spoke or unsent or self._is_over()):
                self._writer.write(frame)
            self._spoke = False

    def _reading(self) -> bool:
        transport = self._writer.transport
        return (
            transport.is_closing()
            or not isinstance(transport, asyncio.ReadTransport)
            or transport.is_reading()
        )


async def connect(
    address: str,
    port: int,
    identity: Identity,
    peer: Peer,
    codec: Codec,
    local_address: str | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    silence_s: float = SILENCE_S,
) -> Channel:
    """Open a channel to a paired host that listens at address:port, from `local_address` if given.

    Raises LinkDown when it cannot be reached now, ClusterError when trying again will not help: it is not the
    host that was paired, or does not know us.
    """
    where = f"host {peer.name} at {address}, port {port}"
    context = tls.make_context(False, identity, [peer])
    remedy = f"Is `expertd serve` running on {peer.name}, with this port?"
    began = time.monotonic()
    try:
        reader, writer = await tls.call(
            address,
            port,
            context,
            timeout_s=timeout_s,
            remedy=remedy,
            local_address=local_address,
            make_reader=_Reader,
        )
    except ssl.SSLCertVerificationError:
        raise ClusterError(_other_identity(where, peer)) from None
    if fingerprint_of(tls.certificate_of(writer)) != peer.fingerprint:
        await tls.close(writer)
        raise ClusterError(_other_identity(where, peer))
    assert isinstance(reader, _Reader)
    channel = Channel(peer, codec, reader, writer, silence_s)
    try:
        await channel._welcome(max(0.1, timeout_s - (time.monotonic() - began)))
        channel._start()
        return channel
    except BaseException as e:
        await channel.close()
        if isinstance(e, TimeoutError):
            raise LinkDown(f"{where}: no answer in time. {remedy}") from None
        if isinstance(e, LinkDown):
            raise ClusterError(
                f"{where} does not know this machine: run `expertd pair` there, and here the command that it prints."
            ) from None
        raise


def _other_identity(where: str, peer: Peer) -> str:
    return (
        f"{where} presented another identity than the one paired on {peer.paired}; if it was reinstalled, run "
        f"`expertd hosts remove {peer.name}` and pair again."
    )


OnChannel = Callable[[Channel], Awaitable[None]]


class Server:
    """The listening side; made by `listen`. `port` is where it listens."""

    def __init__(
        self, identity: Identity, store: PeerStore, codec: Codec, on_channel: OnChannel, silence_s: float
    ) -> None:
        self.port = 0
        self._identity, self._store, self._codec = identity, store, codec
        self._on_channel, self._silence_s = on_channel, silence_s
        self._channels: set[Channel] = set()
        self._warned: dict[str, float] = {}

    def disconnect(self, host_id: str, reason: str = "was disconnected") -> None:
        """Cut off every channel of a host."""
        for channel in [c for c in self._channels if c.peer.host_id == host_id]:
            channel.disconnect(reason)

    def _context(self) -> ssl.SSLContext:
        return tls.make_context(True, self._identity, self._store.peers())

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, admit: tls.Admit
    ) -> None:
        assert isinstance(reader, _Reader)
        try:
            peer = self._store.match(tls.certificate_of(writer))
            if not peer:
                return self._warn(address, _STRANGER)
            async with Channel(peer, self._codec, reader, writer, self._silence_s) as channel:
                admit()
                channel._start()
                self._channels.add(channel)
                try:
                    await self._on_channel(channel)
                finally:
                    self._channels.discard(channel)
        except ExpertdError as e:
            _log.warning("control channel: %s", e)

    def _refused(self, address: str, error: Exception) -> None:
        if isinstance(error, ssl.SSLError) and error.reason in _UNKNOWN_CERTIFICATE:
            self._warn(address, _STRANGER)
        elif isinstance(error, OSError):
            self._warn(address, "refused: it called and did not speak as a paired host does")
        else:
            self._warn(address, f"refused: {error}")

    def _warn(self, address: str, text: str) -> None:
        now = time.monotonic()
        self._warned = {a: t for a, t in self._warned.items() if now - t < WARN_EVERY_S}
        if address not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned[address] = now
            _log.warning("control channel: %s %s", address, text)

    async def _review(self) -> None:
        """Cut off the hosts that are no longer in the list."""
        while True:
            await asyncio.sleep(REVIEW_S)
            try:
                known = {p.fingerprint for p in self._store.peers()}
            except ExpertdError as e:
                self._warn("the list of paired hosts", f"cannot be read: {e}")
                continue
            for channel in [c for c in self._channels if c.peer.fingerprint not in known]:
                channel.disconnect("was removed from the paired hosts")


_STRANGER = "refused: it is not a paired host. To let it in, run `expertd pair` on both machines"
_UNKNOWN_CERTIFICATE = ("CERTIFICATE_VERIFY_FAILED", "PEER_DID_NOT_RETURN_A_CERTIFICATE")


@asynccontextmanager
async def listen(
    host: str,
    port: int,
    identity: Identity,
    store: PeerStore,
    codec: Codec,
    on_channel: OnChannel,
    silence_s: float = SILENCE_S,
) -> AsyncIterator[Server]:
    """Let paired hosts in at host:port ("" is every address) until the block ends, which closes every channel.

    `on_channel` runs in a task per channel, which is closed when it returns. The list of paired hosts is
    followed as it changes. Raises ConfigError when the port is in use.
    """
    server = Server(identity, store, codec, on_channel, silence_s)
    door = tls.Door(tls.listen_on(host, port), server._context, server._serve, server._refused, _Reader)
    async with door:
        server.port = door.port
        review = asyncio.create_task(server._review())
        try:
            yield server
        finally:
            review.cancel()
