"""Is every number of a tensor finite? Answered from the bytes of the files, at the speed of memory.

A float is NaN or infinite when all bits of its exponent are set. Seen as an integer, such a number is at or above
a limit: as a signed one when it is positive, as an unsigned one when it is negative. So two maxima, which NumPy
computes with vector instructions and without the interpreter's lock, decide for a whole piece. E4M3 has one NaN
per sign and no infinity, E8M0 has one NaN and no sign (OCP Microscaling specification 1.0).
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertd.checkpoint.shards import TensorEntry
from expertd.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]
Tell = Callable[[int, str], None]

# Of each format the bytes of a number and its limit: the exponent's bits (of E4M3 and E8M0 all but the sign).
LIMITS = {
    "F32": (4, 0x7F800000),
    "BF16": (2, 0x7F80),
    "F16": (2, 0x7C00),
    "F8_E4M3": (1, 0x7F),
    "F8_E8M0": (1, 0xFF),
}
TASK_BYTES = 16 << 20  # few enough tasks for a terabyte of weights, many enough for all cores
READ_BYTES = 1 << 19  # stays in a core's cache between the copy and the two maxima


@dataclass(frozen=True)
class Span:
    """The bytes of one tensor: a file, and where in it. `format` is a key of LIMITS, or numbers that are always
    finite."""

    path: Path
    name: str
    format: str
    entry: TensorEntry

    @property
    def num_bytes(self) -> int:
        return self.entry.end - self.entry.begin

    @property
    def is_float(self) -> bool:
        return self.format in LIMITS


def check_finite(
    spans: Iterable[Span], threads: int | None = None, tell: Tell = lambda n, name: None
) -> None:
    """Read the tensors and raise CheckpointError for the first number, in their order, that is not finite.

    `threads` None means all cores; `tell(num_bytes, tensor)` is called as bytes are done.
    """
    num_threads = threads or os.cpu_count() or 1
    waiting: deque[tuple[Span, int, Future[int | None]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for span, begin, end in _tasks(spans):
            waiting.append((span, end - begin, pool.submit(first_fault, span, begin, end)))
            if len(waiting) > 4 * num_threads:
                _settle(*waiting.popleft(), tell)
        while waiting:
            _settle(*waiting.popleft(), tell)


def first_fault(span: Span, begin: int, end: int) -> int | None:
    """The index in the flat tensor of the first number in bytes [begin, end) of the file that is not finite.

    Raises CheckpointError when the file ends early or cannot be read.
    """
    size, limit = LIMITS[span.format]
    buffer = np.empty(min(READ_BYTES, end - begin), np.uint8)
    try:
        with span.path.open("rb", buffering=0) as file:
            for start in range(begin, end, READ_BYTES):
                piece = buffer[: min(READ_BYTES, end - start)]
                _read_exactly(file, start, piece, span)
                if (index := fault_in(piece, size, limit)) is not None:
                    return (start - span.entry.begin) // size + index
    except OSError as error:
        raise CheckpointError(
            f"{span.path}: cannot be read ({error.strerror}). Download it again."
        ) from error
    return None


def fault_in(piece: Array, size: int, limit: int) -> int | None:
    """The index of the first number of `size` bytes in `piece` (bytes) at or above `limit`, the sign aside."""
    unsigned, sign = piece.view(f"u{size}"), 1 << (8 * size - 1)
    if limit >= sign:  # no sign bit
        faulty = unsigned.max() >= limit
    else:
        faulty = piece.view(f"i{size}").max() >= limit or unsigned.max() >= (limit | sign)
    if not faulty:
        return None
    values = unsigned if limit >= sign else unsigned & (sign - 1)
    return int(np.argmax(values >= limit))


def _tasks(spans: Iterable[Span]) -> Iterator[tuple[Span, int, int]]:
    for span in spans:
        if span.is_float:
            for begin in range(span.entry.begin, span.entry.end, TASK_BYTES):
                yield span, begin, min(begin + TASK_BYTES, span.entry.end)


def _read_exactly(file: Any, start: int, piece: Array, span: Span) -> None:
    file.seek(start)
    done = 0
    while done < piece.size:
        if not (count := file.readinto(piece[done:])):
            raise CheckpointError(
                f"{span.path}: truncated: tensor {span.name!r} ends at byte {span.entry.end}, "
                f"the file has {start + done}. Download it again."
            )
        done += count


def _settle(span: Span, num_bytes: int, future: Future[int | None], tell: Tell) -> None:
    if (index := future.result()) is not None:
        place = [int(i) for i in np.unravel_index(index, span.entry.shape)]
        raise CheckpointError(
            f"{span.path}: tensor {span.name!r} holds NaN or infinity at {place}, wanted finite numbers. "
            "Download it again; if that does not help, the checkpoint was published damaged."
        )
    tell(num_bytes, span.name)
