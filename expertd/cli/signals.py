"""Run a coroutine until it ends or the user stops it, so that whatever it started is ended in order."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM


def run_until_signal(work: Coroutine[Any, Any, T], wish: Callable[[int], bool] | None = None) -> T:
    """Run `work`; Ctrl-C or SIGTERM cancels it, a second one cancels its clean-up, too.

    `wish` is asked first, about SIGHUP as well, and gives whether that was all that the signal means.

    Raises KeyboardInterrupt after Ctrl-C, SystemExit (143) after SIGTERM, and what `work` raises.
    """
    got: list[int] = []
    try:
        return asyncio.run(_run(work, got, wish))
    except asyncio.CancelledError:
        if not got:
            raise
    # Outside of the loop: asyncio gives these two exceptions a meaning of its own.
    if got[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(TERMINATED)


async def _run(work: Coroutine[Any, Any, T], got: list[int], wish: Callable[[int], bool] | None) -> T:
    task = asyncio.ensure_future(work)

    def stop(number: int) -> None:
        if not (wish and wish(number)):
            got.append(number)
            task.cancel()

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if wish else ()))
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
