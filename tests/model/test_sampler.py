"""The sampler: greedy, reproducible, exactly the nucleus, and the right distribution."""

import math
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from expertd.model.sampler import sample

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
ORDER = [3, 0, 4, 1, 2]  # token ORDER[i] has probability PROBS[i]
LOGITS = mx.array([math.log(PROBS[ORDER.index(token)]) + 2 for token in range(5)])


def draws(count: int, temperature: float = 1.0, top_p: float = 1.0) -> Counter[int]:
    return Counter(sample(LOGITS, temperature, top_p, seed=11, position=i) for i in range(count))


def test_temperature_zero_takes_the_largest() -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        logits = rng.standard_normal(50).astype(np.float32)
        assert sample(mx.array(logits), 0, 0.5, seed=i, position=i) == int(logits.argmax())


def test_seed_and_position_decide_alone() -> None:
    logits = mx.zeros(1000)

    def text(seed: int) -> list[int]:
        return [sample(logits, 1.0, 1.0, seed, position) for position in range(20)]

    first = text(5)
    mx.random.uniform(shape=(10,))  # what others draw changes nothing
    assert text(5) == first
    assert text(6) != first
    assert len(set(first)) > 10


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 - 1, -(2**63)])
def test_any_seed_is_accepted(seed: int) -> None:
    assert 0 <= sample(LOGITS, 1.0, 0.9, seed, position=10**6) < 5


@pytest.mark.parametrize(
    "top_p, size", [(1e-6, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.84, 3), (0.86, 4), (0.99, 5)]
)
def test_top_p_keeps_exactly_the_nucleus(top_p: float, size: int) -> None:
    assert set(draws(100, top_p=top_p)) == set(ORDER[:size])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.5, 0.8)])
def test_distribution(temperature: float, top_p: float) -> None:
    """A chi-square test at 0.1 %, with fixed seeds."""
    weights = [p ** (1 / temperature) for p in PROBS]
    probs = [w / sum(weights) for w in weights]
    kept = next(n for n in range(1, 6) if sum(probs[:n]) >= top_p - 1e-9)
    count, mass = 1000, sum(probs[:kept])
    found = draws(count, temperature, top_p)
    assert set(found) <= set(ORDER[:kept])
    expected = {ORDER[i]: count * probs[i] / mass for i in range(kept)}
    chi_square = sum((found[token] - n) ** 2 / n for token, n in expected.items())
    assert chi_square < {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47}[kept]
