"""The app over httpx's ASGI transport: statuses, shapes and refusals."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from stub_group import LIMIT_S, group_of, received, until

from expertd.cluster.supervisor import Cluster
from expertd.config import DoorConfig, ServerConfig
from expertd.server import stream
from expertd.server.app import make_app
from expertd.server.service import Service

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "one two three"}]}
TEXT = {"model": "demo", "prompt": "one two three"}
OPEN_DOOR = DoorConfig()


def with_app(
    folder: Path,
    test: Callable[[httpx.AsyncClient, Cluster], Awaitable[None]],
    num_ranks: int = 1,
    door: DoorConfig = OPEN_DOOR,
    **moods: str,
) -> None:
    async def main() -> None:
        group = group_of(folder, num_ranks, **moods)
        async with asyncio.timeout(LIMIT_S), Cluster.open(group) as cluster:
            service = Service(ServerConfig(model_id="demo", group=group, door=door), cluster)
            transport = httpx.ASGITransport(app=make_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await test(client, cluster)

    asyncio.run(main())


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_chat(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        response = await client.post("/v1/chat/completions", json=CHAT)
        body = response.json()
        assert response.status_code == 200
        assert body.pop("id").startswith("chatcmpl-") and isinstance(body.pop("created"), int)
        assert body == {
            "object": "chat.completion",
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "one two three ", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 3,
                "total_tokens": 6,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    with_app(tmp_path, test)


def test_chat_stream(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post("/v1/chat/completions", json={**CHAT, **options})
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage = events_of(response)
        assert len({c["id"] for c in chunks}) == 1
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(d["content"] for d in deltas[:-1]) == "one two three "
        reasons = [c["choices"][0]["finish_reason"] for c in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
        assert all(c["usage"] is None for c in chunks)
        assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 6

    with_app(tmp_path, test)


def test_completions_whole_and_streamed(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        body = (await client.post("/v1/completions", json={**TEXT, "max_tokens": 2})).json()
        assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
        choice = {"index": 0, "text": "one two ", "logprobs": None, "finish_reason": "length"}
        assert body["choices"] == [choice]
        chunks = events_of(await client.post("/v1/completions", json={**TEXT, "stream": True}))
        assert "".join(c["choices"][0]["text"] for c in chunks) == "one two three "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and "usage" not in chunks[-1]

    with_app(tmp_path, test)


def test_parameters_reach_the_rank(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
            {"role": "user", "content": parts, "name": "Ann"},
        ]
        options = {"max_completion_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": -1, "stop": "x"}
        harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "n": 1, "tools": [], "seed": None}
        asked = {"model": "demo", "messages": messages, **harmless, **options}
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        await client.post("/v1/completions", json={**TEXT, "stop": ["a", "b"], "top_p": 0})
        chat, text = received(tmp_path)
        assert chat["messages"] == [
            {"role": "system", "content": "be brief"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "one two", "name": "Ann"},
        ]
        sampling = chat["sampling"]
        assert (chat["max_tokens"], sampling["temperature"], sampling["top_p"]) == (1, 0.5, 0.9)
        assert (sampling["seed"], chat["stop"], chat["prompt"]) == (2**63 - 1, ["x"], None)
        assert (text["max_tokens"], text["sampling"]["temperature"], text["stop"]) == (16, 0.0, ["a", "b"])
        assert text["messages"] is None and 0 <= text["sampling"]["seed"] < 2**32  # drawn for it

    with_app(tmp_path, test)


REFUSED = {
    "functions": [{}],
    "function_call": {"name": "f"},
    "best_of": 2,
    "use_beam_search": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "length_penalty": 0.5,
    "suffix": "end",
    "store": True,
    "modalities": ["audio"],
    "audio": {"voice": "a"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
}


def test_parameters_that_change_the_answer_are_refused_by_name(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for path, body in ("/v1/chat/completions", CHAT), ("/v1/completions", TEXT):
            for name, value in REFUSED.items():
                response = await client.post(path, json={**body, name: value})
                error = response.json()["error"]
                assert (response.status_code, error["param"]) == (400, name)
                assert error["code"] == "unsupported_parameter" and name in error["message"]
        # Names of chat alone; and 1 == True in Python, but `best_of` is a number.
        for name, value in (("top_logprobs", 3), ("tools", [{}]), ("best_of", True)):
            response = await client.post("/v1/completions", json={**TEXT, name: value})
            assert response.json()["error"]["code"] == "unsupported_parameter"
        assert received(tmp_path) == []

    with_app(tmp_path, test)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FORCED = {**CHAT, "tools": [TOOL], "tool_choice": "required"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


WRONG = [
    (b"{", None, "not valid JSON"),
    (b"\xff\xfe\x00", None, "not valid JSON"),
    (b"[1]", None, "wanted a JSON object"),
    (b"[" * 100_000, None, "not valid JSON"),
    (b'{"model": "demo", "messages": [], "temperature": NaN}', None, "NaN"),
    ({"messages": CHAT["messages"]}, "model", "model: Field required."),
    ({**CHAT, "messages": []}, "messages", "at least 1"),
    ({**CHAT, "messages": "hi"}, "messages", "valid list"),
    ({**CHAT, "messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'tool'"),
    ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages[0]", "content: Field required"),
    ({**CHAT, "messages": [{"role": "user", "content": "a\ud800"}]}, "messages[0].content", "unicode"),
    (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "image_url",
    ),
    (
        {**CHAT, "messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
        "required",
    ),
    ({**CHAT, "messages": [{**CALLED, "role": "user"}]}, "messages[0]", "only messages of role 'assistant'"),
    ({**CHAT, "n": 0}, "n", "greater than or equal to 1"),
    ({**CHAT, "tools": [TOOL]}, "tools", "knows no tools"),
    ({**CHAT, "tools": [{**TOOL, "type": "web_search"}]}, "tools[0].type", "'function'"),
    ({**CHAT, "tool_choice": "required"}, None, "tool_choice needs tools"),
    ({**FORCED, "tool_choice": named("g")}, "tool_choice", "'g', but no such tool"),
    ({**FORCED, "response_format": {"type": "json_object"}}, "tools", "response_format as well"),
    ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format", "need each other"),
    ({**CHAT, "guided_json": "{"}, "guided_json", "not valid JSON"),
    ({**CHAT, "guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json as well"),
    ({**CHAT, "structured_outputs": {}}, "structured_outputs", "exactly one of json"),
    ({**CHAT, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs.tokenize", "knows no tokenize"),
    ({**CHAT, "reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    ({**CHAT, "thinking_token_budget": 5}, "thinking_token_budget", "not supported"),
    ({**CHAT, "max_tokens": "5"}, "max_tokens", "valid integer, found '5'"),
    ({**CHAT, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({**CHAT, "max_tokens": True}, "max_tokens", "valid integer"),
    ({**CHAT, "temperature": 3}, "temperature", "less than or equal to 2"),
    ({**CHAT, "top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({**CHAT, "seed": 2**70}, "seed", "less than"),
    ({**CHAT, "stop": ["a"] * 5}, "stop", "at most 4"),
    ({**CHAT, "stop": ""}, "stop[0]", "at least 1"),
    ({**CHAT, "stream": "yes"}, "stream", "valid boolean"),
    ({**CHAT, "stream_options": {"include_usage": True}}, None, "stream_options needs"),
    ({**CHAT, "temprature": 1}, "temprature", "Did you mean temperature?"),
    ({**CHAT, "a\ud800": 1}, "a?", "a?: unknown parameter"),
    ({**CHAT, "stop": "\ud800"}, "stop[0]", "unicode"),
    ({**CHAT, "top_k": 1, "prompt": "x"}, "prompt", "unknown parameter"),
    ({**CHAT, "frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2, found 2.1"),
    ({**CHAT, "presence_penalty": -3}, "presence_penalty", "greater than or equal to -2, found -3"),
    ({**CHAT, "repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.1, found 0"),
    (b'{"model": "demo", "messages": [], "repetition_penalty": 1e999}', "repetition_penalty", "found inf"),
    ({**CHAT, "min_p": 1.5}, "min_p", "less than or equal to 1, found 1.5"),
    ({**CHAT, "top_k": -2}, "top_k", "greater than or equal to -1, found -2"),
    ({**CHAT, "top_k": 1.5}, "top_k", "valid integer, found 1.5"),
    ({**CHAT, "logit_bias": [5]}, "logit_bias", "valid dictionary, found [5]"),
    ({**CHAT, "logit_bias": {"the": 1}}, "logit_bias", "'the' is no token id; wanted whole numbers"),
    ({**CHAT, "logit_bias": {"-1": 1}}, "logit_bias", "'-1' is no token id"),
    ({**CHAT, "logit_bias": {"²": 1}}, "logit_bias", "is no token id"),
    ({**CHAT, "logit_bias": {"5": 101}}, "logit_bias[5]", "less than or equal to 100, found 101"),
    ({**CHAT, "logit_bias": {"5": "1"}}, "logit_bias[5]", "valid number, found '1'"),
    ({**CHAT, "stop_token_ids": [1, -1]}, "stop_token_ids[1]", "greater than or equal to 0, found -1"),
    ({**CHAT, "stop_token_ids": 1}, "stop_token_ids", "valid list, found 1"),
    ({**CHAT, "min_tokens": -1}, "min_tokens", "greater than or equal to 0, found -1"),
    ({**CHAT, "min_tokens": 6, "max_tokens": 5}, "min_tokens", "6 is more than the 5 tokens"),
    ({**CHAT, "ignore_eos": 1}, "ignore_eos", "valid boolean, found 1"),
    ({**CHAT, "logprobs": 1}, "logprobs", "valid boolean, found 1"),
    ({**CHAT, "top_logprobs": 2}, None, "top_logprobs needs 'logprobs': true"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20, found 21"),
]
WRONG_TEXT = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a\ud800"}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"max_tokens": 0}, None),
    ({"prompt": 5}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"min_tokens": 17}, "min_tokens"),  # without max_tokens there are 16
]


def test_wrong_requests_get_400_and_the_name_of_the_field(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for body, param, words in WRONG:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = await client.post("/v1/chat/completions", content=content)
            error = response.json()["error"]
            found = (response.status_code, error["type"], error["param"])
            assert found == (400, "invalid_request_error", param), error
            assert words in error["message"] and "\n" not in error["message"], error
        for values, param in WRONG_TEXT:
            response = await client.post("/v1/completions", content=json.dumps({**TEXT, **values}))
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert received(tmp_path) == []

    with_app(tmp_path, test)


def test_unknown_model_path_and_method(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        response = await client.post("/v1/chat/completions", json={**CHAT, "model": "gpt"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        for got, status in ((await client.get("/nope"), 404), (await client.get("/v1/completions"), 405)):
            assert got.status_code == status and got.json()["error"]["message"].startswith("GET /")

    with_app(tmp_path, test)


@pytest.mark.parametrize("streamed", [False, True])
def test_prompt_longer_than_the_context_is_400_before_any_stream(tmp_path: Path, streamed: bool) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "prompt": "x " * 5001, "stream": streamed}
        response = await client.post("/v1/completions", json=asked)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("prompt: 5001 tokens, at most 5000")

    with_app(tmp_path, test)


def test_body_over_the_limit_is_413(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        response = await client.post("/v1/completions", content=b" " * (16 * 2**20 + 1))
        assert response.status_code == 413
        monkeypatch.setattr(stream, "MAX_BODY_BYTES", 10)
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 413

    with_app(tmp_path, test)


def test_models_and_health(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["demo"]
        assert (await client.get("/v1/models/demo")).json() == listed["data"][0]
        assert (await client.get("/v1/models/a/b")).status_code == 404
        body = (await client.get("/health")).json()
        assert body.pop("uptime_s") >= 0 and body.pop("last_step_s_ago") >= 0
        assert body.pop("group") == cluster.describe()
        assert body.pop("hosts") is None
        known = {"status": "ok", "model": "demo", "ranks": 1, "split": "auto", "context_length": 5000}
        assert body == known | {"kernels": {"name": "mlx"}}
        cluster.probe._failure, cluster.probe._failed_at = "a step hangs", math.inf
        response = await client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "unwell")
        assert response.json()["reason"] == "a step hangs"

    with_app(tmp_path, test)


@pytest.mark.fault
def test_dead_follower_changes_health_and_nothing_else(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "prompt": "@slow:0.01 @repeat:20 x", "stream": True, "max_tokens": 20}
        streaming = asyncio.create_task(client.post("/v1/completions", json=asked))
        await until(lambda: received(tmp_path))
        os.kill(cluster._ranks[1].pid, signal.SIGKILL)
        assert "".join(c["choices"][0]["text"] for c in events_of(await streaming)) == "x " * 20
        await until(lambda: cluster.epoch == 2)
        response = await client.get("/health")
        body = response.json()
        assert (response.status_code, body["status"], body["group"]["epoch"]) == (200, "ok", 2)
        assert body["group"]["reason"] == "rank 1 died: killed by SIGKILL"
        assert [rank["state"] for rank in body["group"]["ranks"]][1] == "dead"

    with_app(tmp_path, test, num_ranks=2)


@pytest.mark.fault
def test_dead_group_is_503_everywhere_and_a_stream_ends_with_an_error(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "prompt": "@slow:0.01 @repeat:500 x", "stream": True, "max_tokens": 1000}
        streaming = asyncio.create_task(client.post("/v1/completions", json=asked))
        waiting = asyncio.create_task(client.post("/v1/completions", json={**asked, "stream": False}))
        await asyncio.sleep(0.2)
        os.kill(cluster._ranks[0].pid, signal.SIGKILL)
        body = (await streaming).text
        error = json.loads(body.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "killed by SIGKILL" in error["message"]
        assert "[DONE]" not in body
        assert (await waiting).status_code == 503
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 503
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert "killed by SIGKILL" in health.json()["reason"]

    with_app(tmp_path, test)


def test_failed_request_is_503_and_an_error_event(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "prompt": "so fail"}
        assert (await client.post("/v1/completions", json=asked)).status_code == 503
        response = await client.post("/v1/completions", json={**asked, "stream": True})
        assert response.status_code == 200
        assert "the step failed" in response.text and "[DONE]" not in response.text

    with_app(tmp_path, test)


def test_a_bug_is_one_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        monkeypatch.setattr(Service, "alive", lambda self: 1 / 0)
        response = await client.post("/v1/completions", json=TEXT)
        assert response.status_code == 500
        assert response.json()["error"]["message"].startswith("ZeroDivisionError: ")
        assert "Traceback" not in caplog.text

    with_app(tmp_path, test)


def test_loading_is_503(tmp_path: Path) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app=make_app(Service(ServerConfig())))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/health")).json()["status"] == "loading"
            response = await client.post("/v1/completions", json=TEXT)
            assert response.status_code == 503 and "still loading" in response.text

    asyncio.run(main())


def test_the_server_imports_no_mlx() -> None:
    code = "import sys, expertd.server.serve, expertd.server.app; assert 'mlx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_openapi_document_names_every_parameter(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        found = (await client.get("/openapi.json")).json()
        jsonschema.Draft202012Validator.check_schema(found["components"]["schemas"]["ChatRequest"])
        chat = found["paths"]["/v1/chat/completions"]["post"]
        reference = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/ChatRequest" and "text/event-stream" in str(
            chat["responses"]
        )
        known = set(found["components"]["schemas"]["ChatRequest"]["properties"])
        assert known >= {"messages", "temperature", "tools", "response_format", "n", "seed", "logprobs"}
        # What the document says is what is taken.
        schema = {"$ref": reference, "components": found["components"]}
        jsonschema.validate({**FORCED, "stop": "x", "logit_bias": {"5": 1}}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**CHAT, "temprature": 1}, schema)
        assert {"get", "delete"} == set(found["paths"]["/v1/responses/{response_id}"])

    with_app(tmp_path, test)
