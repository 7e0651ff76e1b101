"""Engine events out, JSON: what OpenAI's chat and completion answers look like, whole and in pieces.

A Choice turns the events of one Submit into pieces, and keeps what it gave: the whole answer is the sum of the pieces.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from expertd.engine.messages import Candidate, Done, Logprobs, Started, Token

Json = dict[str, Any]
Event = Started | Token | Done
END_OF_STREAM = b"data: [DONE]\n\n"


class Choice:
    """One choice of an answer. The subclasses say how it looks; all else is shared.

    Log-probabilities are given for the tokens of the text: not for the one that ended it, and not for what a stop
    string cut off. In a stream they come with their text, which may be held back until it cannot be a stop string's.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.done: Done | None = None
        self._num_chars = 0
        self._waiting: list[Logprobs] = []  # those whose text has not come yet

    def take(self, event: Event) -> list[Json]:
        """The pieces that an event gives, each the choice of a chunk."""
        if isinstance(event, Token):
            self._waiting += event.logprobs
            self._num_chars += len(event.text)
            return self._text(event)
        if isinstance(event, Started):
            return self._opening(event)
        self.done = event
        return self._closing(event)

    def whole(self) -> Json:
        """The choice of a whole answer, after its last event."""
        raise NotImplementedError

    def _opening(self, started: Started) -> list[Json]:
        return []

    def _text(self, token: Token) -> list[Json]:
        raise NotImplementedError

    def _closing(self, done: Done) -> list[Json]:
        raise NotImplementedError

    def _take_logprobs(self) -> list[Logprobs]:
        """Those of the tokens whose text is among the characters that have come: the first ones."""
        if not self._waiting:
            return []
        done = self.done
        shown = self._waiting
        if not (done and done.finish_reason == "length"):
            shown = [found for found in shown if found.text_offset < self._num_chars]
        self._waiting = self._waiting[len(shown) :]
        return shown

    def _piece(self, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


class Answer:
    """A response: its identity, and its choices, `n` for each prompt."""

    def __init__(self, head: Json, whole: str, piece: str, choices: Sequence[Choice], n: int = 1) -> None:
        """`head` is what all objects begin with, but for `whole` and `piece`, the names of their kinds."""
        named = {k: v for k, v in head.items() if k != "id"}
        self._whole = {"id": head["id"], "object": whole, **named}
        self._piece = {"id": head["id"], "object": piece, **named}
        self.choices, self._n = choices, n

    def chunks(self, index: int, event: Event, usage: bool) -> list[Json]:
        """What an event of choice number `index` adds to a stream; with `usage` each chunk says that it has none."""
        none = {"usage": None} if usage else {}
        return [{**self._piece, "choices": [piece], **none} for piece in self.choices[index].take(event)]

    def usage_chunk(self) -> Json:
        return {**self._piece, "choices": [], "usage": self.usage()}

    def whole(self) -> Json:
        """The answer of a request without a stream, after the last event."""
        return {**self._whole, "choices": [c.whole() for c in self.choices], "usage": self.usage()}

    def usage(self) -> Json:
        dones = [c.done for c in self.choices if c.done]
        prompts = [c.done for c in self.choices[:: self._n] if c.done]
        reasoning = sum(getattr(c, "reasoning_tokens", 0) for c in self.choices)
        return usage_of(dones, prompts, reasoning)


def shape_of(candidate: Candidate) -> Json:
    """A token and its log-probability, as in chat answers."""
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.data)}


def usage_of(dones: list[Done], prompts: list[Done], reasoning_tokens: int) -> Json:
    """The token counts of several choices; `prompts` has one of each prompt."""
    prompt, completion = sum(d.prompt_tokens for d in prompts), sum(d.completion_tokens for d in dones)
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion}
    usage["total_tokens"] = prompt + completion
    usage["prompt_tokens_details"] = {"cached_tokens": sum(d.cached_tokens for d in prompts)}
    if reasoning_tokens:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return usage


def json_of(text: str) -> Json:
    """The JSON object that a text is, {} if it was cut off before it became one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def encode_event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def encode_named(value: Json) -> bytes:
    """One server-sent event, named by its "type"."""
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), msgspec.json.encode(value))
