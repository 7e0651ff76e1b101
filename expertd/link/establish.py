"""Bring up the connection to one host: open it, warm it up, test it. Both ends do the same steps at the same time.

Over verbs the socket on which the two met stays as the side connection. After every step each end tells the other
there how it went, so both go on, or both try again with fresh queue pairs; a direction of a new UC queue pair may be
dead, and only new ones help. Three attempts, for repeated ones can wedge a port until the machine is started again.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from expertd.errors import ClusterError, ExpertdError
from expertd.link import codes
from expertd.link.connection import BULK, LATENCY, Connection
from expertd.link.handshake import SetupFailed
from expertd.link.messages import LinkPeer, LinkReport, LinkSetup
from expertd.link.verbs import Config, Verbs
from expertd.native._transport import ffi, lib

PAUSES_S = (0.0, 0.25, 1.0)  # before each attempt
BULK_FRAMES, SAFE_BULK_FRAMES = 32, 4
# Messages of the self-test, in each direction.
NUM_TESTS_TCP = {LATENCY: 50, BULK: 10}
NUM_TESTS_VERBS = {LATENCY: 200, BULK: 200}
MAX_SIDE_BYTES = 2000


class Link:
    """A connection that works, the socket it was made over, and what its self-test measured."""

    def __init__(self, connection: Connection, side: "Side | None", report: LinkReport) -> None:
        self.connection, self.report, self._side = connection, report, side

    def meet(self, timeout_s: float) -> None:
        """Wait until the other end is here too. Raises SetupFailed."""
        if self._side:
            self._side.swap(b"", timeout_s)
        else:
            _checked(
                self.connection, self.report.host, lambda: self.connection.swap(b"", 0, timeout_s=timeout_s)
            )

    def close(self) -> None:
        """Give everything back; the side connection last, for the other end watches it."""
        self.connection.close()
        if self._side:
            self._side.sock.close()


class Side:
    """The side connection to a host: both ends say something short and hear the other's."""

    def __init__(self, sock: socket.socket, host: int) -> None:
        self.sock, self._host = sock, host

    def swap(self, mine: bytes, timeout_s: float) -> bytes:
        """Raises SetupFailed when the other end is gone or says nothing for timeout_s."""
        deadline = time.monotonic() + timeout_s
        try:
            self.sock.settimeout(max(0.001, timeout_s))
            self.sock.sendall(len(mine).to_bytes(2, "little") + mine)
            size = int.from_bytes(self._read(2, deadline), "little")
            if size > MAX_SIDE_BYTES:
                raise SetupFailed("XD_CORRUPT", f"side connection: a message of {size} bytes", self._host)
            return self._read(size, deadline)
        except TimeoutError:
            raise SetupFailed(
                "XD_TIMEOUT", f"host {self._host} lives but does not answer", self._host
            ) from None
        except OSError as e:
            raise SetupFailed("XD_CLOSED", f"side connection to host {self._host}: {e}", self._host) from e

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise SetupFailed("XD_CLOSED", f"host {self._host} hung up while setting up", self._host)
            data += piece
        return data


def establish(setup: LinkSetup, peer: LinkPeer, sock: socket.socket, deadline: float) -> Link:
    """Make the proven socket to `peer` a tested connection, by `deadline` (time.monotonic). Raises SetupFailed."""
    if setup.kind == "verbs":
        return _Verbs(setup, peer, sock, deadline).establish()
    connection = Connection.from_socket(sock, setup.epoch)
    step_s = _step_s(setup)

    def test() -> LinkReport:
        # It may still be busy with another host.
        connection.swap(b"", 0, timeout_s=max(0.0, deadline - time.monotonic()))
        connection.warm_up(step_s)
        latency, bulk = (
            _self_test(connection, setup.host < peer.host, queue, num_messages, step_s)
            for queue, num_messages in NUM_TESTS_TCP.items()
        )
        return _report(peer.host, "tcp", peer.interface, 1, latency, bulk)

    try:
        return Link(connection, None, _checked(connection, peer.host, test))
    except SetupFailed:
        connection.close()
        raise


def _step_s(setup: LinkSetup) -> float:
    """The time for one step: three attempts, each failing at one of them, take less than half of what there is."""
    return setup.setup_s / 8


def _self_test(
    connection: Connection, lower: bool, queue: int, num_messages: int, timeout_s: float
) -> list[float]:
    """Each end in turn is first, so that each has figures: sorted half round trips in us."""
    round_trips: list[float] = []
    for first in (lower, not lower):
        found = connection.self_test(first, queue, num_messages, timeout_s)
        round_trips = found if first else round_trips
    return sorted(us / 2 for us in round_trips)


def _report(
    host: int, kind: str, device: str, attempts: int, latency_us: Sequence[float], bulk_us: Sequence[float]
) -> LinkReport:
    p50, p99 = latency_us[len(latency_us) // 2], latency_us[len(latency_us) * 99 // 100]
    return LinkReport(host, kind, device, attempts, p50, p99, bulk_us[len(bulk_us) // 2])


def _checked(connection: Connection, host: int, work: Callable[[], Any]) -> Any:
    """Do something with a connection; its failure is the set-up's."""
    try:
        return work()
    except ExpertdError as e:
        raise SetupFailed(_code_name(connection, e), f"host {host}: {e}", host) from e


def _code_name(connection: Connection | None, e: ExpertdError) -> str:
    """What to call a failure: as the connection does, if there was one."""
    code = lib.xd_connection_failure(connection.handle, ffi.NULL, 0) if connection else lib.XD_OK
    return codes.name(code) if code else "XD_UNAVAILABLE" if isinstance(e, ClusterError) else "XD_DEVICE"


class _StepFailed(Exception):
    """A step of an attempt has failed, here or at the other end."""

    def __init__(self, step: str, code: str, reason: str) -> None:
        super().__init__(reason)
        self.step, self.code, self.reason = step, code, reason


class _Verbs:
    """The attempts to bring up verbs with one host."""

    def __init__(self, setup: LinkSetup, peer: LinkPeer, sock: socket.socket, deadline: float) -> None:
        self._setup, self._peer, self._deadline = setup, peer, deadline
        self._side = Side(sock, peer.host)
        self._connection: Connection | None = None

    def establish(self) -> Link:
        failed, bulk_frames = _StepFailed("", "", ""), BULK_FRAMES
        for attempt, pause_s in enumerate(PAUSES_S, 1):
            time.sleep(pause_s)
            if attempt == len(PAUSES_S) or failed.step == "bulk test":
                bulk_frames = SAFE_BULK_FRAMES
            try:
                with contextlib.ExitStack() as opened:
                    link = self._attempt(attempt, bulk_frames, opened)
                    opened.pop_all()
                    return link
            except _StepFailed as e:
                failed = e
            if failed.step == "open":  # another try will find the same
                break
        reason = f"host {self._peer.host}, verbs, {failed.step}: {failed.reason}"
        raise SetupFailed(failed.code, reason, self._peer.host)

    def _attempt(self, attempt: int, bulk_frames: int, opened: contextlib.ExitStack) -> Link:
        setup, side_fd, step_s = self._setup, self._side.sock.fileno(), _step_s(self._setup)
        self._connection = None
        config = Config(
            local_ip=self._peer.local_address,
            library=setup.verbs_library,
            bulk_frames=bulk_frames,
            lint=setup.lint,
        )
        verbs = self._in_step("open", lambda: opened.enter_context(Verbs(config)))
        theirs = self._side.swap(verbs.local, self._left_s())
        self._in_step("connect", lambda: verbs.connect(theirs))
        handle = self._in_step("start", lambda: verbs.start(setup.epoch, side_fd))
        connection = self._connection = opened.enter_context(Connection(handle))
        self._in_step("warm-up", lambda: connection.warm_up(step_s))
        lower = setup.host < self._peer.host
        latency, bulk = (
            self._in_step(step, partial(_self_test, connection, lower, queue, NUM_TESTS_VERBS[queue], step_s))
            for step, queue in (("latency test", LATENCY), ("bulk test", BULK))
        )
        return Link(
            connection, self._side, _report(self._peer.host, "verbs", verbs.device, attempt, latency, bulk)
        )

    def _in_step(self, step: str, work: Callable[[], Any]) -> Any:
        """Do our half of a step, tell the other end how it went, and hear how it went there."""
        failure, result = "", None
        try:
            result = work()
        except ExpertdError as e:
            failure = f"{_code_name(self._connection, e)} {e}"
        theirs = self._side.swap(failure.encode()[:MAX_SIDE_BYTES], self._left_s()).decode(errors="replace")
        if failure or theirs:
            code, _, reason = (failure or theirs).partition(" ")
            raise _StepFailed(step, code, reason if failure else f"it says: {reason}")
        return result

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())
