"""Matrix products for evaluation on a CPU: NumPy's BLAS, in tiles of a fixed number of rows.

Theory of operation. MLX's CPU build multiplies float32 matrices at 1.5 GFLOP/s a core and runs 2-bit experts at 65 ms
per token of the demo model; the BLAS inside NumPy does tens of GFLOP/s. Evaluation has thousands of rows at a time
and needs no graph, so it computes its products eagerly here. Every call to BLAS has TILE_ROWS rows, the last tile filled
up with rows that nobody reads: a row's bits then depend neither on how many rows there are nor on which they are
nor on its place (tests/model/test_wide.py), and so an evaluation that is divided over ranks gives the bits of one rank.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TILE_ROWS = 64


def multiply(rows: Array, weight: Array) -> Array:
    """Float32 rows [n, in] times a weight [out, in]: [n, out]."""
    num_rows, width = rows.shape
    tiles = np.zeros((-(-num_rows // TILE_ROWS), TILE_ROWS, width), dtype=np.float32)
    tiles.reshape(-1, width)[:num_rows] = rows
    y: Array = (tiles @ weight.T).reshape(-1, weight.shape[0])[:num_rows]
    return y


def multiply_experts(rows: Array, weight: Array, ids: Array) -> Array:
    """Float32 rows [n, in], each times the weight of its expert ids [n] in [num_experts, out, in]: [n, out]."""
    order = np.argsort(ids, kind="stable")
    ends = np.searchsorted(ids[order], np.arange(len(weight)), side="right").tolist()
    y = np.empty((len(rows), weight.shape[1]), dtype=np.float32)
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            own = order[start:end]
            y[own] = multiply(rows[own], weight[expert])
        start = end
    return y
