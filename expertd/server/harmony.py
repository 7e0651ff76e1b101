"""Answers in harmony, the format of gpt-oss: messages with a channel each, and a recipient if they are calls.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>CONTENT<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>

mlx-lm has no parser for it; the format is OpenAI's (cookbook, "OpenAI harmony response format").
"""

import re
from typing import Any

from expertd.server.parts import Arguments, Call, Part, Splitter

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
MESSAGE = "<|message|>"
# A message ends with the first, the next one begins with one of the others.
ENDS = ["<|end|>", "<|call|>", "<|start|>", "<|channel|>"]


class HarmonySplitter(Splitter):
    """As Splitter. Text that begins without a header is content, as it is when a grammar begins at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._mode, self._header, self._is_first = "header", "", True

    def _marks(self) -> list[str]:
        return [MESSAGE] if self._mode == "header" else ENDS

    def _pass(self, mark: str) -> list[Part]:
        self._fresh = True
        if self._mode != "header":
            self._mode, self._header = "header", mark if mark in ENDS[2:] else ""
            return []
        header, self._header = self._header, ""
        if (recipient := _RECIPIENT.search(header)) and self._parser:
            self._mode = "call"
            self.num_calls += 1
            return [Call(self.num_calls - 1, recipient[1])]
        channel = _CHANNEL.search(header)
        self._mode = "reasoning" if channel and channel[1] == "analysis" else "content"
        return []

    def _take(self, text: str) -> list[Part]:
        if self._mode == "header" and text and self._is_first and not text.startswith("<|"):
            self._mode = "content"
        self._is_first = self._is_first and not text
        if self._mode == "header":
            self._header += text
            return []
        if self._mode == "call":
            return [Arguments(self.num_calls - 1, text)] if text else []
        return super()._take(text)

    def _end_call(self) -> list[Part]:
        return []
