"""Anthropic's Messages, answers: content blocks one after the other, whole and as events."""

from typing import Any

from expertd.engine.messages import Done, Started, Token
from expertd.server.chat import call_id
from expertd.server.parts import Arguments, Call, Content, Part, Reasoning, Splitter
from expertd.server.wire import Event, Json, json_of


class MessageEvents:
    """Builds one message. Like ResponseEvents a pure function of the request and the engine's events."""

    def __init__(self, message_id: str, model_id: str, splitter: Splitter) -> None:
        self._id, self._model_id, self._splitter = message_id, model_id, splitter
        self._blocks: list[Json] = []
        self._texts: list[str] = []  # of the open block
        self._prompt_tokens = 0
        self._done: Done | None = None

    def message(self) -> Json:
        """The message as it is now."""
        done, stop = self._done, None
        if done:
            stop = self._stop_reason(done)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model_id,
            "content": self._blocks,
            "stop_reason": stop,
            "stop_sequence": (done.stop if done else "") or None,
            "usage": self._usage(),
        }

    def take(self, event: Event) -> list[Json]:
        """The events that follow from one of the engine."""
        if isinstance(event, Started):
            self._prompt_tokens = event.prompt_tokens
            return [{"type": "message_start", "message": {**self.message(), "content": []}}]
        if isinstance(event, Token):
            return [e for part in self._splitter.feed(event.text) for e in self._take_part(part)]
        return self._finish(event)

    def _finish(self, done: Done) -> list[Json]:
        events = [e for part in self._splitter.finish() for e in self._take_part(part)]
        events += self._close()
        self._done = done
        delta = {"stop_reason": self._stop_reason(done), "stop_sequence": done.stop or None}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def _stop_reason(self, done: Done) -> str:
        if done.finish_reason == "length":
            return "max_tokens"
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        return "stop_sequence" if done.stop else "end_turn"

    def _usage(self) -> Json:
        done = self._done
        cached = done.cached_tokens if done else 0
        return {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": done.completion_tokens if done else 0,
        }

    def _take_part(self, part: Part) -> list[Json]:
        if isinstance(part, Call):
            block = {
                "type": "tool_use",
                "id": call_id(self._id, 0, part.index),
                "name": part.name,
                "input": {},
            }
            return self._begin(block)
        events: list[Json] = []
        if isinstance(part, Reasoning) and not self._is_open("thinking"):
            events = self._begin({"type": "thinking", "thinking": "", "signature": ""})
        elif isinstance(part, Content) and not self._is_open("text"):
            events = self._begin({"type": "text", "text": ""})
        self._texts.append(part.text)
        return [*events, self._of_block("content_block_delta", delta=_delta(part))]

    def _is_open(self, kind: str) -> bool:
        return bool(self._blocks) and self._blocks[-1]["type"] == kind

    def _begin(self, block: Json) -> list[Json]:
        events = self._close()
        self._blocks.append(block)
        return [*events, self._of_block("content_block_start", content_block=dict(block))]

    def _close(self) -> list[Json]:
        """End the open block, the last one, if there is one."""
        if not self._blocks:
            return []
        block, text, self._texts = self._blocks[-1], "".join(self._texts), []
        if block["type"] == "tool_use":
            block["input"] = json_of(text)
        else:
            block[block["type"]] = text
        return [self._of_block("content_block_stop")]

    def _of_block(self, kind: str, **values: Any) -> Json:
        return {"type": kind, "index": len(self._blocks) - 1, **values}


def _delta(part: Reasoning | Content | Arguments) -> Json:
    if isinstance(part, Reasoning):
        return {"type": "thinking_delta", "thinking": part.text}
    if isinstance(part, Content):
        return {"type": "text_delta", "text": part.text}
    return {"type": "input_json_delta", "partial_json": part.text}
