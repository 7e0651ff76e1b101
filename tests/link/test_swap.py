"""Swaps, warm-up and self-test of a connection over TCP: right bytes, and an end to every wait."""

import functools
import hashlib
import itertools
import random
import subprocess
import sys
import threading

import pytest

from expertd.errors import LinkDown, LinkTimeout, RemoteProtocolError
from expertd.link.connection import BEAT, BULK, END, LATENCY, ROUND, Connection
from tests.link.sockets import (
    DEADLINE_S,
    EPOCH,
    TINY,
    against_hand,
    connections,
    frame,
    read_frame,
    tcp_pair,
    together,
)

SWAPS = [(0, 0), (1, 0), (0, 1), (16384, 4096), (65536, 65537), (3_000_000, 1), (1_500_000, 1_500_000)]


def swap_all(connection: Connection, side: int) -> None:
    for i, sizes in enumerate(SWAPS):
        mine, theirs = (random.Random(2 * i + s).randbytes(sizes[s]) for s in (side, 1 - side))
        assert connection.swap(mine, len(theirs), tag=i, timeout_s=DEADLINE_S) == theirs


@pytest.mark.parametrize("buffer_bytes", [0, TINY], ids=["usual", "tiny"])
def test_swap_gives_the_others_bytes(buffer_bytes: int) -> None:
    with connections(buffer_bytes) as (left, right):
        assert together(lambda: swap_all(left, 0), lambda: swap_all(right, 1)) == [None, None]


PEER = f"""
import hashlib, random, socket, sys
from expertd.link.connection import Connection
rng, sha = random.Random(5), hashlib.sha256()
with Connection.from_socket(socket.socket(fileno=int(sys.argv[1])), {EPOCH}) as connection:
    for i in range(300):
        mine, their_size = rng.randbytes(rng.randrange(40000)), rng.randrange(40000)
        sha.update(mine)
        sha.update(connection.swap(mine, their_size, tag=i, timeout_s={DEADLINE_S}))
print(sha.hexdigest())
"""


def test_swaps_between_processes() -> None:
    ours, theirs = tcp_pair()
    with theirs:
        command = [sys.executable, "-c", PEER, str(theirs.fileno())]
        peer = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
    rng, source, sha = random.Random(5), random.Random(6), hashlib.sha256()
    with Connection.from_socket(ours, EPOCH) as connection:
        for i in range(300):
            theirs_wanted, size = rng.randbytes(rng.randrange(40000)), rng.randrange(40000)
            mine = source.randbytes(size)
            assert connection.swap(mine, len(theirs_wanted), tag=i, timeout_s=DEADLINE_S) == theirs_wanted
            sha.update(theirs_wanted)
            sha.update(mine)
    assert peer.communicate(timeout=DEADLINE_S)[0].strip() == sha.hexdigest()


# Swaps that go wrong.


def test_a_swap_ends_at_its_deadline() -> None:
    with (
        connections() as (left, _),
        pytest.raises(LinkTimeout, match=r"exchange 4: 0 of 9 bytes came in 0\.050 s"),
    ):
        left.swap(b"abc", 9, tag=4, timeout_s=0.05)


def test_a_swap_ends_at_its_deadline_under_a_flood() -> None:
    stop = threading.Event()

    with against_hand() as (connection, hand):
        numbers = itertools.count(1)

        def beat() -> None:
            while not stop.is_set():
                hand.sendall(frame(kind=BEAT, sequence=next(numbers)))

        def swap() -> None:
            try:
                connection.swap(b"", 9, timeout_s=0.2)
            finally:
                stop.set()

        swapped, _ = together(swap, beat)
    assert isinstance(swapped, LinkTimeout)


@pytest.mark.parametrize("tag, their_size", [(6, 3), (5, 4), (5, 0)])
def test_a_swap_that_does_not_match_is_refused(tag: int, their_size: int) -> None:
    with connections() as (left, right):
        mine, theirs = together(
            lambda: left.swap(b"abc", 3, tag=5, timeout_s=1.0),
            lambda: right.swap(b"abc", their_size, tag=tag, timeout_s=1.0),
        )
    assert RemoteProtocolError in {type(mine), type(theirs)}
    assert "wanted exchange" in str(mine) + str(theirs)


def test_a_swap_passes_over_beats_and_ends_with_the_epoch() -> None:
    with connections() as (left, right):
        right.send(BEAT, b"pulses")
        right.send(ROUND, b"abc", tag=1)
        assert left.swap(b"xyz", 3) == b"abc"
        right.send(END, b"rank 1 died")
        with pytest.raises(LinkDown, match="the peer ended the epoch: rank 1 died"):
            left.swap(b"xyz", 3)


def test_a_swap_does_not_look_beyond_its_end() -> None:
    """Our last bytes are kept for want of room, and the next swap's first piece is here: it must wait its turn."""
    mine = bytes(60_000)
    a, hand = tcp_pair(TINY)
    with Connection.from_socket(a, EPOCH) as connection, hand:
        hand.sendall(frame(b"one", kind=ROUND, tag=1) + frame(b"two", kind=ROUND, tag=2, sequence=2))

        def read() -> list[int]:
            hand.settimeout(DEADLINE_S)
            return [read_frame(hand)["length"] for _ in range(2)]

        swap = functools.partial(connection.swap, timeout_s=DEADLINE_S)
        results = together(lambda: [swap(mine, 3, tag=1), swap(mine, 3, tag=2)], read)
    assert results == [[b"one", b"two"], [60_000, 60_000]]


def test_a_swap_whose_last_bytes_nobody_takes_ends_with_the_peer() -> None:
    a, hand = tcp_pair(TINY)
    with Connection.from_socket(a, EPOCH) as connection, hand:
        hand.sendall(frame(b"one", kind=ROUND, tag=1))
        threading.Timer(0.05, hand.close).start()
        with pytest.raises(LinkDown, match="the peer closed the connection"):
            connection.swap(bytes(60_000), 3, tag=1, timeout_s=DEADLINE_S)


# Starting.


@pytest.mark.parametrize("buffer_bytes", [0, TINY], ids=["usual", "tiny"])
def test_warm_up_and_self_test(buffer_bytes: int) -> None:
    def work(connection: Connection, first: bool) -> list[list[float]]:
        connection.warm_up(DEADLINE_S)
        return [connection.self_test(first, queue, 20, DEADLINE_S) for queue in (LATENCY, BULK)]

    with connections(buffer_bytes) as (left, right):
        measured, none = together(lambda: work(left, True), lambda: work(right, False))
        assert none == [[], []]
        assert [len(times) for times in measured] == [20, 20]
        assert all(0 < us < DEADLINE_S * 1e6 for times in measured for us in times)
        assert left.receive() is None  # nothing is left over
        assert right.receive() is None


def test_warm_up_names_the_dead_direction() -> None:
    with (
        connections() as (left, _),
        pytest.raises(LinkTimeout, match="queue bulk: nothing comes from the peer"),
    ):
        left.warm_up(0.05)
    with against_hand() as (connection, hand):
        hand.sendall(frame(bytes(connection.max_payload(BULK)), queue=BULK, tag=1))
        with pytest.raises(LinkTimeout, match="queue bulk: the peer lives but does not hear us"):
            connection.warm_up(1.0)


def test_a_self_test_notices_changed_bytes() -> None:
    """Changed, but with right checksums: as a page of an earlier message would be."""
    with against_hand() as (connection, hand):
        hand.sendall(frame(bytes(connection.max_payload(LATENCY)), tag=4, round=1))
        with pytest.raises(RemoteProtocolError, match="message 1 came back changed"):
            connection.self_test(True, LATENCY, 1, DEADLINE_S)


def test_a_self_test_without_an_answer_ends() -> None:
    with connections() as (left, _), pytest.raises(LinkTimeout, match="no answer in"):
        left.self_test(True, LATENCY, 3, 0.05)
