"""One module's weight to MLX's affine format without calibration: by mx.quantize, or by least squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from expertd.quant import codes
from expertd.quant.codes import Codes

PIECE_WEIGHTS = 1 << 24
DTYPES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}


@dataclass(frozen=True)
class Rounded:
    """A weight in MLX's affine format: weight uint32 [..., rows, cols * bits / 32], scales and biases
    [..., rows, cols / group_size] in the source's dtype."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    def arrays(self, path: str) -> dict[str, mx.array]:
        """The three tensors of a checkpoint, for the module at `path`."""
        return {
            f"{path}.weight": self.weight,
            f"{path}.scales": self.scales,
            f"{path}.biases": self.biases,
        }

    def lazy(self) -> mx.array:
        """The weight [..., rows, cols] in the source's dtype, not computed."""
        return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)

    def dequantized(self) -> mx.array:
        """What the kernels multiply by, float32 [..., rows, cols]: they do not round the products to 16 bits."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        if mx.default_device() != mx.cpu or 32 % self.bits:
            return mx.dequantize(self.weight, scales, biases, self.group_size, self.bits)
        # MLX takes 30 ns per weight on a CPU, NumPy a sixth of that.
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        codes = (np.asarray(self.weight)[..., None] >> shifts) & np.uint32((1 << self.bits) - 1)
        weight = codes.reshape(*scales.shape, self.group_size).astype(np.float32)
        weight *= np.asarray(scales)[..., None]
        weight += np.asarray(biases)[..., None]
        return mx.array(weight.reshape(*scales.shape[:-1], -1))


def from_codes(parts: Sequence[Codes], shape: Sequence[int], dtype: mx.Dtype) -> Rounded:
    """Codes of consecutive rows as one weight; `shape` is that of the full-width weight [..., rows, cols]."""

    def joined(pieces: list[np.ndarray]) -> mx.array:
        rows = np.concatenate(pieces)
        return mx.array(rows.reshape(*shape[:-1], rows.shape[-1]))

    return Rounded(
        joined([codes.pack(part) for part in parts]),
        joined([part.scales for part in parts]).astype(dtype),
        joined([part.biases for part in parts]).astype(dtype),
        parts[0].bits,
        parts[0].group_size,
    )


def round_module(weight: mx.array, bits: int, group_size: int, effort: str, threads: int) -> Rounded:
    """A weight [..., rows, cols] rounded: `plain` is mx.quantize, all other efforts least squares and a row gain.

    No more than PIECE_WEIGHTS weights at a time are at float32, or one row.
    """
    if effort == "plain":
        return _plain(weight, bits, group_size, threads)
    rows, parts = weight.reshape(-1, weight.shape[-1]), []
    step = max(1, PIECE_WEIGHTS // weight.shape[-1])
    for start in range(0, rows.shape[0], step):
        wanted = np.array(rows[start : start + step].astype(mx.float32))
        fitted = codes.fit(wanted, bits, group_size, DTYPES[weight.dtype], threads=threads)
        parts.append(codes.apply_gain(wanted, fitted, threads=threads))
    return from_codes(parts, weight.shape, weight.dtype)


def _plain(weight: mx.array, bits: int, group_size: int, threads: int) -> Rounded:
    """mx.quantize, which a CPU's stream runs on one thread: so slices go to streams of their own."""
    num = min(threads, weight.shape[0]) if mx.default_device() == mx.cpu else 1
    if num < 2:
        return Rounded(*mx.quantize(weight, group_size, bits), bits, group_size)
    bounds = [weight.shape[0] * i // num for i in range(num + 1)]
    parts = [
        mx.quantize(weight[begin:end], group_size, bits, stream=stream)
        for begin, end, stream in zip(bounds, bounds[1:], _streams(num), strict=False)
    ]
    with mx.stream(aside()):
        packed, scales, biases = (mx.concatenate([part[i] for part in parts]) for i in range(3))
    return Rounded(packed, scales, biases, bits, group_size)


def aside() -> mx.Stream:
    """A stream on which work need not wait for what the default stream reads meanwhile."""
    return _streams(1)[0] if mx.default_device() == mx.cpu else mx.default_stream(mx.default_device())


@cache
def _streams(num: int) -> list[mx.Stream]:
    """Each is a thread for as long as the process lives."""
    return [mx.new_stream(mx.cpu) for _ in range(num)]
