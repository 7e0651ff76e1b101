"""What the tests of cluster, server and cli share: groups of stub ranks, and what is left of them."""

import asyncio
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from expertd.cluster import supervisor
from expertd.config import GroupConfig


class StubMailbox:
    """The shape of expertd.link.mailbox without its compiled half: a file in which stub ranks count their beats.

    `poisoned` has the reason of every call.
    """

    def __init__(self) -> None:
        self.poisoned: list[str] = []

    def create(self, num_ranks: int, slot_bytes: int) -> int:
        with tempfile.TemporaryFile() as file:
            file.truncate(8 * num_ranks)
            return os.dup(file.fileno())

    def poison(self, fd: int, reason: str) -> None:
        os.fstat(fd)
        self.poisoned.append(reason)

    def pulses(self, fd: int) -> tuple[tuple[int, ...], int]:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        return struct.unpack(f"{len(data) // 8}Q", data), 0


def use_stub(mailbox: StubMailbox | None = None) -> None:
    """Make this process start stub ranks; for scripts, where no fixture undoes it."""
    supervisor.RANK_MODULE = "stub_rank"
    stub = mailbox or StubMailbox()
    supervisor.load_mailbox = lambda: stub


def group_of(folder: Path, num_ranks: int = 1, **moods: str) -> GroupConfig:
    """A group over `folder`; r1="deaf" changes how rank 1 of it behaves."""
    (folder / "stub.json").write_text(json.dumps({name[1:]: mood for name, mood in moods.items()}))
    return GroupConfig(checkpoint=str(folder), num_ranks=num_ranks)


def received(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What the rank has received after its Setup."""
    log = folder / f"rank{rank}.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has, though the first process of a container may never reap it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(condition: Callable[[], Any], timeout_s: float = 2.0) -> None:
    """Wait for a condition that the test expects to come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def until_now(condition: Callable[[], Any], timeout_s: float = 2.0) -> None:
    """The same, for tests without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)
