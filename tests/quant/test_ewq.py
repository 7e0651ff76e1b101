import math
import random
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expertd.quant.ewq import (
    PIECE,
    BlockScore,
    Entropy,
    EntropySum,
    Threshold,
    choose_bits,
    explain,
    find_threshold,
    mean_and_deviation,
    measure,
    score_blocks,
    share_told_by_size,
    z_scores,
)
from expertd.quant.modules import ModuleInfo
from expertd.quant.recipe import decide
from expertd.quant.settings import EwqForm, Settings
from tests.quant.shapes import DEEPSEEK_V3, entropy, modules_of, tiny_modules

Array = np.ndarray[Any, np.dtype[Any]]


def draw(*shape: int, seed: int = 0, deviation: float = 0.02, mean: float = 0.0) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(shape) * deviation + mean
    return numbers.astype(np.float32)


def brute_force(values: Array) -> tuple[float, float, float]:
    """D, H and H with eps = 0.01, by 40 decimal digits from the definition."""
    with localcontext() as context:
        context.prec = 40
        powers = [Decimal(float(v)).exp() for v in values.reshape(-1)]
        total = sum(powers)
        p = [power / total for power in powers]
        h = -sum((x * x.ln() for x in p), Decimal(0))
        h_eps = -sum((x * (x + Decimal("0.01")).ln() for x in p), Decimal(0))
        return float(Decimal(len(p)).ln() - h), float(h), float(h_eps)


# The entropy of one matrix.


@pytest.mark.parametrize(
    "values",
    [
        draw(20, 50),
        draw(20, 50, deviation=0.001),
        draw(20, 50, mean=0.3),
        draw(1000, deviation=3.0),
        draw(1000, deviation=0.02).astype(np.float16),
        np.array([5.0, -7.0, 0.0]),
        np.array([0.25]),
    ],
)
def test_equals_the_definition_in_decimals(values: Array) -> None:
    d, h, _ = brute_force(values)
    found = measure(values)
    assert found.deficit == pytest.approx(d, rel=1e-12, abs=1e-17)
    assert found.entropy == pytest.approx(h, rel=1e-14, abs=1e-15)
    assert found.num_weights == values.size


def test_epsilon_form_is_that_of_the_definition_to_first_order() -> None:
    values = draw(PIECE)
    assert brute_force(values[:100])[2] == pytest.approx(direct_eps(values[:100]), rel=1e-12)
    for size, tolerance in ((1_000, 2e-3), (10_000, 2e-5), (PIECE, 5e-7)):
        assert measure(values[:size]).entropy_eps == pytest.approx(direct_eps(values[:size]), rel=tolerance)


def direct_eps(values: Array) -> float:
    p = np.exp(values.astype(np.float64))
    p /= math.fsum(p)
    return -math.fsum(p * np.log(p + 0.01))


def test_normal_weights_have_half_their_variance() -> None:
    """Section 1.4's table: ln n - H = s^2 / 2 up to higher cumulants, where float32 keeps two digits."""
    values = draw(1 << 20)
    found = measure(values)
    assert found.deficit == pytest.approx(values.astype(np.float64).var() / 2, rel=2e-3)
    naive = np.exp(values) / np.exp(values).sum()
    assert abs(math.log(values.size) + float((naive * np.log(naive)).sum()) - found.deficit) > 1e-8


def test_direct_formula_in_float64() -> None:
    values = draw(3, PIECE + 17).astype(np.float64)
    p = np.exp(values) / math.fsum(np.exp(values).reshape(-1))
    terms = (p * np.log(p * values.size)).reshape(-1)
    assert measure(values).deficit == pytest.approx(math.fsum(terms), rel=1e-10)
    assert measure(values).sum_p2 == pytest.approx(math.fsum((p * p).reshape(-1)), rel=1e-12)


def chunks_of(values: Array, sizes: Callable[[], int]) -> Entropy:
    sums, start = EntropySum(), 0
    while start < values.size:
        size = sizes()
        sums.add(values[start : start + size])
        start += size
    return sums.result()


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, 3 * PIECE + 5, 200_000])
def test_any_chunking_gives_the_same_bits(size: int) -> None:
    values = draw(size)
    whole = measure(values)
    rng = random.Random(size)
    assert whole == chunks_of(values, lambda: 999)
    assert whole == chunks_of(values, lambda: PIECE)
    for _ in range(3):
        assert whole == chunks_of(values, lambda: rng.choice((0, 1, 7, 4096, PIECE, PIECE + 1, 150_000)))


@pytest.mark.parametrize("threads", [2, 3, 7, 100])
def test_any_thread_count_gives_the_same_bits(threads: int) -> None:
    for size in (1, PIECE, 5 * PIECE + 3):
        assert measure(draw(size), threads) == measure(draw(size))


def test_layout_and_alignment_do_not_matter() -> None:
    values = draw(300, 500)
    shifted = np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(np.float32)
    assert measure(values) == measure(shifted) == measure(np.asfortranarray(values))
    assert measure(values) == measure(values.astype(np.float64))
    assert measure(values) != measure(
        values.T
    )  # another order of the same numbers rounds differently, at 1e-20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, PIECE, 2 * PIECE - 1])
def test_not_a_number_is_refused(bad: float, place: int) -> None:
    values = draw(2 * PIECE)
    values[place] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure(values)


def test_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="no weights"):
        measure(np.empty(0))


def test_weights_beyond_exp_are_no_overflow() -> None:
    values = draw(1000)
    values[3] = 1e30
    found = measure(values)
    assert (found.deficit, found.sum_p2) == (pytest.approx(math.log(1000)), pytest.approx(1))
    values[3] = -1e30
    rest = np.delete(values, 3)
    assert measure(values).entropy == pytest.approx(measure(rest).entropy, abs=1e-12)


# From entropies to bits.


def block(layer: int, score: float, num_weights: int = 100) -> BlockScore:
    return BlockScore(layer, num_weights, score, 0, 0, score)


@pytest.mark.parametrize(
    ("score", "three", "two"),
    [(1.01, 16, 16), (1.0, 8, 16), (0.51, 8, 16), (0.5, 4, 4), (0.49, 4, 4)],
)
def test_rule_and_its_ties(score: float, three: int, two: int) -> None:
    threshold = Threshold(mu=1.0, sigma=0.5, low=0.5)
    assert choose_bits(score, threshold, (4, 8, 16)) == three
    assert choose_bits(score, threshold, (4, 16)) == two
    assert choose_bits(score, threshold, (6,)) == 6


def test_threshold_is_of_the_population() -> None:
    found = find_threshold([block(0, 1.0), block(1, 2.0), block(2, 6.0)], x=0.5)
    assert (found.mu, found.sigma) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    assert found.low == pytest.approx(found.mu - 0.5 * found.sigma, abs=1e-12)


@pytest.mark.parametrize("num_blocks", [1, 3, 10])
def test_blocks_that_do_not_differ_get_the_lowest_level(num_blocks: int) -> None:
    scores = [block(i, 0.1) for i in range(num_blocks)]  # 0.1 * 3 / 3 is not 0.1 in floating point
    threshold = find_threshold(scores, 1.0)
    assert [choose_bits(s.score, threshold, (4, 8, 16)) for s in scores] == [4] * num_blocks
    assert "the same" in explain(scores[0], threshold, 4)


def test_mean_and_deviation_do_not_depend_on_the_order() -> None:
    values = [random.Random(1).gauss(0, 1e-5) + 17 for _ in range(100)]
    assert mean_and_deviation(values) == mean_and_deviation(sorted(values))
    assert mean_and_deviation(values) == pytest.approx((np.mean(values), np.std(values)))
    assert mean_and_deviation([0.1] * 3) == (0.1, 0.0)


def matrix(layer: int, role: str, *shape: int) -> ModuleInfo:
    return ModuleInfo(f"layers.{layer}.{role}", "trunk", layer, role, shape)


def test_only_the_same_role_and_shape_is_compared() -> None:
    trunk = [matrix(i, "q", 64, 64) for i in range(3)] + [matrix(3, "q", 128, 64), matrix(0, "k", 64, 64)]
    deficits = [1e-4, 2e-4, 3e-4, 9e-4, 5e-4]
    z = z_scores(trunk, {m.path: Entropy(m.num_weights, d, 0) for m, d in zip(trunk, deficits, strict=True)})
    assert list(z.values()) == pytest.approx([1.5**0.5, 0, -(1.5**0.5), 0, 0])
    assert z["layers.3.q"] == z["layers.0.k"] == 0.0


def plant(modules: list[ModuleInfo], seed: int) -> dict[str, Array]:
    """Trunk weights whose standard deviations differ."""
    rng = random.Random(seed)
    return {
        m.path: draw(*m.shape, seed=rng.randrange(1 << 30), deviation=0.02 * rng.lognormvariate(0, 0.3))
        for m in modules
        if m.kind == "trunk"
    }


def brute_decision(
    modules: list[ModuleInfo], weights: dict[str, Array], form: EwqForm, x: float
) -> dict[int, int]:
    """The rule again from scratch, in plain float64."""
    h: dict[str, float] = {}
    for path, values in weights.items():
        p = np.exp(values.astype(np.float64))
        p /= p.sum()
        h[path] = float(-(p * np.log(p)).sum())
    trunk = [m for m in modules if m.path in weights]
    value = dict(h)
    if form == "normalized":
        for m in trunk:
            peers = [h[o.path] for o in trunk if (o.role, o.shape) == (m.role, m.shape)]
            spread = float(np.std(peers))
            value[m.path] = (h[m.path] - float(np.mean(peers))) / spread if len(peers) > 1 else 0.0
    layers = sorted({m.layer for m in trunk if m.layer is not None})
    score = np.array(
        [
            np.average(
                [value[m.path] for m in trunk if m.layer == i],
                weights=[m.num_weights for m in trunk if m.layer == i],
            )
            for i in layers
        ]
    ).round(9 if form == "paper" else 6)  # this float64 is naive
    mu, sigma = score.mean(), score.std()
    return {i: 16 if s > mu else 8 if s > mu - x * sigma else 4 for i, s in zip(layers, score, strict=True)}


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("form", ["normalized", "paper"])
def test_decisions_equal_brute_force(family: str, form: EwqForm, tmp_path: Path) -> None:
    modules = tiny_modules(tmp_path, family)
    seen = set()
    for seed in range(6):
        weights, rng = plant(modules, seed), random.Random(seed)
        wanted = brute_decision(modules, weights, form, 0.8)
        found = {p: chunks_of(w.reshape(-1), partial(rng.randint, 1, 5000)) for p, w in weights.items()}
        shuffled = dict(rng.sample(sorted(found.items()), len(found)))
        order = rng.sample(modules, len(modules))
        plan = decide(order, shuffled, Settings(trunk=(4, 8, 16), ewq=form, ewq_x=0.8))
        assert plan.allocation.blocks == wanted
        seen |= set(wanted.values())
    assert len(seen) > 1


def test_rounding_tells_no_blocks_apart() -> None:
    """Two blocks, two matrices of one size: each is the lower one once, so both score 0; and of two unlike
    blocks the lower lies at T = mu - sigma."""
    modules = [matrix(i, role, 64, 64) for i in range(2) for role in "qk"]
    for a, b in ((1.1e-4, 1.7e-4), (3.3e-4, 1.3e-5), (0.1, 0.7)):
        deficits = {"layers.0.q": a, "layers.0.k": b, "layers.1.q": b, "layers.1.k": a}
        plan = decide(modules, {p: Entropy(4096, d, 0) for p, d in deficits.items()}, Settings())
        assert plan.allocation.blocks == {0: 4, 1: 4}
        deficits |= {"layers.0.k": a, "layers.1.k": b}
        plan = decide(modules, {p: Entropy(4096, d, 0) for p, d in deficits.items()}, Settings())
        assert sorted(plan.allocation.blocks.values()) == [4, 16]


def test_order_of_modules_does_not_change_a_bit(tmp_path: Path) -> None:
    modules = tiny_modules(tmp_path, "deepseek_v3")
    weights = plant(modules, 0)
    entropies = {path: measure(values) for path, values in weights.items()}
    for form in ("normalized", "paper"):
        forwards = score_blocks(modules, entropies, form)
        assert forwards == score_blocks(modules[::-1], dict(reversed(entropies.items())), form)


@pytest.fixture(scope="module")
def large() -> list[ModuleInfo]:
    return modules_of(DEEPSEEK_V3)


def planted_large(modules: list[ModuleInfo]) -> dict[str, Entropy]:
    """Standard deviations of 0.02, spread by 15 %; layers 20, 40 and 60 have wider weights."""
    rng = random.Random(4)
    wide = {20: 1.6, 40: 1.5, 60: 1.7}
    return {
        m.path: entropy(m.num_weights, 0.02 * rng.lognormvariate(0, 0.15) * wide.get(m.layer or 0, 1))
        for m in modules
        if m.kind == "trunk"
    }


def test_forms_differ_on_deepseek_v3(large: list[ModuleInfo]) -> None:
    """3 dense layers and 58 with experts: the paper's form sees shapes, the normalized one sees weights."""
    entropies = planted_large(large)
    paper = decide(large, entropies, Settings(trunk=(4, 8, 16), ewq="paper"))
    assert paper.allocation.blocks == {i: 16 if i < 3 else 8 for i in range(61)}
    (warning,) = paper.warnings
    assert warning.startswith("ewq paper: 100.0% of the variance")
    normalized = decide(large, entropies, Settings(trunk=(4, 8, 16)))
    assert normalized.warnings == []
    levels = normalized.allocation.blocks
    assert {20, 40, 60} <= {i for i, bits in levels.items() if bits == 4}
    assert {bits for i, bits in levels.items() if i >= 3} == {4, 8, 16}
    scores = score_blocks(large, entropies, "normalized")
    assert sorted(scores, key=lambda s: s.score)[0].layer in (20, 40, 60)


def test_no_warning_where_shapes_are_alike() -> None:
    modules = [matrix(i, "q", 64, 64) for i in range(8)]
    entropies = {m.path: entropy(4096, 0.02 + i / 1000) for i, m in enumerate(modules)}
    assert share_told_by_size(score_blocks(modules, entropies, "paper")) == pytest.approx(0, abs=1e-9)
    assert decide(modules, entropies, Settings(ewq="paper")).warnings == []
    alike = {m.path: entropy(4096, 0.02) for m in modules}
    assert share_told_by_size(score_blocks(modules, alike, "paper")) == 0


def test_bfloat16_comes_as_float32() -> None:
    values = mx.array(draw(64, 64)).astype(mx.bfloat16)
    assert measure(np.array(values.astype(mx.float32))).deficit == pytest.approx(2e-4, rel=0.1)
