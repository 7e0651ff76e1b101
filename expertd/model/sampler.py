"""From logits to a token id, on rank 0 only.

MLX has evaluated the logits, and NumPy looks at them where they lie. It sorts and sums a vocabulary of 152,064 on a CPU
many times faster than MLX does (bench/LOG.md), and a few hundred kilobytes do not pay for a graph on a GPU. Each row is
computed by itself, so a sequence's choice cannot depend on what else is in the step.
"""

import hashlib
import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd.sampling import Sampling

Row = NDArray[np.float32]  # [vocab]
Ids = NDArray[np.int64]

# OpenAI's word for "very unlikely"; JSON has no infinity.
LEAST_LOGPROB = -9999.0
# The running sum of a vocabulary is made over blocks, then inside one: a tenth of the time of summing through.
BLOCK = 256


class Sampler:
    """Chooses the tokens of one sequence.

    A choice depends on the logits, the seed, the position and the sequence's own tokens alone.
    """

    def __init__(
        self, sampling: Sampling, seed: int, prompt: Sequence[int] = (), end_ids: Collection[int] = ()
    ) -> None:
        self._sampling, self._seed = sampling, seed
        self._history = _History(prompt) if sampling.penalizes else None
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)
        self._bias_ids = np.array([i for i, _ in sampling.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)

    def add(self, token_id: int) -> None:
        """The sequence was given this token; penalties count it."""
        if self._history:
            self._history.add(token_id)

    def choose(self, row: Row, position: int, may_end: bool = True) -> int:
        """Choose the token at `position` of the answer from its logits; none of the `end_ids` unless it may end."""
        row = self._adjusted(row, may_end)
        if self._sampling.greedy:
            return int(row.argmax())
        return _draw(row, self._sampling, uniform(self._seed, position))

    def _adjusted(self, row: Row, may_end: bool) -> Row:
        banned = self._end_ids[: 0 if may_end else None]
        if not (len(banned) or len(self._bias_ids) or self._history):
            return row
        row = row.copy()
        row[banned] = -np.inf
        row[self._bias_ids] += self._bias
        if self._history:
            self._history.penalize(row, self._sampling)
        return row


class _History:
    """The distinct tokens of a sequence, and how often each is in the answer."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = np.unique(np.array(prompt, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._places = {token_id: i for i, token_id in enumerate(self._ids.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._ids))
        if place == len(self._ids):
            self._ids = np.append(self._ids, token_id)
            self._counts = np.append(self._counts, np.float32(0))
        self._counts[place] += 1

    def penalize(self, row: Row, sampling: Sampling) -> None:
        logits, penalty = row[self._ids], sampling.repetition_penalty
        logits = np.where(logits > 0, logits / penalty, logits * penalty)
        logits -= sampling.frequency_penalty * self._counts
        logits -= sampling.presence_penalty * (self._counts > 0)
        row[self._ids] = logits


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that (seed, position) alone decide: 53 bits of a hash, the same on every machine."""
    words = seed % 2**64, position
    digest = hashlib.blake2b(b"".join(w.to_bytes(8, "little") for w in words), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def logprobs(row: Row, token_id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the ids and log-probabilities of the `num_top` likeliest, likeliest first.

    Of the model's own distribution, log_softmax of the raw logits: before biases, penalties, temperature and
    truncation, as OpenAI and vLLM (logprobs_mode "raw_logprobs") give them.
    """
    largest = row.max()
    log_sum = float(largest) + math.log(np.exp(row - largest).sum(dtype=np.float64))
    top = _largest(row, num_top)
    top = top[np.argsort(-row[top], kind="stable")]
    return _logprob(row, token_id, log_sum), [(i, _logprob(row, i, log_sum)) for i in top.tolist()]


def _logprob(row: Row, token_id: int, log_sum: float) -> float:
    return max(LEAST_LOGPROB, float(row[token_id]) - log_sum)


def _draw(row: Row, sampling: Sampling, share: float) -> int:
    """The token at which the running sum of the remaining probabilities, by id, exceeds `share` of it all."""
    largest = row.max()
    if not math.isfinite(largest):  # a broken model's row; others in the step must not suffer from it
        return int(row.argmax())
    weights = np.exp((row - largest) / sampling.temperature)  # the largest is 1
    ids = _kept(weights, sampling)
    return _place_of(weights, share) if ids is None else int(ids[_place_of(weights[ids], share)])


def _kept(weights: Row, sampling: Sampling) -> Ids | None:
    """The ids that truncation leaves, ascending; None for all."""
    ids: Ids | None = None
    if sampling.min_p > 0:
        ids = np.flatnonzero(weights >= sampling.min_p)
    if sampling.top_k > 0:
        ids = (
            _largest(weights, sampling.top_k) if ids is None else ids[_largest(weights[ids], sampling.top_k)]
        )
    if sampling.top_p < 1:
        ids = (
            _nucleus(weights, sampling.top_p) if ids is None else ids[_nucleus(weights[ids], sampling.top_p)]
        )
    return ids


def _largest(values: Row, num: int) -> Ids:
    """Positions of the `num` largest values, ascending; of equal ones the first."""
    if num >= len(values):
        return np.arange(len(values))
    if num == 0:
        return np.arange(0)
    least = np.partition(values, len(values) - num)[len(values) - num]
    keep = values > least
    equal = np.flatnonzero(values == least)
    keep[equal[: num - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _nucleus(weights: Row, top_p: float) -> Ids:
    """Positions of the smallest set whose weights reach `top_p` of all, ascending; of equal ones the first."""
    total = float(weights.sum(dtype=np.float64))
    # Weights below (1 - top_p) / n of the total add up to less than what is cut: only the others need to be sorted.
    # Half of that, because sums are rounded.
    near = np.flatnonzero(weights >= 0.5 * (1 - top_p) * total / len(weights))
    sums = np.sort(weights[near])[::-1].cumsum(dtype=np.float64)
    return near[_largest(weights[near], int(np.searchsorted(sums, top_p * total)) + 1)]


def _place_of(weights: Row, share: float) -> int:
    """The first position at which the running sum exceeds `share` of the whole; its weight is never 0."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    wanted = share * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    rest = wanted - (sums[block - 1] if block else 0.0)
    # The two sums may differ in their last bit.
    rest = min(rest, np.nextafter(inside[-1], 0))
    return block * BLOCK + int(np.searchsorted(inside, rest, side="right"))
