"""Which caches outlive their requests, and with which one a new sequence begins. Rank 0 decides, others replay.

A finished sequence's cache stays until others have more recently been used than the budget holds. A new sequence whose
tokens begin alike begins with a copy of it, cut to what both have in common: plans say so, for all ranks. Caches of
sequences that still run serve as well.

The copy has to have the bits that the sequence would have computed by itself. Where these depend on the steps in
which tokens are read (`one_by_one`), it is taken only where both sequences' steps are the same: at the ends of whole
chunks of both prompts, or, if the prompts are equally long, anywhere after them.

After a failure the caches of a leader that died are here as well, under sequences that the present one does not know,
and the streams that are moved to it go on with them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from expertd.model.caches import SequenceCache

# Fewer tokens are read about as fast as a cache is copied.
MIN_TOKENS = 16
# Lists are compared in pieces, so that one that differs early costs nothing.
PIECE = 256


@dataclass
class Prefixes:
    """The directory of kept caches; the caches themselves are the runner's."""

    budget_bytes: int = 0
    chunk: int = 512
    one_by_one: bool = False
    min_tokens: int = MIN_TOKENS
    _kept: dict[int, int] = field(default_factory=dict)  # bytes by sequence, the longest unused first

    def find(
        self, prompt_tokens: int, tokens: list[int], caches: Mapping[int, SequenceCache]
    ) -> tuple[int, int]:
        """The sequence with whose cache one of these tokens should begin, and the length of what they have in common.

        The last token is never in it, for its logits are wanted. The length is 0 if there is none.
        """
        best, length = 0, 0
        for sequence_id in list(caches if self.budget_bytes else self._kept):
            cache = caches[sequence_id]
            common = num_common(cache.tokens, tokens[:-1], at_least=max(length + 1, self.min_tokens))
            found = max((n for n in self._lengths(cache, common, prompt_tokens) if n <= common), default=0)
            if found > length and found >= self.min_tokens:
                best, length = sequence_id, found
        if best in self._kept:
            self._kept[best] = self._kept.pop(best)
        return best, length

    def keep(self, sequence_id: int, caches: Mapping[int, SequenceCache]) -> list[int]:
        """Keep a finished sequence's cache; gives the kept ones, maybe itself, that have to go for it."""
        cache = caches[sequence_id]
        useless = [i for i in self._kept if i != sequence_id and _covers(cache, caches[i])]
        self._kept[sequence_id] = cache.num_bytes
        for i in useless:
            del self._kept[i]
        while sum(self._kept.values()) > self.budget_bytes:
            useless.append(next(iter(self._kept)))
            del self._kept[useless[-1]]
        return useless

    def meet(self, held: Iterable[int], caches: Mapping[int, SequenceCache]) -> None:
        """Go on in a new epoch with what all ranks have of no open sequence, a former leader's too."""
        order = {i: n for n, i in enumerate(self._kept)}
        self._kept = {i: caches[i].num_bytes for i in sorted(held, key=lambda i: order.get(i, len(order)))}

    def _lengths(self, cache: SequenceCache, common: int, prompt_tokens: int) -> Iterable[int]:
        """The lengths up to about `common` at which a cache may be taken."""
        if not common:
            return ()
        lengths = [common, *cache.lengths()] if cache.can_cut(common) else cache.lengths()
        if not self.one_by_one:
            return lengths
        read = min(cache.num_read, prompt_tokens - 1)
        if cache.can_cut(whole := min(common, read) // self.chunk * self.chunk):
            lengths.append(whole)
        after = read if cache.num_read == prompt_tokens - 1 else common + 1
        return [n for n in lengths if n >= after or (n <= read and n % self.chunk == 0)]


def num_common(a: list[int], b: list[int], at_least: int = 1) -> int:
    """How many first tokens two lists have in common; 0 if fewer than `at_least`."""
    if a[:at_least] != b[:at_least]:
        return 0
    end = min(len(a), len(b))
    at = at_least
    while at < end and a[at : at + PIECE] == b[at : at + PIECE]:
        at += PIECE
    return next((i for i in range(at, end) if a[i] != b[i]), end)


def _covers(cache: SequenceCache, other: SequenceCache) -> bool:
    """Whether whatever can begin with `other` can as well begin with `cache`."""
    same = cache.num_read >= other.num_read and len(cache) >= len(other)
    return same and cache.tokens[: len(other)] == other.tokens and all(map(cache.can_cut, other.lengths()))
