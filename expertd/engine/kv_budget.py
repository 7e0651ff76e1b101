"""How much memory the keys and values of all requests may take together, and who has to wait for that.

Caches grow with every token, and nobody knows how long an answer will be. So nothing is set apart for the longest:
requests are served in the order of their arrival as long as what they have now, and the next token, fits. When it no
longer does, the last of them gives its cache up and waits; later it is read again from its transcript, like after a
failure. The first is always served, and whatever it may become fits, for longer texts are refused.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from expertd.checkpoint.sizes import GROWTH_TOKENS
from expertd.engine.sequence import Sequence


@dataclass(frozen=True)
class KvBudget:
    """`num_bytes` for the caches of all requests on one rank, 0: no bound. `bytes_of(num_tokens)` is what one takes."""

    num_bytes: int = 0
    bytes_of: Callable[[int], int] = lambda num_tokens: 0

    def most_tokens(self, context_length: int) -> int:
        """How long one sequence alone may be."""
        if not self.num_bytes:
            return context_length
        lengths = range(GROWTH_TOKENS, context_length + GROWTH_TOKENS, GROWTH_TOKENS)
        return min(context_length, GROWTH_TOKENS * bisect_right(lengths, self.num_bytes, key=self.bytes_of))

    def fitting(self, sequences: list[Sequence]) -> list[Sequence]:
        """The first of these whose caches fit together, with the next token of each."""
        if not self.num_bytes:
            return sequences
        taken = 0
        for i, sequence in enumerate(sequences):
            num_tokens = len(sequence.prompt) + len(sequence.generated)
            taken += self.bytes_of(-(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS)
            if taken > self.num_bytes and i:
                return sequences[:i]
        return sequences
