"""A rank's life between epochs, with real mailboxes and without a model."""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from stub_group import LIMIT_S, SOON_S, until_now

from expertd.cluster import rank as module
from expertd.cluster.rank import Control, Rank
from expertd.config import GroupConfig
from expertd.engine import runner
from expertd.engine.engine import Engine
from expertd.engine.messages import Begin, Cancel, Ended, Failed, Message, Setup, Stats, Submit
from expertd.link import mailbox as boxes
from expertd.model.model import Model

SUBMIT = Submit("r", prompt="x")


class FakeModel:
    """Knows the rank of its link, None without one."""

    read_s = 0.0

    def __init__(self) -> None:
        self.attached: list[int | None] = []

    def attach(self, link: boxes.Mailbox | None) -> None:
        self.attached.append(link.rank if link else None)


class FakeEngine:
    """Never has anything to do."""

    idle = True

    def __init__(self) -> None:
        self.is_ahead = False
        self.rest: Callable[[], None] = lambda: None
        self.calls: list[Any] = []
        self.reports: list[Stats] = []

    def stats(self) -> Stats:
        return self.reports.pop(0) if self.reports else Stats()

    def begin(self, runner: object, split: str, fractions: tuple[float, ...]) -> None:
        self.calls.append(("begin", split, fractions))

    def abandon(self, reason: str) -> None:
        self.calls.append(("abandon", reason))

    def take(self, message: Message) -> None:
        self.calls.append(message)

    def step(self) -> None:
        pass


class Bench:
    """A rank, and what its supervisor would hold."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.sent: list[Message] = []
        self.send = self.post = self.sent.append
        self.flush = lambda: None
        self.model, self.engine = FakeModel(), FakeEngine()
        self.fds: list[int] = []
        setup = Setup(0, -1, theirs.detach(), {})
        self.rank = Rank(
            setup,
            GroupConfig(""),
            cast(Control, self),
            cast(Model, self.model),
            cast(Engine, self.engine),
        )

    def begin(self, epoch: int, rank: int, num_ranks: int, told: int | None = None) -> Begin:
        """Send a mailbox; gives the Begin that belongs to it."""
        self.fds.append(boxes.create(num_ranks, 4096))
        socket.send_fds(self.channel, [(told or epoch).to_bytes(8, "big")], [self.fds[-1]])
        return Begin(epoch, rank, "auto", (1 / num_ranks,) * num_ranks, "why")

    def after(self, delay_s: float, *steps: Any) -> threading.Timer:
        """Call the functions, put the messages, a little later."""

        def go() -> None:
            for step in steps:
                step() if callable(step) else self.inbox.put(step)

        timer = threading.Timer(delay_s, go)
        timer.start()
        return timer

    def close(self) -> None:
        if self.rank._mailbox:
            self.rank._mailbox.close()
        self.rank._channel.close()
        self.channel.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_idle_leader_notices_a_begin_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IDLE_S", LIMIT_S)
    second = Begin(2, 1, "auto", (0.5, 0.5), "")
    bench.inbox.put(SUBMIT)
    bench.after(0.05, second)
    began = time.monotonic()
    assert bench.rank._live(bench.begin(1, 0, 2)) is second
    assert time.monotonic() - began < SOON_S
    assert bench.engine.calls == [("begin", "auto", (0.5, 0.5)), SUBMIT]
    assert bench.model.attached == [None, 0]
    assert bench.sent == []


def test_idle_leader_lets_the_others_catch_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IDLE_S", LIMIT_S)
    monkeypatch.setattr("expertd.cluster.rank.QUIET_S", 0.001)
    second, too_late = Begin(2, 1, "auto", (0.5, 0.5), ""), Begin(3, 1, "auto", (0.5, 0.5), "")
    bench.engine.is_ahead = True
    bench.engine.rest = lambda: bench.inbox.put(second)
    timer = bench.after(SOON_S, too_late)
    assert bench.rank._live(bench.begin(1, 0, 2)) is second
    timer.cancel()


def test_leader_reports_what_is_new(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IDLE_S", 0.001)
    monkeypatch.setattr("expertd.cluster.rank.REPORT_S", 0.0)
    first, second = Stats(num_running=1), Stats(num_running=2)
    bench.engine.reports = [first, first, second]
    over = Begin(2, 1, "auto", (1.0,), "")
    monkeypatch.setattr(bench.engine, "step", lambda: bench.engine.reports or bench.inbox.put(over))
    assert bench.rank._live(bench.begin(1, 0, 1)) is over
    assert bench.sent == [first, second, Stats()]


def test_idle_follower_is_woken_by_poison(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IDLE_S", LIMIT_S)
    begin, second = bench.begin(1, 1, 2), Begin(2, 0, "auto", (1.0,), "")
    bench.after(0.05, lambda: boxes.poison(bench.fds[0], "rank 0 died"), second)
    began = time.monotonic()
    assert bench.rank._live(begin) is second
    assert time.monotonic() - began < SOON_S
    (ended,) = bench.sent
    assert isinstance(ended, Ended) and (ended.epoch, ended.kind) == (1, "LinkDown")
    assert "rank 0 died" in ended.message
    assert bench.engine.calls == [("abandon", "another rank leads since epoch 1: why")]


def test_pulse_goes_on_until_the_next_mailbox_is_open(bench: Bench) -> None:
    bench.after(0.02, lambda: boxes.poison(bench.fds[0], "over"), Begin(2, 0, "auto", (1.0,), ""))
    bench.rank._live(bench.begin(1, 1, 2))
    beats = boxes.pulses(bench.fds[0])[0][1]
    assert beats > 0
    until_now(lambda: boxes.pulses(bench.fds[0])[0][1] > beats)
    bench.inbox.put(Begin(3, 0, "auto", (1.0,), ""))
    bench.rank._live(bench.begin(2, 0, 1))
    beats = boxes.pulses(bench.fds[0])[0][1]
    time.sleep(0.05)
    assert boxes.pulses(bench.fds[0])[0][1] == beats
    until_now(lambda: boxes.pulses(bench.fds[1])[0][0] > 0)
    assert bench.model.attached == [None, 1, None, None]  # alone it needs no link


def test_requests_of_a_follower_are_given_back(bench: Bench) -> None:
    begin, second = bench.begin(1, 1, 2), Begin(2, 0, "auto", (1.0,), "")
    for message in (SUBMIT, Cancel("r"), second):
        bench.inbox.put(message)
    assert bench.rank._live(begin) is second
    assert bench.sent == [Failed("r", "this rank does not lead any more", lost=True)]


@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        (None, "LinkTimeout", "no mailbox came within 0.1 s"),
        (7, "RemoteProtocolError", "1 mailboxes came, for epoch 7"),
    ],
)
def test_epoch_without_its_mailbox_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, told: int | None, kind: str, words: str
) -> None:
    bench.rank._channel.settimeout(0.1)
    monkeypatch.setattr(module, "MAILBOX_TIMEOUT_S", 0.1)
    begin = bench.begin(1, 0, 1, told) if told else Begin(1, 0, "auto", (1.0,), "")
    second = Begin(2, 0, "auto", (1.0,), "")
    bench.after(0.2, second)
    assert bench.rank._live(begin) is second
    (ended,) = bench.sent
    assert isinstance(ended, Ended) and ended.kind == kind and words in ended.message


def test_descriptors_are_closed_once_mapped(bench: Bench) -> None:
    begins = [bench.begin(epoch, 0, 1) for epoch in range(1, 6)]
    before = len(os.listdir("/dev/fd"))
    for begin in begins:
        bench.inbox.put(begin)
        assert bench.rank._live(begin) is begin
    assert len(os.listdir("/dev/fd")) == before


def test_messages_between_epochs_reach_the_engine(bench: Bench) -> None:
    begin, second = bench.begin(1, 0, 1), Begin(2, 0, "auto", (1.0,), "")
    bench.inbox.put(Begin(9, 0, "auto", (1.0,), ""))
    bench.rank._live(begin)
    bench.inbox.put(SUBMIT)
    bench.inbox.put(second)
    assert bench.rank._wait_begin() is second
    assert bench.engine.calls[-1] is SUBMIT


def test_ranks_share_the_cores_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy reads the variable when it is imported, so nothing may have done that by then."""
    code = "import sys, expertd.cluster.rank; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "9")
    del os.environ["OPENBLAS_NUM_THREADS"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    module.share_cores(3)
    assert os.environ.pop("OPENBLAS_NUM_THREADS") == "2"
    module.share_cores(16)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    module.share_cores(1)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1", "the user's own"


def test_a_rank_whose_supervisor_died_ends_without_a_word() -> None:
    """Its next message finds the socket closed, perhaps before the thread that reads has noticed."""
    code = (
        "import socket; from expertd.cluster.rank import Control; from expertd.engine.messages import Stats\n"
        "ours, theirs = socket.socketpair(); theirs.close(); Control(ours).send(Stats()); raise SystemExit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
