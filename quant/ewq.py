"""Entropy-weighted quantization: how much a softmax over each matrix is spread, and the bits that follow.

Theory of operation. The rule is that of arXiv 2503.04704. For a matrix of n weights let p = softmax(w) over all
of them, and H = -sum p ln p. A block (a layer without its routed experts) has the mean H of its matrices,
weighted by n. With mu and sigma the mean and the standard deviation (of the population) over the blocks and
T = mu - X sigma, a block above mu keeps 16 bits, one between T and mu gets 8, one at T or below 4.

Numerics. For trained weights H is ln n minus about var(w)/2: the part that tells one block from another is
1e-5 of H and less, which float32 loses and float64 keeps only barely. So the deficit D = ln n - H is computed,
never H. With d = w - c, x = exp(d) - 1, and A, B, C the means of x, d x and d:

    sum e^d = n (1 + A)    sum d e^d = n (B + C)    D = (B + C) / (1 + A) - ln(1 + A)

c = 0 will do, for weights are small, and it makes sums of different runs additive. Published code differs in
where an epsilon of 0.01 goes; inside the logarithm it makes H = ln(1/eps) - (1/eps) sum p^2 up to terms of
(p/eps)^2, and sum p^2 = F / (n (1 + A)^2) with F the mean of e^2d. Both are reported; the one without epsilon
decides, since the other differs between blocks by 1e-9.

The same tensor gives the same bits whatever the chunks, the threads or the order of files: sums are taken over
pieces of 64 Ki weights counted from the tensor's start, and added up exactly (math.fsum).

Shapes. As ln n dwarfs D, the paper's form ranks blocks of unlike shape by shape alone: of DeepSeek-V3's 61
layers it keeps the 3 dense ones at 16 bits and gives all others 8. The normalized form therefore compares a
matrix only with those of the same role and shape in other layers (z-score of -D), weights these scores by n,
and applies the same rule to them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertd.quant.modules import ModuleInfo
from expertd.quant.settings import WHOLE, EwqForm

PIECE = 1 << 16
EPSILON = 0.01
# exp(2 d), summed over 2^40 weights, must stay below 1e308. No trained weight comes near: with one at 300 the
# softmax has all its mass there, clipped or not.
LARGEST = 300.0
# Scores are compared to this many decimals, the noise of float64 below them: two blocks that score the same by
# definition must not be told apart by rounding. The paper's entropies differ at the fifth decimal.
DECIMALS = 12
# Above this share of explained variance the paper's form says how large the blocks are and nothing else.
TOLD_BY_SIZE = 0.9

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Entropy:
    """The softmax of one matrix: `deficit` is D = ln n - H in nats, `sum_p2` the sum of p^2."""

    num_weights: int
    deficit: float
    sum_p2: float

    @property
    def entropy(self) -> float:
        """H = -sum p ln p, in nats."""
        return math.log(self.num_weights) - self.deficit

    @property
    def entropy_eps(self) -> float:
        """-sum p ln(p + 0.01), to first order in p / 0.01: exact to 1e-6 from 64 Ki weights on."""
        return -math.log(EPSILON) - self.sum_p2 / EPSILON


class EntropySum:
    """The sums behind an Entropy, fed with a tensor in pieces of any size, in its own order."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, float, float]] = []
        self._rest = np.empty(PIECE)
        self._num_rest = 0
        self._num_weights = 0
        self._scratch = np.empty((2, PIECE))

    def add(self, chunk: Array) -> None:
        """Take the next weights, of any shape and float dtype. Raises ValueError for NaN and infinity."""
        flat = chunk.reshape(-1)
        self._num_weights += flat.size
        start = 0
        if self._num_rest:
            start = min(PIECE - self._num_rest, flat.size)
            self._keep(flat[:start])
        if self._num_rest == PIECE:
            self._flush()
        while flat.size - start >= PIECE:
            self._keep(flat[start : start + PIECE])
            self._flush()
            start += PIECE
        if start < flat.size:
            self._keep(flat[start:])

    def extend(self, following: "EntropySum") -> None:
        """Take what `following` summed of the same tensor. Only for a sum that ended at a piece's border."""
        assert self._num_rest == 0
        self._sums += following._sums
        self._num_weights += following._num_weights
        self._rest, self._num_rest = following._rest, following._num_rest

    def result(self) -> Entropy:
        """The entropy of all that was added. Raises ValueError for NaN and infinity, and for no weights."""
        if not self._num_weights:
            raise ValueError("no weights")
        sums = self._sums
        if self._num_rest:
            sums = [*sums, sum_piece(self._rest[: self._num_rest], self._scratch)]
        n = self._num_weights
        a, b, c, f = (math.fsum(column) / n for column in zip(*sums, strict=True))
        return Entropy(n, max((b + c) / (1 + a) - math.log1p(a), 0.0), f / (n * (1 + a) ** 2))

    def _keep(self, weights: Array) -> None:
        self._rest[self._num_rest : self._num_rest + weights.size] = weights
        self._num_rest += weights.size

    def _flush(self) -> None:
        self._sums.append(sum_piece(self._rest, self._scratch))
        self._num_rest = 0


def sum_piece(d: Array, scratch: Array) -> tuple[float, float, float, float]:
    """The sums of x, d x, d and e^2d over up to PIECE weights, x = e^d - 1. `scratch` is [2, PIECE].

    Raises ValueError for NaN and infinity.
    """
    x, product = scratch[0, : d.size], scratch[1, : d.size]
    with np.errstate(over="ignore", invalid="ignore"):
        np.expm1(d, out=x)
        np.multiply(d, x, out=product)
        b = float(np.add.reduce(product))
    if not b < LARGEST:  # d x is never negative, so nothing large, NaN or infinite gets past this
        if not np.isfinite(d).all():
            raise ValueError("NaN or infinity")
        if max(d.max(), -d.min()) > LARGEST:
            return sum_piece(d.clip(-LARGEST, LARGEST), scratch)
    a, c = float(np.add.reduce(x)), float(np.add.reduce(d))
    x += 1
    np.multiply(x, x, out=product)
    return a, b, c, float(np.add.reduce(product))


def measure(values: Array, threads: int = 1) -> Entropy:
    """The entropy of one matrix in memory; `threads` changes the time alone.

    Raises ValueError for NaN and infinity.
    """
    flat = values.reshape(-1)
    num_pieces = -(-flat.size // PIECE)
    per_part = max(-(-num_pieces // max(threads, 1)), 1) * PIECE
    parts = [flat[start : start + per_part] for start in range(0, flat.size, per_part)]
    with ThreadPoolExecutor(max(len(parts), 1)) as pool:
        sums = list(pool.map(_sum_all, parts))
    total = EntropySum()
    for part in sums:
        total.extend(part)
    return total.result()


def _sum_all(part: Array) -> EntropySum:
    sums = EntropySum()
    sums.add(part)
    return sums


@dataclass(frozen=True)
class BlockScore:
    """What EWQ knows of one block. The entropies and the deficit are means weighted by the matrices' sizes.

    `score` is what the rule is applied to: the entropy (paper), or the mean z-score of -D (normalized).
    """

    layer: int
    num_weights: int
    entropy: float
    entropy_eps: float
    deficit: float
    score: float


@dataclass(frozen=True)
class Threshold:
    """mu, sigma and T = mu - X sigma over the scores of all blocks."""

    mu: float
    sigma: float
    low: float


def score_blocks(
    modules: Iterable[ModuleInfo], entropies: Mapping[str, Entropy], form: EwqForm
) -> list[BlockScore]:
    """The score of every layer that has trunk modules, in execution order."""
    trunk = [m for m in modules if m.kind == "trunk"]
    z = z_scores(trunk, entropies) if form == "normalized" else {}
    by_layer: dict[int, list[ModuleInfo]] = {}
    for m in trunk:
        if m.layer is not None:
            by_layer.setdefault(m.layer, []).append(m)
    return [_score_block(layer, by_layer[layer], entropies, z) for layer in sorted(by_layer)]


def _score_block(
    layer: int, block: Sequence[ModuleInfo], entropies: Mapping[str, Entropy], z: Mapping[str, float]
) -> BlockScore:
    sizes = [m.num_weights for m in block]
    found = [entropies[m.path] for m in block]
    entropy = weighted_mean([e.entropy for e in found], sizes)
    return BlockScore(
        layer=layer,
        num_weights=sum(sizes),
        entropy=entropy,
        entropy_eps=weighted_mean([e.entropy_eps for e in found], sizes),
        deficit=weighted_mean([e.deficit for e in found], sizes),
        score=round(weighted_mean([z[m.path] for m in block], sizes) if z else entropy, DECIMALS),
    )


def z_scores(trunk: Iterable[ModuleInfo], entropies: Mapping[str, Entropy]) -> dict[str, float]:
    """z-score of -D of every module among those of its role and shape; 0 where they do not differ."""
    classes: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for m in trunk:
        classes.setdefault((m.role, m.shape), []).append(m.path)
    scores = {}
    for paths in classes.values():
        values = [-entropies[path].deficit for path in paths]
        mu, sigma = mean_and_deviation(values)
        for path, value in zip(paths, values, strict=True):
            scores[path] = (value - mu) / sigma if sigma else 0.0
    return scores


def find_threshold(scores: Sequence[BlockScore], x: float) -> Threshold:
    """Raises ValueError for no scores."""
    mu, sigma = mean_and_deviation([s.score for s in scores])
    return Threshold(round(mu, DECIMALS), sigma, round(mu - x * sigma, DECIMALS))


def choose_bits(score: float, threshold: Threshold, menu: Sequence[int]) -> int:
    """The level of `menu` (one to three, ascending) for a block.

    Ties go down: a score at T gets the lowest level, one at mu the middle one. So a single block, or blocks
    that do not differ at all, get the lowest level; nothing says that they need more.
    """
    if len(menu) == 1 or score <= threshold.low:
        return menu[0]
    return menu[-1] if len(menu) == 2 or score > threshold.mu else menu[1]


def explain(block: BlockScore, threshold: Threshold, bits: int) -> str:
    """Why a block got `bits`, for people."""
    if not threshold.sigma:
        return "all blocks score the same, so all get the lowest level"
    z = (block.score - threshold.mu) / threshold.sigma
    if block.score <= threshold.low:
        place = "at or below the threshold"
    else:
        place = "above the mean" if block.score > threshold.mu else "between the threshold and the mean"
    return f"score {z:+.2f} standard deviations from the mean, {place}: {in_words(bits)}"


def in_words(bits: int) -> str:
    return "kept whole" if bits == WHOLE else f"{bits} bits"


def share_told_by_size(scores: Sequence[BlockScore]) -> float:
    """The share of the variance of the blocks' entropies that ln n explains; H is ln n - D exactly."""
    _, spread = mean_and_deviation([s.entropy for s in scores])
    _, left = mean_and_deviation([s.deficit for s in scores])
    return 1 - (left / spread) ** 2 if spread else 0.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the population; exact, and exactly 0 when all values are equal."""
    if min(values) == max(values):
        return values[0], 0.0
    mu = math.fsum(values) / len(values)
    return mu, math.sqrt(math.fsum((value - mu) ** 2 for value in values) / len(values))


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Exactly rounded sums, so that the order of the values does not matter."""
    if min(values) == max(values):
        return values[0]
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
