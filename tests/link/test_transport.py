"""A connection over TCP: what it delivers, what it refuses, and that every wait ends."""

import itertools
import os
import random
import socket

import psutil
import pytest

from expertd.bench import soak
from expertd.errors import (
    ClusterError,
    LinkDown,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from expertd.link.connection import (
    BULK,
    END,
    LATENCY,
    ROUND,
    TEST,
    Connection,
    Header,
)
from expertd.native._transport import ffi, lib
from tests.link.sockets import (
    EPOCH,
    TINY,
    against_hand,
    connections,
    crc32c,
    frame,
    read_frame,
    tcp_pair,
    together,
)

LATENCY_GRANT, BULK_GRANT = 16, 8
QUEUES = pytest.mark.parametrize("queue, grant", [(LATENCY, LATENCY_GRANT), (BULK, BULK_GRANT)])


def take(connection: Connection) -> tuple[Header, bytes]:
    """The next frame, which is under way."""
    for _ in range(1_000_000):
        if (found := connection.receive()) is not None:
            return found
    raise AssertionError("nothing came")


def fails(connection: Connection, kind: type[TransportError], match: str) -> None:
    """What is under way fails the connection so, and so does everything after it."""
    with pytest.raises(kind, match=match):
        take(connection)
    for again in (connection.receive, lambda: connection.send(TEST), lambda: connection.swap(b"", 0)):
        with pytest.raises(kind, match=match):
            again()


# What arrives.


def pump_random(left: Connection, right: Connection, num_frames: int, seed: int) -> None:
    """Random frames on both queues both ways, each end sending and taking by turns; every byte is compared."""
    rng = random.Random(seed)
    under_way: dict[tuple[int, int], list[tuple[int, bytes]]] = {
        (i, q): [] for i in (0, 1) for q in (LATENCY, BULK)
    }
    ends, sent, taken = (left, right), 0, 0
    while taken < num_frames:
        i = rng.randrange(2)
        if sent < num_frames and rng.random() < 0.6:
            queue = rng.choice((LATENCY, BULK))
            size = rng.choice((0, 1, rng.randrange(5000), ends[i].max_payload(queue)))
            payload = rng.randbytes(size)
            if ends[i].send(TEST, payload, queue=queue, tag=sent):
                under_way[1 - i, queue].append((sent, payload))
                sent += 1
        elif (found := ends[i].receive()) is not None:
            header, payload = found
            assert (header.tag, payload) == under_way[i, header.queue].pop(0)
            taken += 1


@pytest.mark.parametrize("buffer_bytes", [0, TINY], ids=["usual", "tiny"])
def test_every_byte_arrives(buffer_bytes: int) -> None:
    with connections(buffer_bytes) as (left, right):
        pump_random(left, right, 400, seed=buffer_bytes)
        a, b = left.statistics(), right.statistics()
        assert (a.sent_bytes, b.sent_bytes) == (b.received_bytes, a.received_bytes)
        assert a.duplicates == b.duplicates == 0


def test_header_arrives() -> None:
    with connections() as (left, right):
        fields = {
            "source": 3,
            "tag": 2**32 - 1,
            "round": 2**64 - 1,
            "digest": 2**63,
            "offset": 5,
            "total": 11,
        }
        assert left.send(ROUND, b"abc", queue=BULK, **fields)
        header, payload = take(right)
        assert (header, payload) == (Header(kind=ROUND, queue=BULK, sequence=1, **fields), b"abc")


def test_bytes_may_come_one_by_one() -> None:
    """Through a go-between that passes single bytes on, so that every call may find any part of a frame."""
    payloads = [random.Random(i).randbytes(i * 9) for i in range(12)]
    ours, between = tcp_pair()
    back, theirs = tcp_pair()

    def pass_on() -> None:
        while data := back.recv(4096):
            for byte in data:
                between.sendall(bytes([byte]))

    def send() -> None:
        with Connection.from_socket(theirs, EPOCH) as left:
            for payload in payloads:
                assert left.send(TEST, payload)

    with between, back, Connection.from_socket(ours, EPOCH) as right:
        results = together(pass_on, send, lambda: [take(right)[1] for _ in payloads])
    assert results == [None, None, payloads]


def test_frames_that_came_before_the_end_are_delivered() -> None:
    with connections() as (left, right):
        for payload in (b"one", b"two"):
            assert left.send(END, payload)
        left.close()
        # Our own sends now fail, which must not hide what the peer said before it went.
        for _ in range(3):
            right.send(TEST, bytes(1000))
        assert [take(right)[1] for _ in range(2)] == [b"one", b"two"]
        fails(right, LinkDown, "^the peer closed the connection$")


# Credits.


def fill(connection: Connection, queue: int) -> int:
    """Send until there is no credit."""
    return next(n for n in itertools.count() if not connection.send(TEST, b"x", queue=queue))


@QUEUES
def test_credits_run_out_and_come_back(queue: int, grant: int) -> None:
    with connections() as (left, right):
        assert fill(left, queue) == grant
        assert left.statistics().starved == 1
        assert left.receive() is None
        assert fill(left, queue) == 0  # nobody took anything
        assert left.send(TEST, queue=1 - queue)  # the other queue has its own
        for _ in range(
            grant // 2 + 1 + 1
        ):  # half of the grant, the other queue's, and the call that gives back
            take(right)
        while left.receive() is None and left.statistics().received_frames == 0:
            pass
        assert fill(left, queue) >= grant // 2


@QUEUES
def test_bare_credits_stay_within_the_reserved_receives(queue: int, grant: int) -> None:
    """One way only, so that nothing rides along: a credit frame for each half of the grant, never three untaken."""
    rng = random.Random(grant)
    with against_hand() as (connection, hand):
        sent, known, num_credits = 0, 0, 0
        for _ in range(200):
            burst = rng.randint(0, known + grant - sent)
            hand.sendall(b"".join(frame(b"x", queue=queue, sequence=sent + i + 1) for i in range(burst)))
            sent += burst
            for _ in range(burst):
                take(connection)
            assert connection.receive() is None
            waiting = connection.statistics().sent_frames - num_credits
            assert waiting <= 2
            if rng.random() < 0.5 or sent == known + grant:
                for _ in range(waiting):
                    known = read_frame(hand)["credits"]
                    num_credits += 1
        assert num_credits >= sent // grant
        assert num_credits <= sent // (grant // 2)


def test_credits_ride_along() -> None:
    with connections() as (left, right):
        for i in range(200):
            assert left.send(TEST, b"ping", tag=i)
            assert take(right)[0].tag == i
            assert right.send(TEST, b"pong", tag=i)
            assert take(left)[0].tag == i
        assert left.statistics().sent_frames == right.statistics().sent_frames == 200


def test_a_peer_that_sends_more_than_its_grant_is_refused() -> None:
    a, b = tcp_pair(1)
    with Connection.from_socket(a, EPOCH) as connection, b:
        b.sendall(b"".join(frame(sequence=i + 1) for i in range(4)))
        for _ in range(BULK_GRANT):
            connection.send(TEST, bytes(connection.max_payload(BULK)), queue=BULK)  # no room for a credit now
        for i in range(4, LATENCY_GRANT):
            b.sendall(frame(sequence=i + 1))
        for _ in range(LATENCY_GRANT):
            take(connection)
        b.sendall(frame(sequence=LATENCY_GRANT + 1))
        fails(connection, RemoteProtocolError, "sends more than the 16 frames granted")


def test_credits_for_what_was_never_sent_are_refused() -> None:
    with against_hand() as (connection, hand):
        connection.send(TEST)
        hand.sendall(frame(credits=1))
        take(connection)
        hand.sendall(frame(sequence=2, credits=2))
        fails(connection, RemoteProtocolError, "took 2 frames, of 1 that were sent")


# What is refused.


def read(data: bytes, max_payload: int = 64) -> tuple[int, str]:
    """Code and reason of xd_frame_read."""
    header, err = ffi.new("xd_header *"), ffi.new("char[200]")
    code = lib.xd_frame_read(data, len(data), EPOCH, max_payload, header, err, len(err))
    return code, ffi.string(err).decode()


def test_every_single_byte_of_damage_is_refused() -> None:
    good = frame(random.Random(0).randbytes(40))
    assert read(good) == (lib.XD_OK, "")
    for at in range(len(good)):
        for flip in range(1, 256):
            damaged = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
            assert read(damaged)[0] == lib.XD_CORRUPT, (at, flip)


def test_damage_fails_the_connection_at_every_place() -> None:
    good = frame(b"eight b.")
    for at in range(len(good)):
        with against_hand() as (connection, hand):
            hand.sendall(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            fails(connection, RemoteProtocolError, "queue (latency|bulk): not a frame of this connection")


def test_a_frame_cut_short_is_not_complete() -> None:
    good = frame(b"eight b.")
    assert {read(good[:n])[0] for n in range(len(good))} == {lib.XD_AGAIN}
    assert read(good + b"next")[0] == lib.XD_OK


REFUSED: list[tuple[dict[str, int], str]] = [
    ({"magic": 1}, "magic 1, wanted"),
    ({"version": 2}, "version 2, wanted 1"),
    ({"epoch": EPOCH - 1}, f"epoch {EPOCH - 1}, wanted {EPOCH}"),
    ({"kind": 0}, "kind 0"),
    ({"kind": 6}, "kind 6"),
    ({"queue": 2}, "queue 2"),
    ({"length": 65}, "payload bytes 65, wanted 64"),
    ({"length": 2**32 - 1}, "payload bytes 4294967295"),
    ({"kind": 3}, "payload bytes 3, wanted 0"),
    ({"kind": 1, "total": 2}, "end of a piece 3, wanted 2"),
    ({"kind": 1, "offset": 2**32 - 1}, "end of a piece 4294967298, wanted 3"),
    ({"payload_crc": 5}, "payload checksum 5"),
]


@pytest.mark.parametrize("fields, reason", REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_a_header_that_lies_is_refused(fields: dict[str, int], reason: str) -> None:
    code, said = read(frame(b"abc", **fields))
    assert code == lib.XD_CORRUPT
    assert reason in said


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(4), bytes(100), frame(length=2**31), frame(kind=9), b"\xff" * 5000],
)
def test_a_stranger_is_refused(garbage: bytes) -> None:
    with against_hand() as (connection, hand):
        hand.sendall(garbage)
        fails(connection, RemoteProtocolError, "not a frame of this connection")


def test_a_frame_longer_than_its_queue_allows_is_refused() -> None:
    with against_hand() as (connection, hand):
        hand.sendall(frame(bytes(65536 + 1)))
        fails(connection, RemoteProtocolError, "payload bytes 65537, wanted 65536")


def test_a_stale_epoch_is_refused() -> None:
    with against_hand() as (connection, hand):
        hand.sendall(frame(epoch=EPOCH - 1))
        fails(connection, RemoteProtocolError, "epoch 6, wanted 7")


def test_a_gap_is_a_lost_frame() -> None:
    with against_hand() as (connection, hand):
        hand.sendall(frame(sequence=1) + frame(sequence=1, queue=BULK) + frame(sequence=3))
        assert [take(connection)[0].queue for _ in range(2)] == [LATENCY, BULK]
        fails(connection, LinkDown, "queue latency: frame 3 came, wanted 2")


def test_duplicates_are_dropped_and_counted() -> None:
    with against_hand() as (connection, hand):
        frames = [frame(bytes([i]), sequence=i) for i in range(1, 6)]
        hand.sendall(b"".join(frames[i] for i in (0, 1, 0, 1, 1, 2, 3, 4, 4)))
        assert [take(connection)[1][0] for _ in range(5)] == [1, 2, 3, 4, 5]
        assert connection.receive() is None
        found = connection.statistics()
        assert (found.duplicates, found.received_frames, found.received_bytes) == (4, 5, 5)


def test_a_flood_of_duplicates_does_not_hold_the_caller() -> None:
    with against_hand() as (connection, hand):
        hand.sendall(frame(sequence=0) * 1000)
        assert connection.receive() is None
        assert 0 < connection.statistics().duplicates < 1000


@pytest.mark.parametrize("cut", [1, 3, 63, 64, 70])
def test_an_end_inside_a_frame_is_told(cut: int) -> None:
    with against_hand() as (connection, hand):
        hand.sendall(frame(b"one") + frame(bytes(100), sequence=2)[:cut])
        hand.close()
        assert take(connection)[1] == b"one"
        fails(connection, LinkDown, f"closed the connection {cut} bytes into a frame")


def test_a_reset_is_told() -> None:
    with against_hand() as (connection, hand):
        hand.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        hand.close()
        fails(connection, LinkDown, "closed the connection")


# What we may not do ourselves.


@pytest.mark.parametrize(
    "kind, queue, size",
    [
        (TEST, LATENCY, 65537),
        (TEST, BULK, 262145),
        (TEST, 2, 1),
        (0, LATENCY, 1),
        (6, LATENCY, 1),
        (3, LATENCY, 0),
    ],
)
def test_a_frame_that_no_peer_would_take_is_not_sent(kind: int, queue: int, size: int) -> None:
    with connections() as (left, right):
        with pytest.raises(LocalProtocolError, match="cannot send a frame"):
            left.send(kind, bytes(size), queue=queue)
        assert right.receive() is None


def test_a_closed_connection_is_refused() -> None:
    with connections() as (left, _):
        left.close()
        left.close()
        for call in (left.receive, left.statistics, left.check, lambda: left.send(TEST)):
            with pytest.raises(LocalProtocolError, match="is closed"):
                call()


def test_what_is_no_stream_is_refused_and_stays_the_callers() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        with pytest.raises(ClusterError, match=r"TCP: descriptor \d+ cannot be used"):
            Connection.from_socket(datagrams, EPOCH)
        assert datagrams.fileno() >= 0


# Nothing is left behind.


def test_descriptors_are_closed() -> None:
    process = psutil.Process(os.getpid())
    before = process.num_fds()
    for _ in range(20):
        with connections() as (left, right):
            left.send(TEST, b"x")
            take(right)
    assert process.num_fds() == before


@pytest.mark.parametrize("kind", soak.KINDS)
def test_memory_stays_flat(kind: str) -> None:
    """`make soak` does a million."""
    for end in soak.measure(kind, 20_000):
        assert end.num_exchanges == 20_000
        assert end.fds_end == end.fds_start
        assert end.rss_end_bytes - end.rss_start_bytes < 2 << 20


def test_frame_made_by_hand_is_ours() -> None:
    """The twin in tests/link/sockets.py and the C agree on every field, or half of the above says nothing."""
    with against_hand() as (connection, hand):
        connection.send(ROUND, b"abc", queue=BULK, source=2, tag=3, round=4, digest=5, offset=6, total=9)
        found = read_frame(hand)
    assert found == found | {"kind": ROUND, "queue": BULK, "source": 2, "tag": 3, "round": 4, "digest": 5}
    assert found == found | {
        "offset": 6,
        "total": 9,
        "length": 3,
        "payload_crc": crc32c(b"abc"),
        "epoch": EPOCH,
    }
