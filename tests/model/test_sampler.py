"""The sampler against a slow twin in plain Python, the right distribution, and what a choice depends on."""

import math
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from expertd.model.sampler import LEAST_LOGPROB, Row, Sampler, logprobs, uniform
from expertd.sampling import Sampling

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
ORDER = [3, 0, 4, 1, 2]  # token ORDER[i] has probability PROBS[i]
LOGITS: Row = np.array([math.log(PROBS[ORDER.index(token)]) + 2 for token in range(5)], dtype=np.float32)
VOCAB = 600  # a running sum of three blocks, the last one short
REAL_VOCAB = 152_064
NUM_TOKENS = 80


def random_row(seed: int, vocab: int = VOCAB) -> Row:
    return (np.random.default_rng(seed).standard_normal(vocab) * 3).astype(np.float32)


def repeating_row(position: int) -> Row:
    """The same logits come again and again, and their tokens' penalties grow; every other time most are negative."""
    return random_row(position % 24) - np.float32(8 * (position % 2))


# The slow twin: the formulas of expertd.sampling, one token after the other, in float64.


def twin_logits(row: Row, s: Sampling, prompt: list[int], answer: list[int], banned: set[int]) -> list[float]:
    logits = [float(x) for x in row]
    for token_id, bias in s.logit_bias:
        logits[token_id] += bias
    for token_id in set(prompt) | set(answer):
        x = logits[token_id]
        x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        x -= s.frequency_penalty * answer.count(token_id)
        x -= s.presence_penalty if token_id in answer else 0
        logits[token_id] = x
    return [-math.inf if i in banned else x for i, x in enumerate(logits)]


def twin_weights(logits: list[float], s: Sampling) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities times something, by id."""
    weights = [math.exp((x - max(logits)) / s.temperature) for x in logits]
    kept = sorted((i for i in range(len(weights)) if weights[i] >= s.min_p), key=lambda i: -weights[i])
    kept = kept[: s.top_k or None]
    wanted, mass, num = s.top_p * math.fsum(weights[i] for i in kept), 0.0, 0
    while s.top_p < 1 and mass < wanted:
        mass, num = mass + weights[kept[num]], num + 1
    return {i: weights[i] for i in sorted(kept[: num or None]) if weights[i] > 0}


def twin_draw(weights: dict[int, float], share: float) -> int:
    total, mass = sum(weights.values()), 0.0
    for token_id, weight in weights.items():
        mass += weight
        if mass > share * total:
            return token_id
    raise AssertionError("no token")


def twin_choice(row: Row, s: Sampling, prompt: list[int], answer: list[int], banned: set[int]) -> int:
    logits = twin_logits(row, s, prompt, answer, banned)
    if s.greedy:
        return logits.index(max(logits))
    return twin_draw(twin_weights(logits, s), uniform(s.seed or 0, len(answer)))


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.2, "top_k": 7},
    "min_p": {"temperature": 1.5, "min_p": 0.08},
    "top_p": {"temperature": 1.3, "top_p": 0.85},
    "truncated thrice": {"temperature": 1.8, "top_k": 30, "min_p": 0.1, "top_p": 0.9},
    "logit_bias": {"temperature": 1.0, "logit_bias": ((3, 9.5), (599, 11), (4, -100.0))},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.7},
    "repetition wanted": {"temperature": 1.0, "repetition_penalty": 0.5, "top_k": 50},
    "presence": {"temperature": 1.0, "presence_penalty": 2.0},
    "frequency": {"temperature": 0.8, "frequency_penalty": -1.5},
    "greedy, repetition": {"repetition_penalty": 1.5},
    "greedy, frequency": {"frequency_penalty": 1.5},
    "greedy, presence": {"presence_penalty": 2.0},
    "all": {
        "temperature": 0.9,
        "top_k": 6,
        "min_p": 0.2,
        "top_p": 0.9,
        "logit_bias": ((7, 6.0), (8, -3.5)),
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_against_the_slow_twin(name: str) -> None:
    """A text, the first 20 of which may not be one of three."""
    sampling, prompt, banned = Sampling(seed=17, **SETTINGS[name]), [5, 9, 9, 301, 7], {2, 300, 599}
    sampler = Sampler(sampling, 17, prompt, banned)
    answer: list[int] = []
    for position in range(NUM_TOKENS):
        row = repeating_row(position)
        found = sampler.choose(row, position, may_end=position >= 20)
        assert found == twin_choice(row, sampling, prompt, answer, banned if position < 20 else set())
        answer.append(found)
        sampler.add(found)
    assert len(set(answer)) > 5


def text_of(sampling: Sampling) -> list[int]:
    sampler, answer = Sampler(sampling, 17, [5, 9, 9, 301, 7]), []
    for position in range(NUM_TOKENS):
        answer.append(sampler.choose(repeating_row(position), position))
        sampler.add(answer[-1])
    return answer


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_changes_the_text(name: str) -> None:
    """So the test above would notice one that does nothing."""
    whole = Sampling(**SETTINGS[name])
    for field in fields(Sampling):
        if field.name in SETTINGS[name]:
            assert text_of(replace(whole, **{field.name: field.default})) != text_of(whole), field.name


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {"top_p": 0.999999}]
)
def test_a_real_vocabulary_against_numpy(options: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.0, seed=3, **options)
    row = random_row(1, REAL_VOCAB)
    weights = np.exp((row - row.max()).astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    order = order[weights[order] >= sampling.min_p][: sampling.top_k or None]
    sums = weights[order].cumsum()
    num = len(order) if sampling.top_p == 1 else int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
    ids = np.sort(order[:num])
    sums = weights[ids].cumsum()
    for position in range(50):
        wanted = ids[np.searchsorted(sums, uniform(3, position) * sums[-1], side="right")]
        assert Sampler(sampling, 3).choose(row, position) == wanted


def draws(count: int, **options: Any) -> Counter[int]:
    sampler = Sampler(Sampling(**{"temperature": 1.0, **options}), seed=11)
    return Counter(sampler.choose(LOGITS, position) for position in range(count))


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
    found = draws(count, temperature=temperature, top_p=top_p)
    assert set(found) <= set(ORDER[:kept])
    expected = {ORDER[i]: count * probs[i] / mass for i in range(kept)}
    chi_square = sum((found[token] - n) ** 2 / n for token, n in expected.items())
    assert chi_square < {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47}[kept]


def test_of_equal_tokens_the_first_ones_remain() -> None:
    row = np.zeros(1000, dtype=np.float32)
    for options, ids in (
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.004}, {0, 1, 2, 3}),
        ({"top_p": 1e-20}, {0}),
    ):
        sampler = Sampler(Sampling(temperature=1.0, **options), seed=0)
        assert {sampler.choose(row, position) for position in range(200)} == ids
    assert Sampler(Sampling(), 0).choose(row, 0) == 0
    assert [i for i, _ in logprobs(row, 0, 3)[1]] == [0, 1, 2]


def test_what_has_no_weight_is_never_drawn() -> None:
    row = np.full(1000, -1e9, dtype=np.float32)
    row[[255, 256, 700]] = 0.0
    sampler = Sampler(Sampling(temperature=2.0), seed=0)
    assert {sampler.choose(row, position) for position in range(300)} == {255, 256, 700}


def test_seed_and_position_decide_alone() -> None:
    row = np.zeros(1000, dtype=np.float32)

    def text(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), seed)
        return [sampler.choose(row, position) for position in range(20)]

    first = text(5)
    np.random.default_rng().random(10)  # what others draw changes nothing
    assert text(5) == first
    assert text(6) != first
    assert len(set(first)) > 10
    # Recorded: a seed must mean the same on every machine and in every version.
    assert [uniform(5, 0), uniform(5, 1), uniform(-1, 10**6)] == RECORDED
    assert uniform(-1, 3) == uniform(2**64 - 1, 3) != uniform(1, 3)


RECORDED = [0.5241395379957329, 0.3344966361339442, 0.9198683481359026]


def test_the_numbers_are_even() -> None:
    counts = np.histogram([uniform(s, p) for s in range(100) for p in range(100)], bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 19 degrees of freedom, 0.1 %


def test_a_row_is_not_written_to() -> None:
    row = random_row(0)
    row.flags.writeable = False
    for options in SETTINGS.values():
        Sampler(Sampling(**options), 1, [1, 2], {3}).choose(row, 0, may_end=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}]
)
def test_a_broken_row_gives_some_token(value: float, options: dict[str, Any]) -> None:
    row = np.full(300, value, dtype=np.float32)
    assert 0 <= Sampler(Sampling(**options), 1).choose(row, 0) < 300


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_of_the_raw_logits(num_top: int) -> None:
    row = random_row(4, REAL_VOCAB)
    exact = row.astype(np.float64)
    exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    found, top = logprobs(row, 77, num_top)
    assert found == pytest.approx(exact[77], abs=1e-5)
    order = np.argsort(-row, kind="stable")[:num_top]
    assert [i for i, _ in top] == order.tolist()
    assert [p for _, p in top] == pytest.approx(exact[order], abs=1e-5)


def test_logprobs_of_the_impossible_are_numbers() -> None:
    row = np.array([0.0, -np.inf, 1.0], dtype=np.float32)
    found, top = logprobs(row, 1, 3)
    assert found == LEAST_LOGPROB and [i for i, _ in top] == [2, 0, 1] and top[2][1] == LEAST_LOGPROB
    assert logprobs(np.full(3, np.nan, dtype=np.float32), 0, 0) == (LEAST_LOGPROB, [])
