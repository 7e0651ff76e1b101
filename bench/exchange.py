"""Latency of one exchange inside the MLX graph, beside MLX's own ring backend.

    python -m expertd.bench.exchange [--ranks 2] [--sizes-kib 4 16 64] [--repeats 200] [--json FILE]

Method. One process per rank, each on a core of its own, holds both a mailbox and a ring group over
127.0.0.1. A chain is 100 exchanges in one `mx.eval`; the next rank's rows of each result are the input of
the next one, so nothing can overlap. Building the graph is not timed, and a barrier precedes each chain.
One sample is the time of a chain by its slowest rank, divided by 100; p99 is thus over chains, not over
single exchanges. Chains of ours, of the ring and of the floor (the bare C function called from Python,
without MLX) take turns in blocks of BLOCK, so that noise hits all three. Both results are compared with the
right values once per size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertd.bench.processes import free_ports, wait_for_all
from expertd.config import MAX_RANKS
from expertd.errors import ClusterError, ConfigError, ExpertdError
from expertd.topology.machine import describe_machine, own_cores, settle, summarize

CHAIN = 100  # exchanges per graph
BLOCK = 5  # chains of one kind in a row
WARM_UP = 3  # chains before the timed ones, per kind and size
WIDTH = 256  # float32, so that a row is one KiB
DEADLINE_S = 120.0
# A busy machine may starve a pinned rank for longer than serving allows; deaths are the parent's to see.
PULSE_TIMEOUT_S = 10.0
SLOT_BYTES = 1 << 20  # as GroupConfig's default
KINDS = ("ours", "ring", "floor")

Chain = Callable[[], float]  # runs one chain, gives its seconds


@dataclass(frozen=True)
class Job:
    """What one rank process is told; `cores` is empty when ranks are not pinned."""

    rank: int
    num_ranks: int
    mailbox_fd: int
    lifeline_fd: int
    cores: list[int]
    sizes_kib: list[int]
    repeats: int


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.job:
        _run_rank(Job(**json.loads(arguments.job)))
        return
    try:
        report = measure(arguments.ranks, arguments.sizes_kib, arguments.repeats, not arguments.no_pin)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    except ExpertdError as e:
        sys.stderr.write(f"bench exchange: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    _print(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.exchange", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--ranks", type=int, default=2, help="rank processes (default 2)")
    parser.add_argument(
        "--sizes-kib", type=int, nargs="+", default=[4, 16, 64], help="KiB that each rank sends"
    )
    parser.add_argument(
        "--repeats", type=int, default=200, help="timed chains per size and kind (default 200)"
    )
    parser.add_argument("--no-pin", action="store_true", help="let the system place the ranks")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def measure(num_ranks: int, sizes_kib: list[int], repeats: int, pin: bool = True) -> dict[str, Any]:
    """Measure in rank processes that have all ended when this returns or raises.

    Raises ConfigError for senseless arguments, ClusterError when a rank fails or DEADLINE_S passes.
    """
    if not 2 <= num_ranks <= MAX_RANKS or min(sizes_kib) < 1 or repeats < 1:
        raise ConfigError(f"wanted 2 to {MAX_RANKS} ranks, sizes of at least 1 KiB and at least 1 repeat.")
    cores = own_cores(num_ranks) if pin else []
    samples = _run_ranks(num_ranks, cores, sizes_kib, repeats)
    rows = [_row(kib, [rank[str(kib)] for rank in samples]) for kib in sizes_kib]
    return {"machine": describe_machine(), "ranks": num_ranks, "pinned_to": cores, "rows": rows}


def _row(kib: int, ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"kib": kib}
    for kind in KINDS:
        slowest = [max(times) for times in zip(*(rank[kind] for rank in ranks), strict=True)]
        row[f"{kind}_us"] = _summary([seconds * 1e6 / CHAIN for seconds in slowest])
    row["ratio"] = round(row["ours_us"]["p50"] / row["ring_us"]["p50"], 4)
    return row


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50": round(statistics.median(ordered), 3), "p99": round(p99, 3), "min": round(ordered[0], 3)}


def _print(report: dict[str, Any]) -> None:
    placed = f"pinned to cores {report['pinned_to']}" if report["pinned_to"] else "not pinned"
    sys.stdout.write(f"{summarize(report['machine'])}\n{report['ranks']} ranks, {placed}; ")
    sys.stdout.write("µs per exchange inside the MLX graph (floor: outside)\n")
    sys.stdout.write(f"{'KiB':>5}  {'ours p50':>9} {'p99':>8}  {'ring p50':>9} {'p99':>8}")
    sys.stdout.write(f"  {'ours/ring':>9}  {'floor p50':>9}\n")
    for row in report["rows"]:
        ours, ring = row["ours_us"], row["ring_us"]
        sys.stdout.write(f"{row['kib']:5d}  {ours['p50']:9.2f} {ours['p99']:8.2f}")
        sys.stdout.write(f"  {ring['p50']:9.2f} {ring['p99']:8.2f}  {'1/%.1f' % (1 / row['ratio']):>9}")
        sys.stdout.write(f"  {row['floor_us']['p50']:9.2f}\n")


# The parent: start the ranks, wait with a deadline, leave none behind.


def _run_ranks(num_ranks: int, cores: list[int], sizes_kib: list[int], repeats: int) -> list[Any]:
    from expertd.link import mailbox

    mailbox_fd = mailbox.create(num_ranks, SLOT_BYTES)
    lifeline_fd, lifeline = os.pipe()
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as name:
        folder = Path(name)
        (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{p}"] for p in free_ports(num_ranks)]))
        try:
            for rank in range(num_ranks):
                job = Job(rank, num_ranks, mailbox_fd, lifeline_fd, cores, sizes_kib, repeats)
                ranks.append(_spawn(job, folder))
            wait_for_all(ranks, folder, DEADLINE_S)
            return [json.loads((folder / f"{rank}.out").read_text()) for rank in range(num_ranks)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            for fd in (mailbox_fd, lifeline_fd, lifeline):
                os.close(fd)


def _spawn(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    ring = {"MLX_RANK": str(job.rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
    with open(folder / f"{job.rank}.out", "wb") as out, open(folder / f"{job.rank}.err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "expertd.bench.exchange", "--job", json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **ring},
            pass_fds=[job.mailbox_fd, job.lifeline_fd],
            process_group=0,  # the terminal's Ctrl-C is ours alone
        )


# A rank: the three kinds of chains, taking turns.


def _run_rank(job: Job) -> None:
    settle([job.cores[job.rank]] if job.cores else [])
    from expertd.link.mailbox import Mailbox

    with Mailbox(
        job.mailbox_fd, job.rank, job.num_ranks, DEADLINE_S, PULSE_TIMEOUT_S, job.lifeline_fd
    ) as box:
        bench = _RankBench(job, box)
        result = {kib: bench.measure(kib, job.repeats) for kib in job.sizes_kib}
    sys.stdout.write(json.dumps(result))


class _RankBench:
    """One rank's side of the measurement; all ranks make the same calls in the same order."""

    def __init__(self, job: Job, box: Any) -> None:
        import mlx.core as mx

        self._job, self._box, self._mx = job, box, mx
        mx.set_default_device(mx.cpu)  # the ring and the mailbox both live on the CPU; no fences to a GPU
        self._ring = mx.distributed.init(strict=True, backend="ring")
        if self._ring.size() != job.num_ranks:
            raise ClusterError(f"the ring has {self._ring.size()} ranks, wanted {job.num_ranks}")

    def measure(self, kib: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of each timed chain with kib KiB per rank, by kind."""
        self._check_values(kib)
        chains: dict[str, Chain] = {
            "ours": lambda: self._time_graph(kib, self._ours),
            "ring": lambda: self._time_graph(kib, self._all_gather),
            "floor": lambda: self._time_floor(kib << 10),
        }
        for chain in chains.values():
            for _ in range(WARM_UP):
                chain()
        samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for start in range(0, repeats, BLOCK):
            for kind in KINDS:
                samples[kind] += [chains[kind]() for _ in range(min(BLOCK, repeats - start))]
        return samples

    def _ours(self, rows: Any, tag: int) -> Any:
        from expertd.model.exchange import exchange

        return exchange(self._box, rows, [rows.shape[0]] * self._job.num_ranks, tag)

    def _all_gather(self, rows: Any, tag: int) -> Any:
        return self._mx.distributed.all_gather(rows, group=self._ring)

    def _rows(self, rank: int, kib: int) -> Any:
        """The rows [kib, WIDTH] with which a rank starts: no two numbers in the group are equal."""
        size = kib * WIDTH
        return self._mx.arange(rank * size, (rank + 1) * size, dtype=self._mx.float32).reshape(kib, WIDTH)

    def _chain(self, kib: int, gather: Callable[[Any, int], Any]) -> Any:
        """The graph of CHAIN exchanges, not evaluated; gives the last result [num_ranks * kib, WIDTH]."""
        rows = self._rows(self._job.rank, kib)
        self._mx.eval(rows)
        following = (self._job.rank + 1) % self._job.num_ranks
        for tag in range(1, CHAIN + 1):
            everything = gather(rows, tag)
            rows = everything[following * kib : (following + 1) * kib]
        return everything

    def _time_graph(self, kib: int, gather: Callable[[Any, int], Any]) -> float:
        graph = self._chain(kib, gather)
        self._barrier()
        start = time.perf_counter()
        self._mx.eval(graph)
        seconds = time.perf_counter() - start
        self._box.check()
        return seconds

    def _time_floor(self, num_bytes: int) -> float:
        """The same chain by calls of the C function; each call through cffi adds some 0.2 µs."""
        from expertd.native._transport import ffi, lib

        num_ranks, box = self._job.num_ranks, ffi.cast("xd_mailbox *", self._box.address)
        sizes = ffi.new("size_t[]", [num_bytes] * num_ranks)
        mine, at = ffi.new("char[]", num_bytes), (self._job.rank + 1) % num_ranks * num_bytes
        everything = [ffi.new("char[]", num_bytes * num_ranks) for _ in range(2)]
        calls = [(everything[tag % 2] + at, everything[(tag + 1) % 2]) for tag in range(CHAIN)]
        calls[0] = (mine, calls[0][1])
        self._barrier()
        start = time.perf_counter()
        for tag, (rows, out) in enumerate(calls, 1):
            lib.xd_mailbox_exchange(box, tag, 0, rows, sizes, out)
        seconds = time.perf_counter() - start
        self._box.check()
        return seconds

    def _barrier(self) -> None:
        self._box.exchange(b"x", [1] * self._job.num_ranks)

    def _check_values(self, kib: int) -> None:
        """Raise ClusterError unless both kinds give what CHAIN rotations of the rows must give."""
        num_ranks = self._job.num_ranks
        shifted = [(rank + CHAIN - 1) % num_ranks for rank in range(num_ranks)]
        wanted = self._mx.concatenate([self._rows(rank, kib) for rank in shifted])
        for name, gather in (("the exchange", self._ours), ("MLX's ring", self._all_gather)):
            if not self._mx.array_equal(self._chain(kib, gather), wanted).item():
                self._box.check()
                raise ClusterError(f"{name} gave wrong values at {kib} KiB. Do not trust its times.")


if __name__ == "__main__":
    main()
