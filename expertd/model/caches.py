"""What the layers of a model remember of one sequence, and the way back in it.

Theory of operation. A step that fails must not have happened, and a rank whose step succeeded must be able to take it
back when another rank's did not. Keys and values (mlx-lm's KVCache) are appended, so going back means to forget the
end. A window (RotatingKVCache) overwrites its oldest keys and a recurrent layer (ArraysCache) its state, so going back
means to have kept what was there. MLX's arrays never change, and a second handle to one keeps it alive: `mx.array(a)`
is such a handle. `a` itself is not, because mlx-lm's `keys[...] = new` makes the same Python object stand for another
array.

Other sequences may begin with the first tokens of this one (`fork`). Keys and values are shared until one of both
writes; for windows and recurrent states, marks are kept at some ends of a prompt's chunks.

For recurrent layers all this costs memory alone. A window is copied at each step, because its array is in use twice:
for a token of gpt-oss-20b these are 3 MB, beside the GB of weights that it reads.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

# The leader may have begun the step after one that another rank has not finished, and no further one.
NUM_STEPS_BACK = 2
# States kept for other sequences: in Qwen3-Next-80B one is 75 MB.
MAX_MARKS = 4

# What was computed in many steps is read in chunks of so many tokens, the default of --prefill-chunk.
MERGED = 512

# The class of plain keys and values: what appending to one means is known, and done without mlx-lm's own calls.
PLAIN = KVCache

State = list[Any]  # of each layer; None where the layer forgets by itself


@dataclass(frozen=True)
class Piece:
    """Tokens that one step appended to a sequence."""

    tokens: list[int]
    decode: bool


class SequenceCache:
    """The caches of all layers, as mlx-lm makes them, and the tokens that are in them.

    All ranks have the first `num_shared` of these; the first `num_read` were read in chunks. Under the split
    `sequences` a sequence has a `home`, the one rank that computes it; `pending` is what all others lack, in pieces as
    the home took them, the same list on every rank. `forgets`: it can forget any number of its last tokens.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.forgetting = list(map(_forgets, layers))
        self.forgets = all(self.forgetting)
        self.tokens: list[int] = []
        self.num_shared = self.num_read = 0
        self.home: int | None = None
        self.pending: list[Piece] = []
        self.num_pending = 0  # tokens; adding them up took 0.6 ms of a step of 16 sequences
        self.uneven = False  # whether ranks may have been able to go back to unlike lengths
        self._before: dict[int, State] = {}  # the last steps, by the number of tokens
        self.marks: dict[int, State] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Marks included, which may share arrays with each other: at most this much."""
        marked: Any = tree_flatten(list(self.marks.values()))
        sizes = [layer.nbytes for layer in self.layers] + [getattr(a, "nbytes", 0) for _, a in marked]
        return sum(sizes)

    def extend(self, tokens: list[int], decode: bool) -> None:
        """Note that a step appends `tokens`; `cut` takes it back."""
        if self.num_read == len(self) and not decode:
            self.num_read += len(tokens)
        self._before[len(self)] = self._state()
        for length in sorted(self._before)[:-NUM_STEPS_BACK]:
            del self._before[length]
        self.tokens += tokens

    @property
    def known(self) -> list[int]:
        """The tokens of the sequence, those included that are at its home alone."""
        if not self.pending:
            return self.tokens
        return self.tokens[: self.num_shared] + [token for piece in self.pending for token in piece.tokens]

    def add_pending(self, pieces: Iterable[Piece]) -> None:
        """Note what the home alone has, or will have after this step."""
        for piece in pieces:
            self.pending.append(piece)
            self.num_pending += len(piece.tokens)

    def share(self) -> None:
        """Note that every rank now has what this one has."""
        self.num_shared, self.pending, self.num_pending = len(self), [], 0

    def pieces(self, start: int, chunk: int) -> list[Piece]:
        """The tokens from `start` on, as they were computed: a prompt in chunks, the answer one by one."""
        ends = [*range(start // chunk * chunk + chunk, self.num_read, chunk), max(start, self.num_read)]
        starts = [start, *ends[:-1]]
        read = [Piece(self.tokens[a:b], False) for a, b in zip(starts, ends, strict=True) if b > a]
        return read + [Piece([token], True) for token in self.tokens[ends[-1] :]]

    def take_pending(self, limit: int | None, merge: bool) -> list[Piece]:
        """Take pieces out of `pending`, of `limit` tokens in all.

        `merge` joins them to chunks of MERGED tokens; else they stay as they were computed, and the last may be longer.
        """
        taken: list[Piece] = []
        while self.pending and (limit is None or sum(len(piece.tokens) for piece in taken) < limit):
            taken.append(self.pending.pop(0))
            self.num_pending -= len(taken[-1].tokens)
        if not merge:
            return taken
        if limit is not None and (more := sum(len(piece.tokens) for piece in taken) - limit) > 0:
            last = taken.pop()
            taken.append(Piece(last.tokens[:-more], last.decode))
            self.pending.insert(0, Piece(last.tokens[-more:], last.decode))
            self.num_pending += more
        tokens = [token for piece in taken for token in piece.tokens]
        return [Piece(tokens[at : at + MERGED], False) for at in range(0, len(tokens), MERGED)]

    def take_tokens(self, count: int) -> list[Piece]:
        """Take the first `count` tokens out of `pending`, in pieces as they were computed, or in parts of these."""
        taken: list[Piece] = []
        self.num_pending -= count
        while count:
            piece = self.pending.pop(0)
            if len(piece.tokens) > count:
                self.pending.insert(0, Piece(piece.tokens[count:], piece.decode))
            taken.append(Piece(piece.tokens[:count], piece.decode))
            count -= len(taken[-1].tokens)
        return taken

    def lengths(self) -> list[int]:
        """The numbers of tokens, above 0, that it is or was made ready to be cut to, longest first."""
        shared = {self.num_shared} if self.forgets else set()
        return sorted({len(self), *shared, *self._before, *self.marks} - {0}, reverse=True)

    def digests(self, lengths: list[int]) -> list[int]:
        """The CRC-32 of the first so many tokens (of all, where there are fewer), for each of these numbers."""
        found, crc, at = {}, 0, 0
        for length in sorted(lengths):
            crc = zlib.crc32(array("I", self.tokens[at:length]), crc)
            found[length], at = crc, length
        return [found[length] for length in lengths]

    def can_cut(self, length: int) -> bool:
        """Whether its first `length` tokens can be had."""
        return length in self.lengths() or (0 < length < len(self) and self.forgets)

    def cut(self, length: int) -> None:
        """Go back to the first `length` tokens: what `can_cut`, or what there was before the last step."""
        if length < len(self):
            nothing = [None] * len(self.layers)
            state = self._before.get(length) or self.marks.get(length) or nothing
            for layer, kept in zip(self.layers, state, strict=True):
                _go_back(layer, length, kept)
        del self.tokens[length:]
        self.num_shared = min(self.num_shared, length)
        self.num_read = min(self.num_read, length)
        self._before = {n: state for n, state in self._before.items() if n < length}
        self.marks = {n: state for n, state in self.marks.items() if n <= length}

    def mark(self) -> None:
        """Let other sequences begin with the present state; thins out earlier marks."""
        if not self.forgets:
            self.marks[len(self)] = self._state()
            if len(self.marks) > MAX_MARKS:
                ends = [0, *sorted(self.marks)]
                gaps = {ends[i]: ends[i + 1] - ends[i - 1] for i in range(1, len(ends) - 1)}
                del self.marks[min(gaps, key=gaps.__getitem__)]

    def keep_marks(self, lengths: set[int]) -> None:
        """Drop those that some rank lacks; what all kept to take a step back is as good as a mark."""
        kept = self.marks if self.forgets else self._before | self.marks
        self.marks = {n: state for n, state in kept.items() if n in lengths}

    def starts(self) -> list[int]:
        """The lengths at which every rank can begin another sequence, if the cache does not forget: its own and its
        marks. What was kept to take steps back may differ between ranks."""
        return sorted({len(self), *self.marks})

    def settle(self) -> None:
        """Its sequence is finished: no step will be taken back."""
        self._before.clear()

    def fork(self, length: int) -> "SequenceCache":
        """Another sequence's cache, with the first `length` of the tokens that are `known`.

        What is pending of these stays so, and the fork has the same home.
        """
        fork = SequenceCache([type(layer).from_state(_handles(layer.state)) for layer in self.layers])
        fork.tokens, fork.num_read = self.tokens[:], self.num_read
        fork._before, fork.marks = self._before, self.marks
        fork.cut(min(length, len(fork)))
        fork.num_shared = min(length, self.num_shared) if self.pending else length
        fork.home, left = self.home, length - fork.num_shared
        for piece in self.pending if left else ():
            fork.add_pending([Piece(piece.tokens[:left], piece.decode)])
            left -= len(fork.pending[-1].tokens)
            if not left:
                break
        fork.uneven = self.uneven
        fork._before = {}
        for layer in fork.layers:
            _shrink(layer)
        return fork

    def evaluate(self) -> None:
        """Compute what is still lazy, while the link is there that it may need."""
        mx.eval([layer.state for layer in self.layers])

    def _state(self) -> State:
        return [None if _forgets(layer) else _handles(layer.state) for layer in self.layers]


def leaves(layers: Iterable[Any]) -> Iterator[Any]:
    """The caches that lists of caches hold, one by one."""
    for layer in layers:
        if isinstance(layer, CacheList):
            yield from leaves(layer.caches)
        else:
            yield layer


def rotates(layer: Any) -> bool:
    """Whether a layer's cache keeps single tokens in another order than chunks of them, and so changes sums.

    Tried with numbers for keys: one chunk and two tokens more than a window holds, if it is one.
    """
    size = getattr(layer, "max_size", 0)
    if not size:
        return False
    for first, last in ((0, size), (size, size + 1), (size + 1, size + 2)):
        numbers = mx.arange(first, last, dtype=mx.float32).reshape(1, 1, -1, 1)
        keys, _ = layer.update_and_fetch(numbers, numbers)
    found = keys.flatten()
    return not mx.all(found[1:] > found[:-1]).item()


def has_room(layer: Any, dtype: mx.Dtype) -> bool:
    """Whether a layer's cache is plain keys and values of this type, whose buffers hold one more token."""
    if type(layer) is not PLAIN or layer.keys is None:
        return False
    fits: bool = layer.offset < layer.keys.shape[2] and layer.keys.dtype == layer.values.dtype == dtype
    return fits


def _forgets(layer: Any) -> bool:
    """Whether a layer's cache can forget any number of its last tokens."""
    return all(isinstance(leaf, KVCache | QuantizedKVCache) for leaf in leaves([layer]))


def _go_back(layer: Any, length: int, kept: Any) -> None:
    if kept is not None:
        layer.state = _handles(kept)  # again: the layer will change what it gets
    elif isinstance(layer, CacheList):
        for each in layer.caches:
            _go_back(each, length, None)
    else:
        layer.trim(layer.offset - length)


def _shrink(layer: Any) -> None:
    """Let go of the room behind the last token, and of the tokens that were there."""
    if isinstance(layer, CacheList):
        for each in layer.caches:
            _shrink(each)
    elif isinstance(layer, KVCache | QuantizedKVCache) and layer.keys is not None:
        pair = (layer.keys, layer.values)
        layer.keys, layer.values = tree_map(lambda a: a[..., : layer.offset, :], pair)


def _handles(state: Any) -> Any:
    return tree_map(lambda a: mx.array(a) if isinstance(a, mx.array) else a, state)
