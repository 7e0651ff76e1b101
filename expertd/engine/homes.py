"""Where sequences live under the split `sequences`: each has one rank that computes it, its home."""

from collections import Counter
from collections.abc import Sequence as Several
from itertools import groupby

from expertd.engine.sequence import Sequence

# To leave `sequences`, the other ranks must read what a home computed alone. So few tokens are a chunk that nobody
# notices; with more, sequences stay where they are.
MAX_BEHIND = 64
# What a rank without a sequence reads beside a step of another, so that the last stream can be divided again: about
# as much work as the step itself.
SPARE = 8


def give_homes(sequences: Several[Sequence], served: Several[Sequence], fractions: tuple[float, ...]) -> None:
    """Give those without a home the rank that has the fewest for its fraction."""
    loads = Counter(s.home for s in served if s.home is not None)
    ranks = [rank for rank, fraction in enumerate(fractions) if fraction > 0]
    for sequence in sequences:
        if sequence.home is None:
            sequence.home = min(ranks, key=lambda rank: (loads[rank] + 1) / fractions[rank])
            loads[sequence.home] += 1


def home_of(sequence: Sequence) -> int:
    assert sequence.home is not None
    return sequence.home


def by_home(sequences: Several[Sequence]) -> list[list[Sequence]]:
    """The sequences of every home that has some, in the order of the ranks."""
    return [list(of_one) for _, of_one in groupby(sorted(sequences, key=home_of), key=home_of)]
