"""A request and its leaders, who are lists of events here: what the client gets when they are lost."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from expertd.cluster import requests
from expertd.cluster.reply import LeaderLost
from expertd.cluster.requests import Requests
from expertd.engine.messages import Done, Started, Submit, Token
from expertd.errors import ClusterError, ConfigError
from tests.cluster.hosts import finish

ANSWER = [3, 1, 4, 1, 5, 9, 2, 6]


class Leaders:
    """Each leader gives so many tokens and is lost, or raises what the list has; the last one sees it through."""

    def __init__(self, *lives: "int | Exception", num_said: int = len(ANSWER)) -> None:
        self._lives, self._num_said = [*lives], num_said
        self.asked: list[Submit] = []
        self.requests = Requests(self.find)

    async def find(self) -> Any:
        return self

    async def generate(self, submit: Submit) -> AsyncGenerator[Any, None]:
        self.asked.append(submit)
        life = self._lives.pop(0) if self._lives else len(ANSWER)
        if isinstance(life, Exception):
            raise life
        yield Started(submit.request_id, 2)
        for token_id in ANSWER[len(submit.generated) :][:life]:
            yield Token(submit.request_id, [token_id], str(token_id))
        if len(submit.generated) + life < len(ANSWER):
            raise LeaderLost("rank 0 died")
        yield Done(submit.request_id, "stop", 2, self._num_said, 1.0, 1.0, "solo", 1)

    async def answer(self) -> list[Any]:
        return [e async for e in self.requests.generate(Submit("r", prompt="x"))]


def test_it_goes_on_with_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_PAUSE_S", 0.0)

    async def main() -> None:
        leaders = Leaders(0, 3, LeaderLost("gone"), 0, 4)
        started, *tokens, done = await leaders.answer()
        assert started == Started("r", 2) and done.completion_tokens == len(ANSWER)
        assert tokens == [Token("r", [i], str(i)) for i in ANSWER]
        assert [s.request_id for s in leaders.asked] == ["r", "r~1", "r~2", "r~3", "r~4", "r~5"]
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
