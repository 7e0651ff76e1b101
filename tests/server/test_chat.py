"""Several choices, several prompts, echoes, tools and reasoning, over stub ranks that say what they are told."""

import json
from pathlib import Path
from typing import Any

import httpx
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from stub_group import received

from expertd.cluster.supervisor import Cluster
from tests.server.test_app import CALLED, CHAT, TEXT, TOOL, events_of, named, with_app
from tests.server.test_sampling import checked


def saying(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **more}


def submits(folder: Path) -> list[dict[str, Any]]:
    return [m for m in received(folder) if m["op"] == "Submit"]


def test_several_choices_have_seeds_of_their_own(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        body = (await client.post("/v1/chat/completions", json={**CHAT, "n": 3, "seed": 7})).json()
        choices = checked(ChatCompletion, body).choices
        assert [(c.index, c.message.content) for c in choices] == [(i, "one two three ") for i in range(3)]
        assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 9
        asked = submits(tmp_path)
        assert sorted(m["sampling"]["seed"] for m in asked) == [7, 8, 9]
        assert len({m["request_id"] for m in asked}) == 3

    with_app(tmp_path, test)


def test_several_choices_in_one_stream(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage = events_of(await client.post("/v1/chat/completions", json=asked))
        for index in (0, 1):
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "stop"
            assert "".join(c["delta"].get("content", "") for c in own) == "one two three "
        assert usage["usage"]["total_tokens"] == 3 + 6
        failed = await client.post("/v1/chat/completions", json=saying("so fail", n=2, stream=True))
        assert "the step failed" in failed.text and "[DONE]" not in failed.text

    with_app(tmp_path, test)


def test_several_prompts(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        prompts: list[Any]
        for prompts, wanted in (
            (["a", "b c"], ["a ", "b c "]),
            ([[5], [6, 7]], ["5 ", "6 7 "]),
            ([8, 9], ["8 9 "]),
        ):
            body = (await client.post("/v1/completions", json={**TEXT, "prompt": prompts})).json()
            assert [c.text for c in checked(Completion, body).choices] == wanted
        many = {**TEXT, "prompt": ["w"] * 20, "n": 2}  # more than are asked for at a time
        body = (await client.post("/v1/completions", json=many)).json()
        assert [c["index"] for c in body["choices"]] == list(range(40))
        assert body["usage"]["prompt_tokens"] == 20 and body["usage"]["completion_tokens"] == 40

    with_app(tmp_path, test)


def test_echo(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "echo": True, "logprobs": 0, "max_tokens": 1}
        body = (await client.post("/v1/completions", json=asked)).json()
        choice = body["choices"][0]
        assert choice["text"] == "one two threeone "
        found = choice["logprobs"]
        assert found["tokens"] == ["one ", "two ", "three", "one "]
        assert found["token_logprobs"] == [None, -1.0, -2.0, -0.5]
        assert found["text_offset"] == [0, 4, 8, 13]
        assert found["top_logprobs"][:2] == [None, {"two ": -1.0}]
        chunks = events_of(await client.post("/v1/completions", json={**asked, "stream": True}))
        assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        assert [x for part in parts for x in part["token_logprobs"]] == found["token_logprobs"]
        plain = {**TEXT, "echo": True, "max_tokens": 0}
        choice = (await client.post("/v1/completions", json=plain)).json()["choices"][0]
        assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (
            "one two three",
            None,
            "length",
        )
        assert [m["prompt_logprobs"] for m in submits(tmp_path)] == [0, 0, None]

    with_app(tmp_path, test)


def test_tokenize_and_detokenize(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        body = (await client.post("/tokenize", json={"prompt": "a b c"})).json()
        assert body == {"count": 3, "max_model_len": 5000, "tokens": [0, 1, 2], "token_strs": None}
        chat = {"model": "demo", "messages": [{"role": "user", "content": "a b"}]}
        assert (await client.post("/tokenize", json=chat)).json()["count"] == 2
        assert (await client.post("/detokenize", json={"tokens": [4, 5]})).json() == {"prompt": "4 5"}
        for wrong in ({}, {"prompt": "a", "messages": chat["messages"]}, {"prompt": "a", "model": "x"}):
            assert (await client.post("/tokenize", json=wrong)).status_code in (400, 404)
        assert [m["max_tokens"] for m in submits(tmp_path)] == [0, 0, 0]

    with_app(tmp_path, test)


def test_a_model_calls_a_tool(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        call = '<tool_call> {"name": "f", "arguments": {"a": "b c"}} </tool_call>'
        asked = saying(f"<think> hm </think> Look: {call}", tools=[TOOL], parallel_tool_calls=False)
        body = (await client.post("/v1/chat/completions", json=asked)).json()
        choice = ChatCompletion.model_validate(body).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Look:")
        (made,) = choice.message.tool_calls or []
        assert made.type == "function" and json.loads(made.function.arguments) == {"a": "b c"}
        assert body["choices"][0]["message"]["reasoning_content"] == "hm"
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
        chunks = events_of(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
        deltas = [ChatCompletionChunk.model_validate(c).choices[0].delta for c in chunks]
        calls = [c for d in deltas for c in d.tool_calls or []]
        assert [c.function.name for c in calls if c.function and c.function.name] == ["f"]
        arguments = [c.function.arguments or "" for c in calls if c.function]
        assert json.loads("".join(arguments)) == {"a": "b c"} and len(arguments) > 2
        assert "".join(d.content or "" for d in deltas) == "Look:"
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert submits(tmp_path)[0]["tools"] == [TOOL]

    with_app(tmp_path, test, r0="tools")


def test_what_a_conversation_with_tools_tells_the_template(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        result = {"role": "tool", "tool_call_id": "c", "content": "42"}
        thought = {**CALLED, "reasoning_content": "hm", "refusal": None}
        asked = saying("hi", tools=[TOOL], tool_choice="none")
        asked["messages"] += [thought, result]
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        (submit,) = submits(tmp_path)
        function = {"name": "f", "arguments": {}}
        assert submit["messages"][1:] == [
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "c", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c"},
        ]
        assert submit["tools"] == []

    with_app(tmp_path, test, r0="tools")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


LOOKS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        "json_schema",
        json.dumps(SCHEMA),
    ),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
    ({"structured_outputs": {"choice": ["a", 'b"c']}}, "lark", 'start: "a" | "b\\"c"'),
    ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
]


def test_how_an_answer_s_look_is_asked_for(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for values, kind, text in LOOKS:
            for path, body in ("/v1/chat/completions", CHAT), ("/v1/completions", TEXT):
                assert (await client.post(path, json={**body, **values})).status_code == 200
                wanted = {"kind": kind, "text": text, "param": next(iter(values))}
                assert submits(tmp_path)[-1]["grammar"] == wanted

    with_app(tmp_path, test)


def test_strict_tools_keep_to_their_schemas(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
        assert (
            await client.post("/v1/chat/completions", json=saying("hi", tools=[strict]))
        ).status_code == 200
        (submit,) = submits(tmp_path)
        assert submit["grammar"]["kind"] == "lark" and '{"const": "f"}' in submit["grammar"]["text"]

    with_app(tmp_path, test, r0="tools")


def test_a_forced_call_is_a_grammar(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        tools = [TOOL, {"type": "function", "function": {"name": "g"}}]
        said = '[{"name": "g", "arguments": {"x": 1}}]'
        for choice, wanted, most in (("required", {"f", "g"}, 8), (named("g"), {"g"}, 1)):
            asked = saying(said, tools=tools, tool_choice=choice)
            made = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]
            assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
            assert made["message"]["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"x": 1}'}
            schema = json.loads(submits(tmp_path)[-1]["grammar"]["text"])
            items = schema["items"].get("anyOf", [schema["items"]])
            assert {item["properties"]["name"]["const"] for item in items} == wanted
            assert schema["maxItems"] == most

    with_app(tmp_path, test)
