"""The mailbox: what it delivers, and that every wait ends, with the right reason, whatever a peer does."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd.errors import ClusterError, LinkDown, LinkTimeout, LocalProtocolError, RemoteProtocolError
from expertd.link import mailbox
from expertd.link.mailbox import Mailbox
from tests import ranks
from tests.link.mailbox_jobs import payload, random_sizes

JOBS = Path(__file__).with_name("mailbox_jobs.py")
# Far beyond what any of this takes: reaching it means that something waits for ever.
DEADLINE_S = 30.0
# A slot of this size fills its pages to the last byte: writing beyond it would hit the next one.
FULL_PAGE = 16384 - 128
# A live peer must not be taken for dead because the machine that runs the tests is busy.
PATIENT = {"pulse_timeout_s": 10.0}


@contextlib.contextmanager
def memory(num_ranks: int, slot_bytes: int = 4096) -> Iterator[int]:
    fd = mailbox.create(num_ranks, slot_bytes)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_group(num_ranks: int, slot_bytes: int = 4096, **options: float) -> Iterator[list[Mailbox]]:
    """Every rank's handle of a new mailbox, in this process."""
    with memory(num_ranks, slot_bytes) as fd, contextlib.ExitStack() as stack:
        options = PATIENT | options
        yield [stack.enter_context(Mailbox(fd, rank, num_ranks, **options)) for rank in range(num_ranks)]


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run each work on a thread of its own; what each gave, or the exception that it raised."""
    results: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


@contextlib.contextmanager
def rank_process(
    fd: int, rank: int, num_ranks: int, job: str, **args: Any
) -> Iterator[subprocess.Popen[str]]:
    """One rank in a process of its own, past the first line that its job prints."""
    process = ranks.start_rank(JOBS, job, fd, rank, num_ranks, args, {"pulse_timeout_s": 1.5})
    try:
        assert process.stdout
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


# What an exchange delivers.


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("slot_bytes", [1, 300, FULL_PAGE])
def test_exchange_is_concatenation(num_ranks: int, slot_bytes: int) -> None:
    num_rounds = 40
    with open_group(num_ranks, slot_bytes) as boxes:

        def swap(box: Mailbox) -> None:
            for i in range(num_rounds):
                sizes = random_sizes(7, i, num_ranks, slot_bytes)
                everybody = [payload(7, i, rank, size) for rank, size in enumerate(sizes)]
                assert box.exchange(everybody[box.rank], sizes, tag=i + 1) == b"".join(everybody), (
                    f"round {i}"
                )

        assert together(*(lambda box=box: swap(box) for box in boxes)) == [None] * num_ranks
        assert [box.statistics()["num_exchanges"] for box in boxes] == [num_rounds] * num_ranks


def test_waits_are_counted_by_their_length() -> None:
    """One of each exchange with each peer, none of a frame, and buckets that fit the time of all."""
    with open_group(3, 8) as boxes:

        def swap(box: Mailbox) -> None:
            for tag in range(1, 31):
                if tag % 10 == 1:
                    box.send_frame(b"step") if box.rank == 0 else box.wait_frame(DEADLINE_S)
                box.exchange(b"a", [1, 1, 1], tag=tag)

        assert together(*(lambda box=box: swap(box) for box in boxes)) == [None] * 3
        for counts, waited_s in (box.waits() for box in boxes):
            assert sum(counts) == 30 * 2
            least = sum(n * 2 ** (i - 1) for i, n in enumerate(counts) if i)
            assert least * 1e-9 <= waited_s <= 2 * least * 1e-9
        assert sum(waited_s for _, waited_s in (box.waits() for box in boxes)) > 0


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_exchange_between_processes(num_ranks: int) -> None:
    num_rounds, slot_bytes, sha = 100, 1000, hashlib.sha256()
    for i in range(num_rounds):
        for rank, size in enumerate(random_sizes(3, i, num_ranks, slot_bytes)):
            sha.update(payload(3, i, rank, size))
    args = {"seed": 3, "num_rounds": num_rounds, "slot_bytes": slot_bytes, "around_bytes": slot_bytes}
    assert ranks.run_ranks(JOBS, "swap", num_ranks, args, DEADLINE_S) == [sha.hexdigest()] * num_ranks


# Frames.


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_frames_reach_every_follower(num_ranks: int) -> None:
    frames = [payload(1, i, 0, size) for i, size in enumerate([0, 1, 4096, 17, 0])]

    def lead(box: Mailbox) -> list[bytes]:
        for frame in frames:
            box.send_frame(frame)
            box.exchange(b"ab", [2] * num_ranks, tag=1)
        return frames

    def follow(box: Mailbox) -> list[bytes | None]:
        taken = []
        for _ in frames:
            taken.append(box.wait_frame(DEADLINE_S))
            box.exchange(b"ab", [2] * num_ranks, tag=1)
        return taken

    with open_group(num_ranks) as boxes:
        works = [lambda box=box: follow(box) for box in boxes[1:]]
        assert together(lambda: lead(boxes[0]), *works) == [frames] * num_ranks


def test_frame_arrives_after_idle_timeouts() -> None:
    with open_group(3) as boxes:
        for _ in range(3):
            assert [box.wait_frame(0.01) for box in boxes[1:]] == [None, None]
        frame = random.Random(0).randbytes(4096)
        works = [lambda box=box: box.wait_frame(DEADLINE_S) for box in boxes[1:]]
        assert together(lambda: boxes[0].send_frame(frame), *works) == [None, frame, frame]
        assert boxes[1].wait_frame(0.01) is None
        boxes[1].check()


def test_frame_larger_than_a_slot_is_refused() -> None:
    with open_group(2) as boxes:
        with pytest.raises(LocalProtocolError, match=r"rank 0.*frame larger than a slot"):
            boxes[0].send_frame(bytes(4097))
        with pytest.raises(LinkDown):
            boxes[1].wait_frame(DEADLINE_S)


def test_frame_read_by_one_follower_only_is_a_timeout_not_an_idle_wait() -> None:
    with open_group(3, step_timeout_s=0.2) as boxes:
        leader, follower = together(
            lambda: boxes[0].send_frame(b"plan"), lambda: boxes[1].wait_frame(DEADLINE_S)
        )
    assert isinstance(leader, LinkTimeout | LinkDown)
    assert isinstance(follower, LinkTimeout | LinkDown)
    assert LinkTimeout in {type(leader), type(follower)}


# Broken contracts are told on both sides.


def _each_reports(kind: type[Exception], results: list[Any], tags: tuple[int, int], reason: str) -> None:
    for rank, (result, tag) in enumerate(zip(results, tags, strict=True)):
        assert type(result) is kind, result
        assert str(result).startswith(f"rank {rank}, exchange {tag} with rank {1 - rank}: ")
        assert reason in str(result)


@pytest.mark.parametrize("delay_s", [0, 0.01])
def test_different_exchanges_are_a_mismatch(delay_s: float) -> None:
    def late(box: Mailbox) -> bytes:
        time.sleep(delay_s)
        return box.exchange(b"a", [1, 1], tag=6)

    with open_group(2) as (a, b):
        results = together(lambda: a.exchange(b"a", [1, 1], tag=5), lambda: late(b))
    _each_reports(RemoteProtocolError, results, (5, 6), "wanted exchange")


def test_different_sizes_are_a_mismatch() -> None:
    with open_group(2) as (a, b):
        results = together(lambda: a.exchange(b"a", [1, 2], tag=3), lambda: b.exchange(b"abc", [2, 3], tag=3))
    _each_reports(RemoteProtocolError, results, (3, 3), "bytes, wanted")


def test_frame_against_exchange_is_a_mismatch() -> None:
    with open_group(2) as (a, b):
        results = together(lambda: a.exchange(b"a", [1, 1], tag=9), lambda: b.wait_frame(DEADLINE_S))
    assert [type(r) for r in results] == [RemoteProtocolError, RemoteProtocolError]


def test_different_routing_is_a_divergence() -> None:
    with open_group(2) as (a, b):
        same = together(lambda: a.exchange(b"", [0, 0], 1, 77), lambda: b.exchange(b"", [0, 0], 1, 77))
        assert same == [b"", b""]
        results = together(lambda: a.exchange(b"", [0, 0], 2, 77), lambda: b.exchange(b"", [0, 0], 2, 78))
    _each_reports(RemoteProtocolError, results, (2, 2), "router chose other experts")


@pytest.mark.parametrize("mine, sizes", [(b"a", [1]), (b"a", [1, 1, 1]), (b"ab", [1, 1]), (b"", [1, 1])])
def test_sizes_that_do_not_fit_are_refused(mine: bytes, sizes: list[int]) -> None:
    with open_group(2) as (a, _), pytest.raises(LocalProtocolError, match="rank 0, exchange 4"):
        a.exchange(mine, sizes, tag=4)


# Peers that die, hang or are late.


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("wait", ["exchange", "frame"])
def test_dead_peer_ends_the_wait(sign: signal.Signals, wait: str) -> None:
    with memory(2) as fd, Mailbox(fd, 1, 2, pulse_timeout_s=1.5) as box:
        started = threading.Thread(target=lambda: [box.exchange(b"y", [1, 1], tag=i + 1) for i in range(3)])
        started.start()
        with rank_process(fd, 0, 2, "answer", num_rounds=3) as peer:
            started.join(DEADLINE_S)
            peer.send_signal(sign)
            start = time.monotonic()
            with pytest.raises(LinkDown, match=r"rank 1, exchange \d+ with rank 0: it is dead"):
                box.exchange(b"y", [1, 1], tag=4) if wait == "exchange" else box.wait_frame(DEADLINE_S)
            assert time.monotonic() - start < DEADLINE_S / 2


def test_living_but_late_peer_is_a_timeout() -> None:
    with open_group(2, step_timeout_s=1.6, pulse_timeout_s=1.5) as (a, b):
        with pytest.raises(LinkTimeout, match="rank 0, exchange 1 with rank 1: it lives"):
            a.exchange(b"a", [1, 1])
        with pytest.raises(LinkDown, match="rank 1, exchange 1"):
            b.exchange(b"b", [1, 1])


def test_waits_of_a_step_add_up() -> None:
    """Waits shorter than the step's deadline, but too many."""

    def slow(box: Mailbox) -> bytes:
        for i in range(40):
            time.sleep(0.1)
            box.exchange(b"b", [1, 1], tag=i + 1)
        return b""

    with open_group(2, step_timeout_s=1.5) as (a, b):
        results = together(lambda: [a.exchange(b"a", [1, 1], tag=i + 1) for i in range(40)], lambda: slow(b))
        assert type(results[0]) is LinkTimeout
        assert 1 < a.statistics()["num_exchanges"] < 39


def test_a_peer_that_has_not_opened_yet_is_not_dead() -> None:
    def come_late(fd: int) -> bytes:
        time.sleep(1.7)
        with Mailbox(fd, 1, 2, **PATIENT) as box:
            return box.exchange(b"b", [1, 1])

    with memory(2) as fd, Mailbox(fd, 0, 2, pulse_timeout_s=1.5) as box:
        assert together(lambda: box.exchange(b"a", [1, 1]), lambda: come_late(fd)) == [b"ab", b"ab"]


def test_stopping_both_is_no_death() -> None:
    """As a laptop's lid does; rank 0, which waits for rank 1, then looks at an old pulse first."""
    with (
        memory(2) as fd,
        rank_process(fd, 0, 2, "swap_for", duration_s=4) as first,
        rank_process(fd, 1, 2, "swap_for", duration_s=0) as second,
    ):
        time.sleep(0.3)
        first.send_signal(signal.SIGSTOP)
        second.send_signal(signal.SIGSTOP)
        time.sleep(3)
        first.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        second.send_signal(signal.SIGCONT)
        counts = [json.loads(process.communicate(timeout=DEADLINE_S)[0]) for process in (first, second)]
    assert counts[0] == counts[1] > 1


# Poison, and what comes after a failure.


@pytest.mark.parametrize("wait", ["exchange", "frame"])
def test_poison_ends_a_wait_at_once(wait: str) -> None:
    def end_the_epoch(fd: int) -> None:
        time.sleep(0.2)
        mailbox.poison(fd)

    with memory(2) as fd, Mailbox(fd, 1, 2, **PATIENT) as box:
        work = (
            (lambda: box.exchange(b"a", [1, 1]))
            if wait == "exchange"
            else (lambda: box.wait_frame(DEADLINE_S))
        )
        result, _ = together(work, lambda: end_the_epoch(fd))
    assert type(result) is LinkDown
    assert "ended this epoch" in str(result)


def test_poison_forbids_frames_that_have_come_already() -> None:
    with (
        memory(2) as fd,
        Mailbox(fd, 0, 2, **PATIENT) as a,
        Mailbox(fd, 1, 2, **PATIENT) as b,
    ):
        assert b.wait_frame(0.01) is None
        a.send_frame(b"plan")
        mailbox.poison(fd)
        with pytest.raises(LinkDown):
            b.wait_frame(DEADLINE_S)


def test_poison_tells_its_first_reason() -> None:
    with memory(2) as fd, Mailbox(fd, 0, 2, **PATIENT) as a, Mailbox(fd, 1, 2, **PATIENT) as b:
        mailbox.poison(fd)
        mailbox.poison(fd, "rank 1 was killed by SIGKILL " + "x" * 1000)
        mailbox.poison(fd, "something later")
        for box in (a, b):
            with pytest.raises(LinkDown, match=r"ended this epoch: rank 1 was killed by SIGKILL x+$"):
                box.exchange(b"a", [1, 1])


def test_the_reason_of_a_rank_is_told_by_the_others() -> None:
    with open_group(3, step_timeout_s=0.1) as (a, b, c):
        with pytest.raises(LinkTimeout, match="rank 0, exchange 5 with rank 1: it lives"):
            a.exchange(b"a", [1, 1, 1], tag=5)
        for box in (b, c):
            with pytest.raises(
                LinkDown, match=r"rank ., exchange 5 .*: rank 0, exchange 5 with rank 1: it lives"
            ):
                box.exchange(b"a", [1, 1, 1], tag=5)


def test_pulses_are_seen_from_outside() -> None:
    with memory(3) as fd, Mailbox(fd, 1, 3):
        (first, before, last), link_beat = mailbox.pulses(fd)
        assert (first, last, link_beat) == (0, 0, 0)
        deadline = time.monotonic() + DEADLINE_S
        while mailbox.pulses(fd)[0][1] < before + 3:
            assert time.monotonic() < deadline


def test_first_reason_stays() -> None:
    with open_group(2, step_timeout_s=0.1) as (a, b):
        with pytest.raises(LinkTimeout) as first:
            a.exchange(b"a", [1, 1], tag=12)
        for call in (
            lambda: a.exchange(b"a", [1, 1], tag=13),
            lambda: a.send_frame(b"plan"),
            lambda: a.send_frame(bytes(5000)),
            lambda: a.wait_frame(DEADLINE_S),
            a.check,
        ):
            with pytest.raises(LinkTimeout) as again:
                call()
            assert str(again.value) == str(first.value)
        for call in (lambda: b.exchange(b"a", [1, 1]), lambda: b.wait_frame(DEADLINE_S), b.check):
            with pytest.raises(LinkDown, match="rank 1"):
                call()


# The lifeline.


def test_end_of_the_lifeline_ends_the_process() -> None:
    read, write = os.pipe()
    with memory(2) as fd, Mailbox(fd, 0, 2, **PATIENT) as box:
        with rank_process(fd, 1, 2, "hold_the_gil", mailbox_fd=fd, lifeline_fd=read) as process:
            os.close(read)
            time.sleep(0.3)
            assert process.poll() is None
            os.close(write)
            assert process.wait(DEADLINE_S) == 3
        with pytest.raises(LinkDown, match="ended this epoch"):
            box.exchange(b"a", [1, 1])


# Opening and closing.


def test_nothing_leaks() -> None:
    def traces() -> tuple[int, list[str], int]:
        shm = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
        maps = Path("/proc/self/maps")
        mapped = maps.read_text().count("expertd-mailbox") if maps.exists() else 0
        return (
            len(os.listdir("/dev/fd")),
            [name for name in shm if "expertd" in name or "xd-" in name],
            mapped,
        )

    before, num_threads = traces(), threading.active_count()
    for _ in range(200):
        fd = mailbox.create(2, 1 << 16)
        box = Mailbox(fd, 1, 2)
        os.close(fd)
        box.close()
        box.close()
    assert (traces(), threading.active_count()) == (before, num_threads)


@pytest.mark.parametrize("num_ranks, slot_bytes", [(0, 64), (-1, 64), (5, 64), (2, 0), (2, 1 << 33)])
def test_sizes_out_of_range_are_refused(num_ranks: int, slot_bytes: int) -> None:
    with pytest.raises(ClusterError, match="wanted 1 to 4 ranks"):
        mailbox.create(num_ranks, slot_bytes)


@pytest.mark.parametrize("rank, num_ranks", [(-1, 2), (2, 2), (0, 1), (0, 3)])
def test_ranks_out_of_range_are_refused(rank: int, num_ranks: int) -> None:
    with memory(2) as fd, pytest.raises(ClusterError, match=f"rank {rank}"):
        Mailbox(fd, rank, num_ranks)


def test_other_descriptors_are_refused() -> None:
    read, write = os.pipe()
    with (
        contextlib.closing(os.fdopen(read)),
        contextlib.closing(os.fdopen(write)),
        tempfile.TemporaryFile() as file,
    ):
        file.truncate(1 << 16)
        for fd in (read, file.fileno(), -1):
            with pytest.raises(ClusterError, match=f"descriptor {fd} "):
                Mailbox(fd, 0, 1)
            with pytest.raises(LocalProtocolError, match=f"descriptor {fd} "):
                mailbox.poison(fd)
            with pytest.raises(LocalProtocolError, match=f"descriptor {fd} "):
                mailbox.pulses(fd)


def test_other_layouts_are_refused() -> None:
    with memory(2) as fd, tempfile.TemporaryFile() as file:
        data = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
        os.pwrite(file.fileno(), data, 0)
        mailbox.poison(file.fileno())  # a copy is as good
        data[0] ^= 1  # the number of the layout
        os.pwrite(file.fileno(), data, 0)
        with pytest.raises(ClusterError, match="no mailbox of this version"):
            Mailbox(file.fileno(), 0, 2)
        data[0] ^= 1
        os.pwrite(file.fileno(), data[:4096], 0)
        file.truncate(len(data) - 1)
        with pytest.raises(ClusterError, match="no mailbox of this version"):
            Mailbox(file.fileno(), 0, 2)


def test_a_closed_mailbox_refuses_calls() -> None:
    fd = mailbox.create(1, 64)
    box = mailbox.Mailbox(fd, 0, 1)
    os.close(fd)
    box.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        box.check()
    box.close()
