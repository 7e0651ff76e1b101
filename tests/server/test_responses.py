"""OpenAI's Responses: shapes, the conversation that a stored one begins, and the same events on every host."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from stub_group import received, until

from expertd.cluster.copies import copy_of
from expertd.cluster.host_messages import Hold
from expertd.cluster.requests import Requests
from expertd.cluster.supervisor import Cluster
from expertd.config import ServerConfig
from expertd.server.app import make_app
from expertd.server.service import Service
from tests.server.test_app import with_app
from tests.server.test_serve import client_of, with_server

ASKED: dict[str, Any] = {"model": "demo", "input": "one two"}
TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
CALL = '<tool_call> {"name": "f", "arguments": {"a": "b c"}} </tool_call>'
PATH = "/v1/responses"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def checked(body: dict[str, Any]) -> Response:
    """OpenAI's own type makes of the body that body again."""
    response = Response.model_validate(body)
    assert response.model_dump(exclude_unset=True, by_alias=True) == body
    return response


def test_a_response_whole(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**ASKED, "instructions": "be brief", "metadata": {"a": "b"}, "max_output_tokens": 9}
        body = (await client.post(PATH, json={**asked, "top_logprobs": 1})).json()
        response = checked(body)
        assert (response.status, response.output_text, response.metadata) == (
            "completed",
            "one two ",
            {"a": "b"},
        )
        assert response.usage and response.usage.total_tokens == 4
        (submit,) = received(tmp_path)
        assert [m["role"] for m in submit["messages"]] == ["system", "user"]
        assert (submit["max_tokens"], submit["logprobs"], submit["keep"]) == (9, 1, True)
        cut = checked((await client.post(PATH, json={**ASKED, "max_output_tokens": 1})).json())
        assert cut.status == "incomplete" and cut.incomplete_details
        assert cut.incomplete_details.reason == "max_output_tokens"

    with_app(tmp_path, test)


def test_the_events_of_a_stream_and_their_replay(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        text = f"<think> hm </think> Look: {CALL}"
        streamed = await client.post(
            PATH, json={"model": "demo", "input": text, "tools": [TOOL], "stream": True}
        )
        events = events_of(streamed)
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        kinds = [e["type"].removeprefix("response.") for e in events if not e["type"].endswith(".delta")]
        part = ["output_item.added", "content_part.added"]
        assert kinds == [
            *("created", "in_progress"),
            *(*part, "reasoning_text.done", "content_part.done", "output_item.done"),
            *(*part, "output_text.done", "content_part.done", "output_item.done"),
            *("output_item.added", "function_call_arguments.done", "output_item.done", "completed"),
        ]
        final = checked(events[-1]["response"])
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert json.loads(final.output[2].arguments) == {"a": "b c"}  # type: ignore[union-attr]
        assert final.usage and final.usage.output_tokens_details.reasoning_tokens == 3
        path = f"{PATH}/{final.id}"
        assert (await client.get(path)).json() == events[-1]["response"]
        for after in (-1, 0, 7, len(events) - 2, len(events)):
            again = await client.get(path, params={"stream": "true", "starting_after": after})
            assert events_of(again) == events[after + 1 :]
        assert (await client.get(path, params={"stream": "true", "starting_after": "x"})).status_code == 400
        assert (await client.delete(path)).json() == {"id": final.id, "object": "response", "deleted": True}
        assert (await client.get(path)).status_code == 404

    with_app(tmp_path, test, r0="tools")


def test_a_conversation_goes_on(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        first = {"model": "demo", "input": f"Look: {CALL}", "tools": [TOOL], "instructions": "be brief"}
        response = checked((await client.post(PATH, json=first)).json())
        call = response.output[1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}  # type: ignore[union-attr]
        second = {"model": "demo", "input": [result], "previous_response_id": response.id, "tools": [TOOL]}
        assert (await client.post(PATH, json=second)).status_code == 200
        # The same without a store: all of it is sent again.
        again = [
            {"role": "user", "content": first["input"]},
            *(i.model_dump(exclude_unset=True) for i in response.output),
            result,
        ]
        third = {"model": "demo", "input": again, "tools": [TOOL], "store": False}
        assert (await client.post(PATH, json=third)).status_code == 200
        messages = [m["messages"] for m in received(tmp_path) if m["op"] == "Submit"]
        assert messages[1] == messages[2]
        assert [m["role"] for m in messages[1]] == ["user", "assistant", "tool"]
        assert messages[1][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "b c"}}
        unknown = await client.post(PATH, json={**ASKED, "previous_response_id": "resp_0"})
        assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "previous_response_id"

    with_app(tmp_path, test, r0="tools")


def test_a_stream_that_was_left_goes_on_and_can_be_cancelled(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            stream = await client.responses.create(model="demo", input="@slow:0.02 @repeat:50 x", stream=True)
            seen = [await anext(aiter(stream)) for _ in range(5)]
            await stream.close()
            response_id = seen[0].response.id  # type: ignore[union-attr]
            assert (await client.responses.retrieve(response_id)).status == "in_progress"
            after = seen[-1].sequence_number
            stream = await client.responses.retrieve(response_id, stream=True, starting_after=after)
            rest = [event async for event in stream]
            assert [e.sequence_number for e in rest] == list(range(after + 1, after + 1 + len(rest)))
            assert rest[-1].type == "response.completed" and rest[-1].response.output_text == "x " * 50
            assert [m["op"] for m in received(tmp_path)] == ["Submit"]
            hanging = asyncio.create_task(client.responses.create(model="demo", input="@hang x", stream=True))
            stream = await hanging
            created = await anext(aiter(stream))
            assert (await client.responses.cancel(created.response.id)).status == "cancelled"  # type: ignore[union-attr]
            await until(lambda: received(tmp_path)[-1]["op"] == "Cancel")
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(created.response.id)  # type: ignore[union-attr]

    with_server(tmp_path, test)


def test_another_host_goes_on_with_a_stream(tmp_path: Path) -> None:
    """It holds a copy of the first tokens; the host that made them is gone; no event differs, none is repeated."""

    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        text = "<think> hm </think> @slow:0.02 @repeat:10 one two"
        asked = asyncio.create_task(client.post(PATH, json={"model": "demo", "input": text, "stream": True}))
        await until(lambda: [t for t in cluster.requests.kept.all() if t.num_tokens > 5])
        (transcript,) = cluster.requests.kept.all()
        copy = copy_of(transcript)
        assert len(copy.tokens) < 20
        requests = Requests(cluster._find_leader)
        requests.hold(Hold(1, [copy]))
        requests.lose_leaders()
        other: Any = SimpleNamespace(
            requests=requests, resume=requests.resume, ready=cluster.ready, failure=None
        )
        app = make_app(Service(ServerConfig(model_id="demo"), other))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://b") as at_b:
            path = f"{PATH}/{transcript.request_id}"
            again = events_of(await at_b.get(path, params={"stream": "true"}))
            rest = events_of(await at_b.get(path, params={"stream": "true", "starting_after": "7"}))
        events = events_of(await asked)
        assert again == events and rest == events[8:]
        assert [m["resumed"] for m in received(tmp_path) if m["op"] == "Submit"] == [False, True]
        assert events[-1]["type"] == "response.completed"
        await requests.close()

    with_app(tmp_path, test, r0="tools")


def test_in_the_background(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {"model": "demo", "input": "@slow:0.02 @repeat:10 x", "background": True}
        begun = checked((await client.post(PATH, json=asked)).json())
        assert (begun.status, begun.background, begun.output) == ("in_progress", True, [])
        await until(lambda: cluster.requests.kept.find(begun.id).end)  # type: ignore[union-attr]
        done = checked((await client.get(f"{PATH}/{begun.id}")).json())
        assert (done.status, done.output_text) == ("completed", "x " * 10)

    with_app(tmp_path, test)


def test_a_failure_is_an_event_and_a_status(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        events = events_of(
            await client.post(PATH, json={"model": "demo", "input": "so fail", "stream": True})
        )
        assert events[-1]["type"] == "response.failed"
        failed = checked(events[-1]["response"])
        assert failed.error and "the step failed" in failed.error.message
        assert (await client.get(f"{PATH}/{failed.id}")).json()["status"] == "failed"
        rejected = await client.post(PATH, json={"model": "demo", "input": "@reject:why x", "stream": True})
        assert rejected.status_code == 400

    with_app(tmp_path, test)


WRONG = [
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL]}, "knows no tools"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "need each other"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"include": ["web_search_call.results"]}, "include"),
    ({"background": True, "store": False}, "background needs 'store': true"),
    ({"conversation": "c"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tokens": 5}, "unknown parameter"),
]


def test_wrong_requests_are_refused_by_name(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for values, words in WRONG:
            response = await client.post(PATH, json={**ASKED, **values})
            assert response.status_code == 400, values
            assert words in response.json()["error"]["message"], response.text
        assert received(tmp_path) == []

    with_app(tmp_path, test)
