"""Whether a group still works: while nobody asks anything, it is asked for one token now and then, of all ranks."""

import asyncio
import secrets
import time

from expertd.cluster.requests import Requests
from expertd.engine.messages import Submit
from expertd.errors import ExpertdError

IDLE_S = 30.0
TIMEOUT_S = 30.0
# How soon it asks again after a failure, and how often it looks whether it should.
AGAIN_S, LOOK_S = 5.0, 1.0
# With requests open, each second with a step is told by the leader. The longest step is a chunk of a prompt.
STUCK_S = 120.0


class Probe:
    """Lives as long as its cluster. `last_step_at` is when a step was last known to have ended."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._failure, self._failed_at = "", 0.0
        self._stepped_at = time.monotonic()

    def stepped(self) -> None:
        """The leader has told of steps."""
        self._stepped_at = time.monotonic()

    @property
    def last_step_at(self) -> float:
        return max(self._stepped_at, self._requests.last_token_at)

    @property
    def failure(self) -> str:
        """Why the group must be thought not to work, "" while it does."""
        still_s = time.monotonic() - self.last_step_at
        if self._requests.num_open and still_s > STUCK_S:
            return f"no step for {still_s:.0f} s with {self._requests.num_open} requests open"
        return self._failure if self._failed_at > self.last_step_at else ""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S if self.failure else LOOK_S)
            idle = not self._requests.num_open and time.monotonic() - self.last_step_at > IDLE_S
            if idle or self.failure:
                await self._ask()

    async def _ask(self) -> None:
        submit = Submit(f"probe-{secrets.token_hex(8)}", prompt="a", max_tokens=1, ignore_end=True)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for _ in self._requests.generate(submit):
                    pass
            return
        except TimeoutError:
            self._failure = f"a step of one token has not ended within {TIMEOUT_S:g} s"
        except ExpertdError as e:
            self._failure = f"a step of one token failed: {e}"
        self._failed_at = time.monotonic()
