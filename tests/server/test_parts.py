"""Reasoning, content and tool calls out of one text, in whatever pieces it comes."""

import json
import random
from typing import Any

import pytest

from expertd.dialect import HARMONY, Dialect
from expertd.server.harmony import HarmonySplitter
from expertd.server.parts import Arguments, Call, Content, Reasoning, Splitter
from expertd.server.tools import parser_of

JSON = Dialect("<think>", "</think>", "<tool_call>", "</tool_call>", "json_tools")
XML = Dialect("<think>", "</think>", "<tool_call>", "</tool_call>", "qwen3_coder")
KIMI = Dialect(
    call_start="<|tool_calls_section_begin|>", call_end="<|tool_calls_section_end|>", call_parser="kimi_k2"
)
GPT_OSS = Dialect(call_parser=HARMONY)
MISTRAL = Dialect(call_start="[TOOL_CALLS]", call_parser="mistral")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


def split(splitter: Splitter, pieces: list[str]) -> dict[str, Any]:
    """What the parts add up to; a call's arguments are read as JSON."""
    found: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
    for part in [
        p for piece in [*pieces, None] for p in (splitter.finish() if piece is None else splitter.feed(piece))
    ]:
        if isinstance(part, Reasoning):
            found["reasoning"] += part.text
        elif isinstance(part, Content):
            found["content"] += part.text
        elif isinstance(part, Call):
            assert part.index == len(found["calls"])
            found["calls"].append([part.name, ""])
        elif isinstance(part, Arguments):
            found["calls"][part.index][1] += part.text
    found["calls"] = [(name, json.loads(text)) for name, text in found["calls"]]
    return found


@pytest.mark.parametrize(
    "dialect, text, wanted",
    [
        (JSON, "plain text \n", ("", "plain text \n", [])),
        (JSON, "<think>\nwhy\n\n</think>\n\nso", ("why", "so", [])),
        (JSON, "<think>cut off ", ("cut off ", "", [])),
        (JSON, "a < b <thin", ("", "a < b <thin", [])),
        (JSON, 'a "<think>" is no thought', ("", 'a "<think>" is no thought', [])),
        (
            JSON,
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            ("", "", [("f", {"a": 1})]),
        ),
        (
            JSON,
            '<think>t</think>Look:\n<tool_call>{"name":"f","arguments":{"s":"}</x>\\"{"}}</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            ("t", "Look:", [("f", {"s": '}</x>"{'}), ("g", {})]),
        ),
        # Arguments first: read when it is whole.
        (JSON, '<tool_call>{"arguments": {"a": 2}, "name": "f"}</tool_call>', ("", "", [("f", {"a": 2})])),
        # No call at all: nothing is lost.
        (JSON, "<tool_call>nonsense</tool_call> end", ("", "<tool_call>nonsense</tool_call>end", [])),
        (
            XML,
            "<tool_call>\n<function=f>\n<parameter=a>\n7\n</parameter>\n</function>\n</tool_call>",
            ("", "", [("f", {"a": 7})]),
        ),
        (
            KIMI,
            "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
            '{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}'
            "<|tool_call_end|><|tool_calls_section_end|>",
            ("", "Hm.", [("f", {"a": 1}), ("g", {})]),
        ),
        (
            GPT_OSS,
            "<|channel|>analysis<|message|>why < because<|end|><|start|>assistant<|channel|>final<|message|>so",
            ("why < because", "so", []),
        ),
        (
            GPT_OSS,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a": 1}',
            ("hm", "", [("f", {"a": 1})]),
        ),
        (GPT_OSS, "no header", ("", "no header", [])),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 3}', ("", "", [("f", {"a": 3})])),
    ],
)
def test_a_text_is_divided_the_same_in_any_pieces(
    dialect: Dialect, text: str, wanted: tuple[Any, ...]
) -> None:
    chance = random.Random(0)
    cuts = [[text], list(text)]
    for _ in range(20):
        places = sorted(chance.sample(range(len(text) + 1), min(4, len(text))))
        cuts.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    for pieces in cuts:
        kind = HarmonySplitter if dialect is GPT_OSS else Splitter
        found = split(kind(dialect, parser_of(dialect, TOOLS)), pieces)
        assert (found["reasoning"], found["content"], found["calls"]) == wanted, pieces


FORCED = '[{"name": "f", "arguments": {"a": [1, "]}"]}}, {"name":"g","arguments":{}}]'


def test_forced_calls_come_as_they_are_written() -> None:
    splitter = Splitter(JSON, only_calls=True)
    parts = [
        part for letter in "<think>x</think>" + FORCED for part in splitter.feed(letter)
    ] + splitter.finish()
    assert parts[0] == Reasoning("x")
    assert [p.name for p in parts if isinstance(p, Call)] == ["f", "g"]
    first = [p.text for p in parts if isinstance(p, Arguments) and p.index == 0]
    assert "".join(first) == '{"a": [1, "]}"]}' and len(first) == len("".join(first))  # letter by letter


def test_one_call_at_a_time() -> None:
    text = '<tool_call>{"name":"f","arguments":{}}</tool_call>' * 2
    found = split(Splitter(JSON, parser_of(JSON, TOOLS), parallel=False), [text])
    assert found["calls"] == [("f", {})]


def test_without_tools_a_call_is_text() -> None:
    text = '<tool_call>{"name":"f","arguments":{}}</tool_call>'
    assert split(Splitter(JSON), list(text))["content"] == text


def test_text_without_marks_is_not_held_back() -> None:
    splitter = Splitter(Dialect())
    assert splitter.feed("a <") == [Content("a <")]
