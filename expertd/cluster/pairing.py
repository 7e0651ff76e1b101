"""Pairing: two machines learn each other's certificate because one person typed one code into both.

How it works. One side listens and shows a code of 8 digits; the other is given that code. Over TLS whose certificate
nobody can check yet, they run SPAKE2 (RFC 9382): both get the same key only if both used the same code,
and whoever listened, or took part with a guess, learns nothing but whether that one guess was right. Each then
proves by an HMAC under that key that it saw the same conversation:

    caller   -> listener   Hello    its certificate, its SPAKE2 message
    listener -> caller     Welcome  its SPAKE2 message; its certificate is the one that TLS has shown
    caller   -> listener   Confirm  HMAC(key, "caller" + transcript)
    listener -> caller     Confirm  HMAC(key, "listener" + transcript), or Refused
    caller   -> listener   Stored

The transcript holds both messages and the certificate *seen in TLS*: a machine in the middle, which must show one
of its own, makes both confirmations fail. The caller confirms first, and its try is counted before it hears the
answer, so the listener gives away MAX_TRIES guesses at 10^8 codes however many connections run at once.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import spake2

import expertd
from expertd.cluster import tls
from expertd.cluster.identity import Identity, Peer, PeerStore, clean_name, make_peer
from expertd.errors import ClusterError, ConfigError, LinkDown, RemoteProtocolError
from expertd.wire import Codec

DEFAULT_PORT = 7421
PROTOCOL = 1
MAX_TRIES = 3
VALID_S = 600.0
CODE_DIGITS = 8
MAX_FRAME_BYTES = 4096
READ_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Hello:
    """The first message: `protocol` comes first so that an unlike version can be named."""

    protocol: int
    version: str
    name: str
    certificate: bytes
    spake: bytes


@dataclass(frozen=True)
class Welcome:
    version: str
    name: str
    spake: bytes


@dataclass(frozen=True)
class Confirm:
    mac: bytes


@dataclass(frozen=True)
class Refused:
    """`reason` is one of the keys of _REFUSALS; `version` is the listener's."""

    reason: str
    tries_left: int
    version: str


@dataclass(frozen=True)
class Stored:
    """The caller has stored the listener; now the listener may store the caller."""


Message = Hello | Welcome | Confirm | Refused | Stored
codec = Codec(Message, MAX_FRAME_BYTES)

_AGAIN = "Run `expertd pair` there again for a new one."
_REFUSALS = {
    "wrong": "wrong code, or another machine is in between. Compare the code ({tries_left} tries left).",
    "void": f"the code is void after {MAX_TRIES} wrong tries. {_AGAIN}",
    "used": f"the code has been used. {_AGAIN}",
    "expired": f"the code has expired. {_AGAIN}",
    "protocol": "expertd {version} runs there and {own} here. Install the same version on both.",
}


class Code:
    """One code: valid once, for `valid_s` seconds and MAX_TRIES tries. `text` is for the user's eyes alone."""

    def __init__(self, valid_s: float = VALID_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._digits = f"{secrets.randbelow(10**CODE_DIGITS):0{CODE_DIGITS}d}"
        self._clock, self._ends = clock, clock() + valid_s
        self._used = False
        self.tries_left = MAX_TRIES

    @property
    def text(self) -> str:
        return f"{self._digits[:4]}-{self._digits[4:]}"

    def spent(self) -> str:
        """Why the code is of no more use: a key of _REFUSALS, "" while it is valid."""
        if self._used:
            return "used"
        if self.tries_left < 1:
            return "void"
        return "expired" if self._clock() >= self._ends else ""

    def attempt(self, given: bytes, wanted: bytes) -> str:
        """Count one try, then compare: "" if right (which uses the code up), else the reason."""
        if reason := self.spent():
            return reason
        self.tries_left -= 1
        if not hmac.compare_digest(given, wanted):
            return "wrong" if self.tries_left else "void"
        self._used = True
        return ""


def parse_code(text: str) -> bytes:
    """Give the digits of a code as the user typed it. Raises ConfigError, which does not repeat it."""
    digits = re.sub(r"[\s-]", "", text)
    if not re.fullmatch(rf"[0-9]{{{CODE_DIGITS}}}", digits):
        raise ConfigError(
            f"CODE: wanted the {CODE_DIGITS} digits that `expertd pair` shows, such as 1234-5678."
        )
    return digits.encode()


class _Conversation:
    """Messages over one connection, each bounded in size and time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, who: str) -> None:
        self._reader, self._writer, self._who = reader, writer, who
        self._decoder = codec.decoder()
        self._arrived: deque[Message] = deque()

    async def send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                self._writer.write(codec.encode(message))
                await self._writer.drain()
        except OSError as e:
            raise LinkDown(f"{self._who}: {tls.explain(e)}.") from e

    async def receive(self, wanted: type[T]) -> T:
        """Wait for the next message. Raises LinkDown, or RemoteProtocolError when it is another one."""
        message = await self._receive()
        if not isinstance(message, wanted):
            raise RemoteProtocolError(
                f"{self._who}: {type(message).__name__} came, wanted {wanted.__name__}."
            )
        return message

    async def answer(self, wanted: type[T]) -> T:
        """The same on the caller's side, where Refused may come instead: raises ClusterError that says why."""
        message = await self._receive()
        if isinstance(message, Refused):
            text = _REFUSALS.get(message.reason, "it refuses to pair.")
            version = clean_name(message.version)
            text = text.format(tries_left=message.tries_left, version=version, own=expertd.__version__)
            raise ClusterError(f"{self._who}: {text}")
        self._arrived.appendleft(message)
        return await self.receive(wanted)

    async def _receive(self) -> Message:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await self._next()
        except OSError as e:
            raise LinkDown(f"{self._who}: {tls.explain(e)}.") from e

    async def _next(self) -> Message:
        while not self._arrived:
            data = await self._reader.read(MAX_FRAME_BYTES)
            if not data:
                raise LinkDown(f"{self._who}: it closed the connection. Run `expertd pair` there again.")
            try:
                self._arrived.extend(self._decoder.feed(data))
            except RemoteProtocolError as e:
                raise RemoteProtocolError(f"{self._who}: {e}.") from None
        return self._arrived.popleft()


def _finish(spake: spake2.SPAKE2_A | spake2.SPAKE2_B, message: bytes) -> bytes:
    """Give the key. The library raises many things for a message that is no group element."""
    try:
        key: bytes = spake.finish(message)
        return key
    except Exception:
        raise RemoteProtocolError("not a SPAKE2 message") from None


def _transcript(hello: Hello, welcome: Welcome, certificate_seen: bytes) -> bytes:
    """Hash the conversation; lengths go in, so that no byte can count as part of its neighbour."""
    parts = (b"expertd pairing", codec.encode(hello), codec.encode(welcome), certificate_seen)
    return hashlib.sha256(b"".join(len(p).to_bytes(4, "big") + p for p in parts)).digest()


def _mac(key: bytes, role: str, transcript: bytes) -> bytes:
    return hmac.digest(key, role.encode() + b" " + transcript, "sha256")


class _Offer:
    """The listening side: serves every caller at once, until one of them has paired."""

    def __init__(
        self, identity: Identity, store: PeerStore, code: Code, notice: Callable[[str], None]
    ) -> None:
        self._identity, self._store, self._code, self._notice = identity, store, code, notice
        self.done: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, _: tls.Admit
    ) -> None:
        conversation = _Conversation(reader, writer, address)
        try:
            await self._pair(conversation, address)
        except (LinkDown, RemoteProtocolError) as e:
            _log.debug("pairing: %s called and failed: %s", address, e)
        except (ClusterError, ConfigError) as e:
            if not self.done.done():
                self.done.set_exception(e)

    async def _pair(self, conversation: _Conversation, address: str) -> None:
        hello = await conversation.receive(Hello)
        reason = "protocol" if hello.protocol != PROTOCOL else self._code.spent()
        if reason:
            return await self._refuse(conversation, reason)
        try:
            peer = make_peer(hello.name, hello.certificate, address)
        except ValueError:
            raise RemoteProtocolError("its certificate is none") from None
        digits = parse_code(self._code.text)
        spake = spake2.SPAKE2_B(digits, idA=hello.certificate, idB=self._identity.certificate)
        welcome = Welcome(expertd.__version__, self._identity.name, spake.start())
        key = _finish(spake, hello.spake)
        await conversation.send(welcome)
        transcript = _transcript(hello, welcome, self._identity.certificate)
        confirm = await conversation.receive(Confirm)
        if reason := self._code.attempt(confirm.mac, _mac(key, "caller", transcript)):
            return await self._failed(conversation, reason, address)
        await self._succeed(conversation, _mac(key, "listener", transcript), peer)

    async def _failed(self, conversation: _Conversation, reason: str, address: str) -> None:
        self._notice(f"{address} gave a wrong code ({self._code.tries_left} tries left)")
        with contextlib.suppress(LinkDown):
            await self._refuse(conversation, reason)
        if reason == "void":
            raise ConfigError(
                f"the code is void after {MAX_TRIES} wrong tries. Run `expertd pair` again for a new one."
            )

    async def _refuse(self, conversation: _Conversation, reason: str) -> None:
        await conversation.send(Refused(reason, self._code.tries_left, expertd.__version__))

    async def _succeed(self, conversation: _Conversation, mac: bytes, peer: Peer) -> None:
        try:
            await conversation.send(Confirm(mac))
            await conversation.receive(Stored)
        except (LinkDown, RemoteProtocolError) as e:
            raise ClusterError(
                f"{peer.name} knew the code but was gone before it was done. Run `expertd pair` on both again."
            ) from e
        if not self.done.done():  # the time may have run out meanwhile
            self.done.set_result(self._store.add(peer))


async def offer(
    identity: Identity,
    store: PeerStore,
    listener: socket.socket,
    code: Code,
    notice: Callable[[str], None],
    valid_s: float = VALID_S,
) -> Peer:
    """Wait for the machine that knows `code`, store it and give it back; `notice` is told of failed tries.

    Raises ConfigError when the code is void or has expired, ClusterError when the other machine was lost at the end.
    """
    pending = _Offer(identity, store, code, notice)

    def refused(address: str, reason: Exception) -> None:
        _log.debug("pairing: no TLS with %s: %s", address, reason)

    # The caller shows its certificate inside the conversation: TLS would not take one that it cannot check.
    context = tls.make_context(True, identity, [])
    context.verify_mode = ssl.CERT_NONE
    async with tls.Door(listener, lambda: context, pending.serve, refused):
        try:
            async with asyncio.timeout(valid_s):
                return await pending.done
        except TimeoutError:
            raise ConfigError(
                f"nobody paired within {valid_s / 60:g} minutes. Run `expertd pair` again for a new code."
            ) from None


async def pair_with(identity: Identity, store: PeerStore, address: str, port: int, code: str) -> Peer:
    """Pair with the machine that shows `code` at address:port, store it and give it back.

    Raises ConfigError for a code that is none, ClusterError when it refuses or is not who it seems, LinkDown.
    """
    digits = parse_code(code)
    context = tls.make_context(False, identity, [])
    context.verify_mode = ssl.CERT_NONE  # who it is will be proved by the confirmation
    remedy = "Run `expertd pair` on that machine and use the command that it prints."
    reader, writer = await tls.call(address, port, context, timeout_s=CALL_TIMEOUT_S, remedy=remedy)
    try:
        seen = tls.certificate_of(writer)
        if seen == identity.certificate:
            raise ConfigError(f"{address}: this is the machine itself. Type the command on the other one.")
        conversation = _Conversation(reader, writer, address)
        name = await _prove(conversation, identity, digits, seen)
        peer = store.add(make_peer(name, seen, address))
        await conversation.send(Stored())
        return peer
    finally:
        await tls.close(writer)


async def _prove(conversation: _Conversation, identity: Identity, digits: bytes, seen: bytes) -> str:
    """Run the caller's half up to the listener's proof; give the listener's name."""
    spake = spake2.SPAKE2_A(digits, idA=identity.certificate, idB=seen)
    hello = Hello(PROTOCOL, expertd.__version__, identity.name, identity.certificate, spake.start())
    await conversation.send(hello)
    welcome = await conversation.answer(Welcome)
    key = _finish(spake, welcome.spake)
    transcript = _transcript(hello, welcome, seen)
    await conversation.send(Confirm(_mac(key, "caller", transcript)))
    confirm = await conversation.answer(Confirm)
    if not hmac.compare_digest(confirm.mac, _mac(key, "listener", transcript)):
        raise ClusterError(
            "the other machine could not prove that it knows the code: another one may be in between."
        )
    return welcome.name
