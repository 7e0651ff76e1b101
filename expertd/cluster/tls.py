"""TLS between hosts: the door where strangers knock, the way to call one, and what to tell the user when it fails.

A connection at the door is a stranger until its handler calls `admit`. At most MAX_STRANGERS are inside at a time. The
next one takes the place of the *oldest*: a host of ours is done with its handshake in milliseconds, so the
oldest stranger is the one that stalls, and filling all places with silent connections keeps nobody out.
"""

import asyncio
import errno
import re
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Self

from expertd.cluster.identity import Identity, Peer
from expertd.errors import ConfigError, ExpertdError, LinkDown

MAX_STRANGERS = 32
HANDSHAKE_TIMEOUT_S = 5.0
# How long the other end may take to answer our good-bye; asyncio's own default is 30 s.
SHUTDOWN_TIMEOUT_S = 1.0
# Out of descriptors: the backlog keeps callers while connections end.
ACCEPT_PAUSE_S = 0.1

MakeReader = Callable[[], asyncio.StreamReader]
Admit = Callable[[], None]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str, Admit], Awaitable[None]]


def make_context(server: bool, identity: Identity, trusted: list[Peer]) -> ssl.SSLContext:
    """Give a context that shows this machine's certificate and accepts those of `trusted` alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # whose certificate it is counts, not at which address
    context.verify_mode = ssl.CERT_REQUIRED
    # A paired certificate is trusted itself, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if server:
        context.num_tickets = 0  # nothing is resumed: every connection proves both keys anew
    context.load_cert_chain(identity.path, password=b"")
    if trusted:
        context.load_verify_locations(cadata="".join(p.certificate for p in trusted))
    return context


def listen_on(host: str, port: int) -> socket.socket:
    """Give a listening socket; host "" means all addresses of this machine, port 0 any free one.

    Raises ConfigError that names the port.
    """
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        # Not SO_REUSEPORT: two programs must not share the port without knowing.
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual, backlog=128)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: the port is in use. Give another one with --port.") from e
        raise ConfigError(f"cannot listen on {host or 'any address'}, port {port}: {e.strerror or e}.") from e


class Door:
    """Serves every connection to `listener` over TLS in a task of its own, until the `async with` ends.

    `context` is asked anew for each connection, so that it can follow what is on disk. `serve` gets the
    streams, the caller's address and `admit`; when it returns, the connection is closed. `refused` is told
    the address and the reason when TLS does not come up.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: Callable[[], ssl.SSLContext],
        serve: Serve,
        refused: Callable[[str, Exception], None],
        make_reader: MakeReader = asyncio.StreamReader,
    ) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener, self._context = listener, context
        self._serve, self._refused, self._make_reader = serve, refused, make_reader
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._run(connection, plain_address(address[0])))
            self._strangers[task] = None
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            context = {"message": "a connection's handler failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _run(self, connection: socket.socket, address: str) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                reader, writer = await self._streams(connection)
        except (OSError, ExpertdError) as e:
            self._refused(address, e)
            return
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._serve(reader, writer, address, lambda: self._strangers.pop(task, None))
        finally:
            await close(writer)

    async def _streams(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            context = self._context()
        except BaseException:
            connection.close()
            raise
        loop, reader = asyncio.get_running_loop(), self._make_reader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def call(
    address: str,
    port: int,
    context: ssl.SSLContext,
    *,
    timeout_s: float,
    remedy: str,
    local_address: str | None = None,
    make_reader: MakeReader = asyncio.StreamReader,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a host. Raises LinkDown, which ends with `remedy`, or ssl.SSLCertVerificationError."""
    loop, reader = asyncio.get_running_loop(), make_reader()
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(
                lambda: protocol,
                address,
                port,
                ssl=context,
                # Python wants some name beside an address; ours tells an onlooker nothing.
                server_hostname="expertd",
                local_addr=(local_address, 0) if local_address else None,
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
    except ssl.SSLCertVerificationError:
        raise
    except OSError as e:
        raise LinkDown(f"{address}, port {port}: {explain(e)}. {remedy}") from e
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def explain(error: OSError, platform: str = sys.platform) -> str:
    """Say why a call failed, for a user."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return "something answers there, but not expertd"
    if isinstance(error, socket.gaierror):
        return "no machine of this name is known"
    # For a name with several addresses asyncio joins the errors in one text and drops their numbers.
    numbers = [error.errno] if error.errno else [int(n) for n in re.findall(r"\[Errno (\d+)\]", str(error))]
    if errno.ECONNREFUSED in numbers:
        return "connection refused: nothing listens there"
    if errno.EHOSTUNREACH in numbers and platform == "darwin":
        return (
            "no route to this machine, or macOS forbids this program to use the local network (allow it under "
            "System Settings > Privacy & Security > Local Network)"
        )
    if {errno.EHOSTUNREACH, errno.ENETUNREACH} & set(numbers):
        return "no route to this machine"
    if {errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE} & set(numbers):
        return "it closed the connection"
    return error.strerror or str(error) or type(error).__name__


def certificate_of(writer: asyncio.StreamWriter) -> bytes:
    """Give the DER of the certificate that the other end has shown, b"" if it has shown none."""
    return writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""


def plain_address(address: str) -> str:
    """Give an IPv4 address as such, though a socket for both families calls it ::ffff:10.0.0.1."""
    return address.removeprefix("::ffff:") if "." in address else address


async def close(writer: asyncio.StreamWriter) -> None:
    """Send what is still to be sent and close, within SHUTDOWN_TIMEOUT_S."""
    if not writer.is_closing():  # a second close breaks asyncio's TLS transport (Python 3.11)
        writer.close()
    try:
        async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
            await writer.wait_closed()
    except asyncio.CancelledError:
        writer.transport.abort()
        raise
    except TimeoutError:
        writer.transport.abort()
    except OSError:
        pass  # the other end was faster: it is closed
