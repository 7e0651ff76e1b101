"""Bring up the connection to one host: open it, warm it up, test it. Both ends do the same steps at the same time.

Over verbs the socket on which the two met stays as the side connection. After every step each end tells the other
there how it went, so both go on, or both try again with fresh queue pairs; a direction of a new UC queue pair may be
dead, and only new ones help. Three attempts, for repeated ones can wedge a port until the machine is started again.
"""

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from expertd.errors import ExpertdError
from expertd.link import codes
from expertd.link.connection import BULK, LATENCY, Connection
from expertd.link.handshake import SetupFailed
from expertd.link.messages import LinkPeer, LinkReport, LinkSetup
from expertd.native._transport import ffi, lib

PAUSES_S = (0.0, 0.25, 1.0)  # before each attempt
LATENCY_FRAMES, BULK_FRAMES, SAFE_BULK_FRAMES = 4, 32, 4
LATENCY_DEPTH, BULK_DEPTH = 16, 8
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
            self.sock.settimeout(timeout_s)
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
    stage_s = _stage_s(setup)

    def test() -> LinkReport:
        connection.swap(
            b"", 0, timeout_s=max(0.0, deadline - time.monotonic())
        )  # it may be busy with another host still
        connection.warm_up(stage_s)
        measured = [
            _self_test(connection, setup.host < peer.host, queue, n, stage_s)
            for queue, n in NUM_TESTS_TCP.items()
        ]
        return _report(peer.host, "tcp", peer.interface, 1, measured[0], measured[1])

    try:
        return Link(connection, None, _checked(connection, peer.host, test))
    except SetupFailed:
        connection.close()
        raise


def _stage_s(setup: LinkSetup) -> float:
    """The time for one step: three attempts, each of which fails at one of them, take half of what there is."""
    return setup.setup_s / 6


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
        raise SetupFailed(_code_name(connection), f"host {host}: {e}", host) from e


def _code_name(connection: Connection | None) -> str:
    code = lib.xd_connection_failure(connection.handle, ffi.NULL, 0) if connection else lib.XD_OK
    return codes.name(code) if code else "XD_DEVICE"


class _Attempt(Exception):
    """A step of an attempt has failed, here or at the other end: "XD_NAME reason"."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class _Verbs:
    """The attempts to bring up verbs with one host."""

    def __init__(self, setup: LinkSetup, peer: LinkPeer, sock: socket.socket, deadline: float) -> None:
        self._setup, self._peer, self._deadline = setup, peer, deadline
        self._side, self._stage_s = Side(sock, peer.host), _stage_s(setup)
        self._verbs = self._device = None
        self._connection: Connection | None = None

    def establish(self) -> Link:
        bulk_frames, failed = BULK_FRAMES, _Attempt("", "")
        for attempt, pause_s in enumerate(PAUSES_S, 1):
            time.sleep(pause_s)
            if attempt == len(PAUSES_S) or failed.step == "bulk test":
                bulk_frames = SAFE_BULK_FRAMES
            try:
                return self._attempt(attempt, bulk_frames)
            except _Attempt as e:
                failed = e
            finally:
                if failed.reason:
                    self._clean_up()
            if failed.reason.startswith("XD_UNAVAILABLE"):
                break
        code, _, reason = failed.reason.partition(" ")
        raise SetupFailed(code, f"host {self._peer.host}, verbs, {failed.step}: {reason}", self._peer.host)

    def _attempt(self, attempt: int, bulk_frames: int) -> Link:
        self._in_step("open", lambda: self._open(bulk_frames))
        local = ffi.new("xd_verbs_endpoint *")
        lib.xd_verbs_local(self._verbs, local)
        theirs = self._side.swap(bytes(ffi.buffer(local)), self._left_s())
        self._in_step("connect", lambda: self._connect(theirs))
        self._in_step("start", self._start)
        connection = self._connection
        assert connection
        lower = self._setup.host < self._peer.host
        self._in_step("warm-up", lambda: connection.warm_up(self._stage_s))
        measured = [
            self._in_step(
                step, lambda q=queue: _self_test(connection, lower, q, NUM_TESTS_VERBS[q], self._stage_s)
            )
            for step, queue in (("latency test", LATENCY), ("bulk test", BULK))
        ]
        report = _report(self._peer.host, "verbs", self._name, attempt, measured[0], measured[1])
        return Link(connection, self._side, report)

    def _in_step(self, step: str, work: Callable[[], Any]) -> Any:
        """Do our half of a step, tell the other end how it went, and hear how it went there."""
        failure, result = "", None
        try:
            result = work()
        except SetupFailed as e:
            failure = f"{e.code} {e.reason}"
        except ExpertdError as e:
            failure = f"{_code_name(self._connection)} {e}"
        theirs = self._side.swap(failure.encode()[:MAX_SIDE_BYTES], self._left_s()).decode(errors="replace")
        if failure or theirs:
            code_name, _, reason = theirs.partition(" ")
            raise _Attempt(step, failure or f"{code_name} it says: {reason}")
        return result

    def _open(self, bulk_frames: int) -> None:
        err = codes.buffer()
        texts = [
            ffi.new("char[]", t.encode()) for t in (self._setup.verbs_library, "", self._peer.local_address)
        ]
        config = ffi.new(
            "xd_verbs_config *",
            {
                "library": texts[0],
                "device": texts[1],
                "local_ip": texts[2],
                "latency_frames": LATENCY_FRAMES,
                "bulk_frames": bulk_frames,
                "latency_depth": LATENCY_DEPTH,
                "bulk_depth": BULK_DEPTH,
                "lint": self._setup.lint,
            },
        )
        self._verbs = lib.xd_verbs_open(config, err, len(err))
        if self._verbs == ffi.NULL:
            self._verbs = None
            raise SetupFailed("XD_UNAVAILABLE", codes.text(err))
        self._name = codes.text(lib.xd_verbs_name(self._verbs))

    def _connect(self, theirs: bytes) -> None:
        err, remote = codes.buffer(), ffi.new("xd_verbs_endpoint *")
        if len(theirs) != ffi.sizeof("xd_verbs_endpoint"):
            raise SetupFailed("XD_CORRUPT", f"an endpoint of {len(theirs)} bytes")
        ffi.memmove(remote, theirs, len(theirs))
        if code := lib.xd_verbs_connect(self._verbs, remote, err, len(err)):
            raise SetupFailed(codes.name(code), codes.text(err))

    def _start(self) -> None:
        err, verbs, self._verbs = codes.buffer(), self._verbs, None
        pointer = lib.xd_verbs_start(verbs, self._setup.epoch, self._side.sock.fileno(), err, len(err))
        if pointer == ffi.NULL:
            raise SetupFailed("XD_DEVICE", codes.text(err))
        self._connection = Connection(pointer)

    def _clean_up(self) -> None:
        if self._connection:
            self._connection.close()
        elif self._verbs:
            lib.xd_verbs_close(self._verbs)
        self._connection = self._verbs = None

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())
