"""Matrix products for evaluation on a CPU: NumPy's BLAS, in tiles of a fixed number of rows.

Theory of operation. MLX's CPU build multiplies float32 matrices at 1.5 GFLOP/s a core and runs 2-bit experts at 65 ms
per token of the demo model; the BLAS inside NumPy reaches 50 GFLOP/s a core (bench/LOG.md). Evaluation has thousands
of rows at a time and needs no graph, so it computes its products eagerly here. Every call to BLAS has the rows of one
tile, the last tile filled up with rows that nobody reads: a row's bits then depend neither on how many rows there are
nor on which they are nor on its place (tests/model/test_wide.py), and so an evaluation that is divided over ranks
gives the bits of one rank.

Two habits of OpenBLAS could break that, and do on processors without AVX-512. Its kernels are 12 columns wide and
narrower at an edge, with other roundings there: `_keeps_bits` tries each way of Way before it is taken. And how it cuts
a product for its threads moves these edges: a rank with one thread would give other bits than a process with two. So a
pass (`one_thread_a_product`) keeps BLAS to one and spreads the products over as many threads as BLAS had.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

Array = np.ndarray[Any, np.dtype[Any]]

# Rows of a tile, and whether they are the columns of what BLAS computes. The first is faster where it keeps bits.
Way = tuple[int, bool]
WAYS: tuple[Way, ...] = ((64, False), (16, True))

_blas = ThreadpoolController().select(user_api="blas")
_workers: ThreadPoolExecutor | None = None
_num_workers = 1


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """For one pass over a model at a time."""
    global _workers, _num_workers
    _num_workers = max((library["num_threads"] for library in _blas.info()), default=1)
    with _blas.limit(limits=1), ThreadPoolExecutor(_num_workers) as _workers:
        try:
            yield
        finally:
            _workers = None


def _spread(work: Callable[[int], None], count: int) -> None:
    """Call `work` with every number below `count`, on the threads of the pass."""
    if not _workers or count < 2:
        for number in range(count):
            work(number)
        return
    step = -(-count // (4 * _num_workers))

    def some(start: int) -> None:
        for number in range(start, min(start + step, count)):
            work(number)

    list(_workers.map(some, range(0, count, step)))


@cache
def _way() -> Way:
    return next((way for way in WAYS if _keeps_bits(way)), WAYS[-1])


def _keeps_bits(way: Way) -> bool:
    """Whether a row's bits are the same at every place of a tile."""
    random = np.random.RandomState(0)
    for out, width in ((64, 64), (200, 72), (257, 640)):
        weight, tile = (random.standard_normal((n, width)).astype(np.float32) for n in (out, way[0]))
        wanted = _product(tile, weight, way)
        for places in range(1, way[0]):
            found = _product(np.roll(tile, places, axis=0), weight, way)
            if not np.array_equal(found, np.roll(wanted, places, axis=0)):
                return False
    return True


def _product(tile: Array, weight: Array, way: Way | None = None) -> Array:
    """One tile [rows, in] times a weight [out, in]: [rows, out]."""
    _, as_columns = way or _way()
    y: Array = (weight @ tile.T).T if as_columns else tile @ weight.T
    return y


def _tiles(rows: Array) -> Array:
    """Rows [n, in] as [num_tiles, rows of a tile, in], the last one filled up."""
    height, _ = _way()
    tiles = np.zeros((-(-len(rows) // height), height, rows.shape[1]), dtype=np.float32)
    tiles.reshape(-1, rows.shape[1])[: len(rows)] = rows
    return tiles


def multiply(rows: Array, weight: Array) -> Array:
    """Float32 rows [n, in] times a weight [out, in]: [n, out]."""
    tiles = _tiles(rows)
    y = np.empty((*tiles.shape[:2], len(weight)), dtype=np.float32)

    def work(number: int) -> None:
        y[number] = _product(tiles[number], weight)

    _spread(work, len(tiles))
    return y.reshape(-1, len(weight))[: len(rows)]


def multiply_experts(rows: Array, weight: Array, ids: Array) -> Array:
    """Float32 rows [n, in], each times the weight of its expert ids [n] in [num_experts, out, in]: [n, out]."""
    order = np.argsort(ids, kind="stable")
    ends = np.searchsorted(ids[order], np.arange(len(weight)), side="right").tolist()
    y = np.empty((len(rows), weight.shape[1]), dtype=np.float32)

    def work(expert: int) -> None:
        own = order[ends[expert - 1] if expert else 0 : ends[expert]]
        if len(own):
            y[own] = np.concatenate([_product(t, weight[expert]) for t in _tiles(rows[own])])[: len(own)]

    _spread(work, len(weight))
    return y


def attend(queries: Array, keys: Array, values: Array, scale: float, mask: Array | str | None) -> Array:
    """Scaled dot-product attention in float32: [num_windows, num_heads, num_tokens, width of a value].

    Queries [num_windows, num_heads, num_tokens, width]; keys and values may have fewer heads, each of which serves
    as many queries' heads. `mask` is "causal", None, true where a token is seen, or added to the scores.
    """
    num_windows, num_heads, num_tokens, _ = queries.shape
    shared = num_heads // keys.shape[1]
    y = np.empty((num_windows, num_heads, num_tokens, values.shape[-1]), dtype=np.float32)
    if isinstance(mask, str):
        mask = np.tri(num_tokens, keys.shape[2], keys.shape[2] - num_tokens, dtype=bool)
    masks = None if mask is None else np.broadcast_to(mask, (*queries.shape[:3], keys.shape[2]))

    def work(number: int) -> None:
        window, head = divmod(number, num_heads)
        scores = (queries[window, head] * np.float32(scale)) @ keys[window, head // shared].T
        if masks is not None:
            own = masks[window, head]
            scores = np.where(own, scores, np.float32(-math.inf)) if own.dtype == bool else scores + own
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        y[window, head] = (scores @ values[window, head // shared]) / total

    _spread(work, num_windows * num_heads)
    return y
