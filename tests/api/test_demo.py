"""The official clients, and every example of docs/api.md, against the demo model as a user serves it."""

import concurrent.futures
import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.api.schemas import SCHEMAS
from tests.cluster.computers import END_S, free_port

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CHAT: Any = {"model": "demo", "messages": [{"role": "user", "content": "Once upon a time"}]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`expertd serve demo`, alone and healthy."""
    with serving(tmp_path_factory.mktemp("served")) as url:
        yield url


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "expertd", "serve", "demo", "--port", str(port), *options]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_healthy(server, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(END_S)


def wait_healthy(server: "subprocess.Popen[bytes]", url: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not become healthy")


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


# The page.


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("curl")])
def test_curl_lines_of_the_page(url: str, line: str) -> None:
    words = shlex.split(line.replace("http://127.0.0.1:8080", url))
    answer = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=60).stdout)
    if "temprature" in line:
        assert answer == json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    else:
        assert "error" not in answer


def test_the_other_lines_of_the_page_are_known() -> None:
    """`serve` is the fixture; `key` has a test of its own."""
    assert [line for line in SHELL if not line.startswith("curl")] == [
        "expertd serve demo --port 8080",
        "expertd key laptop",
    ]


def test_programs_of_the_page(url: str) -> None:
    """All in one process: each imports what it needs, but once."""
    assert len(PYTHON) >= 5
    code = "\n".join(PYTHON).replace("http://127.0.0.1:8080", url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# The official clients.


class Animal(BaseModel):
    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)


def test_openai_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**CHAT, response_format=Animal, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    response = client.responses.parse(
        model="demo", input="Which animal?", text_format=Animal, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, Animal)


TOOL: Any = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string", "maxLength": 9}},
        "required": ["at"],
        "additionalProperties": False,
    },
}


def test_openai_forces_a_call(client: openai.OpenAI) -> None:
    asked = {**CHAT, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    with client.chat.completions.stream(**asked, max_tokens=300, parallel_tool_calls=False) as stream:
        message = stream.get_final_completion().choices[0].message
    assert not message.content and message.tool_calls
    assert set(json.loads(message.tool_calls[0].function.arguments)) == {"at"}
    forced = {"type": "function", "name": "look"}
    response = client.responses.create(
        model="demo",
        input="Look!",
        tools=[{"type": "function", **TOOL}],
        tool_choice=forced,
        max_output_tokens=99,
    )
    (call,) = response.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"at"}


def test_anthropic_forces_a_call(url: str) -> None:
    tool: Any = {"name": "look", "input_schema": TOOL["parameters"]}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked = {**CHAT, "max_tokens": 100, "tools": [tool], "tool_choice": {"type": "tool", "name": "look"}}
        with client.messages.stream(**asked) as stream:
            message = stream.get_final_message()
    (block,) = message.content
    assert block.type == "tool_use" and set(block.input) == {"at"} and message.stop_reason == "tool_use"


def test_logprobs_of_a_prompt_are_those_of_an_answer(client: openai.OpenAI) -> None:
    """What was likely when it was chosen is as likely when it is read."""
    answer = client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=0
    )
    read = client.completions.create(
        model="demo", prompt="Once upon a time" + answer.choices[0].text, max_tokens=0, echo=True, logprobs=0
    )
    made, again = answer.choices[0].logprobs, read.choices[0].logprobs
    assert made and again and again.tokens and made.tokens
    assert again.tokens[-8:] == made.tokens
    assert again.token_logprobs and again.token_logprobs[0] is None  # type: ignore[comparison-overlap]
    assert again.token_logprobs[-8:] == pytest.approx(made.token_logprobs, abs=2e-3)


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    texts = [
        [c.message.content for c in client.chat.completions.create(**CHAT, n=3, seed=5, max_tokens=8).choices]
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    alone = client.chat.completions.create(**CHAT, seed=6, max_tokens=8)
    assert alone.choices[0].message.content == texts[0][1]


# Structured output.


def draw(client: openai.OpenAI, number: int) -> tuple[str, Any, str | None, bool]:
    """Answer number `number`: one schema after the other, every other one streamed, and in the next round the rest."""
    name, schema = SCHEMAS[number % len(SCHEMAS)]
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {**CHAT, "response_format": shape, "seed": number, "max_tokens": 900, "temperature": 1}
    if (number + number // len(SCHEMAS)) % 2:
        choice = client.chat.completions.create(**asked).choices[0]
        return name, schema, choice.message.content, choice.finish_reason == "length"
    chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    text = "".join(c.delta.content or "" for c in chunks)
    return name, schema, text, chunks[-1].finish_reason == "length"


def check_json(client: openai.OpenAI, numbers: range) -> int:
    """Draw answers, half of them streamed, 16 at a time; gives how many ended by length, which are counted apart."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: draw(client, i), numbers))
    for name, schema, text, cut in found:
        if not cut:
            assert text is not None
            try:
                jsonschema.validate(json.loads(text), schema)
            except (ValueError, jsonschema.ValidationError) as e:
                raise AssertionError(f"{name}: {text}") from e
    return sum(cut for *_, cut in found)


def test_json_is_valid_at_temperature_1(client: openai.OpenAI) -> None:
    assert check_json(client, range(50)) <= 1


@pytest.mark.soak
def test_json_is_valid_under_every_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 answers, 200 under each split: every schema four times, twice of them streamed."""
    splits, cut = ("solo", "experts", "tokens", "sequences", "auto"), []
    for at, split in enumerate(splits):
        with serving(tmp_path, "--ranks", "2", "--split", split) as url:
            assert httpx.get(f"{url}/health").json()["split"] == split
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
                cut.append(check_json(client, range(200 * at, 200 * (at + 1))))
    with capsys.disabled():
        print("\n1000 of 1000 valid; cut by length:", dict(zip(splits, cut, strict=True)))
    assert sum(cut) <= 10
