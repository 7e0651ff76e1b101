"""The slow twins of the quantizer's kernels: textbook forms in float64, written without looking at the fast ones.

A "problem" is a weight matrix and the second moments of inputs that are correlated, as those of a trained model are.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from expertd.quant.codes import Codes

Doubles = NDArray[np.float64]


def gaussian(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(5, (rows, cols)) * 0.02).astype(np.float32)


@cache
def second_moments(cols: int, num_inputs: int, seed: int = 0) -> Doubles:
    """Of inputs with variances 1, 1/2, 1/3... along random axes, and columns of unlike size."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    inputs = (rng.standard_normal((num_inputs, cols)) / np.sqrt(np.arange(1, cols + 1))) @ axes
    inputs *= np.exp(0.3 * rng.standard_normal(cols))
    moments: Doubles = inputs.T @ inputs / num_inputs
    moments.flags.writeable = False
    return moments


def plain_rounding(w: NDArray[np.float32], bits: int, group_size: int) -> NDArray[np.float32]:
    """What mx.quantize makes of bfloat16 weights, as the kernels read it."""
    packed, scales, biases = mx.quantize(mx.array(w).astype(mx.bfloat16), group_size, bits)
    wide = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
    return np.array(wide)


def error(w: NDArray[np.float32], wide: NDArray[Any], hessian: Doubles | None = None) -> float:
    """tr(e H e') / tr(w H w')."""
    h = np.eye(w.shape[1]) if hessian is None else hessian
    e, full = w.astype(np.float64) - wide, w.astype(np.float64)
    return float(np.sum(e @ h * e) / np.sum(full @ h * full))


def nearest(x: Doubles, scale: Any, bias: Any, bits: int) -> Doubles:
    safe = np.where(scale == 0, 1, scale)
    codes: Doubles = np.where(scale == 0, 0, np.clip(np.rint((x - bias) / safe), 0, 2**bits - 1))
    return codes


def fit_error(group: Doubles, weight: Doubles, bits: int, num_starts: int = 300) -> float:
    """The least weighted squared error of one group over many random starts, nothing rounded."""
    ends = np.random.default_rng(0).uniform(1.2 * group.min(), 1.2 * group.max(), (num_starts, 2))
    low, high = np.sort(ends, axis=1).T[..., None]
    scale, bias, best = (high - low) / (2**bits - 1), low, np.inf
    for _ in range(12):
        codes = nearest(group, scale, bias, bits)
        mean, level = (np.average(a, axis=-1, weights=weight) for a in (group, codes))
        offset, code = group - mean, codes - level[:, None]
        spread = np.sum(weight * code**2, axis=1)
        scale = (np.sum(weight * code * offset, axis=1) / np.where(spread > 0, spread, 1))[:, None]
        bias = mean - scale * level[:, None]
        best = min(best, float(np.sum(weight * (group - codes * scale - bias) ** 2, axis=1).min()))
    return best


def gptq(w: Doubles, hessian: Doubles, damping: float, grids: Codes) -> Doubles:
    """The published algorithm, by the Cholesky factor of the inverse, with the grids of `grids`."""
    w = w.astype(np.float64).copy()
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes = np.zeros_like(w)
    for k in range(w.shape[1]):
        scale, bias = (a[:, k // grids.group_size].astype(np.float64) for a in (grids.scales, grids.biases))
        codes[:, k] = nearest(w[:, k], scale, bias, grids.bits)
        missed = (w[:, k] - codes[:, k] * scale - bias) / inverse[k, k]
        w[:, k:] -= np.outer(missed, inverse[k, k:])
    return codes


def descend(w: Doubles, hessian: Doubles, start: Codes, num_sweeps: int) -> tuple[Doubles, Doubles, Doubles]:
    """Codes, scales and biases by coordinate descent, one row after the other; float32 scales, nothing rounded."""
    n = start.group_size
    all_codes, all_scales, all_biases = (
        a.astype(np.float64).copy() for a in (start.codes, start.scales, start.biases)
    )
    for row, codes, scales, biases in zip(w, all_codes, all_scales, all_biases, strict=True):
        for _ in range(num_sweeps):
            for g in range(len(scales)):
                part = slice(g * n, (g + 1) * n)
                block = hessian[part, part]
                for _ in range(2):
                    p = (row - (codes * np.repeat(scales, n) + np.repeat(biases, n))) @ hessian
                    basis = np.stack([codes[part], np.ones(n)])
                    step = np.linalg.lstsq(basis @ block @ basis.T, basis @ p[part], rcond=None)[0]
                    scales[g] += step[0]
                    biases[g] += step[1]
                    for k in range(part.start, part.stop):
                        e = row - (codes * np.repeat(scales, n) + np.repeat(biases, n))
                        wanted = codes[k] + e @ hessian[:, k] / (hessian[k, k] * scales[g])
                        codes[k] = np.clip(np.rint(wanted), 0, 2**start.bits - 1)
    return all_codes, all_scales, all_biases


def stream(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """One stream of bits a row, least significant first, as 32-bit words."""
    single = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")
    return packed.view("<u4").astype(np.uint32)
