"""A probe over the loopback: both ends in this process, as two threads."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from expertd.topology import measure
from expertd.topology.measure import ProbeError, probe, serve_probe

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with ours, theirs:
            yield ours, theirs


def in_thread(run: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            run()
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=guarded)
    thread.start()
    return thread, errors


def test_probe(pair: Pair) -> None:
    thread, errors = in_thread(lambda: serve_probe(pair[1]))
    small, large = probe(pair[0], payloads=(64, 16384), num=40, bulk=(2, 1 << 18))
    thread.join(20)
    assert not thread.is_alive() and errors == []
    assert (small.payload_bytes, large.payload_bytes, small.num) == (64, 16384, 40)
    for m in (small, large):
        assert 0 < m.p50_us <= m.p99_us < 5e6
        assert m.bandwidth_mb_s > 0
    assert pair[0].fileno() == pair[1].fileno() == -1  # both were taken over, and closed


def test_silent_peer_ends_the_probe(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(ProbeError):
        probe(pair[0], timeout_s=0.3)
    assert time.monotonic() - began < 10


def test_peer_that_goes_away_ends_it_soon(pair: Pair) -> None:
    pair[1].close()
    began = time.monotonic()
    with pytest.raises(ProbeError):
        probe(pair[0], timeout_s=30)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("end", [probe, serve_probe])
def test_stranger_is_refused(end: Callable[..., object], pair: Pair) -> None:
    pair[1].sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
    with pytest.raises(ProbeError):
        end(pair[0], timeout_s=5)


@pytest.mark.parametrize(
    "plan",
    [(1 << 20, 3, 1 << 20, 64), (10, 3, 1 << 30, 64), (10, 3, 64, 1 << 30), (10, 3, 64, 0), (0, 0, 0, 0)],
)
def test_greedy_plan_is_refused(
    plan: tuple[int, int, int, int], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer, authenticated or not, cannot keep us busy for long or make us allocate."""
    thread, errors = in_thread(lambda: serve_probe(pair[1], timeout_s=5))
    num, num_bulk, bulk_bytes, payload = plan
    magic = b"xdprobe1" if num else b"xdprobe2"
    with measure._Swapper(pair[0], 5) as swapper:
        data = struct.pack("<8sIII4I", magic, num, num_bulk, bulk_bytes, payload, 0, 0, 0)
        swapper.swap(measure._TAG_PLAN, data.ljust(64, b"\0"), 64)
        thread.join(20)
    assert [type(e) for e in errors] == [ProbeError] and "does not know or allow" in str(errors[0])


def test_too_many_payloads() -> None:
    with socket.socket() as sock, pytest.raises(ValueError, match="wanted 1 to 4"):
        probe(sock, payloads=range(5))
