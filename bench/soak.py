"""Swap bytes between two processes for a long time: every byte is compared, memory and descriptors must not grow.

    python -m expertd.bench.soak tcp|mailbox [--exchanges 1000000]

Sizes go from nothing to LARGEST_BYTES and differ by direction. What an end sends is a window of one block of
random bytes that moves with every exchange, so that a stale, torn or shifted answer is a wrong answer.
"""

import argparse
import gc
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from expertd.errors import ClusterError, ExpertdError

KINDS = ("tcp", "mailbox")
LARGEST_BYTES = 20_000  # two pieces through the mailbox's slots, some segments through TCP
SLOT_BYTES = 16_384
EXCHANGE_TIMEOUT_S = 30.0
MAX_GROWTH_BYTES = 4 << 20  # of resident memory; a leak of 8 bytes an exchange reaches it in 500 000

Swap = Callable[[bytes, int, int], bytes]  # (ours, their size, tag) -> theirs


@dataclass(frozen=True)
class End:
    """What one of the two processes saw. Memory and descriptors are counted after a first hundredth, and at the end."""

    num_exchanges: int
    num_bytes: int
    seconds: float
    rss_start_bytes: int
    rss_end_bytes: int
    fds_start: int
    fds_end: int


@dataclass(frozen=True)
class Job:
    """What one process is told: the mailbox's descriptor or its socket's, and which of the two it is."""

    kind: str
    fd: int
    side: int
    num_exchanges: int


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.job:
        sys.stdout.write(json.dumps(asdict(_run(Job(**json.loads(arguments.job))))))
        return
    try:
        ends = measure(arguments.kind, arguments.exchanges)
        _print(arguments.kind, ends)
        check(ends)
    except ExpertdError as e:
        sys.stderr.write(f"bench soak: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("kind", choices=KINDS, nargs="?", default="tcp")
    parser.add_argument("--exchanges", type=int, default=1_000_000, help="default: a million")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def measure(kind: str, num_exchanges: int) -> list[End]:
    """Swap in two processes, which have ended when this returns. Raises ClusterError when one fails or hangs."""
    fds = _mailbox() if kind == "mailbox" else _sockets()
    ends: list[subprocess.Popen[str]] = []
    deadline_s = 60 + num_exchanges / 1000
    try:
        ends += [_spawn(Job(kind, fd, side, num_exchanges)) for side, fd in enumerate(fds)]
        return [End(**json.loads(_output(end, deadline_s))) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.communicate()
        for fd in set(fds):
            os.close(fd)


def check(ends: list[End]) -> None:
    """Raise ClusterError when an end holds more than it began with."""
    for side, end in enumerate(ends):
        grown = end.rss_end_bytes - end.rss_start_bytes
        if end.fds_end != end.fds_start or grown > MAX_GROWTH_BYTES:
            raise ClusterError(
                f"end {side} grew by {grown} bytes, wanted at most {MAX_GROWTH_BYTES}, "
                f"and from {end.fds_start} to {end.fds_end} descriptors. Look for what is not freed."
            )


def _mailbox() -> list[int]:
    from expertd.link import mailbox

    return [mailbox.create(2, SLOT_BYTES)] * 2


def _sockets() -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return [left.detach(), right.detach()]


def _spawn(job: Job) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "expertd.bench.soak", "--job", json.dumps(asdict(job))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[job.fd],
        process_group=0,  # the terminal's Ctrl-C is ours alone
    )


def _output(end: subprocess.Popen[str], deadline_s: float) -> str:
    try:
        out, err = end.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"not done after {deadline_s:g} s. Try fewer --exchanges.") from None
    if end.returncode:
        last = err.strip().split("\n")[-1][:300]
        raise ClusterError(f"an end gave up with code {end.returncode}: {last or 'it said nothing'}")
    return out


# One of the two processes.


def _run(job: Job) -> End:
    if job.kind == "tcp":
        from expertd.link.connection import Connection

        with Connection.from_socket(socket.socket(fileno=job.fd), epoch=1) as connection:
            return _soak(
                job,
                lambda mine, size, tag: connection.swap(mine, size, tag, EXCHANGE_TIMEOUT_S),
            )
    from expertd.link.mailbox import Mailbox

    with Mailbox(job.fd, job.side, 2, step_timeout_s=1e9, pulse_timeout_s=EXCHANGE_TIMEOUT_S) as box:
        return _soak(job, lambda mine, size, tag: _through(box, job.side, mine, size, tag))


def _through(box: Any, side: int, mine: bytes, size: int, tag: int) -> bytes:
    """A mailbox gives every rank's bytes in rank order; the other's are wanted."""
    sizes = (len(mine), size) if side == 0 else (size, len(mine))
    both: bytes = box.exchange(mine, sizes, tag)
    return both[len(mine) :] if side == 0 else both[:size]


def _soak(job: Job, swap: Swap) -> End:
    rng = random.Random(1)  # the same block at both ends, which know what they must get
    block = rng.randbytes(1 << 18)
    sizes = [0, 1, 4096, LARGEST_BYTES, *(rng.randrange(LARGEST_BYTES) for _ in range(997))]
    process, start, num_bytes = psutil.Process(), time.monotonic(), 0
    for i in range(job.num_exchanges):
        if i == job.num_exchanges // 100:
            gc.collect()
            rss, fds = process.memory_info().rss, process.num_fds()
        mine, theirs = (_window(block, sizes, i, side) for side in (job.side, 1 - job.side))
        if swap(mine, len(theirs), i % 2**32) != theirs:
            raise ClusterError(f"exchange {i} gave other bytes than the peer sent.")
        num_bytes += len(mine) + len(theirs)
    gc.collect()
    seconds, rss_end = time.monotonic() - start, process.memory_info().rss
    return End(job.num_exchanges, num_bytes, seconds, rss, rss_end, fds, process.num_fds())


def _window(block: bytes, sizes: list[int], i: int, side: int) -> bytes:
    size = sizes[(i + 500 * side) % len(sizes)]
    at = (i * 7919 + side * 104_729) % (len(block) - LARGEST_BYTES)
    return block[at : at + size]


def _print(kind: str, ends: list[End]) -> None:
    for side, e in enumerate(ends):
        sys.stdout.write(
            f"{kind} end {side}: {e.num_exchanges} exchanges, {e.num_bytes / 2**30:.2f} GiB both ways, all right, "
            f"{e.seconds:.0f} s ({e.seconds / e.num_exchanges * 1e6:.1f} µs each); memory "
            f"{e.rss_start_bytes / 2**20:.1f} -> {e.rss_end_bytes / 2**20:.1f} MiB, "
            f"descriptors {e.fds_start} -> {e.fds_end}\n"
        )


if __name__ == "__main__":
    main()
