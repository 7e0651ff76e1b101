"""The ways between the hosts of a group: each is measured with what decoding sends, and the fastest is the route.

A host measures its ways to those that joined before it. It connects once per pair of addresses on one subnet, pinned to
the interface, proves that it knows the group's secret, and swaps payloads over the code that links use (topology/).
An interface's name or kind decides nothing.
"""

import asyncio
import logging
import socket
from collections.abc import Collection, Sequence
from importlib.metadata import version

from expertd.cluster.host_messages import HostAddress, Measure, PathReport
from expertd.cluster.tls import explain
from expertd.link.handshake import Identity, Stranger, answer, call
from expertd.topology.measure import probe, serve_probe
from expertd.topology.pin import bind_to_route, check_route
from expertd.topology.routes import candidate_paths, should_change
from expertd.topology.values import Interface, Path

PROBE_TIMEOUT_S = 10.0
PROVE_TIMEOUT_S = 5.0
MAX_PROBES = 8
ACCEPT_PAUSE_S = 0.1
# A probe belongs to no epoch; who calls is 1, who listens 0, whatever their places in the group.
_NO_EPOCH, _LISTENER, _CALLER = 0, 0, 1

_log = logging.getLogger(__name__)


class Paths:
    """This host's interfaces and the port on which others measure their way to it. `verbs` says why it has no RDMA."""

    def __init__(self, interfaces: Sequence[Interface], verbs: str) -> None:
        self._interfaces, self.verbs = interfaces, verbs
        self.mlx_version = version("mlx")
        self.secret = b""
        self.probe_port = 0
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()

    def addresses(self, near: str) -> list[HostAddress]:
        """Our IPv4 addresses, those of the loopback only when `near`, which the other host reached, is one of them."""
        with_loopback = near.startswith("127.")
        return [
            HostAddress(i.name, i.kind, a.ip, a.prefix_length)
            for i in self._interfaces
            for a in i.addresses
            if i.up and ":" not in a.ip and (i.kind == "loopback") <= with_loopback
        ]

    # Being measured.

    def open(self, address: str) -> None:
        """Listen for probes, on any port."""
        self._listener = socket.create_server((address, 0), backlog=MAX_PROBES)
        self._listener.setblocking(False)
        self.probe_port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def close(self) -> None:
        tasks = [*self._probes, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener:
            self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # out of descriptors: the backlog keeps callers while others end
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            if len(self._probes) >= MAX_PROBES:
                sock.close()
                continue
            task = asyncio.create_task(self._serve(sock))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(PROVE_TIMEOUT_S):
                await answer(Identity(_NO_EPOCH, _LISTENER, self.secret), sock)
                await asyncio.get_running_loop().sock_sendall(sock, b"\x01")
            await asyncio.to_thread(serve_probe, sock, PROBE_TIMEOUT_S)
        except (OSError, Stranger) as e:  # a TimeoutError is an OSError
            _log.debug("a probe failed: %s", e)
        finally:
            sock.close()

    # Measuring.

    async def measure_to(self, message: Measure) -> list[PathReport]:
        """Measure every way to a host, one after another; one that cannot be used says why."""
        remote = {a.address: a for a in message.addresses}
        candidates = [*candidate_paths(self._interfaces, list(remote)), *self._loopback(remote)]
        return [await self._measure(p, remote[p.remote_address], message.port) for p in candidates]

    def _loopback(self, remote: Collection[str]) -> list[Path]:
        """The way between two groups of processes of one machine, as in tests."""
        own = [(i, a.ip) for i in self._interfaces for a in i.addresses if i.kind == "loopback"]
        return [Path(i.name, i.kind, ip, ip) for i, ip in own if ip in remote]

    async def _measure(self, path: Path, remote: HostAddress, port: int) -> PathReport:
        prefix = next(
            a.prefix_length
            for i in self._interfaces
            if i.name == path.interface
            for a in i.addresses
            if a.ip == path.local_address
        )
        local = HostAddress(path.interface, path.kind, path.local_address, prefix)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(PROVE_TIMEOUT_S):
                bind_to_route(sock, path.local_address, path.interface)
                await asyncio.get_running_loop().sock_connect(sock, (remote.address, port))
                check_route(sock, path.local_address, path.interface)
                await call(Identity(_NO_EPOCH, _CALLER, self.secret), _LISTENER, sock)
            results = await asyncio.to_thread(probe, sock, timeout_s=PROBE_TIMEOUT_S)
        except TimeoutError:
            return PathReport(local, remote, error=f"no answer within {PROVE_TIMEOUT_S:g} s")
        except OSError as e:
            return PathReport(local, remote, error=explain(e))
        except Stranger as e:
            return PathReport(local, remote, error=str(e))
        finally:
            sock.close()
        m = max(results, key=lambda r: r.payload_bytes)
        return PathReport(local, remote, m.payload_bytes, m.p50_us, m.p99_us, m.bandwidth_mb_s)


def best_path(paths: Sequence[PathReport], current: PathReport | None = None) -> PathReport | None:
    """The path with the fastest exchange; `current` stays unless another is much better. None when none works."""
    usable = [p for p in paths if not p.error]
    best = min(usable, key=lambda p: p.p50_us, default=None)
    same = next(
        (p for p in usable if current and (p.local, p.remote) == (current.local, current.remote)), None
    )
    return same if best and same and not should_change(same.p50_us, best.p50_us) else best
