"""How a step is divided: which split, and how many rows each rank takes. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class StepSplit:
    """The split of one step, and every rank's fraction of it (they add up to 1)."""

    name: str
    fractions: tuple[float, ...]


def cut(count: int, fractions: Sequence[float]) -> list[int]:
    """Divide `count` rows among ranks: counts that add up to `count`, each within one of its fraction.

    The bounds are the rounded running sums, so that every rank computes the same cut by itself.
    """
    bounds, total = [0], 0.0
    for fraction in fractions:
        total += fraction
        bounds.append(int(count * total + 0.5))
    bounds[-1] = count
    return [max(0, b - a) for a, b in pairwise(bounds)]


def choose(wanted: str, num_tokens: int, supported: Sequence[str], fractions: tuple[float, ...]) -> StepSplit:
    """Give the split of a step of `num_tokens` tokens (design, section 2).

    `auto` takes `experts` for one token, where only the chosen experts can be divided, and `tokens` for
    more, where the payload is smallest; it keeps to what the family supports.
    """
    if len(fractions) == 1:
        return StepSplit("solo", fractions)
    if wanted != "auto":
        return StepSplit(wanted, fractions)
    best = "experts" if num_tokens == 1 else "tokens"
    name = best if best in supported else next((s for s in ("experts", "tokens") if s in supported), "solo")
    return StepSplit(name, fractions)
