"""Answers that follow a grammar: which tokens may come next, by llguidance (Microsoft, Earley's parser over bytes).

A grammar is compiled for one sequence, on rank 0 alone, between two steps. Limits bound what that and each mask may
cost, so that no request holds up the others for long: of eight hostile grammars the worst took 0.9 s to compile and
0.05 s for a mask; a usual schema takes milliseconds.
"""

import json
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from expertd.engine.messages import Grammar
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.model.sampler import Row

# As the request's text; a schema of a large API has some 50 KB.
MAX_GRAMMAR_BYTES = 256 << 10
# At most one space where JSON allows any: a model that may write white space for ever sometimes does.
WHITESPACE = {"whitespace_pattern": "[ ]?"}


class Grammars:
    """Compiles grammars for one checkpoint. What llguidance needs to know of its vocabulary is found once, about
    a second's work for 150,000 tokens, when the first grammar comes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._limits = LLParserLimits(max_grammar_size=30_000, max_lexer_states=50_000, verbose_errors=False)

    def compile(self, grammar: Grammar) -> "Matcher":
        """A matcher at the beginning of an answer. Raises ConfigError that names the request's parameter."""
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            raise ConfigError(
                f"{grammar.param}: {len(grammar.text.encode())} bytes, at most {MAX_GRAMMAR_BYTES}. Simplify it."
            )
        try:
            inner = LLMatcher(self._vocabulary_of_model(), _source(grammar), log_level=0, limits=self._limits)
        except (ValueError, TypeError) as e:
            raise ConfigError(_refusal(grammar, str(e))) from e
        if reason := inner.get_error() or _error_of_first_token(inner):
            raise ConfigError(_refusal(grammar, reason))
        return Matcher(inner, self._tokenizer.end_ids)

    def _vocabulary_of_model(self) -> LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = self._tokenizer.for_grammars(self._vocab_size)
        return self._vocabulary


def _error_of_first_token(inner: LLMatcher) -> str:
    """Some grammars turn out to be too large only when something is read by them."""
    probe = inner.deep_copy()
    if allowed := np.flatnonzero(_bits(probe)).tolist():
        probe.consume_token(allowed[0])
    return str(probe.get_error())


def _bits(inner: LLMatcher) -> NDArray[np.bool_]:
    """Which tokens may come next [vocab, and up to 31 more]."""
    packed = np.frombuffer(inner.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little").view(np.bool_)


def _source(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        options: Any = WHITESPACE
        return str(LLMatcher.grammar_from_json_schema(json.loads(grammar.text), overrides=options))
    make = {"regex": LLMatcher.grammar_from_regex, "lark": LLMatcher.grammar_from_lark}[grammar.kind]
    return str(make(grammar.text))


def _refusal(grammar: Grammar, reason: str) -> str:
    text = " ".join(reason.split())[:300].rstrip(".")
    return f"{grammar.param}: this {grammar.kind.replace('_', ' ')} cannot be followed: {text}. Change it."


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, inner: LLMatcher, end_ids: set[int]) -> None:
        self._inner, self._end_ids = inner, np.array(sorted(end_ids), dtype=np.int64)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._inner.is_stopped())

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further, "" while it can."""
        return str(self._inner.get_error())

    def masked(self, row: Row) -> Row:
        """The logits [vocab], minus infinity for tokens that the grammar forbids. End tokens are possible where the
        grammar may end, all of the checkpoint's and not only the one that llguidance knows."""
        allowed = _bits(self._inner)[: len(row)]
        allowed[self._end_ids] = self._inner.is_accepting()
        return np.where(allowed, row, np.float32(-np.inf))

    def take(self, token_id: int) -> None:
        """The sequence was given this token; one that the grammar forbids leads to `error`."""
        self._inner.consume_token(token_id)
