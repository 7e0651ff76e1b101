"""From a ServerConfig to a running server: take the port, start the ranks, serve, end everything in time."""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import uvicorn

from expertd.cluster.joiner import Joiner
from expertd.cluster.leader import Leader
from expertd.cluster.supervisor import Cluster
from expertd.config import DoorConfig, ServerConfig
from expertd.errors import ClusterError, ConfigError
from expertd.server.app import make_app
from expertd.server.protocol import HEAD_TIMEOUT_S, MAX_HEAD_BYTES, guarded_protocol
from expertd.server.service import Service

# Streams get their last event as soon as the cluster ends; this is for clients that do not read it.
DRAIN_TIMEOUT_S = 1
BACKLOG = 128


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the command line, which must also end the ranks."""
        yield


def take_port(config: ServerConfig) -> socket.socket:
    """Listen on the configured address; port 0 takes any. Raises ConfigError when it cannot be had."""
    tls_context(config.door)
    where = f"--host {config.host} --port {config.port}"
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"{where}: cannot listen there: wanted a port of 0 (any) to 65535.")
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Listening at once is what makes a second server on the port fail here, not after loading.
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as e:
        if isinstance(e, OSError) and e.errno == errno.EADDRINUSE:
            raise ConfigError(f"{where}: the port is in use. Choose another, for example --port 0.") from e
        raise ConfigError(f"{where}: cannot listen there: {e}. Choose another address.") from e


def tls_context(door: DoorConfig) -> ssl.SSLContext | None:
    """TLS 1.2 and newer with the configured certificate; None without one. Raises ConfigError."""
    if not door.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(door.tls_cert, door.tls_key)
    except (OSError, ssl.SSLError) as e:
        where = f"--tls-cert {door.tls_cert} --tls-key {door.tls_key}"
        raise ConfigError(f"{where}: not a PEM certificate and its key: {e}. Check both files.") from e
    return context


Lead = Callable[[Cluster], contextlib.AbstractAsyncContextManager[Leader]]


async def serve(
    config: ServerConfig,
    listener: socket.socket,
    announce: Callable[[Cluster], None],
    lead: Lead | None = None,
) -> None:
    """Serve until cancelled; `announce` is called once, when requests can be answered. `lead` lets other hosts join.

    Answers 503 while the ranks load. Raises what `Cluster.open` raises, and ClusterError when the group
    dies. Everything that was started has ended when this returns or raises.
    """
    service = Service(config)
    async with _running_server(service, listener) as (server, served):
        try:
            async with (
                Cluster.open(config.group, restart=True) as cluster,
                contextlib.AsyncExitStack() as hosts,
            ):
                service.cluster = cluster
                if lead:
                    service.hosts = (await hosts.enter_async_context(lead(cluster))).describe
                announce(cluster)
                try:
                    await _wait_any_end(cluster, served)
                finally:
                    # Now, not when the ranks have ended: both take up to a second, side by side.
                    server.should_exit = True
        finally:
            server.should_exit = True


Follow = Callable[[Callable[[Cluster | None, str], None]], contextlib.AbstractAsyncContextManager[Joiner]]


async def join(
    config: ServerConfig, listener: socket.socket, follow: Follow, say: Callable[[str], None]
) -> None:
    """Serve over HTTP what the leader serves, until cancelled; `say` gets a line when that changes.

    `follow` makes the Joiner, given a function that takes the cluster of this host, or None, and the model's id.
    Answers 503 until a leader was found. Raises what `Joiner.run` raises.
    """
    service = Service(config)

    def show(cluster: Cluster | None, model_id: str) -> None:
        service.config = replace(service.config, model_id=model_id)
        service.cluster = cluster
        if cluster:
            host, port = listener.getsockname()[:2]
            say(f"serving {model_id} at {config.scheme}://{host}:{port}/v1")

    async with _running_server(service, listener) as (server, served), follow(show) as joiner:
        service.hosts = joiner.describe
        running = asyncio.create_task(joiner.run())
        try:
            await asyncio.wait({running, served}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            raise ClusterError("the HTTP server ended. Start expertd again.")
        finally:
            server.should_exit = True
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _wait_any_end(cluster: Cluster, served: asyncio.Task[None]) -> None:
    failed = asyncio.create_task(cluster.wait_failed())
    try:
        await asyncio.wait({failed, served}, return_when=asyncio.FIRST_COMPLETED)
        raise ClusterError(
            failed.result() if failed.done() else "the HTTP server ended. Start expertd again."
        )
    finally:
        failed.cancel()


@contextlib.asynccontextmanager
async def _running_server(
    service: Service, listener: socket.socket
) -> AsyncIterator[tuple[_Server, asyncio.Task[None]]]:
    # uvicorn reports what clients do wrong, and each failure again with a traceback; ours are said once.
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    logging.getLogger("uvicorn").propagate = False
    door = service.config.door
    context = tls_context(door)
    config = uvicorn.Config(
        make_app(service),
        http=guarded_protocol(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
        ssl_context_factory=(lambda _config, _default: context) if context else None,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
    )
    server = _Server(config)
    served = asyncio.create_task(server.serve([listener]))
    ticking = asyncio.create_task(service.history.run())
    try:
        yield server, served
    finally:
        ticking.cancel()
        server.should_exit = True
        await asyncio.wait({served}, timeout=2 * DRAIN_TIMEOUT_S)
        served.cancel()
        await asyncio.gather(served, return_exceptions=True)
        listener.close()
