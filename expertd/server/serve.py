"""From a ServerConfig to a running server: take the port, start the ranks, serve, end everything in time."""

import asyncio
import contextlib
import errno
import gc
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from expertd.cluster.joiner import Joiner
from expertd.cluster.supervisor import Cluster
from expertd.config import DoorConfig, ServerConfig
from expertd.errors import ClusterError, ConfigError
from expertd.server.app import make_app
from expertd.server.generation import Generation, Lead, Wishes, reload
from expertd.server.protocol import BACKLOG, HEAD_TIMEOUT_S, guarded_protocol, handler_of
from expertd.server.service import Service

# Streams get their last event as soon as the cluster ends; this is for clients that do not read it.
DRAIN_TIMEOUT_S = 1
# New objects between two looks for garbage (Python's 700 is every tenth token), and how many of these are among the new
# ones alone before older ones are looked at too: closed connections are such. With Python's 10, 10 those of 10,000 took
# 11 MB more when as many came again, so 5.
GARBAGE_EVERY = (10_000, 2, 5)

_log = logging.getLogger(__name__)


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


async def serve(
    config: ServerConfig,
    listener: socket.socket,
    announce: Callable[[Cluster], None],
    lead: Lead | None = None,
    wishes: Wishes | None = None,
    loading: Callable[[int, int], None] = lambda num_bytes, total_bytes: None,
) -> None:
    """Serve until cancelled or drained; `announce` is called once, when requests can be answered. `lead` lets other
    hosts join.

    Answers 503 while the ranks load. Raises what `Cluster.open` raises, and ClusterError when the group
    dies. Everything that was started has ended when this returns or raises.
    """
    service, wishes = Service(config), wishes or Wishes()
    async with _running_server(service, listener) as (server, served), contextlib.AsyncExitStack() as retired:
        try:
            generation = await _or_drained(Generation.open(config, service.loads(loading)), wishes)
            try:
                await generation.show(service, config, lead)
                announce(generation.cluster)
                while not await _wait_wish(generation.cluster, served, wishes):
                    wishes.reload.clear()
                    generation = await reload(service, generation, wishes, retired)
                await _drain(service, server, generation.cluster, wishes.drain_timeout_s)
                await generation.part()
            finally:
                # Now, not when the ranks have ended: both take up to a second, side by side.
                server.should_exit = True
                await generation.close()
        finally:
            server.should_exit = True


async def _or_drained(opening: Coroutine[Any, Any, Generation], wishes: Wishes) -> Generation:
    """The generation, or the end of this task when we are to end while it loads."""
    loading, ending = asyncio.create_task(opening), asyncio.create_task(wishes.drain.wait())
    try:
        await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            return loading.result()
        raise asyncio.CancelledError
    finally:
        loading.cancel()
        ending.cancel()
        await asyncio.gather(loading, ending, return_exceptions=True)


async def _wait_wish(cluster: Cluster, served: "asyncio.Task[None]", wishes: Wishes) -> bool:
    """Wait for a signal: True to end, False to load again. Raises ClusterError when the group or the server ends."""
    failed = asyncio.create_task(cluster.wait_failed())
    signals = [asyncio.create_task(event.wait()) for event in (wishes.drain, wishes.reload)]
    try:
        await asyncio.wait({failed, served, *signals}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done() or served.done():
            raise ClusterError(
                failed.result() if failed.done() else "the HTTP server ended. Start expertd again."
            )
        return wishes.drain.is_set()
    finally:
        for task in (failed, *signals):
            task.cancel()


async def _drain(service: Service, server: _Server, cluster: Cluster | None, timeout_s: float) -> None:
    """Take nothing new, and let what runs come to its end."""
    service.is_draining = True
    for listening in server.servers:
        listening.close()
    if cluster and (num := cluster.requests.num_open):
        _log.warning("ending when %d requests have, in %g s at most; once more ends at once", num, timeout_s)
        reason = f"expertd is stopping, and this did not end within --drain-timeout {timeout_s:g} s"
        await cluster.requests.finish(timeout_s, f"{reason}. Ask again.")


Follow = Callable[[Callable[[Cluster | None, str], None]], contextlib.AbstractAsyncContextManager[Joiner]]


async def join(
    config: ServerConfig,
    listener: socket.socket,
    follow: Follow,
    say: Callable[[str], None],
    wishes: Wishes | None = None,
) -> None:
    """Serve over HTTP what the leader serves, until cancelled or drained; `say` gets a line when that changes.

    `follow` makes the Joiner, given a function that takes the cluster of this host, or None, and the model's id.
    Answers 503 until a leader was found. Raises what `Joiner.run` raises.
    """
    service, wishes = Service(config), wishes or Wishes()

    def show(cluster: Cluster | None, model_id: str) -> None:
        service.config = replace(service.config, model_id=model_id)
        service.cluster = cluster
        if cluster:
            host, port = listener.getsockname()[:2]
            say(f"serving {model_id} at {config.scheme}://{host}:{port}/v1")

    async with _running_server(service, listener) as (server, served), follow(show) as joiner:
        service.hosts = joiner.describe
        running, ending = asyncio.create_task(joiner.run()), asyncio.create_task(wishes.drain.wait())
        try:
            await asyncio.wait({running, served, ending}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            if not ending.done():
                raise ClusterError("the HTTP server ended. Start expertd again.")
            await _drain(service, server, service.cluster, wishes.drain_timeout_s)
        finally:
            server.should_exit = True
            running.cancel()
            ending.cancel()
            await asyncio.gather(running, ending, return_exceptions=True)


@contextlib.asynccontextmanager
async def _running_server(
    service: Service, listener: socket.socket
) -> AsyncIterator[tuple[_Server, asyncio.Task[None]]]:
    # uvicorn reports what clients do wrong, and each failure again with a traceback; ours are said once.
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    logging.getLogger("uvicorn").propagate = False
    door = service.config.door
    context, protocol = tls_context(door), guarded_protocol()
    config = uvicorn.Config(
        make_app(service),
        http=protocol,
        backlog=BACKLOG,
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
        ssl_context_factory=(lambda _config, _default: context) if context else None,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
    )
    # What is imported stays, and a token leaves no cycles: looking for garbage took 8 % of the time of each.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_EVERY)
    server, loop = _Server(config), asyncio.get_running_loop()
    loop.set_exception_handler(handler_of(protocol))
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
        loop.set_exception_handler(None)
