"""Cutting rows among ranks, and the choice of a step's split."""

import random

import pytest

from expertd.split.cut import StepSplit, choose, cut


def random_fractions(rng: random.Random) -> list[float]:
    """Fractions of 1 to 4 ranks, now and then of nothing, scaled as GroupConfig does it."""
    shares = [rng.choice([0.0, 1.0, rng.random(), rng.random() ** 8]) for _ in range(rng.randint(1, 4))]
    shares[rng.randrange(len(shares))] += 0.01
    return [s / sum(shares) for s in shares]


@pytest.mark.parametrize("seed", range(20))
def test_cut_properties(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        fractions = random_fractions(rng)
        count = rng.choice([0, 1, 2, rng.randrange(100), rng.randrange(10**6)])
        counts = cut(count, fractions)
        assert len(counts) == len(fractions)
        assert sum(counts) == count
        assert min(counts) >= 0
        assert all(abs(n - count * f) <= 1 + 1e-6 for n, f in zip(counts, fractions, strict=True))
        assert all(n == 0 for n, f in zip(counts, fractions, strict=True) if f == 0)
        assert cut(count, list(fractions)) == counts


@pytest.mark.parametrize(
    "count, fractions, expected",
    [
        (8, (1.0,), [8]),
        (8, (0.5, 0.5), [4, 4]),
        (1, (0.7, 0.3), [1, 0]),
        (1, (0.3, 0.7), [0, 1]),
        (10, (0.0, 1.0), [0, 10]),
        (10, (1.0, 0.0), [10, 0]),
        (2, (0.25, 0.25, 0.25, 0.25), [1, 0, 1, 0]),
        (7, (1 / 3, 1 / 3, 1 / 3), [2, 3, 2]),
        (100, (0.33, 0.33, 0.33), [33, 33, 34]),  # the last rank takes what rounding left
    ],
)
def test_cut_examples(count: int, fractions: tuple[float, ...], expected: list[int]) -> None:
    assert cut(count, fractions) == expected


ALL = ("solo", "experts", "tokens")
HALVES = (0.5, 0.5)


@pytest.mark.parametrize(
    "wanted, num_tokens, supported, fractions, expected",
    [
        ("auto", 1, ALL, (1.0,), "solo"),
        ("experts", 512, ALL, (1.0,), "solo"),  # nobody to share with
        ("auto", 1, ALL, HALVES, "experts"),
        ("auto", 2, ALL, HALVES, "tokens"),
        ("auto", 512, ALL, HALVES, "tokens"),
        ("auto", 512, ("solo", "experts"), HALVES, "experts"),
        ("auto", 1, ("solo", "tokens"), HALVES, "tokens"),
        ("auto", 1, ("solo",), HALVES, "solo"),
        ("auto", 512, ("solo",), HALVES, "solo"),
        ("solo", 512, ALL, HALVES, "solo"),
        ("experts", 512, ALL, HALVES, "experts"),
        ("tokens", 1, ALL, HALVES, "tokens"),
    ],
)
def test_choose(
    wanted: str, num_tokens: int, supported: tuple[str, ...], fractions: tuple[float, ...], expected: str
) -> None:
    assert choose(wanted, num_tokens, supported, fractions) == StepSplit(expected, fractions)
