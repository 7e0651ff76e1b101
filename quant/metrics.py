"""How far a model's next-token distributions lie from a reference's, and how well it foretells a text.

Theory of operation. Every token gives three numbers: the Kullback-Leibler divergence KL(reference || model) in
nats over the whole vocabulary, and the two models' surprise at the token that really follows. They are computed in
float64 from float32 logits, in slices of SLICE tokens (a slice's logits stay in the cache), and are summed at
the end by math.fsum, which rounds once: no digit depends on how the tokens were handed in.

KL comes first in every table: it uses the whole distribution, whereas perplexity of a text moves both ways with
an error and hides small ones in noise. Errors are over windows, because tokens of one window are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertd.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

SLICE = 64


@dataclass(frozen=True)
class Divergence:
    """A model beside a reference, on the same tokens. KL in nats per token.

    `kl_error` and `ppl_ratio_error` are standard errors over windows, the second of paired differences.
    `top1_agreement` is the fraction of tokens where both models' likeliest next token is the same.
    """

    mean_kl: float
    kl_error: float
    median_kl: float
    p95_kl: float
    p99_kl: float
    top1_agreement: float
    reference_perplexity: float
    ppl_ratio: float
    ppl_ratio_error: float


class TextScore:
    """Perplexity of a text, window by window."""

    def __init__(self) -> None:
        self._surprise: list[Array] = []

    def add(self, logits: Array, targets: Array) -> None:
        """One window: float32 logits [num_tokens, vocab], the tokens [num_tokens] that follow."""
        self._surprise.append(
            _by_slices(lambda a, b: _surprise(_log_softmax(logits[a:b]), targets[a:b]), targets)
        )

    @property
    def num_tokens(self) -> int:
        return sum(window.size for window in self._surprise)

    @property
    def perplexity(self) -> float:
        return _exp(_mean(self._surprise))


class Comparison:
    """Two models on the same tokens, window by window."""

    def __init__(self) -> None:
        self._kl: list[Array] = []
        self._same_top: list[Array] = []
        self._surprise: list[Array] = []
        self._surprise_of_reference: list[Array] = []

    def add(self, reference: Array, logits: Array, targets: Array) -> None:
        """One window: both models' float32 logits [num_tokens, vocab], the tokens [num_tokens] that follow.

        Raises CheckpointError when a logit is not finite.
        """
        rows = _by_slices(lambda a, b: _compare(reference[a:b], logits[a:b], targets[a:b]), targets)
        for kept, values in zip(
            (self._kl, self._same_top, self._surprise_of_reference, self._surprise), rows.T, strict=True
        ):
            kept.append(values)

    @property
    def num_tokens(self) -> int:
        return sum(window.size for window in self._kl)

    @property
    def perplexity(self) -> float:
        return _exp(_mean(self._surprise))

    def divergence(self) -> Divergence:
        kl = np.concatenate(self._kl)
        median, p95, p99 = (float(q) for q in np.quantile(kl, (0.5, 0.95, 0.99)))
        paired = [a - b for a, b in zip(self._surprise, self._surprise_of_reference, strict=True)]
        ratio = _exp(_mean(paired))
        return Divergence(
            mean_kl=_mean(self._kl),
            kl_error=_error(self._kl),
            median_kl=median,
            p95_kl=p95,
            p99_kl=p99,
            top1_agreement=_mean(self._same_top),
            reference_perplexity=_exp(_mean(self._surprise_of_reference)),
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * _error(paired),
        )


class RelativeError:
    """|a - b| / |b| over arrays that come in pieces: the root of the summed squares' ratio."""

    def __init__(self) -> None:
        self._of_difference: list[float] = []
        self._of_reference: list[float] = []

    def add(self, values: Array, reference: Array) -> None:
        wanted = reference.astype(np.float64)
        difference = values - wanted
        self._of_difference.append(float(np.sum(difference * difference)))
        self._of_reference.append(float(np.sum(wanted * wanted)))

    @property
    def value(self) -> float:
        size = math.fsum(self._of_reference)
        return math.sqrt(math.fsum(self._of_difference) / size) if size else 0.0


class Agreement:
    """The fraction of rows that hold the same set."""

    def __init__(self) -> None:
        self._num_same = self._num_rows = 0

    def add(self, sets: Array, reference: Array) -> None:
        """Integer arrays [num_rows, k], each row a set in any order."""
        same = (np.sort(sets, axis=-1) == np.sort(reference, axis=-1)).all(axis=-1)
        self._num_same += int(same.sum())
        self._num_rows += same.size

    @property
    def value(self) -> float:
        return self._num_same / self._num_rows


def _by_slices(compute: Any, targets: Array) -> Array:
    return np.concatenate([compute(a, a + SLICE) for a in range(0, targets.size, SLICE)])


def _compare(reference: Array, logits: Array, targets: Array) -> Array:
    """[num_tokens, 4]: KL, whether the likeliest token is the same, the reference's surprise, the model's."""
    wanted, found = _log_softmax(reference), _log_softmax(logits)
    kl = (np.exp(wanted) * (wanted - found)).sum(axis=-1)
    same = reference.argmax(axis=-1) == logits.argmax(axis=-1)
    # Rounding can leave -1e-16 where the distributions are the same.
    return np.stack([np.maximum(kl, 0), same, _surprise(wanted, targets), _surprise(found, targets)], axis=1)


def _log_softmax(logits: Array) -> Array:
    if not np.isfinite(logits).all():
        raise CheckpointError(
            "the model gives logits that are not finite: its weights are damaged. Convert or download it again."
        )
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _surprise(log_probabilities: Array, targets: Array) -> Array:
    found: Array = -np.take_along_axis(log_probabilities, targets[:, None].astype(np.int64), axis=-1)[:, 0]
    return found


def _exp(surprise: float) -> float:
    """Perplexity; a model so broken that float64 cannot hold it gets 1e304, which JSON can."""
    return math.exp(min(surprise, 700.0))


def _mean(windows: Sequence[Array]) -> float:
    values = np.concatenate(windows)
    return math.fsum(values.tolist()) / values.size


def _error(windows: Sequence[Array]) -> float:
    """Standard error of the mean over windows of equal size; 0 for a single one."""
    if len(windows) < 2:
        return 0.0
    means = [math.fsum(window.tolist()) / window.size for window in windows]
    centre = math.fsum(means) / len(means)
    variance = math.fsum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))
