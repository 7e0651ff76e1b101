"""A budget for reasoning: when it is used up, the mark that ends reasoning is what comes next."""

from dataclasses import dataclass

from expertd.engine.messages import Submit
from expertd.engine.text import Tokenizer


@dataclass
class ReasoningBudget:
    """`num_tokens` may come between the marks `start` and `end`, which are tokens; `is_open` if the prompt has begun
    it. Reasoning that begins later than with the answer's first token is none."""

    num_tokens: int
    start: list[int]
    end: list[int]
    is_open: bool
    is_over: bool = False

    def take(self, generated: list[int]) -> None:
        """The sequence was given the last of these tokens."""
        if generated[-len(self.end) :] == self.end:
            self.is_over = True

    def forced(self, generated: list[int]) -> int | None:
        """The token that must come next, None if any may."""
        first = 0 if self.is_open else len(self.start)
        if self.is_over or (not self.is_open and generated[:first] != self.start):
            return None
        if len(generated) - first < self.num_tokens:
            return None
        begun = (n for n in range(len(self.end) - 1, 0, -1) if generated[-n:] == self.end[:n])
        return self.end[next(begun, 0)]


def budget_of(submit: Submit, tokenizer: Tokenizer, is_open: bool) -> ReasoningBudget | None:
    """What a request allows, if it bounds reasoning and the model marks it."""
    if submit.max_reasoning is None or not tokenizer.think_end:
        return None
    return ReasoningBudget(submit.max_reasoning, tokenizer.think_start, tokenizer.think_end, is_open)
