"""One of the two processes of `expertd bench link`: `python -m expertd.bench.link_side JOB`. Side 0 writes figures.

Both sides make the same calls in the same order; nothing else keeps them together.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.errors import ClusterError
from expertd.topology.machine import settle

SLOT_BYTES = 1 << 20  # as GroupConfig's default: the largest size crosses in one round
TIMEOUT_S = 60.0
PULSE_TIMEOUT_S = 10.0  # a busy machine may starve a pinned process; deaths are the parent's to see
NUM_WARM = 20
CHAIN = 20  # exchanges of MLX's ring in one graph
ENOUGH_FOR_P999 = 1000

Microseconds = list[float]
# (pattern, bytes each way, operations) -> the time of each
Timed = Callable[[str, int, int], Microseconds]


@dataclass(frozen=True)
class Job:
    """What one side is told; `cores` is empty when it is not pinned.

    `fds` are mailbox, memory, connection, socket, linked (the mailbox of one of two hosts) and lifeline; and verbs, as
    linked, where there is a device.
    """

    side: int
    library: str
    fds: dict[str, int]
    cores: list[int]
    sizes: list[int]
    repeats: int


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    settle(job.cores)
    with ExitStack() as stack:
        links = _links(stack, job)
        rows = [{"bytes": size, **measure(links, size, job.repeats)} for size in job.sizes]
    if job.side == 0:
        sys.stdout.write(json.dumps(rows))
    sys.stdout.flush()
    os._exit(0)  # MLX's ring has threads that need no tidy end


def measure(links: dict[str, tuple[Timed, list[str]]], size: int, repeats: int) -> dict[str, Any]:
    """Run each link's patterns in turn, in blocks; give {link: {pattern: figures}}."""
    turns = [(link, pattern) for link, (_, patterns) in links.items() for pattern in patterns]
    blocks: dict[tuple[str, str], list[Microseconds]] = {turn: [] for turn in turns}
    count = max(50, min(1000, (1 << 26) // size))
    for repeat in range(repeats):
        for link, pattern in turns if repeat % 2 == 0 else reversed(turns):
            blocks[link, pattern].append(links[link][0](pattern, size, count))
    figures: dict[str, Any] = {}
    for (link, pattern), taken in blocks.items():
        figures.setdefault(link, {})[pattern] = summarize(taken)
    return figures


def summarize(blocks: list[Microseconds]) -> dict[str, Any]:
    """p50, p99, p99.9 and minimum of all samples, and the median of each block."""
    ordered = sorted(sample for block in blocks for sample in block)

    def percentile(fraction: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * fraction))], 3)

    return {
        "samples": len(ordered),
        "p50_us": percentile(0.5),
        "p99_us": percentile(0.99),
        "p999_us": percentile(0.999) if len(ordered) >= ENOUGH_FOR_P999 else None,
        "min_us": round(ordered[0], 3),
        "rounds_us": [round(statistics.median(block), 3) for block in blocks],
    }


# The links. Each closes with the stack.


def _links(stack: ExitStack, job: Job) -> dict[str, tuple[Timed, list[str]]]:
    both = ["swap", "one_way"]
    loops = _Loops(stack, job)
    links = {name: (timed, ["swap"] if name == "crc" else both) for name, timed in loops.links()}
    return {**links, "ring": (_ring(), ["swap"])}


class _Loops:
    """The loops in C, and what they call, by address: cffi's two libraries share no types."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        from cffi import FFI

        self._ffi, self._stack, self._job = FFI(), stack, job
        self._ffi.cdef((Path(__file__).parent / "floor.h").read_text())
        self._lib: Any = self._ffi.dlopen(job.library)

    def links(self) -> Iterator[tuple[str, Timed]]:
        fds, side = self._job.fds, self._job.side
        yield "mailbox", self._timed(self._mailbox("mailbox"))
        yield "memory", self._timed(self._lib.xb_memory(fds["memory"], SLOT_BYTES, side, TIMEOUT_S))
        yield "tcp", self._timed(self._connection())
        yield "linked", self._timed(self._mailbox("linked"))
        if "verbs" in fds:
            yield "verbs", self._timed(self._mailbox("verbs"))
        yield "spinning", self._timed(self._lib.xb_socket(fds["socket"], 1, side, TIMEOUT_S))
        yield "blocking", self._timed(self._lib.xb_socket(fds["socket"], 0, side, TIMEOUT_S))
        yield "crc", self._timed(self._lib.xb_checksum(_address("xd_crc32c"), side))

    def _mailbox(self, name: str) -> Any:
        from expertd.link.mailbox import Mailbox

        fds, side = self._job.fds, self._job.side
        box = self._stack.enter_context(
            Mailbox(fds[name], side, 2, TIMEOUT_S, PULSE_TIMEOUT_S, fds["lifeline"])
        )
        return self._lib.xb_mailbox(_address("xd_mailbox_exchange"), box.address, side, TIMEOUT_S)

    def _connection(self) -> Any:
        from expertd.native._transport import ffi, lib

        err = ffi.new("char[200]")
        connection = lib.xd_tcp_open(self._job.fds["connection"], 1, err, len(err))
        if connection == ffi.NULL:
            raise ClusterError(ffi.string(err).decode(errors="replace"))
        self._stack.callback(lib.xd_connection_close, connection)
        address = int(ffi.cast("uintptr_t", connection))
        return self._lib.xb_connection(_address("xd_swap"), address, self._job.side, TIMEOUT_S)

    def _timed(self, link: Any) -> Timed:
        if link == self._ffi.NULL:
            raise ClusterError("a floor of the benchmark could not be set up: out of memory")
        self._stack.callback(self._lib.xb_close, link)

        def run(pattern: str, size: int, count: int) -> Microseconds:
            turns = self._lib.XB_PONG if self._job.side else self._lib.XB_PING
            number = self._lib.XB_SWAP if pattern == "swap" else turns
            ns = self._ffi.new("uint64_t[]", count)
            if code := self._lib.xb_run(link, number, size, NUM_WARM, count, ns):
                raise ClusterError(f"{pattern} of {size} bytes failed with code {code}")
            scale = 1e3 if pattern == "swap" else 2e3
            return [t / scale for t in ns]

        return run


def _address(function: str) -> int:
    from expertd.native._transport import ffi, lib

    return int(ffi.cast("uintptr_t", ffi.addressof(lib, function)))


def _ring() -> Timed:
    """MLX's own ring: chains of exchanges in one graph, each sample the mean of a chain."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")

    def run(pattern: str, size: int, count: int) -> Microseconds:
        samples = []
        for _ in range(max(1, count // 200) + 1):  # the first is the warm-up
            rows = mx.zeros((size,), dtype=mx.uint8)
            mx.eval(rows)
            for _ in range(CHAIN):
                rows = mx.distributed.all_gather(rows, group=group)[:size]
            begin = time.perf_counter()
            mx.eval(rows)
            samples.append((time.perf_counter() - begin) * 1e6 / CHAIN)
        return samples[1:]

    return run


if __name__ == "__main__":
    main()
