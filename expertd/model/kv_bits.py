"""Keys and values kept at 8 or 4 bits: mlx-lm's QuantizedKVCache, and what attention makes of it.

All families send their attention through one function of mlx-lm's, which sees by a cache's `bits` that its keys and
values are codes, scales and biases, and calls another one for these: MLX has products of such matrices. On a CPU these
are slow (one token after 2048, 32 heads of 128: 135 ms a layer), so our kernels attend there, to arrays that are
widened for one step (3.8 ms; 0.75 where they were never narrow). That is mx.dequantize to the last bit, in a fourth
to a half of its time.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from expertd.errors import ConfigError

# mlx-lm's name for attention with quantized keys and values, in models/base.py.
FUNCTION = "quantized_scaled_dot_product_attention"
# Numbers that share a scale and a bias; heads that are no multiple of the first take the second.
GROUP_SIZES = (64, 32)

# What a family can raise whose attention does not take codes.
REFUSED = (AttributeError, TypeError, ValueError, IndexError, RuntimeError)


class NarrowKVCache(QuantizedKVCache):
    """mlx-lm's, which knows no size while it is empty, in groups that fit the heads."""

    def __init__(self, bits: int) -> None:
        super().__init__(GROUP_SIZES[0], bits)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        widths = keys.shape[-1], values.shape[-1]
        fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        self.group_size = (fitting or GROUP_SIZES)[0]
        return super().update_and_fetch(keys, values)

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else super().nbytes


def narrowed(layers: list[Any], bits: int) -> list[Any]:
    """The caches of a model's layers, empty, at so many bits (0: as they are)."""
    return [NarrowKVCache(bits) for _ in layers] if bits else layers


def require_narrow(family: str, bits: int, layers: list[Any], try_it: Callable[[], object]) -> None:
    """Raise ConfigError when a family's layers keep anything but keys and values, or `try_it` shows that their
    attention does not take these as codes."""
    strange = sorted({type(layer).__name__ for layer in layers if type(layer) is not KVCache})
    reason = f"it keeps {', '.join(strange)} and not keys and values alone" if strange else ""
    try:
        _ = strange or try_it()
    except REFUSED as e:
        reason = f"its attention does not take them so: {type(e).__name__}: {str(e).splitlines()[0][:160]}"
    if reason:
        raise ConfigError(f"--kv-bits {bits}: a {family} cannot ({reason}). Leave --kv-bits out.")


def widening(attention: Callable[..., mx.array]) -> tuple[Any, str, Callable[..., mx.array]]:
    """What `replaced` (swap.py) needs to let `attention`, an mx.fast.scaled_dot_product_attention, take codes."""

    def attend(
        queries: mx.array, keys: Any, values: Any, *, group_size: int, bits: int, **options: Any
    ) -> mx.array:
        wide = [_wide(codes, scales, biases, bits) for codes, scales, biases in (keys, values)]
        return attention(queries, *wide, **options)

    return base, FUNCTION, attend


def _wide(codes: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """As mx.dequantize: codes uint32 [..., width * bits / 32], scales and biases [..., groups], to [..., width]."""
    each = codes.view(mx.uint8)
    if bits == 4:
        each = mx.stack([each & 15, each >> 4], axis=-1)
    each = each.reshape(*scales.shape, -1)
    wide = each.astype(scales.dtype) * scales[..., None] + biases[..., None]
    return wide.reshape(*scales.shape[:-1], -1)
