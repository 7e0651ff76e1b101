"""Leaders without ranks: they answer with ANSWER, token by token, as far as a test lets them."""

import asyncio
from typing import Any

from expertd.cluster.reply import LeaderLost, Take
from expertd.cluster.requests import Requests
from expertd.engine.messages import Done, Started, Submit, Token

ANSWER = [3, 1, 4, 1, 5, 9, 2, 6]
EVENTS = [
    Started("r", 2),
    *(Token("r", [i], f"{i} ") for i in ANSWER),
    Done("r", "stop", 2, len(ANSWER), 1.0, 1.0, "solo", 1),
]


class Leaders:
    """Each leader gives so many tokens and is lost, or raises what the list has; the last one sees it through."""

    def __init__(self, *lives: "int | Exception", num_said: int = len(ANSWER)) -> None:
        self._lives, self._num_said = [*lives], num_said
        self.asked: list[Submit] = []
        self.requests = Requests(self.find)

    async def find(self, patient: bool) -> Any:
        return self

    async def answer(self, submit: Submit, take: Take) -> None:
        self.asked.append(submit)
        life = self._lives.pop(0) if self._lives else len(ANSWER)
        if isinstance(life, Exception):
            raise life
        take(Started(submit.request_id, 2))
        for token_id in ANSWER[len(submit.generated) :][:life]:
            await self.pace()
            take(Token(submit.request_id, [token_id], f"{token_id} "))
        if len(submit.generated) + life < len(ANSWER):
            raise LeaderLost("rank 0 died")
        await self.pace()
        take(Done(submit.request_id, "stop", 2, self._num_said, 1.0, 1.0, "solo", 1))

    async def pace(self) -> None:
        """Before each token, and before the Done."""

    async def ask(self, **options: Any) -> list[Any]:
        return [e async for e in self.requests.generate(Submit("r", prompt="x", **options))]


class Paced(Leaders):
    """`allowed` tokens (and Dones) come, and no more until it grows."""

    def __init__(self, *lives: "int | Exception", allowed: int = 0) -> None:
        super().__init__(*lives)
        self._allowed, self._more, self.num_given = allowed, asyncio.Event(), 0

    def allow(self, number: int) -> None:
        self._allowed = number
        self._more.set()

    async def pace(self) -> None:
        while self.num_given >= self._allowed:
            self._more.clear()
            await self._more.wait()
        self.num_given += 1
