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

from expertd.cluster import local, supervisor
from expertd.config import GroupConfig

# For what takes milliseconds, on a machine that others keep busy: reaching it means that something never comes.
LIMIT_S = 30.0
# For what ends by itself only after minutes, or never.
SOON_S = 10.0


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


def use_stub(change: Callable[[Any, str, Any], None] = setattr) -> StubMailbox:
    """Make this process start stub ranks. `change` is a fixture's monkeypatch.setattr; in scripts nothing undoes it.

    STUB_KILL_AFTER_S in the environment is another KILL_AFTER_S.
    """
    stub = StubMailbox()
    change(supervisor, "RANK_MODULE", "stub_rank")
    change(supervisor, "load_mailbox", lambda: stub)
    # A stub beats in Python, which a busy machine may keep waiting for longer than a rank's C thread.
    change(local, "PULSE_SILENCE_S", LIMIT_S)
    change(local, "JOIN_S", LIMIT_S)
    if grace := os.environ.get("STUB_KILL_AFTER_S"):
        change(supervisor, "KILL_AFTER_S", float(grace))
    return stub


def group_of(folder: Path, num_ranks: int = 1, exchange_timeout_s: float = 60, **moods: str) -> GroupConfig:
    """A group over `folder`; r1="deaf" changes how rank 1 of it behaves."""
    (folder / "stub.json").write_text(json.dumps({name[1:]: mood for name, mood in moods.items()}))
    return GroupConfig(checkpoint=str(folder), num_ranks=num_ranks, exchange_timeout_s=exchange_timeout_s)


def received(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The requests and cancellations that a rank has received."""
    return [m for m in _log(folder, rank) if m["op"] != "Begin"]


def begun(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The epochs that a rank has been told of."""
    return [m for m in _log(folder, rank) if m["op"] == "Begin"]


def _log(folder: Path, rank: int) -> list[dict[str, Any]]:
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


async def until(condition: Callable[[], Any], timeout_s: float = LIMIT_S) -> None:
    """Wait for a condition that the test expects to come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def until_now(condition: Callable[[], Any], timeout_s: float = LIMIT_S) -> None:
    """The same, for tests without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)
