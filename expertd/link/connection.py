"""A connection between two hosts; the C header native/transport.h is the contract. TCP and verbs look the same here.

The pump works on `handle` in C. What this class adds is for tests, benchmarks and the start of a link, where an
object and some copies per frame do not matter.
"""

import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from expertd.errors import ClusterError, LocalProtocolError
from expertd.link import codes
from expertd.native._transport import ffi, lib

LATENCY: int = lib.XD_LATENCY
BULK: int = lib.XD_BULK
HEADER_BYTES: int = lib.XD_HEADER_BYTES
ROUND: int = lib.XD_ROUND
BEAT: int = lib.XD_BEAT
END: int = lib.XD_END
TEST: int = lib.XD_TEST


@dataclass(frozen=True)
class Header:
    """What the sender said of a frame; `total` and `offset` are bytes, `sequence` counts per queue from 1."""

    kind: int
    queue: int
    source: int
    tag: int
    sequence: int
    round: int
    digest: int
    offset: int
    total: int


@dataclass(frozen=True)
class Statistics:
    """Of one connection since it was opened. `last_heard_ns` is on the clock of time.monotonic_ns()."""

    sent_frames: int
    sent_bytes: int
    received_frames: int
    received_bytes: int
    duplicates: int
    starved: int
    last_heard_ns: int


class Connection:
    """Owns `handle`, an xd_connection* that C has opened. One thread at a time may use it.

    Every method raises the connection's first failure: LinkDown (closed, silent, lost frames, device, ended),
    RemoteProtocolError (damaged or foreign frames), LinkTimeout; LocalProtocolError for what we did wrong.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._header = ffi.new("xd_header *")
        self._payload = ffi.new("void **")

    @classmethod
    def from_socket(cls, sock: socket.socket, epoch: int) -> Self:
        """Take over a connected TCP socket, which is detached.

        Raises ClusterError when it cannot be used; it is then still the caller's.
        """
        err = codes.buffer()
        handle = lib.xd_tcp_open(sock.fileno(), epoch, err, len(err))
        if handle == ffi.NULL:
            raise ClusterError(codes.text(err))
        sock.detach()
        return cls(handle)

    def max_payload(self, queue: int) -> int:
        """The most bytes of one frame of a queue."""
        return int(lib.xd_max_payload(self._open, queue))

    def send(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        queue: int = LATENCY,
        source: int = 0,
        tag: int = 0,
        round: int = 0,
        digest: int = 0,
        offset: int = 0,
        total: int | None = None,
    ) -> bool:
        """Send one frame; False when there is no credit or room now. `total` is the payload's size if not given."""
        values = {
            "kind": kind,
            "queue": queue,
            "source": source,
            "tag": tag,
            "round": round,
            "digest": digest,
        }
        size = len(payload)
        header = ffi.new(
            "xd_header *",
            values | {"offset": offset, "total": size if total is None else total, "length": size},
        )
        return self._check(lib.xd_send(self._open, header, payload))

    def receive(self) -> tuple[Header, bytes] | None:
        """The next frame that has come, of either queue; None when there is none."""
        if not self._check(lib.xd_receive(self._open, self._header, self._payload)):
            return None
        h = self._header
        header = Header(h.kind, h.queue, h.source, h.tag, h.sequence, h.round, h.digest, h.offset, h.total)
        return header, bytes(ffi.buffer(self._payload[0], h.length))

    def swap(self, mine: bytes, their_size: int, tag: int = 1, timeout_s: float = 60.0) -> bytes:
        """Give `mine` and take `their_size` bytes; the other end makes the matching call."""
        theirs = ffi.new("char[]", max(1, their_size))
        code = lib.xd_swap(self._open, tag, mine, len(mine), theirs, their_size, timeout_s)
        self._check(code)
        return bytes(ffi.buffer(theirs, their_size))

    def warm_up(self, timeout_s: float = 2.0) -> None:
        """Full-size frames of each queue both ways; both ends call it."""
        self._check(lib.xd_warm_up(self._open, timeout_s))

    def self_test(self, first: bool, queue: int, num_messages: int, timeout_s: float = 10.0) -> list[float]:
        """Round trips of full-size frames in µs, at the end that is `first`; the other gets []."""
        round_trip_us = ffi.new("double[]", max(1, num_messages))
        code = lib.xd_self_test(self._open, first, queue, num_messages, timeout_s, round_trip_us)
        self._check(code)
        return list(round_trip_us)[:num_messages] if first else []

    def statistics(self) -> Statistics:
        """The counters of this connection."""
        s = ffi.new("xd_statistics *")
        lib.xd_connection_statistics(self._open, s)
        return Statistics(
            s.sent_frames,
            s.sent_bytes,
            s.received_frames,
            s.received_bytes,
            s.duplicates,
            s.starved,
            s.last_heard_ns,
        )

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        err = codes.buffer()
        code = lib.xd_connection_failure(self._open, err, len(err))
        if code:
            raise codes.error(code, codes.text(err))

    @property
    def _open(self) -> Any:
        if self.handle == ffi.NULL:
            raise LocalProtocolError("the connection is closed")
        return self.handle

    def close(self) -> None:
        """End it and free it; may be called twice."""
        handle, self.handle = self.handle, ffi.NULL
        lib.xd_connection_close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, code: int) -> bool:
        if code == lib.XD_OK:
            return True
        if code == lib.XD_AGAIN:
            return False
        self.check()
        raise LocalProtocolError(f"the connection gave code {code} without a reason")
