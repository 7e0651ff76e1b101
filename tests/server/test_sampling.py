"""Sampling parameters on their way to rank 0, and logprobs on their way back, in the shapes of OpenAI's own types."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs as CompletionLogprobs
from pydantic import BaseModel
from stub_group import received

from expertd.cluster.supervisor import Cluster
from expertd.dialect import Dialect
from expertd.engine.messages import Candidate, Done, Logprobs, Submit, Token
from expertd.sampling import Sampling
from expertd.server.chat import ChatChoice, ChatRequest
from expertd.server.completions import CompletionRequest, TextChoice
from expertd.server.parse import parse_request
from expertd.server.parts import Splitter
from expertd.server.wire import Choice
from tests.server.test_app import CHAT, TEXT, events_of, with_app
from tests.server.test_serve import client_of, with_server

ASKED = {
    "temperature": 0.5,
    "top_p": 0.9,
    "frequency_penalty": 0.25,
    "presence_penalty": -1,
    "logit_bias": {"5": 1, "07": -100},
    "seed": 3,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}
WANTED = Sampling(0.5, 0.9, 40, 0.05, 1.1, -1.0, 0.25, ((5, 1.0), (7, -100.0)), 3)


def submit_of(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> Submit:
    wanted = parse_request(kind, body)
    if isinstance(wanted, ChatRequest):
        return wanted.to_submits("r", Dialect())[0]
    return wanted.to_submits("r")[0]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_parameter_means_the_same_in_both_apis(
    kind: type[ChatRequest] | type[CompletionRequest],
) -> None:
    ends = {"stop_token_ids": [5, 6], "min_tokens": 2, "ignore_eos": True}
    body = httpx.Request(
        "POST", "http://x", json={**(CHAT if kind is ChatRequest else TEXT), **ASKED, **ends}
    )
    submit = submit_of(kind, body.content)
    assert submit.sampling == WANTED
    assert (submit.stop_ids, submit.min_tokens, submit.ignore_end) == ([5, 6], 2, True)
    assert submit.logprobs is None


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({}, Sampling(temperature=1.0)),
        (dict.fromkeys(ASKED), Sampling(temperature=1.0)),  # null
        ({"top_k": -1, "logit_bias": {}}, Sampling(temperature=1.0)),
        ({"top_p": 0}, Sampling(temperature=0.0)),
    ],
)
def test_what_changes_nothing(values: dict[str, Any], wanted: Sampling) -> None:
    body = httpx.Request("POST", "http://x", json={**CHAT, **values}).content
    assert submit_of(ChatRequest, body).sampling == wanted


@pytest.mark.parametrize(
    "kind, values, wanted",
    [
        (ChatRequest, {"logprobs": False, "top_logprobs": 0}, None),
        (ChatRequest, {"logprobs": True}, 0),
        (ChatRequest, {"logprobs": True, "top_logprobs": 20}, 20),
        (CompletionRequest, {"logprobs": 0}, 0),
        (CompletionRequest, {"logprobs": 5, "top_logprobs": 0}, 5),
        (CompletionRequest, {"logprobs": None}, None),
    ],
)
def test_how_logprobs_are_asked_for(
    kind: type[ChatRequest] | type[CompletionRequest], values: dict[str, Any], wanted: int | None
) -> None:
    body = httpx.Request(
        "POST", "http://x", json={**(CHAT if kind is ChatRequest else TEXT), **values}
    ).content
    assert submit_of(kind, body).logprobs == wanted


# Answers. OpenAI's models accept unknown fields, so what they make of a body must be that body again.


def checked(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    model = kind.model_validate(body)
    assert model.model_dump(exclude_unset=True) == body
    assert not extras_of(model)
    return model


def extras_of(model: Any) -> list[str]:
    if isinstance(model, list):
        return [name for part in model for name in extras_of(part)]
    if not isinstance(model, BaseModel):
        return []
    parts = [getattr(model, name) for name in type(model).model_fields]
    return [*(model.model_extra or {}), *extras_of(parts)]


def test_chat_logprobs_whole_and_streamed(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
        body = (await client.post("/v1/chat/completions", json=asked)).json()
        assert checked(ChatCompletion, body).choices[0].logprobs.content[0].top_logprobs[0].token == "other"
        other = {"token": "other", "logprob": -0.125, "bytes": list(b"other")}
        nothing = {"token": "", "logprob": -1.125, "bytes": []}
        content = [
            {"token": "one ", "logprob": -0.5, "bytes": list(b"one "), "top_logprobs": [other, nothing]},
            {"token": "two ", "logprob": -1.0, "bytes": list(b"two "), "top_logprobs": [other, nothing]},
        ]
        assert body["choices"][0]["logprobs"] == {"content": content, "refusal": None}
        chunks = events_of(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
        found = [checked(ChatCompletionChunk, chunk).choices[0] for chunk in chunks]
        assert [c.logprobs is not None for c in found] == [False, True, True, False]
        streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        assert [part for logprobs in streamed for part in logprobs["content"]] == content

    with_app(tmp_path, test)


def test_completion_logprobs_whole_and_streamed(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        asked = {**TEXT, "logprobs": 1}
        body = (await client.post("/v1/completions", json=asked)).json()
        checked(Completion, body)
        wanted = {
            "tokens": ["one ", "two ", "three "],
            "token_logprobs": [-0.5, -1.0, -1.5],
            "top_logprobs": [
                {"other": -0.125, "one ": -0.5},
                {"other": -0.125, "two ": -1.0},
                {"other": -0.125, "three ": -1.5},
            ],
            "text_offset": [0, 4, 8],
        }
        assert body["choices"][0]["logprobs"] == wanted
        chunks = events_of(await client.post("/v1/completions", json={**asked, "stream": True}))
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        for (
            part
        ) in parts:  # not the chunks: OpenAI's server says "finish_reason": null, OpenAI's type forbids it
            checked(CompletionLogprobs, part)
        assert {name: [x for part in parts for x in part[name]] for name in wanted} == wanted
        zero = (await client.post("/v1/completions", json={**TEXT, "logprobs": 0})).json()
        assert zero["choices"][0]["logprobs"]["top_logprobs"][0] == {"one ": -0.5}
        plain = (await client.post("/v1/completions", json=TEXT)).json()
        assert plain["choices"][0]["logprobs"] is None
        assert [m["logprobs"] for m in received(tmp_path) if m["op"] == "Submit"] == [1, 1, 0, None]

    with_app(tmp_path, test)


def test_torn_characters(tmp_path: Path) -> None:
    """Bytes join to the text; a stream brings them with the character that they become; the end token has none."""

    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        messages = [{"role": "user", "content": "@torn é中x"}]
        asked = {"model": "demo", "messages": messages, "logprobs": True}
        choice = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]
        content = choice["logprobs"]["content"]
        assert bytes(b for part in content for b in part["bytes"]).decode() == "é中x"
        assert [part["token"] for part in content] == [r"\xc3", r"\xa9", r"\xe4", r"\xb8", r"\xad", "x"]
        chunks = events_of(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
        for chunk in (c["choices"][0] for c in chunks if c["choices"][0]["logprobs"]):
            data = bytes(b for part in chunk["logprobs"]["content"] for b in part["bytes"])
            assert data.decode() == chunk["delta"]["content"]
        text = {"model": "demo", "prompt": "@torn é中x", "logprobs": 0}
        found = (await client.post("/v1/completions", json=text)).json()["choices"][0]["logprobs"]
        names = [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xe4", r"bytes:\xb8", r"bytes:\xad", "x"]
        assert (found["tokens"], found["text_offset"]) == (names, [0, 0, 1, 1, 1, 2])
        assert found["top_logprobs"][0] == {r"bytes:\xc3": -0.5}

    with_app(tmp_path, test)


def test_the_official_client_asks_and_reads(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            chat: Any = {"model": "demo", "messages": CHAT["messages"], "logprobs": True, "top_logprobs": 1}
            extra = {
                "top_k": 5,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "stop_token_ids": [9],
                "min_tokens": 1,
            }
            answer = await client.chat.completions.create(
                **chat, frequency_penalty=0.5, logit_bias={"3": -5}, extra_body=extra
            )
            assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
            assert [part.token for part in answer.choices[0].logprobs.content] == ["one ", "two ", "three "]
            stream = await client.chat.completions.create(**chat, stream=True)
            parts = [c.choices[0].logprobs async for c in stream]
            assert [p.content[0].logprob for p in parts if p and p.content] == [-0.5, -1.0, -1.5]
            text = await client.completions.create(model="demo", prompt="a b", logprobs=2)
            assert text.choices[0].logprobs and text.choices[0].logprobs.text_offset == [0, 2]
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**{**chat, "top_logprobs": 21})
            assert caught.value.param == "top_logprobs"
        sampling = received(tmp_path)[0]["sampling"]
        assert (sampling["top_k"], sampling["frequency_penalty"]) == (5, 0.5)
        assert sampling["logit_bias"] == [[3, -5.0]]

    with_server(tmp_path, test)


# Which tokens' logprobs are given, when text is held back, cut off and flushed.

DONE = Done("r", "stop", 1, 3, 0.0, 0.0, "solo", 1)
CUT = Done("r", "length", 1, 3, 0.0, 0.0, "solo", 1)


def token(text: str, data: bytes, offset: int) -> Token:
    return Token("r", [0], text, [Logprobs(Candidate(0, data, -1.0), [], offset)])


@pytest.mark.parametrize(
    "tokens, done, wanted",
    [
        # "b" and "c" were held back as a stop string's beginning and then cut, with "c" the stop string's end.
        ([token("a", b"a", 0), token("", b"b", 1), token("", b"c", 2)], DONE, [["a"], []]),
        # Held back and then let go: with the text that has it.
        ([token("a", b"a", 0), token("", b"b", 1), token("bx", b"x", 2)], DONE, [["a"], ["b", "x"], []]),
        # Let go in part: "c" begins another stop string.
        ([token("", b"a", 0), token("ab", b"bc", 1), token("cx", b"x", 3)], DONE, [["a", "bc"], ["x"], []]),
        # An end token has no text; one that is ignored is in the middle of the text.
        ([token("a", b"a", 0), token("", b"<end>", 1)], DONE, [["a"], []]),
        (
            [token("", b"<end>", 0), token("a", b"a", 0), token("", b"<end>", 1)],
            CUT,
            [["<end>", "a"], ["<end>"]],
        ),
        # A character that never became whole.
        ([token("a", b"a", 0), token("\ufffd", b"\xe4", 1)], CUT, [["a"], [r"\xe4"], []]),
        ([], DONE, [[]]),
    ],
)
@pytest.mark.parametrize("kind", [ChatChoice, TextChoice])
def test_logprobs_come_with_their_text(
    kind: type[Choice], tokens: list[Token], done: Done, wanted: list[list[str]]
) -> None:
    def names(logprobs: dict[str, Any] | None) -> list[str]:
        if logprobs is None:
            return []
        if kind is ChatChoice:
            return [part["token"] for part in logprobs["content"]]
        return [name.removeprefix("bytes:") for name in logprobs["tokens"]]

    choice = ChatChoice(0, "r", True, Splitter(Dialect())) if kind is ChatChoice else TextChoice(0)
    pieces = [piece for event in (*tokens, done) for piece in choice.take(event)]
    assert [names(piece["logprobs"]) for piece in pieces] == wanted
    assert names(choice.whole()["logprobs"]) == [name for part in wanted for name in part]


def test_equal_texts_are_one_name_in_completions() -> None:
    """The likelier one's: a word, and a special token that is written like it."""
    top = [Candidate(1, b"a", -0.5), Candidate(2, b"a", -1.5)]
    choice = TextChoice(0)
    for event in (Token("r", [3], "b", [Logprobs(Candidate(3, b"b", -2.5), top, 0)]), DONE):
        choice.take(event)
    assert choice.whole()["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -2.5}]
