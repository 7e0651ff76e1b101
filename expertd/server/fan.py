"""The events of several requests in one stream: n choices, several prompts."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from expertd.engine.messages import Done, Started, Submit, Token
from expertd.errors import ClusterError

# So many choices of one request are asked for at a time; the others wait here, not in the queue that all share.
MAX_AT_ONCE = 16
# Events that wait for a slow reader; the rest stays in the transcripts.
MAX_PENDING = 64

Event = Started | Token | Done
Events = AsyncGenerator[tuple[int, Event], None]


class Source(Protocol):
    """What answers single requests, as a cluster does."""

    def generate(self, submit: Submit, /) -> AsyncGenerator[Event, None]: ...


async def generate_all(source: Source, submits: list[Submit]) -> Events:
    """Run requests side by side and yield their events as they come, each with the number of its request.

    Leaving early cancels all. Raises what the first one to fail raises, and ClusterError for one that was cancelled.
    """
    if len(submits) == 1:
        async with aclosing(source.generate(submits[0])) as events:
            async for event in events:
                yield 0, _checked(event)
        return
    pending: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue(MAX_PENDING)
    at_once = asyncio.Semaphore(MAX_AT_ONCE)
    tasks = [
        asyncio.create_task(_run(source, i, submit, at_once, pending)) for i, submit in enumerate(submits)
    ]
    try:
        num_open = len(submits)
        while num_open:
            found = await pending.get()
            if isinstance(found, Exception):
                raise found
            num_open -= isinstance(found[1], Done)
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(
    source: Source,
    index: int,
    submit: Submit,
    at_once: asyncio.Semaphore,
    pending: "asyncio.Queue[tuple[int, Event] | Exception]",
) -> None:
    try:
        async with at_once, aclosing(source.generate(submit)) as events:
            async for event in events:
                await pending.put((index, _checked(event)))
    except Exception as e:
        await pending.put(e)


def _checked(event: Event) -> Event:
    if isinstance(event, Done) and event.finish_reason == "cancelled":
        raise ClusterError("the request was cancelled. Send it again.")
    return event
