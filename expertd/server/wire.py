"""Engine events out, JSON: what chat and completion answers look like, whole and in pieces."""

import json
import time
import uuid
from typing import Any

from expertd.engine.messages import Done

Json = dict[str, Any]
END_OF_STREAM = b"data: [DONE]\n\n"


class Format:
    """One answer's identity and shape. The subclasses say how a choice looks; all else is shared."""

    prefix = ""
    whole = ""
    piece = ""

    def __init__(self, model_id: str, include_usage: bool = False) -> None:
        self.request_id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._model_id = model_id
        self._include_usage = include_usage
        self._created = int(time.time())

    def answer(self, text: str, done: Done) -> Json:
        """The whole answer of a request without a stream."""
        choice = {"index": 0, **self._content(text), "logprobs": None, "finish_reason": done.finish_reason}
        return {**self._head(self.whole), "choices": [choice], "usage": usage_of(done)}

    def opening(self) -> bytes:
        """The events before the first text."""
        return b""

    def text(self, text: str) -> bytes:
        """The event of a piece of text."""
        return self._event(self._delta(text), None)

    def closing(self, done: Done) -> bytes:
        """The events after the last text, `[DONE]` included."""
        last = self._event(self._delta(""), done.finish_reason)
        if self._include_usage:
            last += encode_event({**self._head(self.piece), "choices": [], "usage": usage_of(done)})
        return last + END_OF_STREAM

    def _event(self, content: Json, finish_reason: str | None) -> bytes:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return encode_event({**self._head(self.piece), "choices": [choice], **usage})

    def _head(self, kind: str) -> Json:
        return {"id": self.request_id, "object": kind, "created": self._created, "model": self._model_id}

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str) -> Json:
        raise NotImplementedError


class ChatFormat(Format):
    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        """The event that says who speaks."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None)

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}


class CompletionFormat(Format):
    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> Json:
        return {"text": text}

    _delta = _content


def usage_of(done: Done) -> Json:
    """The token counts of a request."""
    total = done.prompt_tokens + done.completion_tokens
    counts = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens}
    return {**counts, "total_tokens": total}


def encode_event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
