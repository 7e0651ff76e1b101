"""Which caches outlive their requests, and with which one a new sequence begins. Rank 0 decides, others replay.

A finished sequence's cache stays until others have more recently been used than the budget holds. A new sequence whose
tokens begin alike begins with a copy of it, cut to what both have in common: plans say so, for all ranks. Caches of
sequences that still run serve as well.

The copy has to have the bits that the sequence would have computed by itself. Where these depend on the steps in
which tokens are read (`one_by_one`), it is taken only where both sequences' steps are the same: at the ends of whole
chunks of both prompts, or, if the prompts are equally long, anywhere after them.

After a failure the caches of a leader that died are here as well, under sequences that the present one does not know,
and the streams that are moved to it go on with them (`adopt`).
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
    _bytes_per_token: int = 0
    _kept: dict[int, int] = field(default_factory=dict)  # bytes by sequence, the longest unused first

    def find(
        self,
        prompt_tokens: int,
        tokens: list[int],
        caches: Mapping[int, SequenceCache],
        home: int | None = None,
    ) -> tuple[int, int]:
        """The sequence with whose cache one of these tokens should begin, and the length of what they have in common.

        The last token is never in it, for its logits are wanted. The length is 0 if there is none. What only another
        rank than `home` has is not taken: all streams would go where the first one with their beginning was.
        """
        best, length = 0, 0
        for sequence_id in list(caches if self.budget_bytes else self._kept):
            cache = caches[sequence_id]
            if not self._is_usable(cache):
                continue
            elsewhere = cache.pending and home not in (None, cache.home)
            there = cache.tokens[: cache.num_shared] if elsewhere else cache.known
            common = num_common(there, tokens[:-1], at_least=max(length + 1, self.min_tokens))
            found = self._longest(cache, common, prompt_tokens) if common else 0
            if found > length and found >= self.min_tokens:
                best, length = sequence_id, found
        if best in self._kept:
            self._kept[best] = self._kept.pop(best)
        return best, length

    def adopt(
        self, prompt_tokens: int, tokens: list[int], caches: Mapping[int, SequenceCache]
    ) -> tuple[int, int]:
        """Find the kept cache that a stream can go on with as its own, as it is: nobody keeps it any more.

        Gives its sequence and length, 0 for none.
        """
        best, length = 0, 0
        for sequence_id in self._kept:
            known = caches[sequence_id].known
            if not length < len(known) < len(tokens) or known != tokens[: len(known)]:
                continue
            cache = caches[sequence_id]
            if self._is_usable(cache) and self._longest(cache, len(known), prompt_tokens) == len(known):
                best, length = sequence_id, len(known)
        self._kept.pop(best, None)
        return best, length

    def keep(self, sequence_id: int, caches: Mapping[int, SequenceCache]) -> list[int]:
        """Keep a finished sequence's cache; gives the kept ones, maybe itself, that have to go for it."""
        cache = caches[sequence_id]
        if not self._is_even(cache):
            return [sequence_id]
        useless = [i for i in self._kept if i != sequence_id and _covers(cache, caches[i])]
        self._kept[sequence_id] = self._num_bytes(cache)
        for i in useless:
            del self._kept[i]
        while sum(self._kept.values()) > self.budget_bytes:
            useless.append(next(iter(self._kept)))
            del self._kept[useless[-1]]
        return useless

    def meet(self, held: Iterable[int], caches: Mapping[int, SequenceCache]) -> None:
        """Go on in a new epoch with what all ranks have of no open sequence, a former leader's too."""
        order = {i: n for n, i in enumerate(self._kept)}
        held = sorted(held, key=lambda i: order.get(i, len(order)))
        self._kept = {i: self._num_bytes(caches[i]) for i in held}

    def _num_bytes(self, cache: SequenceCache) -> int:
        """What a cache takes on the rank that has most of it: an estimate, if that is another one."""
        if cache.tokens:
            self._bytes_per_token = cache.num_bytes // len(cache.tokens)
        return cache.num_bytes + (len(cache.known) - len(cache.tokens)) * self._bytes_per_token

    def _is_usable(self, cache: SequenceCache) -> bool:
        """Whether every rank can go on with what this rank, the leader, has of a sequence, at some length at least."""
        return not cache.pending or cache.home == 0 or self._is_even(cache)

    def _is_even(self, cache: SequenceCache) -> bool:
        """Whether every rank can begin another sequence with this one, be it with what is pending."""
        return not (cache.uneven and not cache.forgets) and not (cache.pending and self.one_by_one)

    def _longest(self, cache: SequenceCache, common: int, prompt_tokens: int) -> int:
        """How much of the first `common` tokens of a cache may be taken; 0 for none."""
        read = min(cache.num_read, prompt_tokens - 1)
        if cache.forgets:
            lengths = [common, min(common, read) // self.chunk * self.chunk]
        else:
            # Ranks may have been able to go back to unlike lengths: from what all have, none has to go back.
            least = cache.num_shared if cache.uneven else 0
            lengths = [n for n in cache.starts() if least <= n <= common]
        if self.one_by_one:
            after = read if cache.num_read == prompt_tokens - 1 else common + 1
            lengths = [n for n in lengths if n >= after or (n <= read and n % self.chunk == 0)]
        return max(lengths, default=0)


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
    if cache.num_read < other.num_read or cache.known[: len(other.known)] != other.known:
        return False
    return cache.forgets or set(other.starts()) <= set(cache.starts())
