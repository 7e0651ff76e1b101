"""One request on its way through the engine; it owns all values derived from it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import mlx.core as mx

from expertd.engine.echo import Echo
from expertd.engine.grammar import Matcher
from expertd.engine.messages import Done, Started, Submit
from expertd.engine.reasoning import ReasoningBudget
from expertd.engine.speculate import Guesses
from expertd.engine.text import Detokenizer, StopStrings, Tokenizer
from expertd.errors import ConfigError
from expertd.model.sampler import Row, Sampler


def prompt_ids(submit: Submit, tokenizer: Tokenizer, context_length: int, most_tokens: int) -> list[int]:
    """The request's token ids. Raises ConfigError when they are none or more than the context or the memory holds."""
    if submit.messages is not None:
        ids = tokenizer.encode_chat(submit.messages, submit.tools, **submit.template_args)
    elif submit.prompt_ids is not None:
        ids = submit.prompt_ids
    else:
        ids = tokenizer.encode(submit.prompt or "")
    if not ids:
        raise ConfigError("the prompt is empty: wanted at least one token. Write something.")
    if len(ids) >= context_length:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but this model's context holds {context_length}, "
            f"the answer included. Shorten it to at most {context_length - 1} tokens."
        )
    if len(ids) >= most_tokens:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but the memory for keys and values (--kv-cache) holds {most_tokens}, "
            f"the answer included. Shorten it to at most {most_tokens - 1} tokens, or serve with more --kv-cache, "
            "or --kv-bits 8."
        )
    return ids


def check_ids(submit: Submit, vocab_size: int) -> None:
    """Raise ConfigError when the request names a token that the model does not have."""
    biased = [token_id for token_id, _ in submit.sampling.logit_bias]
    named = ("logit_bias", biased), ("stop_token_ids", submit.stop_ids), ("prompt", submit.prompt_ids or [])
    for name, ids in named:
        if wrong := _outside(ids, vocab_size):
            raise ConfigError(
                f"{name}: token {wrong[0]}, but this model's tokens are 0 to {vocab_size - 1}. Leave it out."
            )


def _outside(ids: Iterable[int], vocab_size: int) -> list[int]:
    return [token_id for token_id in ids if not 0 <= token_id < vocab_size]


@dataclass(eq=False)  # one is itself alone
class Sequence:
    sequence_id: int
    submit: Submit
    prompt: list[int]
    end_ids: frozenset[int]  # those that end this answer
    max_tokens: int
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopStrings
    echo: Echo | None = None
    matcher: Matcher | None = None
    grammar_after: list[int] = field(default_factory=list)  # its grammar begins after these tokens
    budget: ReasoningBudget | None = None
    opening: str = ""  # text that belongs before the first token's
    num_computed: int = 0  # tokens in the cache, of every rank or of its home's
    num_cached: int = 0  # of the prompt: those that another sequence's cache had
    home: int | None = None  # engine/homes.py
    guesses: Guesses | None = None
    num_guessed: int = 0
    generated: list[int] = field(default_factory=list)
    num_replayed: int = 0  # of `generated`: another leader chose them
    num_chars: int = 0  # of the text of `generated`, but for the bytes of an unfinished character
    logits: list[mx.array] = field(default_factory=list)  # for Submit.logits_file
    cancelled: bool = False
    finish_reason: str | None = None
    failure: str = ""
    started_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    def tokens_at(self, start: int, number: int) -> list[int]:
        """`number` of its tokens, from `start` on; a step asks, so nothing is copied but these."""
        num_prompt, end = len(self.prompt), start + number
        return self.prompt[start:end] + self.generated[max(0, start - num_prompt) : max(0, end - num_prompt)]

    @property
    def num_left(self) -> int:
        """Tokens known but not yet in the cache; the last of them is the next decode step's."""
        return len(self.prompt) + len(self.generated) - self.num_computed

    @property
    def wants_logits(self) -> bool:
        """Whether those of the prompt's next chunk are needed."""
        return self.echo is not None and self.echo.wanting

    @property
    def started(self) -> Started:
        prompt = self.echo.prompt() if self.echo else None
        return Started(self.submit.request_id, len(self.prompt), prompt)

    @property
    def _bound(self) -> Matcher | None:
        """The grammar, once it has begun."""
        return None if self.grammar_after else self.matcher

    def choose(self, row: Row) -> int:
        """The next token, from its logits [vocab]."""
        if self.budget and (forced := self.budget.forced(self.generated)) is not None:
            return forced
        position, bound = len(self.generated), self._bound
        may_end = position + 1 > self.submit.min_tokens
        if bound:
            row = bound.masked(row)
            self.failure = bound.error
        return self.sampler.choose(row, position, may_end)

    @property
    def ends_by_text(self) -> bool:
        """Whether a token's text has to be known before the next one is asked for: a stop string may be in it."""
        return bool(self.submit.stop)

    def take(self, token_id: int) -> None:
        """Take a token, chosen now or before an interruption; sets `finish_reason` if it ends the answer by itself."""
        if not self.first_token_at:
            self.first_token_at = time.monotonic()
        self.generated.append(token_id)
        self.sampler.add(token_id)
        if self.budget:
            self.budget.take(self.generated)
        if self.guesses:
            self.guesses.add(token_id)
        if token_id in self.end_ids or self._follow(token_id):
            self.finish_reason = "stop"
        elif len(self.generated) >= self.max_tokens:
            self.finish_reason = "length"

    def say(self, token_id: int, is_last: bool) -> tuple[str, int]:
        """The text that became final with a token that was taken, and how many characters there are before its own.

        Tokens come here in the order in which they were taken. Sets `finish_reason` when a stop string is complete.
        """
        if token_id in self.end_ids:
            return self._flush(""), self.num_chars
        opening, self.opening = self.opening, ""
        self.num_chars += len(opening)
        offset = self.num_chars
        text = opening + self._find_stops(self.detokenizer.add(token_id))
        if self.stops.found:
            self.finish_reason = "stop"
        elif is_last:
            text = self._flush(text)
        return text, offset

    def replay(self, token_ids: list[int]) -> None:
        """Take tokens that another leader chose and whose text the client has."""
        for token_id in token_ids:
            self.take(token_id)
            self.say(token_id, bool(self.finish_reason))
        if token_ids:
            self.num_replayed, self.started_at, self.first_token_at = len(token_ids), time.monotonic(), 0.0

    def _follow(self, token_id: int) -> bool:
        """Take a token into the grammar; gives whether that is complete."""
        if bound := self._bound:
            bound.take(token_id)
            return bound.complete
        after = self.grammar_after
        if after and self.generated[-len(after) :] == after:
            self.grammar_after = []
        return False

    def _flush(self, text: str) -> str:
        text += self._find_stops(self.detokenizer.finish())
        return text if self.stops.found else text + self.stops.finish()

    def _find_stops(self, text: str) -> str:
        self.num_chars += len(text)
        return self.stops.add(text) if len(self.generated) >= self.submit.min_tokens else text

    def done(self, split: str, num_ranks: int) -> Done:
        """The closing message, with the speeds of this request."""
        now = time.monotonic()
        first = self.first_token_at or now
        later = max(0, len(self.generated) - self.num_replayed - 1)
        return Done(
            request_id=self.submit.request_id,
            finish_reason="cancelled" if self.cancelled else self.finish_reason or "stop",
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.generated),
            prefill_tokens_per_s=(len(self.prompt) - self.num_cached) / max(first - self.started_at, 1e-9),
            decode_tokens_per_s=later / max(now - first, 1e-9) if later else 0.0,
            split=split,
            ranks=num_ranks,
            stop=self.stops.match,
            cached_tokens=self.num_cached,
            guessed_tokens=self.num_guessed,
        )
