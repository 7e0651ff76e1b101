"""Matrix products for evaluation on a CPU: NumPy's BLAS, in tiles of a fixed number of rows.

Theory of operation. MLX's CPU build multiplies float32 matrices at 1.5 GFLOP/s a core and runs 2-bit experts at 65 ms
per token of the demo model; the BLAS inside NumPy reaches 50 GFLOP/s a core (bench/LOG.md). Evaluation has thousands
of rows at a time and needs no graph, so it computes its products eagerly here. Every call to BLAS has TILE_ROWS rows,
the last tile filled up with rows that nobody reads: a row's bits then depend neither on how many rows there are
nor on which they are nor on its place (tests/model/test_wide.py), and so an evaluation that is divided over ranks
gives the bits of one rank.
"""

import math
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
    for window in range(num_windows):
        for head in range(num_heads):
            scores = (queries[window, head] * np.float32(scale)) @ keys[window, head // shared].T
            if masks is not None:
                own = masks[window, head]
                scores = np.where(own, scores, np.float32(-math.inf)) if own.dtype == bool else scores + own
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)
            y[window, head] = (scores @ values[window, head // shared]) / total
    return y
