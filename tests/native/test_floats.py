"""The float operations beside float64, and the bits of their results: the same for every instruction set, for any
number of threads, in any company."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from expertd.native._kernels import lib
from tests.native.calling import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    Array,
    attention,
    exact,
    glu,
    isas,
    narrowed,
    norm,
    opened,
    product,
    rope,
)

# Of a result that is rounded once, relative, in the Euclidean norm. A sum of 3000 float32 in one chain has 1e-6.
ROUNDING = {FLOAT32: 3e-6, FLOAT16: 3e-4, BFLOAT16: 2.5e-3}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def normal(rng: np.random.Generator, dtype: int, *shape: int) -> Array:
    return narrowed(rng.standard_normal(shape, np.float32), dtype)


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(exact(got) - wanted) / (np.linalg.norm(wanted) or 1))


def same(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


def everywhere(call: Callable[[Any], Array]) -> Array:
    """What a call gives; the same bits for every instruction set and for one thread, three and eight."""
    found: Array | None = None
    for isa in isas():
        for num_threads in (1, 3, 8) if isa != "portable" else (1,):
            with opened(isa, num_threads) as cpu:
                got = call(cpu)
            assert found is None or same(got, found), f"{isa}, {num_threads} threads"
            found = got
    assert found is not None
    return found


# Products.


@by_dtype
@pytest.mark.parametrize(
    "out, width, rows", [(1, 1, 1), (33, 515, 5), (7, 8, 13), (64, 1030, 50), (128, 512, 1)]
)
def test_products_are_right(rng: np.random.Generator, dtype: int, out: int, width: int, rows: int) -> None:
    w, x = normal(rng, dtype, 1, out, width), normal(rng, dtype, rows, width)
    got = everywhere(lambda cpu: product(cpu, w, x))
    assert error(got, exact(x) @ exact(w[0]).T) < 1e-6
    with opened() as cpu:
        for i in range(rows):
            assert same(product(cpu, w, x[i : i + 1]), got[i : i + 1])  # a row alone and among others


def test_products_are_gathered(rng: np.random.Generator) -> None:
    """Each pair has the bits that it has alone; an expert that is not there gives NaN."""
    w, x = normal(rng, BFLOAT16, 6, 40, 70), normal(rng, FLOAT32, 90, 70)
    ids = rng.integers(0, 7, (90, 3)).astype(np.uint32)
    got = everywhere(lambda cpu: product(cpu, w, x, ids, BFLOAT16))
    with opened() as cpu:
        for pair, expert in enumerate(ids.ravel()):
            row = x[pair // 3 : pair // 3 + 1]
            if expert == 6:
                assert np.isnan(exact(got[pair])).all()
            else:
                assert same(product(cpu, w[expert : expert + 1], row, y_dtype=BFLOAT16)[0], got[pair])


def test_empty_products() -> None:
    with opened() as cpu:
        assert product(cpu, np.ones((1, 3, 8), np.float32), np.ones((0, 8), np.float32)).shape == (0, 3)
        none = product(cpu, np.ones((2, 3, 0), np.float32), np.ones((4, 0), np.float32))
    assert (none == 0).all()


# Norm and activations.


@by_dtype
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 13), (4, 128), (2, 2048), (700, 100)])
def test_norms_are_right(rng: np.random.Generator, dtype: int, rows: int, width: int) -> None:
    x, weight = normal(rng, dtype, rows, width + 3)[:, :width], normal(rng, FLOAT32, width)
    wanted = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    assert error(everywhere(lambda cpu: norm(cpu, x, None)), wanted) < ROUNDING[dtype]
    assert error(everywhere(lambda cpu: norm(cpu, x, weight)), wanted * weight) < ROUNDING[dtype]


def _activated(activation: int, g: Array, u: Array, limit: float) -> Array:
    """The definitions of ops.h in float64."""

    def sigmoid(z: Array) -> Array:
        return 1 / (1 + np.exp(-z))

    low, clipped = np.minimum(g, limit), np.clip(u, -limit, limit)
    if activation == lib.XD_SILU:
        return low * sigmoid(low) * clipped
    if activation == lib.XD_SWIGLU_OAI:
        return low * sigmoid(float(np.float32(1.702)) * low) * (clipped + 1)
    if activation == lib.XD_CLIPPED_SILU:
        return np.minimum(g * sigmoid(g), limit) * clipped
    if activation == lib.XD_GELU_TANH:
        return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    return np.maximum(g, 0) ** 2 * u


@by_dtype
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_activations_are_right(rng: np.random.Generator, dtype: int, activation: int, limit: float) -> None:
    both = narrowed(3 * rng.standard_normal((60, 2 * 237), np.float32), dtype)
    gate, up = both[:, :237], both[:, 237:]
    got = everywhere(lambda cpu: glu(cpu, activation, gate, up, limit=limit))
    wanted = _activated(activation, exact(gate), exact(up), limit or np.inf)
    assert error(got, wanted) < ROUNDING[dtype]
    ones = narrowed(np.ones((60, 237), np.float32), dtype)
    with opened() as cpu:
        assert same(glu(cpu, activation, gate, None), glu(cpu, activation, gate, ones))


def test_exp_is_right_from_end_to_end() -> None:
    """silu(g) for g far below zero is g exp(g): exp's error and two roundings."""
    g = np.linspace(-80, -20, 100_001, dtype=np.float32).reshape(1, -1)
    wanted = exact(g) / (1 + np.exp(-exact(g)))
    with opened() as cpu:
        relative = np.abs(exact(glu(cpu, lib.XD_SILU, g, None)) / wanted - 1)
    assert relative.max() < 2.5 * 2.0**-24 * 2


def test_activations_of_what_is_no_number() -> None:
    g = np.array([[np.nan, np.inf, 200, -200, 0]], np.float32)
    with opened() as cpu:
        got = glu(cpu, lib.XD_SILU, g, None)[0]
        assert np.isnan(glu(cpu, lib.XD_RELU2, g, None)[0, 0])
    assert np.isnan(got[0]) and list(got[1:]) == [np.inf, 200, 0, 0]


# Rotation.


@by_dtype
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    "width, dims, tokens, offsets",
    [(128, 128, 3, (0, 1_000_000, 77)), (64, 20, 2, (5,)), (10, 6, 1, (123_456,)), (40, 40, 70, (3, 4, 5))],
)
@pytest.mark.parametrize("by_base", [True, False])
def test_rotations_are_right(
    rng: np.random.Generator,
    dtype: int,
    traditional: bool,
    width: int,
    dims: int,
    tokens: int,
    offsets: tuple[int, ...],
    by_base: bool,
) -> None:
    x = normal(rng, dtype, 3, tokens, 5, width).transpose(0, 2, 1, 3)
    freqs = np.exp(rng.standard_normal(dims // 2) + 3).astype(np.float32)
    options: dict[str, Any] = {"base": 1e4} if by_base else {"freqs": freqs}
    options |= {"scale": 0.5, "traditional": traditional}
    got = everywhere(lambda cpu: rope(cpu, x, dims, np.array(offsets, np.int32), **options))

    inverse = 1e4 ** (-np.arange(dims // 2) * 2 / dims) if by_base else 1 / exact(freqs)
    positions = np.arange(tokens) + np.broadcast_to(np.array(offsets).reshape(-1, 1), (3, 1))
    angles = 0.5 * positions[:, None, :, None] * inverse
    half = dims // 2
    first = slice(0, dims, 2) if traditional else slice(half)
    second = slice(1, dims, 2) if traditional else slice(half, dims)
    wanted, a, b = exact(x), exact(x)[..., first], exact(x)[..., second]
    wanted[..., first] = a * np.cos(angles) - b * np.sin(angles)
    wanted[..., second] = a * np.sin(angles) + b * np.cos(angles)
    assert error(got, wanted) < ROUNDING[dtype]
    assert same(got[..., dims:], np.ascontiguousarray(x[..., dims:]))
    if dtype == FLOAT32:
        assert np.abs(got - wanted).max() < 1e-6


def test_rotation_by_nothing_and_far_out(rng: np.random.Generator) -> None:
    x = normal(rng, FLOAT32, 1, 2, 1, 8)
    offsets = np.array([2**31 - 1], np.int32)
    never = np.full(4, np.inf, np.float32)  # as mlx-lm says "do not rotate"
    with opened() as cpu:
        assert same(rope(cpu, x, 8, offsets, freqs=never), x)
        far = rope(cpu, x, 8, offsets, base=1e4)
    angles = float(offsets[0]) * 1e4 ** (-np.arange(4) / 4)
    wanted = exact(x)[..., :4] * np.cos(angles) - exact(x)[..., 4:] * np.sin(angles)
    assert np.abs(far[..., :4] - wanted).max() < 2e-6


# Attention.


def _attended(q: Array, k: Array, v: Array, scale: float, bias: Array, sinks: Array | None) -> Array:
    """In float64; a bias of -inf hides, and a query that sees nothing gets zeros."""
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(exact(k), repeats, 1), np.repeat(exact(v), repeats, 1)
    scores = np.einsum("bhqd,bhkd->bhqk", exact(q), k) * scale + bias
    sink = np.full((1, q.shape[1], 1, 1), -np.inf) if sinks is None else exact(sinks).reshape(1, -1, 1, 1)
    most = np.maximum(scores.max(-1, keepdims=True), sink)
    most = np.where(np.isfinite(most), most, 0)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True) + np.exp(sink - most)
    return np.einsum("bhqk,bhkd->bhqd", weights / np.where(total == 0, 1, total), v)


SHAPES = [  # batch, heads, kv heads, queries, keys, dim, value dim
    (1, 32, 4, 1, 256, 128, 128),
    (2, 6, 2, 1, 37, 20, 12),
    (1, 3, 3, 1, 1, 8, 8),
    (2, 8, 1, 7, 50, 64, 41),
    (1, 4, 2, 45, 90, 32, 24),
    (1, 5, 1, 40, 33, 16, 1),
    (1, 40, 1, 1, 130, 72, 64),
    (1, 8, 2, 1, 3000, 64, 64),
]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive"])
def test_attention_is_right(
    rng: np.random.Generator, dtype: int, shape: tuple[int, int, int, int, int, int, int], kind: str
) -> None:
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    q = normal(rng, dtype, batch, queries, heads, dim).transpose(0, 2, 1, 3)
    k = normal(rng, dtype, batch, kv_heads, keys + 9, dim)[:, :, :keys]  # as a cache gives them
    v = normal(rng, dtype, batch, kv_heads, keys + 9, value_dim)[:, :, :keys]
    sinks = normal(rng, dtype, heads) if heads % 4 == 0 else None
    mask: Array | str | None = None
    bias: Array = np.zeros((1, 1, queries, keys))
    if kind == "causal":
        mask = kind
        bias = np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0, -np.inf)
    elif kind == "boolean":
        mask = rng.random((batch, 1, queries, keys)) < 0.7
        mask[:, :, :, : keys // 4] = False
        mask[0, :, : queries // 2] = False
        bias = np.where(mask, 0, -np.inf)
    elif kind == "additive":
        numbers = rng.standard_normal((batch, heads, queries, keys), np.float32)
        mask = narrowed(np.where(rng.random(numbers.shape) < 0.2, -np.inf, numbers), dtype)
        bias = exact(mask)
    got = everywhere(lambda cpu: attention(cpu, q, k, v, dim**-0.5, mask, sinks))
    wanted = _attended(q, k, v, dim**-0.5, np.broadcast_to(bias, (batch, heads, queries, keys)), sinks)
    assert error(got, wanted) < ROUNDING[dtype]


@pytest.fixture
def prompt(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Queries, keys and values of 75 tokens: 6 heads on 2 kv heads. In float32, which hides no bit of a sum."""
    q = normal(rng, FLOAT32, 1, 6, 75, 24)
    return q, normal(rng, FLOAT32, 1, 2, 75, 24), normal(rng, FLOAT32, 1, 2, 75, 40)


@pytest.mark.parametrize("isa", isas())
def test_a_token_has_its_bits_in_any_chunk(prompt: tuple[Array, Array, Array], isa: str) -> None:
    q, k, v = prompt
    with opened(isa, 2) as cpu:
        whole = attention(cpu, q, k, v, 0.2, "causal")
        for chunk in (1, 3, 16, 40):
            for start in range(0, 75, chunk):
                end = min(start + chunk, 75)
                part = attention(cpu, q[:, :, start:end], k[:, :, :end], v[:, :, :end], 0.2, "causal")
                assert same(part, np.ascontiguousarray(whole[:, :, start:end]))


def test_a_window_is_what_a_short_cache_gives(prompt: tuple[Array, Array, Array]) -> None:
    """A mask as an array, with numbers below or within what is hidden, gives the bits of the visible keys alone."""
    q, k, v = prompt
    places = np.arange(75)
    window = (places <= places[:, None]) & (places > places[:, None] - 10)
    added = np.where(window, 0, np.finfo(np.float32).min).astype(np.float32)
    with opened() as cpu:
        by_array = attention(cpu, q, k, v, 0.2, window)
        assert same(attention(cpu, q, k, v, 0.2, added), by_array)
        for i in (0, 5, 30, 74):
            keys = slice(max(0, i - 9), i + 1)
            alone = attention(cpu, q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys], 0.2)
            assert same(alone, np.ascontiguousarray(by_array[:, :, i : i + 1]))


def test_a_batch_with_padding_gives_each_its_own(prompt: tuple[Array, Array, Array]) -> None:
    """Padding in front, and a hole in the middle, both of NaN: as if they were not there."""
    q, k, v = prompt
    seen = np.zeros((3, 1, 1, 100), np.bool_)
    seen[0, ..., 25:] = seen[1, ..., :75] = seen[2, ..., :30] = seen[2, ..., 55:] = True
    keys, values = (np.full((3, 2, 100, width), np.nan, np.float32) for width in (24, 40))
    for b in range(3):
        keys[b][:, seen[b, 0, 0]], values[b][:, seen[b, 0, 0]] = k[0], v[0]
    with opened() as cpu:
        alone = attention(cpu, q[:, :, 74:], k, v, 0.2)
        together = attention(cpu, np.repeat(q[:, :, 74:], 3, 0), keys, values, 0.2, seen)
    assert all(same(together[b], alone[0]) for b in range(3))


def test_many_threads_share_one_long_sequence(rng: np.random.Generator) -> None:
    """More threads than kv heads: keys and dimensions are divided, sums are not."""
    q, sinks = normal(rng, FLOAT16, 1, 10, 1, 40), normal(rng, FLOAT16, 10)
    k, v = normal(rng, FLOAT16, 1, 2, 5003, 40), normal(rng, FLOAT16, 1, 2, 5003, 72)
    seen = rng.random((1, 1, 1, 5003)) < 0.9
    for mask in (None, seen):
        wanted = _attended(
            q, k, v, 0.1, np.where(seen, 0, -np.inf) if mask is not None else np.zeros(1), sinks
        )
        assert error(everywhere(lambda cpu: attention(cpu, q, k, v, 0.1, mask, sinks)), wanted) < 1e-3  # noqa: B023


def test_a_query_that_sees_nothing_gets_zeros(prompt: tuple[Array, Array, Array]) -> None:
    q, k, v = prompt
    with opened() as cpu:
        assert not attention(cpu, q, k, v, 0.2, np.zeros((75, 75), np.bool_)).any()
        causal = attention(cpu, q, k[:, :, :70], v[:, :, :70], 0.2, "causal")  # more queries than keys
        assert not attention(cpu, q, k[:, :, :0], v[:, :, :0], 0.2).any()
    assert not causal[:, :, :5].any() and causal[:, :, 5:].any(axis=-1).all()


def test_a_nan_stays_in_its_rows(prompt: tuple[Array, Array, Array]) -> None:
    q, k, v = prompt
    q[0, 3, 40] = np.nan
    k[0, 1, 60] = np.nan
    with opened() as cpu:
        got = np.isnan(attention(cpu, q, k, v, 0.2, "causal")).any(-1)[0]
    wanted = np.zeros((6, 75), np.bool_)
    wanted[3, 40] = wanted[3:, 60:] = True
    assert (got == wanted).all()
