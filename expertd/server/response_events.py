"""OpenAI's Responses, answers: a pure function of what was asked (the note) and of the engine's events.

So every host that knows a request's events tells the same story of it, with the same ids and sequence numbers: a client
that lost one host goes on at another, after the last number it has.
"""

from dataclasses import dataclass, field
from typing import Any

from expertd.engine.messages import Done, Logprobs, Token
from expertd.server.chat import call_id
from expertd.server.parts import Arguments, Call, Content, Part, Reasoning, Splitter
from expertd.server.wire import Event, Json, shape_of


@dataclass
class _Open:
    """The output item that is being written; `kind` is "reasoning", "message" or "function_call". `place` is what all
    events of its content have."""

    kind: str
    item: Json
    index: int
    place: Json
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)


class ResponseEvents:
    """Builds one response. `base` is the response object without status and output; `splitter` divides its text."""

    def __init__(self, base: Json, splitter: Splitter, logprobs: bool = False) -> None:
        self._base, self._splitter, self._wants_logprobs = base, splitter, logprobs
        self._suffix = base["id"].partition("_")[2]
        self._number = 0
        self._output: list[Json] = []
        self._open: _Open | None = None
        self._reasoning_tokens = 0
        self._waiting: list[Logprobs] = []
        self._done: Done | None = None
        self._error: Json | None = None
        self.status = "in_progress"

    def response(self) -> Json:
        """The response object as it is now."""
        reason = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        usage = self._usage(self._done) if self._done else None
        told = {"incomplete_details": reason, "error": self._error, "usage": usage}
        return {**self._base, "status": self.status, "output": list(self._output), **told}

    def take(self, event: Event) -> list[Json]:
        """The events that follow from one of the engine."""
        if isinstance(event, Token):
            return self._take_token(event)
        if isinstance(event, Done):
            return self._finish(event)
        return [
            self._event("response.created", response=self.response()),
            self._event("response.in_progress", response=self.response()),
        ]

    def fail(self, code: str, message: str) -> list[Json]:
        """The last event, when the answer has no end."""
        self.status, self._error = "failed", {"code": code, "message": message}
        return [self._event("response.failed", response=self.response())]

    def cancel(self) -> Json:
        """The response object of an answer that was told to end."""
        self._close("incomplete")
        self.status = "cancelled"
        return self.response()

    def _take_token(self, token: Token) -> list[Json]:
        self._waiting += token.logprobs
        before = self._splitter.reasoning
        events = [e for part in self._splitter.feed(token.text) for e in self._take_part(part)]
        if before or self._splitter.reasoning:
            self._reasoning_tokens += len(token.token_ids)
            self._waiting = []
        return events

    def _finish(self, done: Done) -> list[Json]:
        events = [e for part in self._splitter.finish() for e in self._take_part(part)]
        if not (self._output or self._open):
            events += self._begin("message", self._message())
        self._done = done
        status = "incomplete" if done.finish_reason == "length" else "completed"
        events += self._close(status)
        self.status = status
        return [*events, self._event(f"response.{status}", response=self.response())]

    def _take_part(self, part: Part) -> list[Json]:
        if isinstance(part, Call):
            item = {
                "id": self._id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call_id(self._base["id"], 0, part.index),
                "name": part.name,
                "arguments": "",
            }
            return self._begin("function_call", item)
        events = []
        if isinstance(part, Reasoning) and not self._is_open("reasoning"):
            events = self._begin("reasoning", self._reasoning())
        elif isinstance(part, Content) and not self._is_open("message"):
            events = self._begin("message", self._message())
        return [*events, self._delta(part)]

    def _message(self) -> Json:
        return {
            "id": self._id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def _reasoning(self) -> Json:
        return {
            "id": self._id("rs"),
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open.kind == kind

    def _id(self, prefix: str) -> str:
        number = len(self._output) + (self._open is not None)
        return f"{prefix}_{self._suffix}{number:02d}"

    def _begin(self, kind: str, item: Json) -> list[Json]:
        events = self._close("completed")
        index, is_call = len(self._output), kind == "function_call"
        place = {"output_index": index, "item_id": item["id"], **({} if is_call else {"content_index": 0})}
        self._open = _Open(kind, item, index, place)
        events.append(self._of_item("response.output_item.added", item=dict(item)))
        if not is_call:
            part = self._part(kind, "", [])
            events.append(self._of_content("response.content_part.added", part=part))
        return events

    def _delta(self, part: Reasoning | Content | Arguments) -> Json:
        assert self._open is not None
        self._open.texts.append(part.text)
        if isinstance(part, Arguments):
            return self._of_content("response.function_call_arguments.delta", delta=part.text)
        if isinstance(part, Reasoning):
            return self._of_content("response.reasoning_text.delta", delta=part.text)
        logprobs = self._take_logprobs()
        self._open.logprobs += logprobs
        return self._of_content("response.output_text.delta", delta=part.text, logprobs=logprobs)

    def _take_logprobs(self) -> list[Json]:
        found, self._waiting = self._waiting, []
        if not self._wants_logprobs:
            return []
        return [{**shape_of(f.chosen), "top_logprobs": [shape_of(c) for c in f.top]} for f in found]

    def _close(self, status: str) -> list[Json]:
        """End the open item, if there is one."""
        now = self._open
        if now is None:
            return []
        item, text = {**now.item, "status": status}, "".join(now.texts)
        if now.kind == "function_call":
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            events = [self._of_content(kind, arguments=text, name=item["name"])]
        else:
            part = self._part(now.kind, text, now.logprobs)
            item["content"] = [part]
            name = "output_text" if now.kind == "message" else "reasoning_text"
            more = {"logprobs": now.logprobs} if now.kind == "message" else {}
            events = [
                self._of_content(f"response.{name}.done", text=text, **more),
                self._of_content("response.content_part.done", part=part),
            ]
        events.append(self._of_item("response.output_item.done", item=item))
        self._output.append(item)
        self._open = None
        return events

    @staticmethod
    def _part(kind: str, text: str, logprobs: list[Json]) -> Json:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}

    def _of_content(self, kind: str, **values: Any) -> Json:
        assert self._open is not None
        return self._event(kind, **self._open.place, **values)

    def _of_item(self, kind: str, **values: Any) -> Json:
        assert self._open is not None
        return self._event(kind, output_index=self._open.index, **values)

    def _event(self, kind: str, **values: Any) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **values}

    def _usage(self, done: Done) -> Json:
        return {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": done.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": done.prompt_tokens + done.completion_tokens,
        }
