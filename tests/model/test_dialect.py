"""What a tokenizer and its template tell of how a model marks reasoning and calls."""

from pathlib import Path
from typing import Any

import pytest

from expertd.engine.text import Tokenizer
from expertd.model.dialect import find_dialect
from tests.tiny import END_ID, write_json, write_tokenizer

QWEN = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"
    "{% generation %}{% endgeneration %}{% if enable_thinking %}<think>{% endif %}"
)
HARMONY = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>", "<|end|>"]


def tokenizer_with(folder: Path, template: str, special: list[str], plain: list[str]) -> Tokenizer:
    write_tokenizer(folder)
    write_json(folder / "config.json", {"model_type": "qwen3_moe"})
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder, {"eos_token_id": END_ID})
    inner: Any = tokenizer.inner
    inner.add_special_tokens({"additional_special_tokens": special})
    inner.add_tokens(plain)
    tokenizer.speak(find_dialect(inner))
    return tokenizer


def test_qwen(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(
        tmp_path, QWEN, ["<|im_end|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    )
    found = tokenizer.dialect
    assert (found.think_start, found.think_end, found.call_start) == ("<think>", "</think>", "<tool_call>")
    assert found.call_parser == "json_tools"
    assert set(found.template) >= {"messages", "tools", "enable_thinking"}
    messages = [{"role": "user", "content": "hi"}]
    opened = tokenizer.encode_chat(messages, enable_thinking=True)
    assert tokenizer.opens_reasoning(opened) and tokenizer.grammar_after(opened) == tokenizer.encode(
        "</think>"
    )
    closed = tokenizer.encode_chat(messages)
    assert not tokenizer.opens_reasoning(closed) and tokenizer.grammar_after(closed) == []


def test_marks_are_shown_though_they_are_special(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "", ["<|im_end|>", "<think>", "</think>"], [])
    ids = tokenizer.encode("<think>a</think>b<|im_end|>")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, marks=True) == "<think>a</think>b"


def test_gpt_oss(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ messages }}{{ tools }}{{ reasoning_effort }}", HARMONY, [])
    assert tokenizer.dialect.call_parser == "harmony"
    text = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, marks=True) == text
    assert tokenizer.encode("<|call|>")[0] in tokenizer.end_ids
    assert tokenizer.grammar_after([1]) == tokenizer.encode("<|channel|>final<|message|>")


@pytest.mark.parametrize("template", ["", "{{ messages }}", "{% broken"])
def test_a_plain_model_has_none(template: str, tmp_path: Path) -> None:
    found = tokenizer_with(tmp_path, template, [], []).dialect
    assert found.marks == [] and found.call_parser == "" and "tools" not in found.template
