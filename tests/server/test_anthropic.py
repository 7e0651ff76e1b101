"""Anthropic's Messages, by its own client and its own types, over stub ranks."""

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message
from stub_group import received

from expertd.cluster.supervisor import Cluster
from tests.server.test_app import with_app
from tests.server.test_serve import with_server

ASKED: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "one two"}],
}
TOOL: dict[str, Any] = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
CALL = '<tool_call> {"name": "f", "arguments": {"a": "b c"}} </tool_call>'


def client_of(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=30)


def test_the_official_client_asks_and_reads(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            answer = await client.messages.create(
                **ASKED, system="be brief", stop_sequences=["three"], extra_body={"top_k": 3}
            )
            assert answer.content[0].type == "text" and answer.content[0].text == "one two "
            assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == (
                "end_turn",
                2,
                2,
            )
            async with client.messages.stream(**ASKED) as stream:
                assert "".join([text async for text in stream.text_stream]) == "one two "
                assert (await stream.get_final_message()).stop_reason == "end_turn"
            short = await client.messages.create(**{**ASKED, "max_tokens": 1})
            assert short.stop_reason == "max_tokens"
            counted = await client.messages.count_tokens(model="demo", messages=ASKED["messages"])
            assert counted.input_tokens == 2
            for wrong, kind in (
                ({"model": "x"}, anthropic.NotFoundError),
                ({"max_tokens": 0}, anthropic.BadRequestError),
                ({"messages": [{"role": "user", "content": "so fail"}]}, anthropic.APIStatusError),
            ):
                with pytest.raises(kind) as caught:
                    await client.messages.create(**{**ASKED, **wrong})
                assert caught.value.body["type"] == "error"  # type: ignore[index]
            with pytest.raises(anthropic.APIStatusError, match="the step failed"):
                failing = {**ASKED, "messages": [{"role": "user", "content": "so fail"}]}
                async with client.messages.stream(**failing) as stream:
                    await stream.get_final_message()
        asked = received(tmp_path)[0]
        assert asked["messages"][0] == {"role": "system", "content": "be brief"}
        assert (asked["stop"], asked["sampling"]["top_k"], asked["max_tokens"]) == (["three"], 3, 100)

    with_server(tmp_path, test)


def test_thinking_and_tools_whole_and_streamed(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        content = f"<think> hm </think> Look: {CALL}"
        asked = {**ASKED, "tools": [TOOL], "messages": [{"role": "user", "content": content}]}
        asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        async with client_of(url) as client:
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        assert whole.content[2].input == {"a": "b c"} and whole.stop_reason == "tool_use"  # type: ignore[union-attr]
        assert streamed.content[2].input == {"a": "b c"}  # type: ignore[union-attr]
        assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
        assert received(tmp_path)[0]["max_reasoning"] == 1024

    with_server(tmp_path, test, r0="tools")


def test_a_conversation_with_tools(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        cached = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
        blocks = [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Look."},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        ]
        result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "42"}]}
        messages = [
            {"role": "user", "content": [cached]},
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
        ]
        asked = {**ASKED, "messages": messages, "tools": [TOOL], "tool_choice": {"type": "none"}}
        body = (await client.post("/v1/messages", json=asked)).json()
        assert Message.model_validate(body).model_dump(exclude_unset=True) == body
        assert received(tmp_path)[0]["messages"] == [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "Look.",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "t", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                ],
            },
            {"role": "tool", "content": "42", "tool_call_id": "t"},
            {"role": "user", "content": "so?"},
        ]
        forced = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}
        forced["messages"] = [{"role": "user", "content": '[{"name": "f", "arguments": {}}]'}]
        body = (await client.post("/v1/messages", json=forced)).json()
        assert body["content"][0]["type"] == "tool_use" and body["stop_reason"] == "tool_use"
        schema = json.loads(received(tmp_path)[1]["grammar"]["text"])
        assert schema["maxItems"] == 1

    with_app(tmp_path, test, r0="tools")


WRONG = [
    ({"messages": []}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "has no thinking"),
    ({"max_tokens": None}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"tool_choice": {"type": "tool"}}, "name need each other"),
    ({"tools": [TOOL]}, "knows no tools"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "greater than or equal to 1"),
    ({"thinking": {"type": "adaptive"}}, "does not think"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"stop_sequence": ["x"]}, "Did you mean stop_sequences?"),
]


def test_wrong_requests_are_refused_by_name(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for values, words in WRONG:
            response = await client.post("/v1/messages", json={**ASKED, **values})
            error = response.json()["error"]
            assert (response.status_code, error["type"]) == (400, "invalid_request_error"), values
            assert words in error["message"], error
        assert received(tmp_path) == []

    with_app(tmp_path, test)
