"""Standard output that never blocks the event loop, and the sign of life while ranks load."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# POSIX: a pipe that is ready for writing takes this much at once.
PIECE_BYTES = 512


async def write_out(text: str) -> None:
    """Write to standard output and flush, waiting for a slow reader without blocking Ctrl-C.

    Raises BrokenPipeError when the reader is gone.
    """
    try:
        fd = sys.stdout.fileno()
    except (OSError, ValueError):
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    data = text.encode(sys.stdout.encoding or "utf-8", errors="replace")
    while data:
        await _wait_writable(fd)
        data = data[os.write(fd, data[:PIECE_BYTES]) :]


async def _wait_writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    try:
        loop.add_writer(fd, writable.set)
    except OSError:
        return  # Files and /dev/null are always ready; epoll and kqueue do not take them.
    try:
        await writable.wait()
    finally:
        loop.remove_writer(fd)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[], None]]:
    """Show "what ... 12 s" on standard error during the block, if that is a terminal; needs a loop.

    The function that this gives ends it sooner, for whoever has more to say.
    """
    task = asyncio.create_task(_tick(what)) if sys.stderr.isatty() else None

    def stop() -> None:
        nonlocal task
        if task:
            task.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        task = None

    try:
        yield stop
    finally:
        stop()


async def _tick(what: str) -> None:
    began = time.monotonic()
    while True:
        print(f"\r{what} ... {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)


class Progress:
    """A bar on standard error for work that counts bytes, or `unit`s: `progress(what, done, of)`, from any thread.

    Without a terminal it prints nothing.
    """

    def __init__(self, unit: str = "B") -> None:
        self._unit = unit
        self._bar: Any = None
        self._what = ""
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        with self._lock:
            if what != self._what:
                self.close()
                self._what = what
                scaled = self._unit == "B"
                self._bar = tqdm(
                    total=total, desc=what, disable=None, leave=False, unit=self._unit, unit_scale=scaled
                )
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Take the bar away; the next call draws another."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""
