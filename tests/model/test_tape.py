"""Recorded graphs, built again: the arrays of MLX's nodes and of ours, bit for bit (native/replay.cpp, segment.cpp)."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expertd.model.kernels import Kernels
from expertd.native import _graph
from expertd.native._graph import placeholder
from tests.model.test_replay import same


def test_a_tape_gives_what_was_recorded() -> None:
    """Shared parts, several outputs of one operation, stages, constants, and outputs that are inputs."""
    weight = mx.random.normal((4, 4))
    mx.eval(weight)

    def first(x: mx.array) -> list[mx.array]:
        halves: Any = mx.split(x @ weight, 2, axis=1)
        return [halves[1] + 1, halves[0] * halves[1], x]

    def second(x: mx.array, parts: list[mx.array], y: mx.array) -> list[mx.array]:
        return [mx.exp(y) + parts[0] + mx.arange(2), weight, parts[1].sum() + x]

    x, y = placeholder([3, 4], mx.float32), placeholder([3, 2], mx.float32)
    parts = first(x)
    tape = _graph.Tape([([x], parts), ([y], second(x, parts, y))])
    for _ in range(3):
        given, other = mx.random.normal((3, 4)), mx.random.normal((3, 2))
        step = _graph.Replay(tape)
        found = step.next([given])
        assert same(found, first(given))
        assert same(step.next([other]), second(given, first(given), other))
    with pytest.raises(ValueError, match="no stage is left"):
        step.next([])


# Nodes that follow each other are one node (native/segment.cpp), whose arrays lie where they lay (native/settled.cpp).

FEW, MANY = 4, 600  # rows of 64 numbers: arrays that settle, and arrays that are worth no copy


def random_operations(kernels: Kernels, rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Functions of two bfloat16 arrays [n, 64], with what a decode step has: our kernels', MLX's, and views that need a
    copy later or none."""
    weight = mx.array(rng.normal(size=(64, 64)) / 8).astype(mx.bfloat16)
    scale = mx.array(rng.normal(size=64)).astype(mx.bfloat16)
    mx.eval(weight, scale)

    def route(a: mx.array, b: mx.array) -> mx.array:
        """As a router does, with ties."""
        scores = mx.softmax(mx.round(2 * a), axis=-1, precise=True)
        ids = mx.stop_gradient(mx.argpartition(scores, kth=-8, axis=-1)[..., -8:])
        chosen = mx.take_along_axis(scores, ids, axis=-1)
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
        rows = mx.take(weight, ids, axis=0)
        return (rows * chosen[..., None]).sum(axis=-2) + b

    def halves(a: mx.array, b: mx.array) -> mx.array:
        first, _, last = mx.split(a, [8, 32], axis=1)
        return mx.concatenate([last, b[:, 8:32], first], axis=1)

    return {
        "norm": lambda a, b: kernels.rms_norm(a, scale, 1e-6) + b,
        "glu": lambda a, b: kernels.glu(a, b, "silu"),
        "product": lambda a, b: kernels.plain_product(a, weight),
        "turned": lambda a, b: kernels.rms_norm(a.T.reshape(n, 64), None, 1e-6),
        "heads": lambda a, b: kernels.plain_product(a.reshape(n, 4, 16).transpose(1, 0, 2).reshape(n, 64), weight),
        "backwards": lambda a, b: kernels.glu(a[:, ::-1], b, "gelu_tanh"),
        "add": lambda a, b: a + b,
        "scaled": lambda a, b: a * 0.5 - b,
        "weighed": lambda a, b: a * mx.sigmoid(b[:, :1]) / (mx.abs(b) + 1),
        "mean": lambda a, b: a + b.sum(axis=0, keepdims=True) / n,
        "halves": halves,
        "route": route,
    }  # fmt: skip


def random_stages(kernels: Kernels, seed: int, n: int = FEW) -> list[Any]:
    """Functions from arrays [n, 64] to some that they computed: of 10 to 100 operations, many needed more than once."""
    rng = np.random.default_rng(seed)
    operations = list(random_operations(kernels, rng, n).values())
    plan = [
        [(operations[i], rng.integers(2**30, size=2)) for i in rng.integers(len(operations), size=count)]
        for count in rng.integers(10, 100, size=2)
    ]
    wanted = rng.integers(2**30, size=(2, 3))

    def stage(number: int, pool: list[mx.array]) -> list[mx.array]:
        for operation, places in plan[number]:
            # Half of the inputs are recent, so that there are chains whose memory is used again.
            a, b = (pool[-1 - p // 2 % min(3 if p % 2 else 99, len(pool))] for p in places)
            pool.append(operation(a, b))
        return [pool[place % len(pool)] for place in wanted[number]] + pool[-1:]

    return [functools.partial(stage, number) for number in range(2)]


def random_tape(kernels: Kernels, seed: int, n: int) -> tuple[Any, Any]:
    """A tape of two stages, and the function of two arrays that it was recorded from."""
    first, second = random_stages(kernels, seed, n)

    def alone(x: mx.array, y: mx.array) -> list[mx.array]:
        pool = [x]
        return [*first(pool), *second([*pool, y])]

    x, y = (placeholder([n, 64], mx.bfloat16) for _ in range(2))
    pool = [x]
    parts = first(pool)
    return _graph.Tape([([x], parts), ([y], second([*pool, y]))]), alone


def laid(a: mx.array, how: int) -> mx.array:
    """The same numbers, dense, or rows apart, or columns one after the other."""
    if how == 0:
        return a
    return mx.concatenate([a, a], axis=1)[:, :64] if how == 1 else mx.contiguous(a.T).T


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize("seed", range(12))
def test_merged_nodes_compute_what_they_do_alone(seed: int, n: int) -> None:
    """Steps of two tapes in turn, whose arrays lie in the same memory; what they are given may lie otherwise each time,
    and what they gave stays what it is."""
    rng = np.random.default_rng(seed)
    kernels = Kernels("", 1, 8)
    tapes = [random_tape(kernels, seed + 100 * i, n) for i in range(2)]
    found, wanted = [], []
    for how in (0, 0, 1, 2, 0):
        for tape, alone in tapes:
            given = [mx.array(rng.normal(size=(n, 64))).astype(mx.bfloat16) for _ in range(2)]
            mx.eval(given)
            step = _graph.Replay(tape)
            found += [*step.next([laid(given[0], how)]), *step.next([laid(given[1], how)])]
            del step
            mx.async_eval(found)
            wanted += alone(*given)
    assert same(found, wanted)
    assert not any(mx.isnan(a).any().item() for a in found)


def test_what_is_given_and_wanted_lies_as_it_did() -> None:
    """MLX's products round otherwise where their factors lie otherwise."""
    rng = np.random.default_rng(3)
    x, y, z = (placeholder(shape, mx.float32) for shape in ([65, 127], [65, 127], [33, 127]))
    tape = _graph.Tape([([x, y], [(x + y).T, x.T - y.T]), ([z], [z @ (x + y).T])])
    for how in (0, 2, 1, 0, 2):
        given = [
            mx.array(rng.normal(size=size).astype(np.float32)) for size in ((65, 127), (65, 127), (33, 127))
        ]
        laid = [mx.contiguous(a.T).T if how == 2 else a for a in given]
        mx.eval(laid)
        step = _graph.Replay(tape)
        found = [*step.next(laid[:2]), *step.next(laid[2:])]
        turned = (laid[0] + laid[1]).T
        wanted = [turned, laid[0].T - laid[1].T, laid[2] @ turned]
        assert same(found, wanted)
        assert [np.asarray(a).strides for a in found] == [np.asarray(a).strides for a in wanted]


ODD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    3.0,
    1e-40,
    -1e-40,
    6e-5,
    65504.0,
    3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
]
TWINS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "weigh": lambda a, b: a * b[:, :1],
    "weigh all": lambda a, b: a[:1] / b[:, :1],
    "turned": lambda a, b: a.T + b.T,
    "sum of rows": lambda a, b: a.sum(axis=-1, keepdims=True),
    "sum of columns": lambda a, b: (a * b).sum(axis=0),
    "sum in between": lambda a, b: mx.stack([a, b, b, a, a]).sum(axis=1),
    "gather": lambda a, b: mx.take_along_axis(
        a, mx.argpartition(mx.abs(b), kth=-5, axis=-1)[:, -5:], axis=-1
    ),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_bits_of_mlx(name: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(7)
    for rows, width in ((1, 1), (1, 7), (3, 300), (13, 13)):
        x, y = (placeholder([rows, width], dtype) for _ in range(2))
        if name == "gather" and width < 5:
            continue
        operation = TWINS[name]
        tape = _graph.Tape([([x, y], [operation(x, y) + 0])])
        numbers = [rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-3, 3) for _ in range(2)]
        pairs = [[mx.array(a).astype(dtype) for a in numbers]]
        if rows == width == len(ODD) and name != "gather":
            pairs.append([mx.array([ODD] * width).astype(dtype), mx.array([ODD] * width).T.astype(dtype)])
        for given in pairs:
            mx.eval(given)
            found, wanted = _graph.Replay(tape).next(given)[0], operation(*given) + 0
            odd = mx.isnan(wanted)
            assert mx.array_equal(mx.isnan(found), odd).item()
            bits = mx.uint32 if dtype == mx.float32 else mx.uint16
            assert mx.all((found.view(bits) == wanted.view(bits)) | odd).item(), (rows, width)


def test_a_stage_is_one_node() -> None:
    """As far as it is computed by one stream of the CPU, and not too long."""
    other, x = mx.new_stream(mx.cpu), placeholder([4], mx.float32)

    def chain(*streams: Any) -> mx.array:
        y = x
        for stream in streams:
            y = mx.add(y, y, stream=stream)
        return y

    for streams, num_nodes in (
        ([mx.cpu], 1), ([mx.cpu] * 64, 1), ([mx.cpu] * 65, 2), ([mx.cpu] * 3 + [other] * 2 + [mx.cpu], 3),
    ):  # fmt: skip
        tape = _graph.Tape([([x], [chain(*streams)])])
        assert tape.num_nodes == num_nodes
        (found,) = _graph.Replay(tape).next([mx.full(4, 2.0**-40)])
        assert found.tolist() == [2.0 ** (len(streams) - 40)] * 4


def test_memory_of_a_stage_is_let_go() -> None:
    """What it needs in between is free afterwards; what it gives, and what it was given, stays what it is."""
    x = placeholder([1 << 16], mx.float32)
    tape, given = _graph.Tape([([x], [(x.reshape(2, -1).T.reshape(-1) + x) * 2])]), mx.ones(1 << 16)
    mx.eval(given)
    mx.synchronize()
    before = mx.get_active_memory()
    (found,) = _graph.Replay(tape).next([given])
    mx.eval(found)
    mx.synchronize()
    # malloc may have given a little more than it was asked for.
    assert mx.get_active_memory() - before == pytest.approx(found.nbytes, rel=0.1)
    assert given.tolist() == [1] * (1 << 16) and found.tolist() == [4] * (1 << 16)


def test_memory_is_nobody_elses_before_it_was_read() -> None:
    """The thread that builds the tasks is ahead of the one that does them: here by three large products."""
    weight, x = mx.full((512, 512), 2.0**-9), placeholder([512, 512], mx.float32)
    mx.eval(weight)
    slow, between = x @ weight @ weight @ weight, x + 1
    tape = _graph.Tape([([x], [slow + between.sum(axis=0)])])
    given = mx.ones((512, 512))
    mx.eval(given)
    (found,) = _graph.Replay(tape).next([given])
    mx.async_eval(found)
    others = [mx.array(np.full((512, 512), 7, np.float32)) for _ in range(8)]
    mx.eval(found)
    assert mx.all(found == 1025).item() and all(mx.all(each == 7).item() for each in others)


def test_wrong_tapes_are_refused() -> None:
    x, y = placeholder([3], mx.float32), placeholder([3], mx.float32)
    for stages, message in (
        ([([x], [x + y])], "a placeholder is needed before it is given"),
        ([([x], [x + y]), ([y], [y])], "a placeholder is needed before it is given"),
        ([([mx.ones(3)], [x])], "what a stage is given must be placeholders"),
        ([([x], [x + mx.random.normal((3,))])], "random numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            _graph.Tape(stages)
    tape = _graph.Tape([([x], [x + 1])])
    for given, message in (
        ([], "too few or too many"),
        ([mx.ones(3)] * 2, "too few or too many"),
        ([mx.ones(4)], "another shape or type"),
        ([mx.ones(3, mx.float16)], "another shape or type"),
    ):
        with pytest.raises(ValueError, match=message):
            _graph.Replay(tape).next(given)
    with pytest.raises(RuntimeError, match="without a primitive"):
        mx.eval(x + 1)
