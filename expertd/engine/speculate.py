"""Speculation by lookup: where the last tokens stood before, what followed there is a draft of what follows now.

A draft is checked in one step that reads its tokens like a small prompt, with the logits after each. The sampler
chooses from these one by one, as if every token had had a step of its own: it depends on logits, seed, position and
the tokens before, so as long as it chooses the draft's own tokens the next logits are those of the answer. The rest
of the step is taken back. Nothing about the answer changes but how soon it comes, given that a row's logits do not
depend on the rows beside it and that caches can be cut anywhere; where either is not so the engine does not speculate.

Whether it pays is a matter of measurement: steps of several tokens cost more than steps of one, on a CPU nearly in
proportion, and text differs in how it repeats itself. The planner knows the costs. How often drafts are right is
watched at every token, with or without a check.
"""

from collections.abc import Callable, Sequence

# Tokens that must have stood there before; after two, what follows is right too rarely.
NGRAM = 3
# Draft lengths to choose from: with the token before them, steps of 4 and 8.
LENGTHS = (3, 7)
# A gain below this is not worth what it does to the spread of token times.
MIN_GAIN = 1.1
# To find out what a check costs, drafts must promise so many tokens for a step.
MIN_PROMISE = 2.0
# Weight of the latest token in the share of right guesses: it forgets half in 14 tokens.
WEIGHT = 0.05


class Guesses:
    """What one sequence's tokens let expect, as they come; `rate` is the share of right guesses lately."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.rate = 0.5
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self._append(token)

    def add(self, token: int) -> None:
        """Take the token that was chosen, and see whether it would have been guessed."""
        for guess in self.draft(1):
            self.rate += WEIGHT * ((guess == token) - self.rate)
        self._append(token)

    def draft(self, length: int) -> list[int]:
        """At most `length` tokens that may come next."""
        draft: list[int] = []
        last = tuple(self._tokens[-NGRAM:])
        while len(draft) < length and (follower := self._followers.get(last)) is not None:
            draft.append(follower)
            last = (*last[1:], follower)
        return draft

    def _append(self, token: int) -> None:
        if len(self._tokens) >= NGRAM:
            self._followers[tuple(self._tokens[-NGRAM:])] = token
        self._tokens.append(token)


def promise(rate: float, length: int) -> float:
    """The tokens that a check gives: each of a draft is right only if all before it are, and one comes after them."""
    return sum(rate**i for i in range(length + 1))


def pick_length(
    rate: float, cost_s: Callable[[int], float | None], guess_s: float = 0.0, ahead_s: float = 0.0
) -> int:
    """The draft length with the best gain, 0 if none is worth it.

    cost_s(n) is what a step of n tokens takes; None means that it is not known yet. Each token of a draft takes
    `guess_s`; what has to be done before the first draft takes `ahead_s` for each token of the answer.
    """
    alone = cost_s(1)
    best, best_gain = 0, MIN_GAIN
    for length in LENGTHS if alone else ():
        promised = promise(rate, length)
        cost = cost_s(length + 1)
        if cost is None and promised >= MIN_PROMISE:
            return length
        if not cost or not alone:
            continue
        gain = alone / ((cost + guess_s * length) / promised + ahead_s)
        if gain > best_gain:
            best, best_gain = length, gain
    return best
