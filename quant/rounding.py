"""One module's weight to MLX's affine format without calibration: by mx.quantize, or by least squares."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from expertd.quant import codes
from expertd.quant.codes import Codes

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

    def dequantized(self) -> mx.array:
        """What the kernels multiply by, float32 [..., rows, cols]: they do not round the products to 16 bits."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.weight, scales, biases, self.group_size, self.bits)


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


def matrices(weight: mx.array) -> list[mx.array]:
    """The [rows, cols] matrices of a weight with any leading dimensions; not copied until they are computed."""
    stack = weight.reshape(-1, *weight.shape[-2:])
    return [stack[index] for index in range(stack.shape[0])]


def round_module(weight: mx.array, bits: int, group_size: int, effort: str, threads: int) -> Rounded:
    """A weight [..., rows, cols] rounded: `plain` is mx.quantize, all other efforts least squares and a row gain.

    One matrix at a time is at float32.
    """
    if effort == "plain":
        return Rounded(*mx.quantize(weight, group_size, bits), bits, group_size)
    parts = []
    for matrix in matrices(weight):
        wanted = np.array(matrix.astype(mx.float32))
        fitted = codes.fit(wanted, bits, group_size, DTYPES[weight.dtype], threads=threads)
        parts.append(codes.apply_gain(wanted, fitted, threads=threads))
    return from_codes(parts, weight.shape, weight.dtype)
