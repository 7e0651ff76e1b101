"""A decode step's graph, recorded once and built again without Python.

Theory of operation. mlx-lm builds a step's graph in Python, 0.2 ms a layer, though it is the same at every step but
for tokens, lengths and what the caches hold. So the model is called once with placeholders for these, and with caches
that note what it does to them (`Recorder`). What it does between two accesses to a cache is a stage of a tape, built
again in C++ (native/replay.cpp); the access itself is done at every step by the code that always does it (together.py),
on the sequences' own caches. The same operations meet the same inputs, so the bits are the same.

Nothing of one step can stay in a tape: a placeholder cannot be evaluated, and a Recorder shows a model nothing else
that changes from step to step. A family that looks at a value raises, is not recorded, and goes on as before.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

import expertd.native._graph as _graph
from expertd.model.swap import replaced
from expertd.model.together import Together
from expertd.split.cut import StepSplit

# What a model can raise that does with a placeholder or a Recorder what cannot be done.
REFUSED = (AttributeError, TypeError, ValueError, IndexError, RuntimeError)
# A tape of 48 layers takes about 1 MB; there is one for each number of sequences and each split that is tried.
MAX_TAPES = 64

_log = logging.getLogger(__name__)


class NotThisStep(Exception):
    """A step that is unlike others: no tape can be made of it, or it cannot be built from the tape."""


class _Fetched:
    """The keys (`which` 0) or values (1) of all sequences, which only attention may have.

    Latent attention has a product with them as well (together.py): `rows @ values.swapaxes(-1, -2)`.
    """

    def __init__(self, layer: int, appended: tuple[mx.array, mx.array], which: int) -> None:
        self.layer, self.appended, self.which = layer, appended, which

    def swapaxes(self, *axes: int) -> "_Swapped":
        return _Swapped(self, axes)


class _Swapped:
    def __init__(self, fetched: _Fetched, axes: tuple[int, ...]) -> None:
        self.fetched, self.axes = fetched, axes

    def __rmatmul__(self, rows: mx.array) -> "_Product":
        return _Product(rows, self)


class _Product:
    """Rows @ what was fetched, which only attention may have, as its mask."""

    def __init__(self, rows: mx.array, swapped: _Swapped) -> None:
        self.rows, self.swapped = rows, swapped


class _Hole:
    """A layer's attention: what it is called with, but for keys and values."""

    def __init__(self, layer: int, attend: Callable[..., mx.array], options: dict[str, Any]) -> None:
        self.layer, self._attend, self._options = layer, attend, options

    def fill(self, caches: Together, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        y = caches.attend(queries, keys, values, **self._options)
        return (
            self._attend(queries, *caches.update_and_fetch(keys, values), **self._options) if y is None else y
        )


class _LatentHole(_Hole):
    """Latent attention, whose keys are its values and whose mask is a product, of which it is given the rows."""

    def __init__(
        self, layer: int, attend: Callable[..., mx.array], options: dict[str, Any], axes: tuple[int, ...]
    ) -> None:
        super().__init__(layer, attend, options)
        self._axes = axes

    def fill(
        self, caches: Together, queries: mx.array, keys: mx.array, values: mx.array, *rows: mx.array
    ) -> mx.array:
        latents, rotated = caches.append(keys, values)
        mask = rotated.swapaxes(*self._axes).multiplied(*rows)
        return self._attend(queries, latents, latents, mask=mask, **self._options)


class _Layer:
    """A layer's caches as the model meets them while it is recorded: `together`'s, without anything that changes.

    Whatever is not here raises AttributeError or TypeError, and the family is not recorded.
    """

    lengths = None

    def __init__(self, recorder: "Recorder", number: int, together: Together) -> None:
        self._recorder, self._number, self._together = recorder, number, together

    @property
    def offset(self) -> mx.array:
        self._recorder.asked.append(self._number)
        offsets: mx.array = self._recorder.offsets
        return offsets

    @property
    def bits(self) -> int:
        return self._together.bits

    @property
    def group_size(self) -> int:
        return self._together.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[_Fetched, _Fetched]:
        self._recorder.fetched.append(self._number)
        return _Fetched(self._number, (keys, values), 0), _Fetched(self._number, (keys, values), 1)

    def make_mask(self, num_tokens: int, **options: Any) -> None:
        self._recorder.masks.append((self._number, num_tokens, options))
        if self._together.make_mask(num_tokens, **options) is not None:
            raise ValueError("attention has a mask")

    # A recurrent layer's; a list of caches has caches.

    def __getitem__(self, index: int) -> "mx.array | _Layer":
        now = self._together[index]
        if isinstance(now, Together):
            return self._recorder.part(self._number, index, now)
        return self._recorder.state(self._number, index, now)

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._recorder.states_after[self._number, index] = value

    def advance(self, num_tokens: int) -> None:
        self._recorder.advances.append((self._number, num_tokens))


class Recorder:
    """What a model does in one step of `num_sequences` sequences, whose caches are `layers`."""

    def __init__(self, layers: list[Together], num_sequences: int) -> None:
        self.tokens = _graph.placeholder([num_sequences], mx.int32)
        self.offsets = _graph.placeholder([num_sequences], mx.int32)
        self.layers = [_Layer(self, number, together) for number, together in enumerate(layers)]
        self.parts: list[tuple[int, int]] = []  # layer and index, for the numbers behind those of the layers
        self.asked: list[int] = []  # which layers for their lengths
        self.fetched: list[int] = []
        self.masks: list[tuple[int, int, dict[str, Any]]] = []
        self.states_before: dict[tuple[int, int], mx.array] = {}
        self.states_after: dict[tuple[int, int], mx.array] = {}
        self.advances: list[tuple[int, int]] = []
        self.holes: list[tuple[_Hole, list[mx.array], mx.array]] = []

    def part(self, layer: int, index: int, together: Together) -> _Layer:
        """One of a layer's caches, as if it were another layer's."""
        place = (layer, index)
        if place not in self.parts:
            self.parts.append(place)
        return _Layer(self, len(self.layers) + self.parts.index(place), together)

    def state(self, layer: int, index: int, now: Any) -> mx.array:
        """A recurrent layer's state, which the tape is given at the beginning."""
        place = (layer, index)
        if place in self.states_after:
            return self.states_after[place]
        if now is None:
            raise NotThisStep("a recurrent layer has no state yet")
        if place not in self.states_before:
            self.states_before[place] = _graph.placeholder(now.shape, now.dtype)
        return self.states_before[place]

    @contextmanager
    def attention(self, *functions: tuple[Any, str]) -> Iterator[None]:
        """Meanwhile these functions, mx.fast's attention and those with its arguments, are noted."""
        with replaced([(owner, name, self._noted(getattr(owner, name))) for owner, name in functions]):
            yield

    def _noted(self, attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def note(queries: mx.array, keys: _Fetched, values: _Fetched, **options: Any) -> mx.array:
            hole, given = _hole(attend, queries, keys, values, options)
            if any(a.dtype != queries.dtype for a in given):
                raise TypeError("attention to keys and values of unlike types")
            mx.eval([option for option in options.values() if isinstance(option, mx.array)])
            width = values.appended[values.which].shape[-1]
            y: mx.array = _graph.placeholder([*queries.shape[:-1], width], queries.dtype)
            self.holes.append((hole, given, y))
            return y

        return note


def _hole(
    attend: Callable[..., mx.array],
    queries: mx.array,
    keys: _Fetched,
    values: _Fetched,
    options: dict[str, Any],
) -> tuple[_Hole, list[mx.array]]:
    """The hole for such a call, and what it is filled with; TypeError where it is called with something else."""
    mask, given = options.get("mask"), [queries, *keys.appended]
    if not isinstance(mask, _Product):
        _require([keys, values], (0, 1))
        return _Hole(keys.layer, attend, options), given
    _require([keys, values, mask.swapped.fetched], (0, 0, 1))
    others = {name: option for name, option in options.items() if name != "mask"}
    return _LatentHole(keys.layer, attend, others, mask.swapped.axes), [*given, mask.rows]


def _require(fetched: list[_Fetched], which: tuple[int, ...]) -> None:
    """Raise TypeError unless these are keys (0) and values (1) of one layer in this order."""
    if [(each.layer, each.which) for each in fetched] != [(fetched[0].layer, place) for place in which]:
        raise TypeError("attention to keys and values of unlike layers")


class Tape:
    """A recorded step."""

    def __init__(self, recorder: Recorder, logits: mx.array) -> None:
        """`logits` are what the model gave for the recorder's tokens and layers.

        Raises ValueError where it attended to a layer's keys twice, or never.
        """
        self._parts, self._asked = recorder.parts, recorder.asked
        self._masks, self._advances = recorder.masks, recorder.advances
        self._holes = [hole for hole, _, _ in recorder.holes]
        if sorted(recorder.fetched) != sorted({hole.layer for hole in self._holes}) or len(
            self._holes
        ) != len(recorder.fetched):
            raise ValueError("not one attention for each layer's keys and values")
        self._before, self._after = list(recorder.states_before), list(recorder.states_after)
        self._states = [(a.shape, a.dtype) for a in recorder.states_before.values()]
        given = [[recorder.tokens, recorder.offsets, *recorder.states_before.values()]]
        given += [[y] for _, _, y in recorder.holes]
        wanted = [arrays for _, arrays, _ in recorder.holes] + [[logits, *recorder.states_after.values()]]
        self._graph = _graph.Tape(list(zip(given, wanted, strict=True)))

    def replay(self, tokens: list[int], layers: Sequence[Together]) -> mx.array:
        """The graph of the logits [num_sequences, vocab] of tokens that are appended to these caches.

        Raises NotThisStep, before anything was appended, where the model would have built another graph.
        """
        layers = [*layers, *(layers[layer][index] for layer, index in self._parts)]
        given = [mx.array(tokens), self._offsets(layers, len(tokens)), *self._given_states(layers)]
        if any(
            layers[layer].make_mask(count, **options) is not None for layer, count, options in self._masks
        ):
            raise NotThisStep("there is a mask")
        graph = _graph.Replay(self._graph)
        arrays = graph.next(given)
        for hole in self._holes:
            arrays = graph.next([hole.fill(layers[hole.layer], *arrays)])
        for (layer, index), state in zip(self._after, arrays[1:], strict=True):
            layers[layer][index] = state
        for layer, num_tokens in self._advances:
            layers[layer].advance(num_tokens)
        logits: mx.array = arrays[0]
        return logits

    def _offsets(self, layers: Sequence[Together], num_sequences: int) -> mx.array:
        offsets = layers[self._asked[0]].offsets() if self._asked else [0] * num_sequences
        if any(layers[layer].offsets() != offsets for layer in self._asked):
            raise NotThisStep("layers hold unlike numbers of tokens")
        return mx.array(offsets, dtype=mx.int32)

    def _given_states(self, layers: Sequence[Together]) -> list[mx.array]:
        states = [layers[layer][index] for layer, index in self._before]
        if [isinstance(a, mx.array) and (a.shape, a.dtype) for a in states] != self._states:
            raise NotThisStep("a recurrent layer has another state")
        return states


class Tapes:
    """A model's tapes, each made when it is first asked for. Where there can be none, that is remembered as well."""

    def __init__(self, record: Callable[[Recorder, StepSplit], mx.array]) -> None:
        """`record` calls the model with what a Recorder has, and gives its logits."""
        self._record = record
        self._tapes: OrderedDict[Any, Tape | None] = OrderedDict()
        self.num_built = 0  # graphs, of all tapes

    def clear(self) -> None:
        self._tapes.clear()

    def build(self, tokens: list[int], layers: list[Together], split: StepSplit) -> mx.array | None:
        """The graph of a step's logits [num_sequences, vocab]; None, with nothing changed, if Python must build it."""
        # An operation belongs to a stream, and a stream to a thread.
        key = (len(tokens), split, threading.get_ident())
        try:
            if key not in self._tapes:
                self._tapes[key] = self._made(len(tokens), layers, split)
                if len(self._tapes) > MAX_TAPES:
                    self._tapes.popitem(last=False)
            self._tapes.move_to_end(key)
            tape = self._tapes[key]
            if tape:
                logits = tape.replay(tokens, layers)
                self.num_built += 1
                return logits
        except NotThisStep:
            return None  # Python builds it
        return None

    def _made(self, num_sequences: int, layers: list[Together], split: StepSplit) -> Tape | None:
        recorder = Recorder(layers, num_sequences)
        try:
            return Tape(recorder, self._record(recorder, split))
        except REFUSED as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            _log.info("steps of %d under %s are built in Python (%s)", num_sequences, split.name, reason)
            return None
