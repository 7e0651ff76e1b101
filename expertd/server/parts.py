"""An answer's text, as it comes, divided into reasoning, content and tool calls. Pure: no I/O, no clock, no chance.

The marks come from the checkpoint's dialect. Text that may be the beginning of a mark is held back until it is none,
and white space beside a mark is dropped. Nothing else is ever lost: a call that no parser understands stays content.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from expertd.dialect import Dialect

# Gives what a parser of mlx-lm finds in the text of a call: one or several {"name", "arguments"}.
Parser = Callable[[str], Any]

# The beginning of a call in JSON, up to its arguments, which must be an object.
_HEAD = re.compile(
    r'[\s\[\],}]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_log = logging.getLogger(__name__)


class Reasoning(msgspec.Struct, frozen=True):
    text: str


class Content(msgspec.Struct, frozen=True):
    text: str


class Call(msgspec.Struct, frozen=True):
    """A tool call begins; `index` counts those of the answer."""

    index: int
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """More of the arguments of call number `index`, which are one JSON object in the end."""

    index: int
    text: str


Part = Reasoning | Content | Call | Arguments


class JsonCalls:
    """Reads calls written as `{"name": "f", "arguments": {...}}`, one after the other or in a list, as they come."""

    def __init__(self, first_index: int = 0) -> None:
        self.num_calls = 0
        self._first_index = first_index
        self._head, self._depth = "", 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> Iterator[Part]:
        """Yield what `text` adds."""
        while text:
            if self._depth == 0:
                self._head += text
                match = _HEAD.match(self._head)
                if not match:
                    return
                text, self._head = self._head[match.end() :], ""
                index = self._first_index + self.num_calls
                self.num_calls += 1
                yield Call(index, json.loads(match[1]))
            end = self._end_of_object(text)
            yield Arguments(self._first_index + self.num_calls - 1, text[:end])
            text = text[end:]

    def _end_of_object(self, text: str) -> int:
        """How much of `text` belongs to the object that is open, or begins here."""
        for i, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return len(text)


class Splitter:
    """Divides the text of one answer.

    `parser` reads native calls, None where none are possible; `only_calls` is for an answer that is nothing but calls
    in JSON, because a grammar made it so.
    """

    def __init__(
        self, dialect: Dialect, parser: Parser | None = None, only_calls: bool = False, parallel: bool = True
    ) -> None:
        self._dialect, self._parser = dialect, parser
        self._parallel = parallel
        self._mode = "content"
        self._held = ""
        self._fresh = False  # only white space has come since the last mark
        self._first = True  # there is no content yet, and no call
        self._calls: JsonCalls | None = JsonCalls() if only_calls else None
        self._only_calls = only_calls
        self._call_text = ""
        self.num_calls = 0

    @property
    def reasoning(self) -> bool:
        """Whether the text is inside reasoning now."""
        return self._mode == "reasoning"

    def feed(self, text: str) -> list[Part]:
        """Take text; gives the parts that became certain."""
        parts: list[Part] = []
        self._held += text
        while self._held and (marks := self._marks()):
            found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
            if not found:
                keep = max(_overlap(self._held, mark) for mark in marks)
                keep = max(keep, len(self._held) - len(self._held[: len(self._held) - keep].rstrip()))
                parts += self._take(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                return self._bounded(parts)
            at, mark = min(found)
            parts += self._take(self._held[:at].rstrip())
            self._held = self._held[at + len(mark) :]
            parts += self._pass(mark)
        parts += self._take(self._held)
        self._held = ""
        return self._bounded(parts)

    def finish(self) -> list[Part]:
        """Give what was held back; the text ends here."""
        held, self._held = self._held, ""
        parts = self._take(held)
        if self._mode == "call":
            parts += self._end_call()
        return self._bounded(parts)

    def _marks(self) -> list[str]:
        d = self._dialect
        if self._mode == "reasoning":
            return [d.think_end]
        if self._mode == "call":
            return [d.call_end] if d.call_end else []
        calls = [d.call_start] if self._parser and d.call_start else []
        # Reasoning comes first: later the mark is a part of the text, or of a string in JSON.
        if self._first and d.think_start:
            begin = self._held.lstrip()[: len(d.think_start)]
            if d.think_start.startswith(begin):
                return [d.think_start, *calls]
        return calls

    def _pass(self, mark: str) -> list[Part]:
        """Go past a mark, into what it begins."""
        self._fresh = True
        parts: list[Part] = []
        if self._mode == "call":
            parts = self._end_call()
        if self._mode != "content":
            self._mode = "content"
        elif mark == self._dialect.think_start:
            self._mode = "reasoning"
        else:
            self._mode, self._call_text = "call", ""
            in_json = self._dialect.call_parser == "json_tools"
            self._calls = JsonCalls(self.num_calls) if in_json else None
        return parts

    def _take(self, text: str) -> list[Part]:
        """Text that is no mark and no beginning of one."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        if not text:
            return []
        if self._mode == "reasoning":
            return [Reasoning(text)]
        self._first = self._first and not text.strip()
        if self._mode == "content" and not self._only_calls:
            return [Content(text)]
        self._call_text += text
        if self._calls is None:
            return []
        parts = list(self._calls.feed(text))
        if self._only_calls:
            self.num_calls = self._calls.num_calls
        return parts

    def _end_call(self) -> list[Part]:
        """A native call is complete, or the text is."""
        if self._calls and self._calls.num_calls:
            self.num_calls += self._calls.num_calls
            return []
        text, self._call_text = self._call_text, ""
        try:
            assert self._parser is not None
            found = self._parser(text)
            calls = [
                (str(c["name"]), c["arguments"]) for c in (found if isinstance(found, list) else [found])
            ]
        except Exception as e:  # a parser of mlx-lm may raise anything for a text that is no call
            _log.info("a tool call could not be read: %s", type(e).__name__)
            return [Content(self._dialect.call_start + text + self._dialect.call_end)]
        parts: list[Part] = []
        for name, arguments in calls:
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            parts += [Call(self.num_calls, name), Arguments(self.num_calls, written)]
            self.num_calls += 1
        return parts

    def _bounded(self, parts: list[Part]) -> list[Part]:
        """Without calls beside the first, if the client wants them one at a time."""
        if self._parallel:
            return _joined(parts)
        return _joined([p for p in parts if not isinstance(p, Call | Arguments) or p.index == 0])


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one part."""
    if len(parts) == 1 and isinstance(parts[0], Content) and parts[0].text:  # nearly always
        return parts
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if (
            last is not None
            and not isinstance(part, Call)
            and not isinstance(last, Call)
            and msgspec.structs.replace(last, text="") == msgspec.structs.replace(part, text="")
        ):
            found[-1] = msgspec.structs.replace(last, text=last.text + part.text)
        elif isinstance(part, Call) or part.text:
            found.append(part)
    return found


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may begin `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
