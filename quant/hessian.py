"""Second moments of what a matrix is multiplied with: how much each error of its weights costs.

For rows x of inputs with importance s, an error dW of a weight costs sum s^2 |dW x|^2 = tr(dW H dW'), with
H = sum s^2 x x'. An expert that saw few tokens has an H of low rank, and codes chosen by it alone would
be wild in every direction that it did not see; so H leans on the mean of the layer's experts as if
PSEUDO_TOKENS more tokens had come with that mean.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from expertd.quant import dense

Matrix = np.ndarray[Any, np.dtype[np.float32]]

PSEUDO_TOKENS = 256  # what bench/LOG.md's figures were measured with; no other number was
GRAM_ROWS = 8192  # rows of one partial sum: bounds the memory, and fixes the order of summation


def gram(rows: mx.array, importance: mx.array) -> Matrix:
    """sum over n of importance[n]^2 rows[n] rows[n]', float32 [cols, cols], for float32 rows [n, cols]."""
    cols = rows.shape[-1]
    total = np.zeros((cols, cols), dtype=np.float32)
    for start in range(0, rows.shape[0], GRAM_ROWS):
        total += dense.gram(rows[start : start + GRAM_ROWS] * importance[start : start + GRAM_ROWS, None])
    return total


def shrunk(own: Matrix, num_tokens: int, mean: Matrix) -> Matrix:
    """The Hessian to choose codes by: `own`, summed over `num_tokens`, leaning on the layer's `mean` per token.

    With fewer tokens than a quarter of the columns only the diagonal of `own` counts. Its mean diagonal
    is 1; with neither tokens nor mean it is the identity.
    """
    cols = len(own)
    if num_tokens < cols / 4:
        own = np.diag(np.diag(own))
    both = own + np.float32(PSEUDO_TOKENS) * mean
    size = np.trace(both, dtype=np.float64) / cols
    if not size > 0:
        return np.eye(cols, dtype=np.float32)
    return (both / np.float32(size)).astype(np.float32)
