"""What a processor can do at most, measured: bytes read from memory per second, and operations in registers.

The loops are in C (roofline.c), compiled when the benchmark starts. Each is run several times and the best counts,
since whatever disturbs a run makes it slower. The buffer lies in memory as malloc gives it to MLX, which is what
weights lie in; the same in huge pages, where the system has them on request, is beside it and no part of the roof.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from expertd.bench.compiling import compile_library
from expertd.errors import ClusterError

BUFFER_BYTES = 256 << 20
KINDS = ("read", "int8", "float")  # in the order of roofline.h
SECONDS = 0.02  # of one run of an arithmetic loop
HERE = Path(__file__).parent


class Roofline:
    """The loops, compiled into `folder`, on the processors `cpus` with a thread each (`num_threads` where none are
    pinned), and the best rates that they have reached so far."""

    def __init__(
        self, folder: Path, cpus: Sequence[int], num_threads: int, num_bytes: int = BUFFER_BYTES
    ) -> None:
        from cffi import FFI

        self._ffi: Any = FFI()
        self._ffi.cdef((HERE / "roofline.h").read_text())
        self._lib: Any = self._ffi.dlopen(str(compile_library(HERE / "roofline.c", folder, "-O3")))
        self._cpus = self._ffi.new("int[]", list(cpus)) if cpus else self._ffi.NULL
        self._num_threads, self._num_bytes = num_threads, num_bytes
        self._best: dict[str, dict[str, float]] = {kind: {} for kind in (*KINDS, "huge")}

    def measure(self, repeats: int) -> None:
        """Run every loop `repeats` times. Raises ClusterError."""
        for kind, is_huge in (("read", False), ("huge", True)):
            with self._buffer(is_huge) as buffer:
                self._run("read", kind, repeats, buffer)
        with self._buffer(False) as buffer:
            for kind in ("int8", "float"):
                self._run(kind, kind, repeats, buffer)

    @contextmanager
    def reading(self) -> Iterator[Callable[[], float]]:
        """What reads the memory once with every loop and gives the best rate, bytes per second. Raises ClusterError."""
        with self._buffer(False) as buffer:
            names = self._names("read")
            yield lambda: max(self._rate("read", name, buffer) for name in names)

    @contextmanager
    def _buffer(self, is_huge: bool) -> Iterator[Any]:
        buffer = self._lib.xr_buffer(self._num_bytes, is_huge)
        if buffer == self._ffi.NULL:
            raise ClusterError(f"no memory for a buffer of {self._num_bytes >> 20} MiB. End other programs.")
        try:
            yield buffer
        finally:
            self._lib.xr_free(buffer, self._num_bytes)

    def _run(self, loops: str, kind: str, repeats: int, buffer: Any) -> None:
        best = self._best[kind]
        for name in self._names(loops) * repeats:
            best[name] = max(best.get(name, 0.0), self._rate(loops, name, buffer))

    def _names(self, loops: str) -> list[str]:
        return cast(bytes, self._ffi.string(self._lib.xr_loops(KINDS.index(loops)))).decode().split()

    def _rate(self, loops: str, name: str, buffer: Any) -> float:
        rate, number = self._ffi.new("double *"), KINDS.index(loops)
        code = self._lib.xr_run(
            number, name.encode(), self._cpus, self._num_threads, buffer, self._num_bytes, SECONDS, rate
        )
        if code:
            raise ClusterError(f"loop {name} of the roofline failed with code {code}")
        return float(rate[0])

    def report(self) -> dict[str, Any]:
        """The roof: GB/s read, and operations per second of 8-bit integers and of floats, in 10^9, with the loop that
        reached each and all others."""
        units = {
            "read": "read_gb_per_s",
            "int8": "int8_gop_per_s",
            "float": "float_gflop_per_s",
            "huge": "huge_pages_gb_per_s",
        }
        found: dict[str, Any] = {"threads": self._num_threads, "loops": {}}
        for kind, unit in units.items():
            rates = {name: round(rate / 1e9, 2) for name, rate in self._best[kind].items()}
            found[unit], found["loops"][unit] = max(rates.values()), rates
        return found
