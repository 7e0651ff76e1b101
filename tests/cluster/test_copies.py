"""Kept requests: who holds what before a client gets it, and who goes on with an answer whose host is gone."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from expertd.cluster import copies, transcripts
from expertd.cluster.host_messages import Hold, codec
from expertd.cluster.requests import Requests
from expertd.engine.messages import Done, Submit, Token
from expertd.errors import ClusterError, NotFoundError
from expertd.sampling import Sampling
from tests.cluster.answering import ANSWER, EVENTS, Leaders, Paced
from tests.cluster.hosts import finish, until

KEPT = Submit("r", prompt="x", keep=True, note="shape", sampling=Sampling(seed=1))


class Wire:
    """The way of Holds from one host to another, and of their answers, both as messages; `is_open` lets them pass."""

    def __init__(self, leading: Requests, other: Requests, host_id: str = "b", is_open: bool = True) -> None:
        self.leading, self.other, self.host_id = leading, other, host_id
        self.is_open = is_open
        self.holds: list[Hold] = []
        leading.copies.add(host_id, self.send, leading.kept.all())

    async def send(self, hold: Hold) -> None:
        [message] = codec.decoder().feed(codec.encode(hold))
        self.holds.append(message)
        self.other.hold(message)
        if self.is_open:
            self.answer()

    def answer(self) -> None:
        self.leading.copies.held(self.host_id, self.holds[-1].number)


class Reader:
    """Reads in a task; `events` are what has come."""

    def __init__(self, events: AsyncGenerator[Any, None]) -> None:
        self.events: list[Any] = []
        self.task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[Any, None]) -> None:
        async with aclosing(events):
            async for event in events:
                self.events.append(event)

    @property
    def num_tokens(self) -> int:
        return sum(isinstance(e, Token) for e in self.events)

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_a_token_is_given_out_when_every_host_holds_it() -> None:
    async def main() -> None:
        a = Paced(allowed=3)
        b, c = Requests(a.find), Requests(a.find)
        wires = [Wire(a.requests, b, "b", is_open=False), Wire(a.requests, c, "c")]
        reader = Reader(a.requests.generate(KEPT))
        await until(lambda: wires[0].holds and a.num_given == 3)
        await asyncio.sleep(0)
        assert reader.events == []
        wires[0].answer()
        await until(lambda: reader.num_tokens == 3)
        a.allow(9)
        await until(lambda: len(b.kept.find("r").events) == len(EVENTS))  # type: ignore[union-attr]
        assert reader.num_tokens == 3, "the engine did not wait, the client does"
        a.requests.copies.remove("b")
        await reader.task
        assert reader.events == EVENTS
        for host in (b, c):
            assert [e async for e in host.resume("r")] == EVENTS
            assert host.kept.find("r").submit == KEPT  # type: ignore[union-attr]
        await a.requests.close()

    finish(main())


def test_a_late_host_is_left_out_until_it_is_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "HELD_TIMEOUT_S", 0.05)

    async def main() -> None:
        a = Paced(allowed=3)
        wire = Wire(a.requests, Requests(a.find), is_open=False)
        reader = Reader(a.requests.generate(KEPT))
        await until(lambda: reader.num_tokens == 3)  # after all
        wire.answer()  # late
        monkeypatch.setattr(copies, "HELD_TIMEOUT_S", 30)
        a.allow(4)
        await until(lambda: reader.num_tokens == 4)
        wire.answer()  # in time
        a.allow(6)
        await until(lambda: a.num_given == 6 and len(wire.holds[-1].copies[0].tokens) > 0)
        assert reader.num_tokens == 4
        wire.is_open = True
        a.allow(9)
        await reader.task
        await a.requests.close()

    finish(main())
    assert caplog.messages == [
        "host b: its copies of answers are late, and left out",
        "host b: its copies of answers are in time again",
    ]


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 8])
def test_whoever_is_asked_goes_on_when_the_host_is_gone(num_tokens: int) -> None:
    async def main() -> None:
        a, b = Paced(allowed=num_tokens), Leaders()
        Wire(a.requests, b.requests)
        lost = Reader(a.requests.generate(KEPT))
        await until(lambda: b.requests.kept.find("r"))
        reader = Reader(b.requests.resume("r"))
        await until(lambda: reader.num_tokens == num_tokens)
        a.requests.copies.remove("b")  # A is gone, as B sees it
        await lost.leave()
        b.requests.lose_leaders()
        await reader.task
        assert reader.events == EVENTS
        assert [e async for e in b.requests.resume("r")] == EVENTS
        [again] = b.asked
        assert again.generated == ANSWER[:num_tokens] and again.resumed and again.sampling.seed == 1
        await a.requests.close()

    finish(main())


def test_it_goes_on_without_a_reader_only_if_it_is_kept() -> None:
    async def main() -> None:
        a = Paced(allowed=2)
        readers = [Reader(a.requests.generate(Submit(i, prompt="x", keep=i == "r"))) for i in ("r", "s")]
        await until(lambda: all(r.events for r in readers))
        for reader in readers:
            await reader.leave()
        await until(lambda: a.requests.num_open == 1)
        a.allow(100)
        await until(lambda: a.requests.num_open == 0)
        both = [Reader(a.requests.resume("r")) for _ in range(2)]
        await asyncio.gather(*(reader.task for reader in both))
        assert [reader.events for reader in both] == [EVENTS] * 2
        for wrong in (a.requests.resume("s"), a.requests.resume("nobody")):
            with pytest.raises(NotFoundError, match="not known here, or not any more"):
                await anext(wrong)

    finish(main())


def test_a_host_that_comes_later_gets_what_is_kept() -> None:
    async def main() -> None:
        a = Paced(allowed=9)
        b = Requests(a.find)
        await a.ask(keep=True)
        running = Reader(a.requests.generate(Submit("s", prompt="x", keep=True)))
        a.allow(12)
        await until(lambda: running.num_tokens == 3)
        Wire(a.requests, b)
        a.allow(18)
        await running.task
        assert [e async for e in b.resume("r")] == EVENTS
        assert [e async for e in b.resume("s")] == running.events
        # The other way round: a leader that was started again.
        again = Requests(a.find)
        for copy in b.snapshot():
            again.hold(Hold(0, [copy]))
        assert [e async for e in again.resume("s")] == running.events
        await a.requests.close()

    finish(main())


def test_a_request_of_another_host_is_carried_by_the_leader() -> None:
    """B's client asks, A carries it, and C has a copy. B leaves, comes back with less than A has, and goes on."""

    async def main() -> None:
        a = Paced(allowed=3)
        c = Requests(a.find)
        Wire(
            a.requests, Requests(a.find), "b", is_open=False
        )  # B holds nothing up: it gets its answer itself
        Wire(a.requests, c, "c")
        carried = Reader(a.requests.carry(KEPT, "b"))
        await until(lambda: carried.num_tokens == 3)
        await carried.leave()
        await until(lambda: not (c.kept.find("r") or KEPT).is_led)  # type: ignore[union-attr]
        # B comes back with one token less than A had given it.
        again = Submit(**{**vars(KEPT), "request_id": "r~1", "generated": ANSWER[:2], "resumed": True})
        a.allow(100)
        events = [e async for e in a.requests.carry(again, "b")]
        assert [i for e in events if isinstance(e, Token) for i in e.token_ids] == ANSWER[2:]
        assert {e.request_id for e in events} == {"r~1"}
        assert [e async for e in a.requests.resume("r")] == EVENTS
        await a.requests.close()

    finish(main())


def test_pieces_that_do_not_meet_are_made_again() -> None:
    async def main() -> None:
        a, b = Leaders(), Leaders()
        b.requests.hold(Hold(0, [copies.copy_of(_transcript(EVENTS[:3]))]))
        after = _transcript([EVENTS[0], Token("r", ANSWER[:3], "3 1 4 "), *EVENTS[4:]])
        b.requests.hold(Hold(0, [copies.copy_of(after)]))
        assert [e async for e in b.requests.resume("r")] == EVENTS
        assert [s.generated for s in b.asked] == [ANSWER[:2]] and a.asked == []

    finish(main())


def _transcript(events: list[Any]) -> transcripts.Transcript:
    transcript = transcripts.Transcript(KEPT)
    for event in events:
        transcript.add(event)
    return transcript


def test_a_kept_request_can_be_forgotten_by_all_hosts() -> None:
    async def main() -> None:
        a = Paced(allowed=2)
        b, c = Requests(a.find), Requests(a.find)
        for host_id, other in (("b", b), ("c", c)):
            Wire(a.requests, other, host_id)
        b.tell_leader = lambda request_id: a.requests.hold(Hold(0, [], [request_id]))
        reader = Reader(a.requests.generate(KEPT))
        await until(lambda: reader.num_tokens == 2)
        b.forget("r")
        with pytest.raises(ClusterError, match="request r was cancelled"):
            await reader.task
        await until(lambda: not c.kept.find("r") and not b.kept.find("r"))
        with pytest.raises(NotFoundError):
            a.requests.forget("r")
        await until(lambda: a.requests.num_open == 0)
        await a.requests.close()

    finish(main())


@pytest.mark.parametrize(("limit", "value"), [("MAX_KEPT", 2), ("MAX_KEPT_BYTES", 9000), ("MAX_KEPT_S", 0.0)])
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: str, value: float) -> None:
    async def main() -> None:
        a = Paced(allowed=100)
        for request_id in ("a", "b", "c"):
            async for event in a.requests.generate(Submit(request_id, prompt="x", keep=True)):
                assert not isinstance(event, Done) or event.completion_tokens == 8
        a.allow(100)
        running = Reader(a.requests.generate(Submit("d", prompt="x", keep=True)))
        monkeypatch.setattr(transcripts, limit, value)
        await until(lambda: running.events)
        await running.task
        last = Reader(a.requests.generate(Submit("e", prompt="x", keep=True)))
        await last.task
        found = [i for i in "abcde" if a.requests.kept.find(i)]
        assert found == ([] if limit == "MAX_KEPT_S" else ["c", "d", "e"])

    finish(main())
