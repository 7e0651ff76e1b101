"""Dense float32 products: by NumPy's BLAS where MLX would compute on a CPU, else by MLX.

MLX's wheels for Linux use the reference BLAS: 0.7 GFLOP/s on a 2.5 GHz Xeon where NumPy's gives 25.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from expertd.model.classes import become


def _by_numpy() -> bool:
    return bool(mx.default_device() == mx.cpu)


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T, for float32 x [..., cols] and weight [rows, cols]."""
    if not _by_numpy():
        return x @ weight.T
    y = np.asarray(x).reshape(-1, x.shape[-1]) @ np.asarray(weight).T
    return mx.array(y.reshape(*x.shape[:-1], len(y.T)))


def gram(rows: mx.array) -> np.ndarray:
    """rows.T @ rows, for float32 rows [n, cols]."""
    if not _by_numpy():
        return np.array(rows.T @ rows)
    values = np.asarray(rows)
    return np.asarray(values.T @ values)


class _DenseLinear:
    """A Linear whose product is `matmul`'s; float32 only."""

    def __call__(self, x: mx.array) -> mx.array:
        m: nn.Linear = self  # type: ignore[assignment]
        y = matmul(x, m.weight)
        return y + m.bias if "bias" in m else y


def use_dense(module: nn.Module) -> None:
    """Let every Linear in `module`, whose parameters and inputs are float32, multiply by `matmul`."""
    for _, child in module.named_modules():
        if type(child) is nn.Linear:
            become(child, _DenseLinear)
