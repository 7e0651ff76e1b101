"""How the link processes of an epoch find each other: sockets, pinned to their cable, and mutual proof.

Of two hosts the one with the higher index calls. Each end proves that it knows the epoch's secret, which the
supervisors carried over their own authenticated channel, without showing it:

    caller -> listener   HELLO: magic, epoch, caller's and listener's host index, nonce (32 bytes)
    listener -> caller   nonce (32), proof of the listener (32)
    caller -> listener   proof of the caller (32)
    listener -> caller   one byte: you are in

A proof is HMAC-SHA256 over the role and everything above, so none can be reflected, replayed or moved to another epoch.
Strangers may call too: whoever says nothing, garbage or too little is dropped after a few seconds and holds up nobody.
"""

import asyncio
import hmac
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from expertd.link.messages import LinkPeer
from expertd.topology.pin import RouteError, bind_to_route, check_route

HANDSHAKE_S = 5.0
# Callers that may be under proof at a time; one more, and the oldest goes.
MAX_UNPROVEN = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
WELCOME = b"\x01"
_HELLO = struct.Struct("<8sIBB32s")
_MAGIC = b"xdlink01"


class SetupFailed(Exception):
    """The link cannot be set up: a code by name, a reason for people, and the host it is about (-1: none)."""

    def __init__(self, code: str, reason: str, host: int = -1) -> None:
        super().__init__(reason)
        self.code, self.reason, self.host = code, reason, host


class Stranger(Exception):
    """Whoever is at the other end has not proven to belong to this epoch."""


@dataclass(frozen=True)
class Identity:
    """Who this link process is to the others of its epoch."""

    epoch: int
    host: int
    secret: bytes

    def proof(self, role: bytes, hello: bytes, nonce: bytes) -> bytes:
        return hmac.digest(self.secret, b"expertd link " + role + b"\0" + hello + nonce, "sha256")


# Sockets.


def open_listener(address: str) -> socket.socket:
    """Listen on a free port of an address of this host. Raises SetupFailed."""
    try:
        family, target = _resolve(address, 0)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(target)
        listener.listen(MAX_UNPROVEN)
    except OSError as e:
        raise SetupFailed("XD_UNAVAILABLE", f"cannot listen on {address}: {e}") from e
    listener.setblocking(False)
    return listener


def _resolve(address: str, port: int) -> tuple[int, tuple[str, int]]:
    """Family and socket address of a numeric address; names would ask the network."""
    family, _, _, _, target = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    return family, target  # type: ignore[return-value]  # IPv6 has four fields, which pass through as they are


# Proof.


async def call(identity: Identity, host: int, sock: socket.socket) -> None:
    """Prove ourselves to `host`, whom we called, and have it prove itself. Raises Stranger, OSError."""
    loop = asyncio.get_running_loop()
    hello = _HELLO.pack(_MAGIC, identity.epoch, identity.host, host, secrets.token_bytes(NONCE_BYTES))
    await loop.sock_sendall(sock, hello)
    answer = await _read(sock, NONCE_BYTES + PROOF_BYTES)
    nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, identity.proof(b"listener", hello, nonce)):
        raise Stranger("it does not know this epoch's secret")
    await loop.sock_sendall(sock, identity.proof(b"caller", hello, nonce))
    if await _read(sock, len(WELCOME)) != WELCOME:
        raise Stranger("it did not let us in")


async def answer(identity: Identity, sock: socket.socket) -> int:
    """Have a caller prove itself and give its host index; it waits for WELCOME then. Raises Stranger, OSError."""
    loop = asyncio.get_running_loop()
    hello = await _read(sock, _HELLO.size)
    magic, epoch, caller, listener, _ = _HELLO.unpack(hello)
    if (magic, epoch, listener) != (_MAGIC, identity.epoch, identity.host):
        raise Stranger("its hello is not for us")
    nonce = secrets.token_bytes(NONCE_BYTES)
    await loop.sock_sendall(sock, nonce + identity.proof(b"listener", hello, nonce))
    if not hmac.compare_digest(await _read(sock, PROOF_BYTES), identity.proof(b"caller", hello, nonce)):
        raise Stranger("it does not know this epoch's secret")
    return int(caller)


async def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise Stranger("it hung up")
        data += piece
    return data


# Meeting.


async def meet(
    identity: Identity, peers: Sequence[LinkPeer], listener: socket.socket | None, timeout_s: float
) -> dict[int, socket.socket]:
    """Call the peers with a lower index and wait for the calls of those with a higher one, at most timeout_s.

    Gives each host's socket, proven and on its path. Raises SetupFailed.
    """
    calls = [_call_peer(identity, p) for p in peers if p.host < identity.host]
    expected = {p.host for p in peers if p.host > identity.host}
    met: dict[int, socket.socket] = {}
    if expected and listener is None:
        raise SetupFailed(
            "XD_UNAVAILABLE", f"host {min(expected)} would call, but no address to listen on was given"
        )
    try:
        async with asyncio.timeout(timeout_s):
            if expected and listener:
                calls.append(_take_calls(identity, expected, listener))
            for found in await asyncio.gather(*calls):
                met |= found
    except TimeoutError:
        missing = expected or {p.host for p in peers}
        names = " or ".join(f"host {h}" for h in sorted(missing))
        raise SetupFailed(
            "XD_TIMEOUT", f"not all of {names} have come within {timeout_s:.0f} s", min(missing)
        ) from None
    for peer in peers:
        try:
            check_route(met[peer.host], peer.local_address, peer.interface)
        except RouteError as e:
            raise SetupFailed("XD_UNAVAILABLE", str(e), peer.host) from e
    return met


async def _call_peer(identity: Identity, peer: LinkPeer) -> dict[int, socket.socket]:
    where = f"host {peer.host} at {peer.address} port {peer.port}"
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            family, target = _resolve(peer.address, peer.port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            bind_to_route(sock, peer.local_address, peer.interface)
            await asyncio.get_running_loop().sock_connect(sock, target)
            await call(identity, peer.host, sock)
    except TimeoutError:
        reason = f"{where} did not answer within {HANDSHAKE_S:.0f} s"
        raise SetupFailed("XD_TIMEOUT", reason, peer.host) from None
    except OSError as e:
        way = f"{peer.interface} ({peer.local_address})"
        raise SetupFailed("XD_UNAVAILABLE", f"{where}: {e}, over {way}", peer.host) from e
    except Stranger as e:
        raise SetupFailed("XD_CORRUPT", f"{where}: {e}", peer.host) from e
    return {peer.host: sock}


async def _take_calls(
    identity: Identity, expected: set[int], listener: socket.socket
) -> dict[int, socket.socket]:
    """Accept until every expected host has proven itself; who does not is dropped."""
    loop, met, complete = asyncio.get_running_loop(), dict[int, socket.socket](), asyncio.Event()

    async def judge(sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                host = await answer(identity, sock)
                if host not in expected or host in met:
                    raise Stranger("nobody waits for this host")
                await loop.sock_sendall(sock, WELCOME)
                met[host] = sock
        except (OSError, Stranger):  # a TimeoutError is an OSError
            pass  # dropped below; whoever is expected has until the deadline to come
        finally:
            if sock not in met.values():
                sock.close()
        if met.keys() == expected:
            complete.set()

    async def accept() -> None:
        judging: list[asyncio.Task[None]] = []
        while True:
            sock, _ = await loop.sock_accept(listener)
            judging = [task for task in judging if not task.done()]
            if len(judging) >= MAX_UNPROVEN:
                judging.pop(0).cancel()
            judging.append(asyncio.create_task(judge(sock)))

    accepting = asyncio.create_task(accept())
    await complete.wait()
    accepting.cancel()
    return met
