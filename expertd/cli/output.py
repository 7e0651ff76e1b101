"""Standard output that never blocks the event loop, and the sign of life while ranks load."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator

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
def progress(what: str) -> Iterator[None]:
    """Show "what ... 12 s" on standard error during the block, if that is a terminal; needs a loop."""
    if not sys.stderr.isatty():
        yield
        return
    task = asyncio.create_task(_tick(what))
    try:
        yield
    finally:
        task.cancel()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def _tick(what: str) -> None:
    began = time.monotonic()
    while True:
        print(f"\r{what} ... {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)
