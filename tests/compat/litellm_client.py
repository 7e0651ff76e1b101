"""LiteLLM against a server of ours: `python litellm_client.py URL`. It runs where `make compat` puts it."""

import json
import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
TOOL = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string", "maxLength": 9}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
SHAPE = {
    "type": "json_schema",
    "json_schema": {
        "name": "animal",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 9}, "legs": {"enum": [2, 4]}},
            "required": ["name", "legs"],
            "additionalProperties": False,
        },
    },
}


def try_both_ways(how: dict[str, Any]) -> None:
    """What OpenAI's and Anthropic's APIs both have: answers, streams, forced calls, errors."""
    asked = {**how, "messages": MESSAGES, "max_tokens": 60}
    whole = litellm.completion(**asked, temperature=0.5)
    assert whole.choices[0].message.content and whole.usage.total_tokens > 4
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)]
    assert "".join(pieces)
    named = {"type": "function", "function": {"name": "look"}}
    forced = litellm.completion(**asked, tools=[{"type": "function", "function": TOOL}], tool_choice=named)
    (call,) = forced.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"at"}
    try:
        litellm.completion(**{**asked, "model": asked["model"].replace("demo", "nothing")})
    except litellm.exceptions.NotFoundError:
        return
    raise AssertionError("a model that does not exist was found")


def try_openai(how: dict[str, Any]) -> None:
    """What only OpenAI's API has: log-probabilities, structured output, plain completions."""
    answer = litellm.completion(**how, messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2)
    assert len(answer.choices[0].logprobs["content"]) == 5
    shaped = litellm.completion(**how, messages=MESSAGES, max_tokens=100, response_format=SHAPE)
    assert set(json.loads(shaped.choices[0].message.content)) == {"name", "legs"}
    plain = {**how, "model": "text-completion-openai/demo"}
    assert litellm.text_completion(**plain, prompt="Once upon", max_tokens=5).choices[0].text


def main(url: str) -> None:
    ours = {"api_base": f"{url}/v1", "api_key": "none", "model": "openai/demo"}
    try_both_ways(ours)
    try_both_ways({"api_base": url, "api_key": "none", "model": "anthropic/demo"})
    try_openai(ours)


if __name__ == "__main__":
    main(sys.argv[1])
