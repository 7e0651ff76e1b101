"""A request and its leaders, who are lists of events here: what the client gets when they are lost."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from expertd.cluster import reply, requests
from expertd.cluster.reply import LeaderLost
from expertd.engine.messages import Candidate, Logprobs, Submit, Token
from expertd.errors import ClusterError, ConfigError
from tests.cluster.answering import ANSWER, EVENTS, Leaders
from tests.cluster.hosts import finish


def test_it_goes_on_with_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_PAUSE_S", 0.0)

    async def main() -> None:
        leaders = Leaders(0, 3, LeaderLost("gone"), 0, 4)
        assert await leaders.answer() == EVENTS
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
            await leaders.answer()
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
            await leaders().answer()

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


def test_tokens_that_are_joined_for_a_slow_reader_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "MAX_PENDING_EVENTS", 2)

    async def main() -> None:
        events = reply.Reply("r")
        for i in range(5):
            found = Logprobs(Candidate(i, b"x", -1.0), [], i)
            events.put(Token("r", [i], "x", [found]))
        first, rest = await events.get(), await events.get()
        assert isinstance(first, Token) and first.token_ids == [0]
        assert isinstance(rest, Token) and (rest.token_ids, rest.text) == ([1, 2, 3, 4], "xxxx")
        assert [found.text_offset for found in rest.logprobs] == [1, 2, 3, 4]

    finish(main())
