"""Run a coroutine until it ends or the user stops it, so that whatever it started is ended in order."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; Ctrl-C or SIGTERM cancels it, a second one cancels its clean-up, too.

    Raises KeyboardInterrupt after Ctrl-C, SystemExit (143) after SIGTERM, and what `work` raises.
    """
    got: list[int] = []
    try:
        return asyncio.run(_run(work, got))
    except asyncio.CancelledError:
        if not got:
            raise
    # Outside of the loop: asyncio gives these two exceptions a meaning of its own.
    if got[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(TERMINATED)


async def _run(work: Coroutine[Any, Any, T], got: list[int]) -> T:
    task = asyncio.ensure_future(work)

    def stop(number: int) -> None:
        got.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
