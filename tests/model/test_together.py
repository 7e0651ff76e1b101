"""Sequences that decode in one step: each gets the logits that it gets alone, to the last bit, in every family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

import expertd.native._graph as _graph
from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.model.kernels import Kernels, open_kernels
from expertd.model.model import Cache, Model
from expertd.model.together import Padded, Ragged, Together, ragged_attention
from expertd.split.cut import StepSplit
from tests.tiny import FAMILIES, make_tiny

SOLO = StepSplit("solo", (1.0,))
PROMPTS = ([1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12, 13])
NUM_STEPS = 12
NATIVE = Kernels("", num_threads=2, activation_bits=8)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(7)


class Counting:
    """An append_attention that counts how often it did that."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, *args: Any) -> mx.array | None:
        y = NATIVE.append_attention(*args)
        self.num_calls += y is not None
        return y


def load(folder: Path, kernels: str = "native") -> Model:
    info = check_checkpoint(folder)
    return Model(info.folder, info.config, kernels=open_kernels(kernels, ACTIVATION_BITS, num_threads=2))


def filled(model: Model, prompt: list[int]) -> Cache:
    cache = model.new_cache()
    model.prefill(prompt, cache, SOLO)
    return cache


def token(step: int, sequence: int) -> int:
    return (7 * step + 13 * sequence) % 250


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_as_alone(family: str, kernels: str, tmp_path: Path) -> None:
    """The second sequence joins late, the first leaves early."""
    model = load(make_tiny(tmp_path / family, family), kernels)
    assert model._together is Together
    decode_together(model, kernels == "native" and not family.startswith("deepseek"))


def test_what_a_ragged_cannot_do_one_padded_array_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that computes with the keys on the way to attention."""
    monkeypatch.delattr(Ragged, "swapaxes")
    model = load(make_tiny(tmp_path / "tiny", "deepseek_v3"))
    assert model._together is Padded and not model._replayed
    decode_together(model, at_once=False)


def decode_together(model: Model, at_once: bool) -> None:
    """Each sequence's logits are those that it gets alone; `at_once`: one operation appends and attends."""
    caches, counting = [filled(model, prompt) for prompt in PROMPTS], Counting()
    if model._append_attention:
        model._append_attention = counting
    found: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
    for step in range(NUM_STEPS):
        there = [i for i in range(3) if not (i == 1 and step < 4) and not (i == 0 and step >= 8)]
        logits = model.decode([token(step, i) for i in there], [caches[i] for i in there], SOLO)
        for i, row in zip(there, logits.tolist(), strict=True):
            found[i].append(row)
    num_plain = sum(type(layer) is KVCache for layer in caches[0])
    assert counting.num_calls == (NUM_STEPS * num_plain if at_once else 0)
    for i, prompt in enumerate(PROMPTS):
        steps = range(4, NUM_STEPS) if i == 1 else range(8) if i == 0 else range(NUM_STEPS)
        cache = filled(model, prompt)
        alone = [model.decode([token(step, i)], [cache], SOLO)[0].tolist() for step in steps]
        assert found[i] == alone, f"sequence {i}"
        assert len({tuple(row) for row in alone}) == len(alone)


def test_a_family_that_cannot_decodes_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise TypeError("no such cache\nand more")

    folder = make_tiny(tmp_path / "tiny", "mixtral")
    monkeypatch.setattr(Together, "update_and_fetch", refuse)
    monkeypatch.setattr(Padded, "make_mask", lambda *_, **__: mx.zeros((2, 1, 1, 4), dtype=mx.bool_))
    model = load(folder)
    assert model._together is None
    assert "one sequence after the other (TypeError: no such cache; " in caplog.text
    caches = [filled(model, prompt) for prompt in PROMPTS]
    assert model.decode([1, 2, 3], caches, SOLO).shape == (3, 257)


# Where our kernels attend, one operation appends and attends for all sequences.


def filled_kv(num_tokens: int, dtype: mx.Dtype = mx.float32) -> KVCache:
    cache = KVCache()
    cache.update_and_fetch(*(mx.random.normal((1, 2, num_tokens, width)).astype(dtype) for width in (16, 24)))
    mx.eval(cache.state)
    return cache


def attended(
    caches: list[KVCache],
    rows: tuple[mx.array, ...],
    function: Any = None,
    sinks: mx.array | None = None,
    look: bool = False,
) -> mx.array:
    """What a layer computes of a token's queries, keys and values; `look` has the keys read first."""
    queries, k, v = rows
    owner = SimpleNamespace(attention=NATIVE.attention)
    with ragged_attention((owner, "attention")):
        keys, values = Together(caches, function).update_and_fetch(k, v)
        assert not look or [part.shape[2] for part in keys.parts] == [cache.offset for cache in caches]
        y: mx.array = owner.attention(queries, keys, values, mask=None, scale=0.25, sinks=sinks)
    mx.eval(y, [cache.state for cache in caches])
    return y


def by_mlx_lm(caches: list[Any], rows: tuple[mx.array, ...], sinks: mx.array | None = None) -> mx.array:
    """The same, of each sequence by itself, by its cache's own calls."""
    parts = []
    for i, cache in enumerate(caches):
        queries, k, v = (row[i : i + 1] for row in rows)
        keys, values = cache.update_and_fetch(k, v)
        parts.append(NATIVE.attention(queries, keys, values, mask=None, scale=0.25, sinks=sinks))
    y = mx.concatenate(parts)
    mx.eval(y, [cache.state for cache in caches])
    return y


def rows_of(num_sequences: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    shapes = [(num_sequences, 4, 1, 16), (num_sequences, 2, 1, 16), (num_sequences, 2, 1, 24)]
    return tuple(mx.random.normal(shape).astype(dtype) for shape in shapes)


def copied(cache: KVCache) -> KVCache:
    """With memory of its own."""
    copy = KVCache()
    copy.keys, copy.values = (
        mx.array(np.array(a.astype(mx.float32))).astype(a.dtype) for a in cache.state[:2]
    )
    copy.offset = cache.offset
    return copy


def same_caches(some: list[KVCache], others: list[KVCache]) -> bool:
    pairs = [
        (a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one.state, other.state, strict=True)
    ]
    return all(bool(mx.array_equal(a, b).item()) if isinstance(a, mx.array) else a == b for a, b in pairs)


@pytest.mark.parametrize("function", [Counting(), None], ids=["one operation", "then attention"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_appending_at_once_is_appending_one_by_one(dtype: mx.Dtype, function: Counting | None) -> None:
    """Step by step, to the last bit, in `y` and in the caches; with sinks, from views, where the cache was cut, and to
    the last place of its buffer."""
    before = function.num_calls if function else 0
    caches = [filled_kv(length, dtype) for length in (5, 252, 200)]
    others = list(map(copied, caches))
    sinks = mx.random.normal((4,)).astype(dtype)
    for step in range(4):
        rows = rows_of(3, dtype)
        if step == 1:
            rows = tuple(mx.contiguous(row.swapaxes(1, 3)).swapaxes(1, 3) for row in rows)
        if step == 3:
            for cache in (caches[2], others[2]):
                cache.trim(150)
        y = attended(caches, rows, function, sinks if step == 2 else None)
        wanted = by_mlx_lm(others, rows, sinks if step == 2 else None)
        assert y.dtype == dtype and bool(mx.array_equal(y, wanted).item()), step
        assert same_caches(caches, others), step
    assert function is None or function.num_calls - before == 4


def address(array: mx.array) -> int:
    return int(np.array(array, copy=False).ctypes.data)


@pytest.mark.parametrize("function", [Counting(), None], ids=["one operation", "then attention"])
def test_a_token_goes_into_memory_that_nobody_else_looks_at(function: Counting | None) -> None:
    caches = [filled_kv(5), filled_kv(7)]
    before = [address(array) for cache in caches for array in cache.state[:2]]
    attended(caches, rows_of(2), function)
    assert [address(array) for cache in caches for array in cache.state[:2]] == before


def test_who_else_looks_sees_what_was_there() -> None:
    """A second handle, as caches.py keeps, and a view, as a fork has: of the same tokens, after a cut."""
    cache, counting = filled_kv(8), Counting()
    fork = KVCache.from_state([mx.array(a) if isinstance(a, mx.array) else a for a in cache.state])
    view = cache.keys[..., :8, :]
    mx.eval(view)
    wanted = copied(fork)
    cache.trim(4)
    attended([cache, filled_kv(5)], rows_of(2), counting)
    assert counting.num_calls == 1
    assert same_caches([fork], [wanted])
    assert mx.array_equal(view, wanted.keys[..., :8, :]).item()
    assert not mx.array_equal(cache.keys[..., :5, :], wanted.keys[..., :5, :]).item()
    assert mx.array_equal(cache.keys[..., :4, :], wanted.keys[..., :4, :]).item()


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": (256, 5)},
        {"lengths": (5, 0)},
        {"dtype": mx.float16},
        {"rotates": True},
        {"look": True},
    ],
    ids=["no room", "empty", "another type", "another kind", "read before"],
)
def test_what_cannot_be_appended_at_once_is_not(change: dict[str, Any]) -> None:
    counting = Counting()
    first, second = change.get("lengths", (3, 5))
    caches: list[Any] = [
        filled_kv(first, change.get("dtype", mx.float32)),
        filled_kv(second) if second else KVCache(),
    ]
    others: list[Any] = [copied(caches[0]), copied(caches[1]) if second else KVCache()]
    if change.get("rotates"):
        caches[1], others[1] = RotatingKVCache(max_size=300), RotatingKVCache(max_size=300)
        for cache in (caches[1], others[1]):
            cache.update_and_fetch(mx.ones((1, 2, 5, 16)), mx.ones((1, 2, 5, 24)))
            cache.update_and_fetch(mx.ones((1, 2, 1, 16)), mx.ones((1, 2, 1, 24)))  # now it has room
    rows = rows_of(2)
    y = attended(caches, rows, counting, look=change.get("look", False))
    assert counting.num_calls == 0
    assert mx.array_equal(y, by_mlx_lm(others, rows)).item() and same_caches(caches, others)


def test_a_family_runs_out_of_room_and_goes_on(tmp_path: Path) -> None:
    """One sequence after the other needs a new buffer; a step is taken back and done again."""
    model = load(make_tiny(tmp_path / "tiny", "mixtral"))
    counting = Counting()
    model._append_attention = counting
    prompts = [[i % 250 for i in range(length)] for length in (254, 255, 9)]
    caches = [filled(model, prompt) for prompt in prompts]
    found, calls = [], []
    for step in range(4):
        for attempt in range(2):
            tokens = [token(step, i) if attempt else 77 for i in range(3)]
            found.append(model.decode(tokens, caches, SOLO))
            calls.append(counting.num_calls)
            for layer in [layer for cache in caches for layer in cache if not attempt]:
                layer.trim(1)
    alone = [filled(model, prompt) for prompt in prompts]
    for step in range(4):
        for i, cache in enumerate(alone):
            logits = model.decode([token(step, i)], [cache], SOLO)[0]
            assert mx.array_equal(found[2 * step + 1][i], logits).item(), (step, i)
    num_layers = len(caches[0])
    # The second sequence grows in the second step and the first one in the third; a buffer that grew stays so.
    assert [b - a for a, b in zip([0, *calls], calls, strict=False)] == [
        num_layers * n for n in (1, 1, 0, 1, 0, 1, 1, 1)
    ]


def test_wrong_appending_is_refused() -> None:
    q, k, v = rows_of(2)
    caches = [filled_kv(3), filled_kv(7)]
    good: list[Any] = [caches, KVCache, q, k, v, 0.25]
    for place, wrong, message in (
        (2, q[:, :, :, :8], r"attention: q is \(2,4,1,8\), k \(2,2,1,16\)"),
        (2, q[:1], r"attention: q is \(1,4,1,16\)"),
        (0, caches[:1], "append_attention: .* for 1 sequences"),
        (3, k[:, :1], r"attention: q is .* k \(2,1,1,16\) and v \(2,2,1,24\)"),
        (
            4,
            v[..., :16],
            r"append_attention: values are \(1,2,256,24\) float32 with 3 tokens, for \(2,2,1,16\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            NATIVE.append_attention(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(ValueError, match=r"attention: sinks are \(3\) for 4 heads"):
        NATIVE.append_attention(*good, mx.zeros((3,)))
    with pytest.raises(ValueError, match="cannot be broadcast"):
        _graph.append(caches, KVCache, k, v[..., :16])
    assert [cache.offset for cache in caches] == [3, 7]
    mx.eval(NATIVE.append_attention(*good))
    assert [cache.offset for cache in caches] == [4, 8]


def test_caches_that_are_not_plain_are_left_alone() -> None:
    """One of two: full, empty, of another class or type, or with keys that are no array."""
    q, k, v = rows_of(2)
    odd = [filled_kv(256), KVCache(), RotatingKVCache(max_size=8), filled_kv(2, mx.float16), filled_kv(2)]
    odd[-1].keys = (odd[-1].keys, odd[-1].keys)
    plain = filled_kv(3)
    for cache in odd:
        assert NATIVE.append_attention([plain, cache], KVCache, q, k, v, 0.25) is None
        assert _graph.append([plain, cache], KVCache, k, v) is None
    assert NATIVE.append_attention([plain] * 2, KVCache, q.astype(mx.float16), k, v, 0.25) is None
    assert _graph.append([], KVCache, k, v) is None and plain.offset == 3
