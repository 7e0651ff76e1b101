"""The process that `expertd bench kernels` measures in: `python -m expertd.bench.kernels_side JOB`, figures to stdout.

One process per number of threads, kept to as many cores from its start, so that MLX's threads, ours and those of the
roof share the same ones.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.bench.roofline import Roofline
from expertd.topology.machine import settle

ROUNDS = 9
MAX_CALLS = 200  # of one way at one point
# MLX's slowest products take minutes. What earlier ones foretell to take longer than this is left out, one row's
# product being worth more than that of several.
LIMIT_S, ONE_ROW_LIMIT_S = 2.0, 15.0
# Of ours beside float64: 8 bits of activation give about 0.006, a wrong result 1.
MAX_ERROR = 0.03


@dataclass(frozen=True)
class Job:
    """What the process is told. `cores` is empty when it is not pinned. `shapes` are names or, for tests, sizes
    (Shape's fields); `rows` limits the numbers of rows (None: all). Each way gets `ours_s` or `mlx_s` seconds a
    point."""

    num_threads: int
    cores: list[int]
    shapes: list[str | dict[str, Any]]
    is_quick: bool
    rows: list[int] | None
    ours_s: float
    mlx_s: float
    weight_bytes: int  # 0: what does not fit the cache
    roof_bytes: int
    roof_repeats: int


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    settle(job.cores)
    sys.stdout.write(json.dumps(measure(job)))


def measure(job: Job) -> dict[str, Any]:
    """The roof, before and after all else, and one row per case and number of rows."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as folder:
        roof = Roofline(Path(folder), job.cores, job.num_threads, job.roof_bytes)
        roof.measure(job.roof_repeats)
        bench = _Bench(job)
        with roof.reading() as read:
            rows = bench.rows(read)
        roof.measure(job.roof_repeats)
    return {
        "threads": job.num_threads,
        "cores": job.cores,
        "isa": bench.native.isa if bench.native else None,
        "missing": bench.missing,
        "roof": roof.report(),
        "rows": rows,
    }


class _Bench:
    def __init__(self, job: Job) -> None:
        from expertd.bench.kernel_calls import NativeCpu

        self._job = job
        self.missing: dict[str, str] = {}
        self._mlx_s: dict[str, float] = {}  # per operation, by format
        self.native: NativeCpu | None = None
        try:
            self.native = NativeCpu(job.num_threads)
        except (ImportError, OSError) as e:
            self.missing["native"] = f"our kernels are not there: {e}"

    def rows(self, read: Callable[[], float]) -> list[dict[str, Any]]:
        from expertd.bench.kernel_cases import Weights, cases_of, min_bytes, points
        from expertd.bench.shapes import Shape, find_shape

        shapes = [find_shape(s) if isinstance(s, str) else Shape(**s) for s in self._job.shapes]
        num_bytes = self._job.weight_bytes or min_bytes()
        todo = list(points(cases_of(shapes, self._job.is_quick), self._job.rows))
        rows: list[dict[str, Any]] = []
        for number, (case, row_counts) in enumerate(todo, 1):
            _say(f"{number} of {len(todo)}: {case.matrix.name} of {case.models[0]}, {case.format}")
            weights = Weights(case, num_bytes)
            rows += [self._row(weights, n, read if n == 1 else None) for n in row_counts]
        _say("")
        return rows

    def _row(self, weights: Any, num_rows: int, read: Callable[[], float] | None = None) -> dict[str, Any]:
        """`ways` are the figures of each way to compute it, `skipped` says why one has none.

        With `read` they stand beside what it gives in the same moments.
        """
        from expertd.bench.kernel_calls import Mlx, Native, error_of
        from expertd.bench.kernel_cases import describe, make_calls, work_of

        case, calls = weights.case, make_calls(weights, num_rows)
        work = work_of(case, num_rows, calls)
        callers: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        if self.native:
            callers["native"] = Native(self.native, weights, num_rows, calls, 8)
            if case.bits:
                callers["native-16"] = Native(self.native, weights, num_rows, calls, 16)
        if why := self._too_slow(case.format, num_rows, work):
            skipped["mlx"] = why
        else:
            callers["mlx"] = Mlx(weights, num_rows, calls)
        times, reads = _alternate({n: c.run for n, c in callers.items()}, self._budgets(), len(calls), read)
        ways = {name: figures(taken, work, reads) for name, taken in times.items()}
        if "mlx" in ways:
            self._mlx_s[case.format] = ways["mlx"]["p50_us"] / 1e6 / work["operations"]
        for name, caller in callers.items():
            ways[name]["error"] = error = round(error_of(caller, weights, num_rows, calls[0]), 6)
            if name != "mlx" and not error < MAX_ERROR:
                skipped[name] = f"is wrong: it differs from float64 by {error}"
                del ways[name]
        return {**describe(case), "rows": num_rows, **work, "ways": ways, "skipped": skipped}

    def _too_slow(self, form: str, num_rows: int, work: dict[str, Any]) -> str:
        """Why MLX's product is not made, by its last one in this format; "" when it is."""
        wanted_s = self._mlx_s.get(form, 0.0) * work["operations"]
        return (
            f"would need {wanted_s:.0f} s"
            if wanted_s > (LIMIT_S if num_rows > 1 else ONE_ROW_LIMIT_S)
            else ""
        )

    def _budgets(self) -> dict[str, float]:
        return {"native": self._job.ours_s, "native-16": self._job.ours_s, "mlx": self._job.mlx_s}


def _alternate(
    runs: dict[str, Callable[[int], None]],
    budgets: dict[str, float],
    num_calls: int,
    read: Callable[[], float] | None = None,
) -> tuple[dict[str, list[list[float]]], list[float]]:
    """Seconds of each call in each round, by way, and what was read then, bytes per second.

    All take turns, the order reversed every other round; the first call of each tells how many fit into its budget and
    counts only where that is all there is time for.
    """
    first = {name: _time(run, 0) for name, run in runs.items()}
    if set(runs) - {"mlx"}:  # the first of ours also wakes threads and touches memory
        first.update({name: _time(run, 1 % num_calls) for name, run in runs.items() if name != "mlx"})
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(ROUNDS)] for name in runs}
    reads: list[float] = []
    counts = {
        name: min(MAX_CALLS // ROUNDS, int(budgets[name] / ROUNDS / max(s, 1e-7)))
        for name, s in first.items()
    }
    made = dict.fromkeys(runs, 2)
    turns = ["read", *runs] if read else list(runs)
    for number in range(ROUNDS):
        for name in turns if number % 2 == 0 else reversed(turns):
            if name == "read":
                assert read
                reads.append(read())
                continue
            # One that is too slow for its budget is called in the last round only, if at all.
            for _ in range(counts[name] or int(number == ROUNDS - 1 and first[name] < budgets[name] * 4)):
                times[name][number].append(_time(runs[name], made[name] % num_calls))
                made[name] += 1
    return {name: taken if any(taken) else [[first[name]]] for name, taken in times.items()}, reads


def _time(run: Callable[[int], None], number: int) -> float:
    begin = time.perf_counter()
    run(number)
    return time.perf_counter() - begin


def figures(rounds: list[list[float]], work: dict[str, Any], reads: list[float]) -> dict[str, Any]:
    """Of the seconds of each call in each round, and of what was read in the rounds, if it was."""
    taken = [seconds for calls in rounds for seconds in calls]
    middle = statistics.median(taken)
    found = {
        "samples": len(taken),
        "p50_us": round(middle * 1e6, 2),
        "min_us": round(min(taken) * 1e6, 2),
        "max_us": round(max(taken) * 1e6, 2),
        "gb_per_s": round(work["bytes"] / middle / 1e9, 3),
        "gflop_per_s": round(work["operations"] / middle / 1e9, 3),
    }
    if shares := [
        work["bytes"] / statistics.median(calls) / rate
        for calls, rate in zip(rounds, reads, strict=False)
        if calls
    ]:
        found["of_bandwidth"] = round(statistics.median(shares), 4)
    return found


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
