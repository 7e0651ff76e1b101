"""Keys and values as bytes: the other cache has the same numbers then, and what does not fit changes nothing."""

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

from expertd.errors import RemoteProtocolError
from expertd.model.rows import Packed, pack_rows, put_rows, row_bytes

KINDS = ("float32", "bfloat16", "codes", "list", "no values")


def make(kind: str) -> list[Any]:
    layers = {"codes": lambda: QuantizedKVCache(32, 8), "list": lambda: CacheList(KVCache(), KVCache())}
    return [layers.get(kind, KVCache)() for _ in range(2)]


def fill(layers: list[Any], kind: str, count: int) -> None:
    for layer in layers:
        for leaf in layer.caches if kind == "list" else [layer]:
            dtype = mx.float32 if kind == "float32" else mx.bfloat16
            keys = mx.random.normal((1, 2, count, 64)).astype(dtype)
            values = mx.random.normal((1, 2, count, 0 if kind == "no values" else 32)).astype(dtype)
            leaf.update_and_fetch(keys, values)


def visible(layers: list[Any]) -> list[Any]:
    """All numbers of all tokens."""
    leaves = [leaf for layer in layers for leaf in getattr(layer, "caches", [layer])]
    arrays: Any = [array for leaf in leaves for _, array in tree_flatten(leaf.keys_and_values())]
    return [(leaf.offset) for leaf in leaves] + [a.astype(mx.float32).tolist() for a in arrays]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [0, 3, 250])
def test_the_other_cache_has_the_same_numbers(kind: str, known: int) -> None:
    """Also where its buffers must grow, in pieces, and when it goes on as mlx-lm's caches do."""
    mine, other = make(kind), make(kind)
    fill(mine, kind, known + 300)
    if known:
        put_rows(other, 0, known, pack_rows(mine, 0, known))
    for start, stop in ((known, known + 1), (known + 1, known + 300)):
        put_rows(other, start, stop - start, pack_rows(mine, start, stop))
    assert visible(other) == visible(mine)
    mx.random.seed(3)
    fill(mine, kind, 5)
    mx.random.seed(3)
    fill(other, kind, 5)
    assert visible(other) == visible(mine)


def test_what_somebody_else_holds_stays() -> None:
    layers = make("float32")
    fill(layers, "float32", 3)
    held = [mx.array(layer.keys) for layer in layers]
    before = [keys.tolist() for keys in held]
    put_rows(layers, 3, 1, pack_rows(layers, 0, 1))
    mx.eval([layer.state for layer in layers])
    assert [keys.tolist() for keys in held] == before


def test_the_size_of_a_row() -> None:
    layers = make("bfloat16")
    assert row_bytes(layers) == 0
    fill(layers, "bfloat16", 3)
    assert row_bytes(layers) == 2 * 2 * (64 + 32) * 2
    assert sum(len(data) for _, _, data in pack_rows(layers, 1, 3)) == 2 * row_bytes(layers)


def _changed(packed: list[Packed], **changes: Any) -> list[Packed]:
    (code, shape, data), *rest = packed
    return [(changes.get("code", code), changes.get("shape", shape), changes.get("data", data)), *rest]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p[:-1],
        lambda p: [*p, p[0]],
        lambda p: _changed(p, code="F32"),
        lambda p: _changed(p, code="nothing"),
        lambda p: _changed(p, code="F16"),
        lambda p: _changed(p, shape=[1, 2, 2, 32]),
        lambda p: _changed(p, shape=[1, 4, 2, 32]),
        lambda p: _changed(p, shape=[2, 2, 2, 64]),
        lambda p: _changed(p, shape=[1, 2, 4, 32]),
        lambda p: _changed(p, shape=[1, -2, 2, -64]),
        lambda p: _changed(p, shape=[]),
        lambda p: _changed(p, data=p[0][2][:-1]),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(damage: Any) -> None:
    layers = make("bfloat16")
    fill(layers, "bfloat16", 5)
    before = visible(layers)
    with pytest.raises(RemoteProtocolError):
        put_rows(layers, 5, 2, damage(pack_rows(layers, 0, 2)))
    with pytest.raises(RemoteProtocolError, match="for a layer with 5 tokens"):
        put_rows(layers, 4, 2, pack_rows(layers, 0, 2))
    assert visible(layers) == before


def test_any_damage_is_refused_or_only_changes_numbers() -> None:
    rng = random.Random(7)
    layers = make("codes")
    fill(layers, "codes", 2)
    packed = pack_rows(layers, 0, 2)
    num_refused = 0
    for _ in range(300):
        damaged = [list(row) for row in packed]
        row = rng.choice(damaged)
        field = rng.randrange(3)  # of the types that a plan's frame was found to have
        row[field] = rng.choice([["BF16", "U32", ""], [[1, 2, 2, 16], [1, 2]], [b"", row[2] + b"1"]][field])
        fresh = make("codes")
        try:
            put_rows(fresh, 0, 2, damaged)  # type: ignore[arg-type]
        except RemoteProtocolError:
            num_refused += 1
            assert all(layer.keys is None and layer.offset == 0 for layer in fresh)
    assert 200 < num_refused < 300
