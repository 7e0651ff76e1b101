"""A request and its leaders, who are lists of events here: what the client gets when they are lost."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from expertd.cluster import requests
from expertd.cluster.reply import LeaderLost, Replies
from expertd.engine.messages import Cancel, Failed, Rejected, Started, Submit, Token
from expertd.errors import BusyError, ClusterError, ConfigError, ExpertdError
from tests.cluster.answering import ANSWER, EVENTS, Leaders
from tests.cluster.hosts import finish


def test_it_goes_on_with_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_PAUSE_S", 0.0)

    async def main() -> None:
        leaders = Leaders(0, 3, LeaderLost("gone"), 0, 4)
        assert await leaders.ask() == EVENTS
        ids = [s.request_id for s in leaders.asked]
        assert ids[0] == "r" and len(set(ids)) == len(ids) == 6 and all(i.startswith("r~") for i in ids[1:])
        assert [s.generated for s in leaders.asked] == [ANSWER[:n] for n in (0, 0, 3, 3, 3, 7)]
        assert (
            len({s.sampling.seed for s in leaders.asked}) == 1 and leaders.asked[0].sampling.seed is not None
        )

    finish(main())


def test_what_kills_every_leader_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_PAUSE_S", 0.0)

    async def main() -> None:
        leaders = Leaders(2, *[0] * 20)
        with pytest.raises(
            ClusterError, match=r"^rank 0 died; that was the leader no\. 5 in a row without a"
        ):
            await leaders.ask()
        assert len(leaders.asked) == requests.MAX_LOST_LEADERS
        assert leaders.requests.num_open == 0

    finish(main())


@pytest.mark.parametrize(
    ("leaders", "error", "text"),
    [
        (lambda: Leaders(ConfigError("no")), ConfigError, "^no$"),
        (lambda: Leaders(num_said=9), ClusterError, "8 tokens have come, of 9. This is a bug"),
        (lambda: Leaders(3, num_said=7), ClusterError, "8 tokens have come, of 7. This is a bug"),
        (lambda: Leaders(ZeroDivisionError("x")), ClusterError, "ZeroDivisionError: x. This is a bug"),
    ],
)
def test_what_is_wrong_is_said(leaders: Any, error: type[Exception], text: str) -> None:
    async def main() -> None:
        with pytest.raises(error, match=text):
            await leaders().ask()

    finish(main())


def test_logits_that_are_gone_cannot_be_resumed() -> None:
    async def main() -> None:
        events = Leaders(3).requests.generate(Submit("r", prompt="x", logits_file="l"))
        with pytest.raises(ClusterError, match="rank 0 died; the logits of the answer so far are gone"):
            [e async for e in events]

    finish(main())


def test_a_reader_that_leaves_ends_the_request() -> None:
    async def main() -> None:
        leaders = Leaders()
        async with aclosing(leaders.requests.generate(Submit("r", prompt="x"))) as events:
            await anext(events)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert leaders.requests.num_open == 0

    finish(main())


class Asked:
    """A request that was sent: what it was given, what of it was cancelled, and its end."""

    def __init__(self, at: int = 100) -> None:
        self.sent: list[Submit] = []
        self.taken: list[Any] = []
        self.cancelled: list[Cancel] = []
        self.replies = Replies(self.cancelled.append)
        self._at = at
        self.task = asyncio.create_task(self.replies.answer(Submit("r", prompt="x"), self._send, self._take))

    async def _send(self, submit: Submit) -> None:
        self.sent.append(submit)

    def _take(self, event: Any) -> None:
        self.taken.append(event)
        if len(self.taken) == self._at:
            raise ZeroDivisionError("ours")


def test_what_a_leader_says_is_there_at_once_and_ends_with_the_end() -> None:
    async def main() -> None:
        asked = Asked()
        await asyncio.sleep(0)
        assert asked.sent == [Submit("r", prompt="x")] and len(asked.replies) == 1
        for event in [Started("s", 1), *EVENTS, Token("r", [0], "late"), Failed("r", "late")]:
            asked.replies.hear(event)
        asked.replies.fail("too late", lost=True)
        assert asked.taken == EVENTS
        await asked.task
        assert asked.cancelled == [] and len(asked.replies) == 0

    finish(main())


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (Rejected("r", "why"), ConfigError),
        (Rejected("r", "why", busy=True), BusyError),
        (Failed("r", "why"), ClusterError),
        (Failed("r", "why", lost=True), LeaderLost),
    ],
)
def test_a_refusal_ends_the_request_and_needs_no_cancel(event: Any, error: type[ExpertdError]) -> None:
    async def main() -> None:
        asked = Asked()
        await asyncio.sleep(0)
        for heard in (EVENTS[0], event, Token("r", [0], "late")):
            asked.replies.hear(heard)
        with pytest.raises(error, match=r"^why$"):
            await asked.task
        assert asked.taken == EVENTS[:1] and asked.cancelled == []

    finish(main())


@pytest.mark.parametrize(("rest", "cancelled"), [(EVENTS[3:5], [Cancel("r")]), (EVENTS[3:], [])])
def test_what_a_request_cannot_take_ends_it_alone(rest: list[Any], cancelled: list[Cancel]) -> None:
    """Not whoever hears the leader; and the leader works for nobody, unless it has ended by itself meanwhile."""

    async def main() -> None:
        asked = Asked(at=3)
        await asyncio.sleep(0)
        for event in [*EVENTS[:3], *rest]:
            asked.replies.hear(event)
        with pytest.raises(ZeroDivisionError, match="ours"):
            await asked.task
        assert asked.taken == EVENTS[:3] and asked.cancelled == cancelled

    finish(main())


def test_who_leaves_is_given_nothing_more() -> None:
    async def main() -> None:
        asked = Asked()
        await asyncio.sleep(0)
        asked.replies.hear(EVENTS[0])
        asked.task.cancel()
        asked.replies.hear(EVENTS[1])
        await asyncio.wait([asked.task])
        assert asked.task.cancelled() and asked.taken == EVENTS[:1] and asked.cancelled == [Cancel("r")]

    finish(main())


@pytest.mark.parametrize("lost", [False, True])
def test_when_the_leader_is_gone_it_is_said_whether_another_may_go_on(lost: bool) -> None:
    async def main() -> None:
        asked = Asked()
        await asyncio.sleep(0)
        asked.replies.fail("gone", lost)
        with pytest.raises(ClusterError, match=r"^gone$") as raised:
            await asked.task
        assert isinstance(raised.value, LeaderLost) is lost and asked.cancelled == []

    finish(main())
