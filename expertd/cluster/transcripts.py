"""What a supervisor knows of a request: enough to give its answer again, and to let another leader go on with it."""

import asyncio
from dataclasses import replace

from expertd.engine.messages import Done, Started, Submit, Token
from expertd.errors import ClusterError, ExpertdError

Event = Started | Token | Done


class Transcript:
    """One request and its events so far. `submit` has a seed, so what follows is decided, whoever computes it.

    `num_committed` of the events may be given to readers, who wait for more with `wait_news`. `end` is the Done, or
    why there is none.
    """

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.events: list[Event] = []
        self.num_tokens = 0
        self.num_committed = 0
        self.end: Done | ExpertdError | None = None
        self._news = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def token_ids(self) -> list[int]:
        return [i for event in self.events if isinstance(event, Token) for i in event.token_ids]

    def add(self, event: Event) -> None:
        """Take what the leader says. Raises ClusterError when its Done counts other tokens than have come."""
        if isinstance(event, Started):
            if self.events:  # the next leader says it again
                return
        elif isinstance(event, Token):
            self.num_tokens += len(event.token_ids)
        else:
            if event.completion_tokens != self.num_tokens and event.finish_reason != "cancelled":
                counts = f"{self.num_tokens} tokens have come, of {event.completion_tokens}"
                raise ClusterError(f"request {self.request_id}: {counts}. This is a bug of expertd.")
            self.end = event
        self.events.append(event)

    def commit(self, number: int) -> None:
        """Let readers have the first `number` events."""
        self.num_committed = max(self.num_committed, number)
        self.tell()

    def fail(self, error: ExpertdError) -> None:
        """The answer ends here, but for what was committed."""
        self.end = self.end or error
        self.tell()

    def tell(self) -> None:
        """Wake the readers: something changed."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait_news(self) -> None:
        await self._news.wait()

    def resumed(self, number: int) -> Submit:
        """The request as the next leader gets it, for the `number`th time after the first.

        Its id is another each time: what the rank still says of an earlier one, after a Cancel, is not of this.
        """
        request_id = f"{self.request_id}~{number}"
        return replace(self.submit, request_id=request_id, generated=self.token_ids, resumed=True)
