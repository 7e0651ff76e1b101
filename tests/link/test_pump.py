"""The pump: what it carries, and what it does with a peer that breaks the rules. The test plays the other host."""

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd.errors import ClusterError, ExpertdError, LinkDown, LinkTimeout, LocalProtocolError
from expertd.link import codes, connection, mailbox
from expertd.link.connection import Connection, Header
from expertd.link.mailbox import Mailbox
from expertd.link.pump import Pump
from tests.link.hosts import run_hosts
from tests.link.mailbox_jobs import payload, random_sizes

JOBS = Path(__file__).with_name("link_jobs.py")
DEADLINE_S = 30.0
PATIENT_S = 20.0
SLOT_BYTES = 600_000


def pair() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return Connection.from_socket(one, 1), Connection.from_socket(other, 1)


class Bench:
    """A host with rank 0, its pump on a thread, and the test as the hosts of the ranks above, one each."""

    def __init__(self, num_ranks: int, silence_s: float, lifeline_fd: int, step_timeout_s: float) -> None:
        self.fd = mailbox.create(num_ranks, SLOT_BYTES)
        self.box = Mailbox(self.fd, 0, num_ranks, step_timeout_s, pulse_timeout_s=PATIENT_S)
        self._ours, self.peers = zip(*(pair() for _ in range(num_ranks - 1)), strict=True)
        self.peer = self.peers[0]
        self.pump = Pump(self.fd, range(0, 1), lifeline_fd, silence_s)
        for i, ours in enumerate(self._ours):
            self.pump.add(ours, 10 + i, range(i + 1, i + 2))
        self._stop = threading.Event()
        self._rank: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and self.pump.run(0.02):
            pass

    def failure(self) -> tuple[str, int, str]:
        """Wait for the pump's end: code, host, reason."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the pump has not ended"
        code, host, reason = self.pump.failure()
        return codes.name(code), host, reason

    def send(self, **fields: Any) -> None:
        body = fields.pop("payload", b"")
        values = {"kind": connection.ROUND, "source": 1, "round": 1, "tag": 1} | fields
        kind = values.pop("kind")
        deadline = time.monotonic() + DEADLINE_S
        while not self.peer.send(kind, body, **values):
            assert time.monotonic() < deadline
            self.peer.receive()

    def receive(self, kind: int, peer: int = 0) -> tuple[Header, bytes]:
        """The next frame of a kind."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            found = self.peers[peer].receive()
            if found is None:
                time.sleep(0.001)
            elif found[0].kind == kind:
                return found
        raise AssertionError("it did not come")

    def exchange(self, mine: bytes = b"a", sizes: tuple[int, ...] = (1, 1)) -> "threading.Thread":
        """Rank 0 comes to an exchange; what it gives or raises is in `result`."""
        self.result: Any = None

        def run() -> None:
            try:
                self.result = self.box.exchange(mine, sizes)
            except ExpertdError as e:
                self.result = e

        self._rank = threading.Thread(target=run, daemon=True)
        self._rank.start()
        return self._rank

    def close(self) -> None:
        self._stop.set()
        mailbox.poison(self.fd)
        if self._rank:
            self._rank.join(DEADLINE_S)
        if self._thread.is_alive():
            self._thread.join(DEADLINE_S)
        self.pump.close()
        for c in (*self._ours, *self.peers):
            c.close()
        self.box.close()
        os.close(self.fd)


@contextlib.contextmanager
def bench(
    num_ranks: int = 2,
    silence_s: float = PATIENT_S,
    lifeline_fd: int = -1,
    step_timeout_s: float = 60.0,
    start: bool = True,
) -> Iterator[Bench]:
    b = Bench(num_ranks, silence_s, lifeline_fd, step_timeout_s)
    try:
        if start:
            b.start()
        yield b
    finally:
        b.close()


def mailbox_reason(fd: int) -> str:
    """What ranks that come later are told."""
    with Mailbox(fd, 0, 2) as box, pytest.raises(LinkDown) as caught:
        box.exchange(b"", [0, 0])
    return str(caught.value).partition("ended this epoch: ")[2]


# What it carries, between real processes.


@pytest.mark.parametrize(
    "num_ranks, slot_bytes, num_rounds",
    [([1, 1], 30_000, 60), ([2, 2], 30_000, 60), ([1, 1, 1], 30_000, 60), ([1, 1], 1 << 20, 6)],
)
def test_exchange_between_hosts(num_ranks: list[int], slot_bytes: int, num_rounds: int) -> None:
    """Rounds for both queues, in one piece and in many."""
    sha = hashlib.sha256()
    for i in range(num_rounds):
        for rank, size in enumerate(random_sizes(3, i, sum(num_ranks), slot_bytes)):
            sha.update(payload(3, i, rank, size))
    args = {"seed": 3, "num_rounds": num_rounds, "around_bytes": slot_bytes}
    found = run_hosts(JOBS, "swap", num_ranks, args, DEADLINE_S, slot_bytes=slot_bytes)
    assert found == [sha.hexdigest()] * sum(num_ranks)


def test_frames_between_hosts() -> None:
    args = {"sizes": [0, 1, 4096, 17, 30_000, 0] * 3, "pause_s": 0.01}
    assert run_hosts(JOBS, "frames", [2, 1], args, DEADLINE_S) == [True] * 3


# One round, seen from the other host.


def test_a_round_goes_out_and_comes_in() -> None:
    with bench() as b:
        thread = b.exchange(b"mine", (4, 6))
        header, body = b.receive(connection.ROUND)
        assert (header.source, header.round, header.tag, header.total, body) == (0, 1, 1, 4, b"mine")
        b.send(payload=b"the", total=6)
        b.send(payload=b"irs", total=6, offset=3)
        thread.join(DEADLINE_S)
        assert b.result == b"minetheirs"
        assert b.pump.statistics()["num_rounds"] == 1
        assert 0 < b.pump.statistics()["carried_s"] < DEADLINE_S


def test_a_piece_is_not_a_round() -> None:
    with bench() as b:
        thread = b.exchange(b"mine", (4, 6))
        b.send(payload=b"the", total=6)
        b.receive(connection.BEAT)
        b.receive(connection.BEAT)
        thread.join(0.05)
        assert thread.is_alive()
        b.send(payload=b"irs", total=6, offset=3)
        thread.join(DEADLINE_S)
        assert b.result == b"minetheirs"


def test_two_rounds_in_two_queues_may_change_places() -> None:
    """A rank may be a round ahead, and over verbs nothing orders the two queues."""
    with bench() as b:
        thread = b.exchange(b"a", (1, SLOT_BYTES + 1))
        b.receive(connection.ROUND)
        first = payload(1, 1, 1, SLOT_BYTES)
        most = b.peer.max_payload(connection.BULK)
        assert most < SLOT_BYTES
        rounds = {"queue": connection.BULK, "total": SLOT_BYTES}
        b.send(payload=first[:most], **rounds)
        b.send(round=2, payload=b"z")
        for at in range(most, SLOT_BYTES, most):
            b.send(payload=first[at : at + most], offset=at, **rounds)
        thread.join(DEADLINE_S)
        assert b.result == b"a" + first + b"z"


def test_pulses_cross() -> None:
    with bench() as b:
        _, body = b.receive(connection.BEAT)
        first = struct.unpack("<Q", body)[0]
        while struct.unpack("<Q", b.receive(connection.BEAT)[1])[0] == first:
            pass
        assert mailbox.pulses(b.fd)[0][1] == 0  # that rank has not opened its mailbox
        link_beat = mailbox.pulses(b.fd)[1]
        for beat in (7, 9):
            b.send(kind=connection.BEAT, payload=struct.pack("<Q", beat))
            deadline = time.monotonic() + DEADLINE_S
            while mailbox.pulses(b.fd)[0][1] != beat:
                assert time.monotonic() < deadline
        assert mailbox.pulses(b.fd)[1] > link_beat > 0


def test_a_bulk_round_is_followed_by_bulk_beats() -> None:
    with bench() as b:
        assert b.receive(connection.BEAT)[0].queue == connection.LATENCY
        b.exchange(bytes(SLOT_BYTES), (SLOT_BYTES, 1))
        while b.receive(connection.BEAT)[0].queue != connection.BULK:
            pass


# A peer that breaks the rules: the reason on both sides, and no byte of it reaches a rank.


FULL = {"total": SLOT_BYTES, "payload": b"x" * 10}


@pytest.mark.parametrize(
    "published, frames, reason",
    [
        (1, [{"source": 0}], "not there"),
        (1, [{"source": 2}], "not there"),
        (1, [{"source": 200}], "not there"),
        (1, [{"round": 3}], "out of order"),
        (1, [{"round": 0}], "out of order"),
        (1, [{}, {}], "out of order"),
        (1, [{"total": SLOT_BYTES + 1, "payload": b"x"}], "larger than a slot"),
        (1, [{"total": 2, "offset": 1, "payload": b"x"}], "does not follow"),
        (1, [FULL, FULL | {"offset": 11}], "does not follow"),
        (1, [FULL, FULL | {"offset": 9}], "does not follow"),
        (1, [FULL, {"total": SLOT_BYTES, "offset": 10}], "does not follow"),
        (1, [FULL, FULL | {"total": SLOT_BYTES - 1, "offset": 10}], "first piece"),
        (1, [FULL, FULL | {"tag": 2, "offset": 10}], "first piece"),
        (1, [FULL, FULL | {"digest": 2, "offset": 10}], "first piece"),
        (0, [{"round": 2}], "not free"),
        (1, [{}, {"round": 2}, {"round": 3}], "not free"),
        (1, [{"kind": connection.BEAT, "payload": bytes(7)}], "too few"),
        (1, [{"kind": connection.BEAT, "payload": bytes(16)}], "too many"),
    ],
)
def test_what_does_not_follow_is_refused(published: int, frames: list[dict[str, Any]], reason: str) -> None:
    with bench() as b:
        if published:
            b.exchange(b"a", (1, 0))
            b.receive(connection.ROUND)
        for frame in frames:
            b.send(**frame)
        code, host, text = b.failure()
        assert (code, host) == ("XD_CORRUPT", 10)
        assert text.startswith("host 10: ")
        assert reason in text
        assert mailbox_reason(b.fd) == text


def test_silence_is_an_end() -> None:
    with bench(silence_s=0.2) as b:
        assert b.failure() == ("XD_SILENT", 10, "nothing heard from host 10 for 0.2 s")
        with pytest.raises(LinkDown, match="nothing heard from host 10"):
            b.box.exchange(b"a", [1, 1])


def test_beats_are_life_enough() -> None:
    with bench(silence_s=1.0) as b:
        for i in range(25):
            b.send(kind=connection.BEAT, payload=struct.pack("<Q", i + 1))
            b.receive(connection.BEAT)
        assert b.pump.failure()[0] == 0


def test_a_closed_connection_is_told_to_the_other_hosts() -> None:
    with bench(num_ranks=3) as b:
        b.peers[1].close()
        _, body = b.receive(connection.END)
        assert body.startswith(b"host 11: ")
        b.peer.close()
        code, host, reason = b.failure()
        assert (code, host, reason) == ("XD_CLOSED", 11, body.decode())


# The end of an epoch, with its reason.


def test_local_poison_is_told_to_every_host() -> None:
    with bench(num_ranks=3) as b:
        mailbox.poison(b.fd, "rank 0 was killed by SIGKILL")
        for peer in (0, 1):
            assert b.receive(connection.END, peer)[1] == b"rank 0 was killed by SIGKILL"
        assert b.failure() == ("XD_POISONED", -1, "rank 0 was killed by SIGKILL")
        assert b.pump.run(1) is False


def test_what_was_published_goes_out_before_the_end() -> None:
    with bench(start=False, step_timeout_s=0.01) as b:
        with pytest.raises(LinkTimeout):
            b.box.exchange(b"last", [4, 4])
        b.start()
        assert b.receive(connection.ROUND)[1] == b"last"
        assert b.receive(connection.END)[1].startswith(b"rank 0, exchange 1 with rank 1: it lives")


def test_the_end_comes_from_afar_with_its_reason() -> None:
    with bench(num_ranks=3) as b:
        b.send(kind=connection.END, payload=b"rank 1\x1b[2J\nis dead")
        assert b.receive(connection.END, 1)[1] == b"host 10: rank 1?[2J?is dead"
        assert b.failure() == ("XD_POISONED", 10, "host 10: rank 1?[2J?is dead")
        with pytest.raises(LinkDown, match=r"ended this epoch: host 10: rank 1\?\[2J\?is dead"):
            b.box.exchange(b"a", [1, 1, 1])


def test_the_end_of_the_lifeline() -> None:
    read, write = os.pipe()
    with contextlib.closing(os.fdopen(read)), bench(lifeline_fd=read) as b:
        b.receive(connection.BEAT)
        os.close(write)
        assert b.receive(connection.END)[1] == b"the supervisor is gone"
        assert b.failure() == ("XD_CLOSED", -1, "the supervisor is gone")
        with pytest.raises(LinkDown, match="the supervisor is gone"):
            b.box.exchange(b"a", [1, 1])


# Opening.


def test_what_makes_no_sense_is_refused() -> None:
    fd = mailbox.create(3, 64)
    ours, theirs = pair()
    with ours, theirs:
        for local in (range(0), range(3, 4)):
            with pytest.raises(ClusterError, match="local ranks"):
                Pump(fd, local, -1, 1.0)
        with pytest.raises(ClusterError, match="not a mailbox"):
            Pump(0, range(1), -1, 1.0)
        pump = Pump(fd, range(1), -1, 1.0)
        pump.add(ours, 1, range(1, 2))
        for taken in (range(0), range(1), range(1, 2), range(1, 3), range(3, 4)):
            with pytest.raises(LocalProtocolError):
                pump.add(ours, 2, taken)
        pump.close()
        pump.close()
    os.close(fd)
