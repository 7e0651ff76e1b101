"""Time a path: symmetric exchanges over one TCP connection, through the code that decoding uses.

Both ends call the C transport's xd_swap, which is what an exchange between hosts is: each end sends and takes the same
number of bytes, and neither goes on before it has the other's. So p50 is the cost of one exchange, not of a ping: of
two messages that pass each other. The side that probes says in a first swap of 64 bytes what will follow; the
other refuses what would take longer or more memory than it allows.
"""

import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from expertd.native._transport import ffi, lib
from expertd.topology.values import Measurement

PAYLOADS = (64, 16384)  # bytes: a bare round, and a row of 4096 float32 as decode swaps it
NUM = 200
NUM_BULK, BULK_BYTES = 3, 1 << 20
WARM_UP = 5
TIMEOUT_S = 10.0
MAX_PAYLOADS, MAX_NUM, MAX_BYTES = 4, 2000, 4 << 20

_PLAN = struct.Struct("<8sIII4I")  # magic, times of each payload, times and bytes of bulk, payloads (0: none)
_MAGIC = b"xdprobe1"
_EPOCH = 0  # a probe belongs to no epoch of a group; those count from 1
_TAG_PLAN, _TAG_DATA = 1, 2
_PLAN_BYTES = 64


class ProbeError(OSError):
    """A path was not measured to the end; the message says why."""


def probe(
    sock: socket.socket,
    payloads: Sequence[int] = PAYLOADS,
    num: int = NUM,
    bulk: tuple[int, int] = (NUM_BULK, BULK_BYTES),
    timeout_s: float = TIMEOUT_S,
) -> tuple[Measurement, ...]:
    """Measure the path of a connected, authenticated TCP socket whose other end runs serve_probe; closes the socket.

    One Measurement per payload. Raises ProbeError when it fails or takes longer than timeout_s.
    """
    if not 1 <= len(payloads) <= MAX_PAYLOADS:
        raise ValueError(f"{len(payloads)} payloads, wanted 1 to {MAX_PAYLOADS}")
    plan = _PLAN.pack(_MAGIC, num, *bulk, *(*payloads, 0, 0, 0)[:MAX_PAYLOADS])
    with _Swapper(sock, timeout_s) as swapper:
        swapper.swap(_TAG_PLAN, plan.ljust(_PLAN_BYTES, b"\0"), _PLAN_BYTES)
        times = [_time(swapper, size, num, WARM_UP) for size in payloads]
        bulk_us = statistics.median(_time(swapper, bulk[1], bulk[0], warm_up=1))
    bandwidth_mb_s = round(bulk[1] / bulk_us, 1)
    return tuple(_summary(t, size, bandwidth_mb_s) for t, size in zip(times, payloads, strict=True))


def serve_probe(sock: socket.socket, timeout_s: float = TIMEOUT_S) -> None:
    """Be the other end of one probe; closes the socket. Raises ProbeError."""
    with _Swapper(sock, timeout_s) as swapper:
        magic, num, num_bulk, bulk_bytes, *payloads = _PLAN.unpack_from(
            swapper.swap(_TAG_PLAN, bytes(_PLAN_BYTES), _PLAN_BYTES)
        )
        sizes = [size for size in payloads if size]
        if (
            magic != _MAGIC
            or not sizes
            or max(num, num_bulk) > MAX_NUM
            or max([*sizes, bulk_bytes]) > MAX_BYTES
        ):
            raise ProbeError("the other host asks for a probe that this version does not know or allow")
        for size in sizes:
            _time(swapper, size, num, WARM_UP)
        _time(swapper, bulk_bytes, num_bulk, warm_up=1)


def _time(swapper: "_Swapper", size: int, num: int, warm_up: int) -> list[float]:
    """Microseconds of each of `num` exchanges of `size` bytes each way."""
    swap = swapper.swapper(_TAG_DATA, size)
    for _ in range(warm_up):
        swap()
    times = []
    for _ in range(num):
        start = time.perf_counter()
        swap()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _summary(times_us: list[float], payload_bytes: int, bandwidth_mb_s: float) -> Measurement:
    ordered = sorted(times_us)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return Measurement(
        round(statistics.median(ordered), 2), round(p99, 2), bandwidth_mb_s, payload_bytes, len(ordered)
    )


class _Swapper:
    """A connection of the C transport over a socket, which it takes over, with one deadline for all of it."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        err = ffi.new("char[240]")
        fd = sock.detach()
        self._connection = lib.xd_tcp_open(fd, _EPOCH, err, len(err))
        if self._connection == ffi.NULL:
            socket.close(fd)
            raise ProbeError(_text(err))

    def swap(self, tag: int, mine: bytes, their_size: int) -> bytes:
        theirs = ffi.new("char[]", their_size)
        self._swap(tag, ffi.from_buffer(mine), len(mine), theirs, their_size)
        return bytes(ffi.buffer(theirs, their_size))

    def swapper(self, tag: int, size: int) -> Callable[[], None]:
        """The same exchange of `size` zeros, many times, without making anything on the way."""
        mine, theirs = ffi.new("char[]", max(1, size)), ffi.new("char[]", max(1, size))
        return lambda: self._swap(tag, mine, size, theirs, size)

    def _swap(self, tag: int, mine: Any, size: int, theirs: Any, their_size: int) -> None:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise ProbeError("the probe took longer than its limit")
        code = lib.xd_swap(self._connection, tag, mine, size, theirs, their_size, remaining_s)
        if code != lib.XD_OK:
            err = ffi.new("char[240]")
            lib.xd_connection_failure(self._connection, err, len(err))
            raise ProbeError(_text(err) or f"the transport gave code {code}")

    def __enter__(self) -> "_Swapper":
        return self

    def __exit__(self, *_: object) -> None:
        lib.xd_connection_close(self._connection)


def _text(err: Any) -> str:
    return str(ffi.string(err).decode(errors="replace"))
