"""Several sequences in one step, each with a cache of its own.

Theory of operation. What a decode step computes for a token is rows through matrices, which are the same for every
sequence, and attention over what the sequence has said so far, which is not. So rows go through the model together,
one per sequence, and the model's attention meets a cache that is really several: `Together`. What it fetches from it
is one array per sequence, `Ragged`, and attention is computed for each sequence by itself; then rows are together
again. Caches stay as mlx-lm makes them: a sequence joins or leaves between two steps without a copy, and each can be
cut back, stored or thrown away by itself.

Where our kernels attend, a layer's plain keys and values are not appended before attention asks for them: then one
operation of the graph (`Kernels.append_attention`) does both for all sequences (`Appending`). Plain caches are changed
without Python (native/cache_ops.cpp), and left as mlx-lm's own calls would have left them.

Families with latent attention (DeepSeek's) fetch latents and rotated keys, and add a product with the latter,
`rows @ keys.swapaxes(-1, -2)`, to the scores as a mask: a Ragged can do that much. Families that compute otherwise
with what they fetch meet `Padded`: one array, filled up to the longest sequence, whose padding a mask hides.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

import expertd.native._graph as _graph
from expertd.model.caches import PLAIN, has_room
from expertd.model.swap import replaced

AppendAttention = Callable[..., mx.array | None]  # Kernels.append_attention


class Ragged:
    """One array [1, ...] (or its codes, scales and biases) per sequence, where a model's attention expects one
    [num_sequences, ...]."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    @property
    def parts(self) -> list[Any]:
        return self._parts

    def swapaxes(self, *axes: int) -> "Ragged":
        return Ragged([part.swapaxes(*axes) for part in self.parts])

    def multiplied(self, rows: mx.array) -> "Ragged":
        """Rows [num_sequences, ...] @ this, each sequence's with its own."""
        return Ragged([row @ part for row, part in zip(_rows(rows), self.parts, strict=True)])

    __rmatmul__ = multiplied


class Appending:
    """A token's keys and values [num_sequences, ...], on their way into KVCaches that have room for it.

    The caches count the token from the beginning.
    """

    def __init__(
        self, caches: list[Any], keys: mx.array, values: mx.array, function: AppendAttention
    ) -> None:
        self._caches, self._keys, self._values, self._function = caches, keys, values, function
        self._done = False
        self._count(1)

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array | None:
        """Append, and attend to all tokens; None if it is too late for that, or queries are of another type."""
        if self._done or queries.dtype != self._keys.dtype:
            return None
        self._count(-1)
        y = self._function(self._caches, PLAIN, queries, self._keys, self._values, scale, sinks)
        if y is None:
            self._count(1)
        self._done = y is not None
        return y

    def _count(self, num_tokens: int) -> None:
        for cache in self._caches:
            cache.offset += num_tokens

    def pairs(self) -> list[tuple[mx.array, mx.array]]:
        """Each sequence's keys and values, appended by mlx-lm if nobody has attended."""
        if not self._done:
            self._done = True
            self._count(-1)
            for cache, k, v in zip(self._caches, _rows(self._keys), _rows(self._values), strict=True):
                cache.update_and_fetch(k, v)
        return [cache.keys_and_values() for cache in self._caches]


class Appended(Ragged):
    """The keys (`which` 0) or values (1) of an Appending; whoever reads them has them appended."""

    def __init__(self, appending: Appending, which: int) -> None:
        self.appending, self._which = appending, which

    @property
    def parts(self) -> list[Any]:
        return [pair[self._which] for pair in self.appending.pairs()]


class Together:
    """The caches that several sequences have of one layer, as the one that the layer asks for a token of each.

    Keys and values (KVCache, RotatingKVCache, ...), states of recurrent layers (ArraysCache), and lists of these.
    """

    def __init__(self, caches: list[Any], append_attention: AppendAttention | None = None) -> None:
        """`append_attention`: our kernels', if these attend."""
        self._caches, self._append_attention = caches, append_attention

    @property
    def offset(self) -> mx.array:
        """How many tokens each sequence has, int32 [num_sequences]."""
        return mx.array(self.offsets(), dtype=mx.int32)

    def offsets(self) -> list[int]:
        return [cache.offset for cache in self._caches]

    @property
    def bits(self) -> int:
        """Of quantized keys and values, by which mlx-lm knows these; AttributeError for others."""
        return self._caches[0].bits  # type: ignore[no-any-return]

    @property
    def group_size(self) -> int:
        return self._caches[0].group_size  # type: ignore[no-any-return]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Ragged, Ragged]:
        if (
            self._append_attention
            and keys.shape[2] == 1
            and all(has_room(c, keys.dtype) for c in self._caches)
        ):
            appending = Appending(self._caches, keys, values, self._append_attention)
            return Appended(appending, 0), Appended(appending, 1)
        return self.append(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        sinks: mx.array | None = None,
        mask: Any = None,
        **others: Any,
    ) -> mx.array | None:
        """Append, and attend to all tokens, at once; None, with nothing changed, where that cannot be done."""
        if (
            self._append_attention is None or mask is not None or others
        ):  # others: of quantized keys and values
            return None
        return self._append_attention(self._caches, PLAIN, queries, keys, values, scale, sinks)

    def append(self, keys: mx.array, values: mx.array) -> tuple[Ragged, Ragged]:
        """As update_and_fetch, for those who compute with what they fetch before they attend."""
        if appended := _graph.append(self._caches, PLAIN, keys, values):
            return Ragged(appended[0]), Ragged(appended[1])
        rows = zip(self._caches, _rows(keys), _rows(values), strict=True)
        pairs = [cache.update_and_fetch(k, v) for cache, k, v in rows]
        return Ragged([k for k, _ in pairs]), Ragged([v for _, v in pairs])

    def make_mask(self, num_tokens: int, **options: Any) -> Ragged | None:
        masks = [cache.make_mask(num_tokens, **options) for cache in self._caches]
        return None if all(mask is None for mask in masks) else Ragged(masks)

    # A recurrent layer's.

    lengths = None  # no padding

    def __getitem__(self, index: int) -> Any:
        parts = [cache[index] for cache in self._caches]
        if all(isinstance(part, mx.array) for part in parts):
            return mx.concatenate(parts)
        return None if all(part is None for part in parts) else Together(parts)

    def __setitem__(self, index: int, value: mx.array) -> None:
        for cache, row in zip(self._caches, _rows(value), strict=True):
            cache[index] = row

    def advance(self, num_tokens: int) -> None:
        for cache in self._caches:
            cache.advance(num_tokens)


class Padded(Together):
    """As Together, with keys and values of all sequences in one array, and a mask [num_sequences, 1, 1, num_keys]."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        ragged = self.append(keys, values)
        longest = max(part.shape[2] for part in ragged[0].parts)
        return tuple(
            mx.concatenate([_pad(part, longest - part.shape[2]) for part in each.parts]) for each in ragged
        )

    def make_mask(self, num_tokens: int, **options: Any) -> Any:
        ends = [cache.offset + num_tokens for cache in self._caches]
        return mx.arange(max(ends)) < mx.array(ends)[:, None, None, None]


def _rows(array: mx.array) -> list[mx.array]:
    """Its rows, [1, ...] each: a third of the time that Python takes to index them one by one."""
    if array.shape[0] == 1:
        return [array]
    rows: Any = mx.split(array, array.shape[0])  # MLX says that it gives one array
    return list(rows)


def _pad(part: mx.array, num_keys: int) -> mx.array:
    return mx.pad(part, [(0, 0), (0, 0), (0, num_keys), (0, 0)]) if num_keys else part


@contextmanager
def ragged_attention(*functions: tuple[Any, str]) -> Iterator[None]:
    """Meanwhile these functions, mx.fast's attention and those with its arguments, take Ragged keys, values and masks,
    and attend for each sequence by itself; and an array may be multiplied with a Ragged."""
    found = [(owner, name, _ragged(getattr(owner, name))) for owner, name in functions]
    with replaced([*found, (mx.array, "__matmul__", _asking(mx.array.__matmul__))]):
        yield


def _asking(stock: Callable[..., mx.array]) -> Callable[..., Any]:
    """mx.array's product, as Python wants it: what is no array is asked for the product. MLX's raises TypeError."""

    def multiply(x: mx.array, y: Any) -> Any:
        return stock(x, y) if isinstance(y, mx.array) else NotImplemented

    return multiply


def _ragged(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attend(queries: mx.array, keys: Any, values: Any, *, mask: Any = None, **options: Any) -> mx.array:
        if not isinstance(keys, Ragged):
            return stock(queries, keys, values, mask=mask, **options)
        if mask is None and isinstance(keys, Appended) and isinstance(values, Appended):
            y = keys.appending.attend(queries, **options)
            if y is not None:
                return y
        masks = mask.parts if isinstance(mask, Ragged) else [mask] * len(keys.parts)
        return mx.concatenate(
            [
                stock(q, k, v, mask=m, **options)
                for q, k, v, m in zip(_rows(queries), keys.parts, values.parts, masks, strict=True)
            ]
        )

    return attend
