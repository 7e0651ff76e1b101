"""Choosing codes, scales and biases of MLX's affine format: NumPy arrays in, NumPy arrays out.

`native/quantize.h` opens with the format and the theory, and its C code does the work; here is what surrounds it:
memory, the preparation of a Hessian, and the whole recipe (`calibrated`). A Hessian is the second moments of a
layer's inputs, X'X or any multiple of it. All functions give the same bytes for any number of threads.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd.native._quantize import ffi, lib

Floats = NDArray[np.float32]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
NUM_SWEEPS = 6
# Share of the mean second moment that error feedback adds to each: GPTQ's own.
DAMPING = 0.01
MAX_THREADS = 256

_GRIDS = {"float32": lib.XQ_F32, "bfloat16": lib.XQ_BF16, "float16": lib.XQ_F16}
_NUMBERS = {
    "F32": (lib.XQ_F32, 4), "BF16": (lib.XQ_BF16, 2), "F16": (lib.XQ_F16, 2), "F8_E4M3": (lib.XQ_F8_E4M3, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: entry k of row r is codes[r, k] * scales[r, k // group_size] + biases[r, ...].

    `codes` is uint8 [rows, cols]; `scales` and `biases` are float32 [rows, cols / group_size] and hold values of
    `dtype` ("bfloat16", "float16" or "float32"), in which they are to be stored.
    """

    codes: NDArray[np.uint8]
    scales: Floats
    biases: Floats
    bits: int
    group_size: int
    dtype: str = "bfloat16"


def fit(
    w: Floats,
    bits: int,
    group_size: int,
    dtype: str = "bfloat16",
    weight: Floats | None = None,
    threads: int | None = None,
) -> Codes:
    """The codes with the least squared error, weighted by `weight` [cols] if given (an input's mean square)."""
    w, codes = _matrix(w), _empty(w, bits, group_size, dtype)
    column_weight = None if weight is None else _checked(weight, (w.shape[1],), "weight")
    if column_weight is not None and column_weight.min(initial=0) < 0:
        raise ValueError("weight: holds negative numbers, wanted mean squares")
    _call(lib.xq_fit, w, codes, threads, _floats(column_weight))
    return codes


def gptq(
    w: Floats,
    hessian: NDArray[Any],
    bits: int,
    group_size: int,
    dtype: str = "bfloat16",
    damping: float = DAMPING,
    threads: int | None = None,
) -> Codes:
    """Codes by error feedback along the columns, each group's grid fitted when its turn comes.

    Raises ValueError when `hessian` [cols, cols] is not positive definite even with `damping` times its mean
    diagonal added.
    """
    w, codes = _matrix(w), _empty(w, bits, group_size, dtype)
    moments = _checked(hessian, (w.shape[1], w.shape[1]), "hessian", np.float64)
    feedback, weight = _feedback(moments, damping, threads)
    _call(lib.xq_gptq, w, codes, threads, _floats(_panels(feedback, group_size)), _floats(weight))
    return codes


def refine(
    w: Floats, hessian: NDArray[Any], codes: Codes, sweeps: int = NUM_SWEEPS, threads: int | None = None
) -> Codes:
    """Better codes, scales and biases under `hessian`, by coordinate descent; never worse ones."""
    w, better = _matrix(w), _copy(codes)
    _call(lib.xq_refine, w, better, threads, _floats(_normal(w, hessian, codes.group_size)), sweeps)
    return better


def apply_gain(
    w: Floats, codes: Codes, hessian: NDArray[Any] | None = None, threads: int | None = None
) -> Codes:
    """One factor per row, folded into scales and biases, that undoes the shrinking of least squares.

    Without a Hessian the codes become those nearest to the enlarged weights, because the rounding of the
    scales has moved the levels a little; with one they stay, because nearest is not best there. Nearest to the
    weights themselves would shrink them again: 4 % on Gaussian rows at 2 bits. Experts of the demo model at 2 bits, KL
    divergence beside plain rounding's: least squares alone 0.935, with the gain 0.574.
    """
    w, larger = _matrix(w), _copy(codes)
    moments = _moments(w, codes, hessian, threads)
    gain = np.ones(len(w))
    np.divide(moments[:, 0], moments[:, 1], out=gain, where=moments[:, 1] > 0)
    limited = np.clip(gain, 0.5, 2.0).astype(np.float32)
    _call(lib.xq_rescale, w, larger, threads, _floats(limited), int(hessian is not None))
    return larger


def calibrated(
    w: Floats,
    hessian: NDArray[Any],
    bits: int,
    group_size: int,
    dtype: str = "bfloat16",
    sweeps: int = NUM_SWEEPS,
    threads: int | None = None,
) -> Codes:
    """The whole recipe: error feedback, descent, gain. Without any information in `hessian`, `fit` and gain."""
    w = _matrix(w)
    moments = _checked(hessian, (w.shape[1], w.shape[1]), "hessian", np.float64)
    if not moments.diagonal().max(initial=0) > 0:
        return apply_gain(w, fit(w, bits, group_size, dtype, None, threads), None, threads)
    codes = _start(w, moments, bits, group_size, dtype, threads)
    return apply_gain(w, refine(w, moments, codes, sweeps, threads), moments, threads)


def _start(
    w: Floats, hessian: NDArray[np.float64], bits: int, group_size: int, dtype: str, threads: int | None
) -> Codes:
    """Error feedback with as little damping as a Hessian that is no sum of squares lets it; else a plain fit."""
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        try:
            return gptq(w, hessian, bits, group_size, dtype, damping, threads)
        except ValueError:
            continue
    weight = np.maximum(hessian.diagonal(), 0).astype(np.float32)
    return fit(w, bits, group_size, dtype, weight, threads)


def pack(codes: Codes, threads: int | None = None) -> NDArray[np.uint32]:
    """The codes as MLX stores them: [rows, cols * bits / 32]."""
    packed = np.empty((len(codes.codes), codes.codes.shape[1] * codes.bits // 32), np.uint32)
    source, words = ffi.from_buffer("uint8_t[]", codes.codes), ffi.from_buffer("uint32_t[]", packed)
    _check(lib.xq_pack(source, *codes.codes.shape, codes.bits, _num_threads(threads), words))
    return packed


def dequantize(codes: Codes) -> Floats:
    """The weights that a kernel computes with: float32 [rows, cols]."""
    grouped = codes.codes.reshape(*codes.scales.shape, codes.group_size).astype(np.float32)
    grouped *= codes.scales[..., None]
    grouped += codes.biases[..., None]
    return grouped.reshape(codes.codes.shape)


def relative_error(
    w: Floats, codes: Codes, hessian: NDArray[Any] | None = None, threads: int | None = None
) -> float:
    """The output's squared error over the output's square, tr(e H e') / tr(w H w'); H is I without a Hessian."""
    total = _moments(_matrix(w), codes, hessian, threads).sum(axis=0)
    return float(total[2] / total[0]) if total[0] > 0 else 0.0


def first_not_finite(numbers: Any, dtype: str, threads: int | None = None) -> int:
    """The index of the first NaN or infinity in a buffer of safetensors dtype F32, BF16, F16 or F8_E4M3; else
    -1."""
    code, num_bytes = _NUMBERS[dtype]
    view = memoryview(numbers).cast("B")
    index = ffi.new("size_t *")
    if not view.nbytes:
        return -1
    num = view.nbytes // num_bytes
    _check(lib.xq_first_not_finite(ffi.from_buffer(view), num, code, _num_threads(threads), index))
    return int(index[0]) if index[0] < num else -1


def _matrix(w: Floats) -> Floats:
    if w.ndim != 2:
        raise ValueError(f"w: has shape {w.shape}, wanted [rows, cols]")
    return np.ascontiguousarray(w, np.float32)


def _empty(w: Floats, bits: int, group_size: int, dtype: str) -> Codes:
    if bits not in BITS or group_size not in GROUP_SIZES or dtype not in _GRIDS:
        raise ValueError(f"bits {bits}, group size {group_size}, dtype {dtype!r}: MLX knows no such format")
    if w.shape[1] % group_size:
        raise ValueError(f"w: has {w.shape[1]} columns, wanted a multiple of the group size {group_size}")
    grid = (w.shape[0], w.shape[1] // group_size)
    return Codes(
        np.empty(w.shape, np.uint8), np.empty(grid, np.float32), np.empty(grid, np.float32),
        bits, group_size, dtype,
    )  # fmt: skip


def _copy(codes: Codes) -> Codes:
    return replace(codes, codes=codes.codes.copy(), scales=codes.scales.copy(), biases=codes.biases.copy())


def _checked(
    array: NDArray[Any], shape: tuple[int, ...], name: str, dtype: type[np.floating[Any]] = np.float32
) -> NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"{name}: has shape {array.shape}, wanted {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinity")
    return np.ascontiguousarray(array, dtype)


def _normal(w: Floats, hessian: NDArray[Any], group_size: int) -> Floats:
    """Panels of the Hessian as float32, its mean diagonal 1: no scale of inputs overflows it."""
    checked = _checked(hessian, (w.shape[1], w.shape[1]), "hessian", np.float64)
    mean = float(np.mean(np.abs(checked.diagonal())))
    return _panels(checked / mean if mean > 0 else checked, group_size)


def _panels(matrix: NDArray[Any], group_size: int) -> Floats:
    """A square matrix cut into panels of one group's columns: float32 [cols / group_size, cols, group_size]."""
    cut = matrix.reshape(len(matrix), -1, group_size).swapaxes(0, 1)
    return np.ascontiguousarray(cut, np.float32)


def _feedback(hessian: NDArray[np.float64], damping: float, threads: int | None) -> tuple[Floats, Floats]:
    """What error feedback needs of the damped Hessian: L' and D (see native/quantize.h)."""
    reverse = np.ascontiguousarray(hessian[::-1, ::-1]) / (np.mean(np.abs(hessian.diagonal())) or 1.0)
    reverse[np.diag_indices_from(reverse)] += damping
    feedback, weight = np.zeros(hessian.shape, np.float32), np.empty(len(hessian), np.float32)
    source = ffi.from_buffer("double[]", reverse)
    result = lib.xq_factor(source, len(hessian), _num_threads(threads), _floats(feedback), _floats(weight))
    if result == lib.XQ_NOT_POSITIVE:
        raise ValueError(f"hessian: not positive definite with damping {damping}")
    _check(result)
    return feedback, weight


def _moments(
    w: Floats, codes: Codes, hessian: NDArray[Any] | None, threads: int | None
) -> NDArray[np.float64]:
    """Per row w H w', w H q' and e H e', q being what `codes` stand for: float64 [rows, 3]."""
    moments = np.empty((len(w), 3), np.float64)
    normal = None if hessian is None else _normal(w, hessian, codes.group_size)
    _call(lib.xq_moments, w, codes, threads, _floats(normal), ffi.from_buffer("double[]", moments))
    return moments


def _floats(array: Floats | None) -> Any:
    return ffi.NULL if array is None else ffi.from_buffer("float[]", array)


def _num_threads(threads: int | None) -> int:
    return min(threads or os.cpu_count() or 1, MAX_THREADS)


def _call(function: Any, w: Floats, codes: Codes, threads: int | None, *arguments: Any) -> None:
    """Call a kernel on a matrix; the interpreter's lock is free meanwhile."""
    if w.shape != codes.codes.shape:
        raise ValueError(f"w: has shape {w.shape}, its codes {codes.codes.shape}")
    matrix = ffi.new(
        "xq_matrix *",
        {
            "w": _floats(w),
            "rows": codes.codes.shape[0],
            "cols": codes.codes.shape[1],
            "bits": codes.bits,
            "group": codes.group_size,
            "dtype": _GRIDS[codes.dtype],
            "threads": _num_threads(threads),
            "codes": ffi.from_buffer("uint8_t[]", codes.codes),
            "scales": _floats(codes.scales),
            "biases": _floats(codes.biases),
        },
    )
    _check(function(matrix, *arguments))


def _check(result: int) -> None:
    if result == lib.XQ_MEMORY:
        raise MemoryError("no memory for the quantizer's scratch")
    if result:
        raise ValueError("the quantizer refused its arguments")
