"""What one rank's caches have of a sequence and another's lack, as bytes: the keys and values of some of its tokens.

They are the numbers themselves, so the other rank has the bits that it would have computed. Only layers that can forget
any number of their last tokens are made of such rows (SequenceCache.forgets); windows and recurrent states are not.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import CacheList

from expertd.errors import RemoteProtocolError

# As a safetensors header names them, with the integers as which NumPy carries what it does not know.
DTYPES = {
    "F32": (mx.float32, np.float32), "F16": (mx.float16, np.float16), "BF16": (mx.bfloat16, np.uint16),
    "U32": (mx.uint32, np.uint32), "I32": (mx.int32, np.int32),
}  # fmt: skip
CODES = {dtype: code for code, (dtype, _) in DTYPES.items()}
# Buffers grow by so many tokens, as mlx-lm's.
ROOM = 256

# An array's code, shape and bytes; its axis 2 counts tokens.
Packed = tuple[str, list[int], bytes]


def row_bytes(layers: list[Any]) -> int:
    """What a token takes in the caches of all layers; 0 if they have none yet."""
    arrays = [array for layer in _leaves(layers) for array in _arrays(layer)]
    return sum(array.nbytes // array.shape[2] for array in arrays)


def pack_rows(layers: list[Any], start: int, stop: int) -> list[Packed]:
    """The rows of tokens `start` to `stop`, layer by layer; their arrays are evaluated by this."""
    arrays = [array for layer in _leaves(layers) for array in _arrays(layer)]
    rows = [mx.contiguous(array[..., start:stop, :]) for array in arrays]
    mx.eval(rows)
    return [(CODES[row.dtype], list(row.shape), bytes(bytes_of(row))) for row in rows]


def put_rows(layers: list[Any], start: int, count: int, packed: list[Packed]) -> None:
    """Append the rows of `count` tokens to layers that have `start`.

    Raises RemoteProtocolError, and changes nothing, when they are not rows of caches like these.
    """
    rows = [_row(*of_one, count) for of_one in packed]
    leaves, taken = list(_leaves(layers)), []
    for layer in leaves:
        num_arrays = 2 * (3 if hasattr(layer, "bits") else 1)
        mine, rows = rows[:num_arrays], rows[num_arrays:]
        _check(layer, mine, num_arrays, start)
        taken.append(mine)
    if rows:
        raise RemoteProtocolError(f"rows of {len(rows)} more arrays than {len(leaves)} layers have")
    for layer, mine in zip(leaves, taken, strict=True):
        names = [f"{half}.{i}" for half in (0, 1) for i in range(3)] if len(mine) == 6 else ["0", "1"]
        pair: Any = tree_unflatten(list(zip(names, mine, strict=True)))
        held = pair if layer.keys is None else (layer.keys, layer.values)
        layer.keys, layer.values = tree_map(lambda old, new: _appended(old, new, start), held, pair)
        layer.offset = start + count


def bytes_of(array: mx.array) -> memoryview:
    """An evaluated contiguous array's bytes, where they lie."""
    seen: Any = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return memoryview(seen.reshape(-1).view(np.uint8))


def array_of(code: str, shape: list[int], data: bytes | memoryview) -> mx.array:
    """The opposite. Raises LookupError and ValueError for bytes that are no such array."""
    dtype, carried = DTYPES[code]
    numbers = np.frombuffer(data, carried) if len(data) else np.zeros(0, carried)
    array = mx.array(numbers.reshape(shape))
    return array.view(dtype) if dtype == mx.bfloat16 else array


def _leaves(layers: list[Any]) -> Iterator[Any]:
    for layer in layers:
        if isinstance(layer, CacheList):
            yield from _leaves(layer.caches)
        else:
            yield layer


def _arrays(layer: Any) -> list[mx.array]:
    flat: Any = [] if layer.keys is None else tree_flatten((layer.keys, layer.values))
    return [array for _, array in flat]


def _row(code: str, shape: list[int], data: bytes, count: int) -> mx.array:
    try:
        if len(shape) != 4 or min(shape) < 0 or shape[0] != 1 or shape[2] != count:
            raise ValueError("wanted those of the tokens")
        return array_of(code, shape, data)
    except (LookupError, ValueError) as e:
        raise RemoteProtocolError(f"rows {code[:8]} {shape[:8]} for {count} tokens: {e}") from e


def _check(layer: Any, rows: list[mx.array], num_arrays: int, start: int) -> None:
    like = _arrays(layer)
    same = all(
        a.dtype == b.dtype and (a.shape[1], a.shape[3]) == (b.shape[1], b.shape[3])
        for a, b in zip(rows, like, strict=False)
    )
    if len(rows) != num_arrays or layer.offset != start or not same:
        found, wanted = [(a.dtype, a.shape) for a in rows], [(a.dtype, a.shape) for a in like]
        raise RemoteProtocolError(
            f"rows from token {start} on, {found}, for a layer with {layer.offset} tokens, {wanted}"
        )


def _appended(held: mx.array, rows: mx.array, start: int) -> mx.array:
    """`held` with rows from token `start` on: in place if it has room and nobody else holds it."""
    count = rows.shape[2]
    if held is rows or held.shape[2] < start + count:
        room = mx.zeros((*rows.shape[:2], -(-count // ROOM) * ROOM, rows.shape[3]), rows.dtype)
        held = mx.concatenate([held[..., :start, :], room], axis=2)
    held[..., start : start + count, :] = rows
    return held
