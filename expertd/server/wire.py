"""Engine events out, JSON: what chat and completion answers look like, whole and in pieces."""

import json
import time
import uuid
from typing import Any

from expertd.engine.messages import Candidate, Done, Logprobs, Token

Json = dict[str, Any]
END_OF_STREAM = b"data: [DONE]\n\n"


class Format:
    """One answer's identity and shape. The subclasses say how a choice looks; all else is shared.

    Log-probabilities are given for the tokens of the text: not for the one that ended it, and not for what a stop
    string cut off. In a stream they come with their text, which may be held back until it cannot be a stop string's.
    """

    prefix = ""
    whole = ""
    piece = ""

    def __init__(self, model_id: str, include_usage: bool = False) -> None:
        self.request_id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._model_id = model_id
        self._include_usage = include_usage
        self._created = int(time.time())
        self._num_chars = 0
        self._waiting: list[Logprobs] = []  # those whose text has not come yet

    def answer(self, tokens: list[Token], done: Done) -> Json:
        """The whole answer of a request without a stream."""
        text = "".join(token.text for token in tokens)
        found = [logprobs for token in tokens for logprobs in token.logprobs]
        shown = self._with_text(found, len(text), done)
        choice = self._choice(self._content(text), shown if found else None, done.finish_reason)
        return {**self._head(self.whole), "choices": [choice], "usage": usage_of(done)}

    def opening(self) -> bytes:
        """The events before the first text."""
        return b""

    def text(self, token: Token) -> bytes:
        """The event of the text that came with a token, if any did."""
        self._waiting += token.logprobs
        if not token.text:
            return b""
        self._num_chars += len(token.text)
        return self._event(self._delta(token.text), self._take(None), None)

    def closing(self, done: Done) -> bytes:
        """The events after the last text, `[DONE]` included."""
        last = self._event(self._delta(""), self._take(done), done.finish_reason)
        if self._include_usage:
            last += encode_event({**self._head(self.piece), "choices": [], "usage": usage_of(done)})
        return last + END_OF_STREAM

    def _take(self, done: Done | None) -> list[Logprobs] | None:
        shown = self._with_text(self._waiting, self._num_chars, done)
        self._waiting = self._waiting[len(shown) :]
        return shown or None

    @staticmethod
    def _with_text(logprobs: list[Logprobs], num_chars: int, done: Done | None) -> list[Logprobs]:
        """Those of the tokens whose text is among the first `num_chars` characters: the first ones."""
        if done and done.finish_reason == "length":
            return logprobs
        return [found for found in logprobs if found.text_offset < num_chars]

    def _event(self, content: Json, logprobs: list[Logprobs] | None, finish_reason: str | None) -> bytes:
        choice = self._choice(content, logprobs, finish_reason)
        usage = {"usage": None} if self._include_usage else {}
        return encode_event({**self._head(self.piece), "choices": [choice], **usage})

    def _choice(self, content: Json, logprobs: list[Logprobs] | None, finish_reason: str | None) -> Json:
        shape = None if logprobs is None else self._logprobs(logprobs)
        return {"index": 0, **content, "logprobs": shape, "finish_reason": finish_reason}

    def _head(self, kind: str) -> Json:
        return {"id": self.request_id, "object": kind, "created": self._created, "model": self._model_id}

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str) -> Json:
        raise NotImplementedError

    def _logprobs(self, logprobs: list[Logprobs]) -> Json:
        raise NotImplementedError


class ChatFormat(Format):
    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        """The event that says who speaks."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None, None)

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, logprobs: list[Logprobs]) -> Json:
        content = [{**shape_of(f.chosen), "top_logprobs": [shape_of(c) for c in f.top]} for f in logprobs]
        return {"content": content, "refusal": None}


class CompletionFormat(Format):
    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> Json:
        return {"text": text}

    _delta = _content

    def _logprobs(self, logprobs: list[Logprobs]) -> Json:
        return {
            "tokens": [_named(found.chosen) for found in logprobs],
            "token_logprobs": [found.chosen.logprob for found in logprobs],
            "top_logprobs": [_by_name([*found.top, found.chosen]) for found in logprobs],
            "text_offset": [found.text_offset for found in logprobs],
        }


def shape_of(candidate: Candidate) -> Json:
    """A token and its log-probability, as in chat answers."""
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.data)}


def _named(candidate: Candidate) -> str:
    """A token's name in completions: "bytes:" marks one that is no UTF-8 by itself."""
    whole = candidate.text.encode() == candidate.data
    return candidate.text if whole else "bytes:" + candidate.text


def _by_name(candidates: list[Candidate]) -> dict[str, float]:
    """Likeliest first; of tokens with the same text, such as a word and a special token, the likelier one."""
    found: dict[str, float] = {}
    for candidate in candidates:
        found.setdefault(_named(candidate), candidate.logprob)
    return found


def usage_of(done: Done) -> Json:
    """The token counts of a request."""
    total = done.prompt_tokens + done.completion_tokens
    counts = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens}
    return {**counts, "total_tokens": total}


def encode_event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
