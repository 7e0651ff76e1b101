"""Other people's clients against the demo server: LiteLLM and lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_demo import CHAT, TOOL, url

pytestmark = pytest.mark.compat
TASKS = Path(__file__).with_name("tasks")
DEMO = Path(__file__).parents[2] / "expertd/demo"

__all__ = ["url"]  # the fixture


def test_litellm(url: str) -> None:
    import litellm

    ours: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "model": "openai/demo"}
    theirs = {"api_base": url, "api_key": "none", "model": "anthropic/demo"}
    tools: Any = [{"type": "function", "function": TOOL}]
    for how in ours, theirs:
        asked = {**how, "messages": CHAT["messages"], "max_tokens": 60}
        whole = litellm.completion(**asked, temperature=0.5)
        assert whole.choices[0].message.content and whole.usage.total_tokens > 4
        pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)]
        assert "".join(pieces)
        forced = litellm.completion(
            **asked, tools=tools, tool_choice={"type": "function", "function": {"name": "look"}}
        )
        (call,) = forced.choices[0].message.tool_calls
        assert set(json.loads(call.function.arguments)) == {"at"}
        with pytest.raises(litellm.exceptions.NotFoundError):
            litellm.completion(**{**asked, "model": asked["model"].replace("demo", "nothing")})
    answer = litellm.completion(
        **ours, messages=CHAT["messages"], max_tokens=5, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices[0].logprobs["content"]) == 5
    text = litellm.text_completion(
        **{**ours, "model": "text-completion-openai/demo"}, prompt="Once upon", max_tokens=5
    )
    assert text.choices[0].text


def evaluate(folder: Path, model: str, model_args: str, task: str, *options: str) -> dict[str, Any]:
    """Run one of our tasks; gives its results and the first sample's answers."""
    for file in TASKS.iterdir():
        (folder / file.name).write_text(file.read_text().replace("FOLDER", str(folder)))
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", model_args, "--tasks", task]
    more = ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples", *options]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=300, env=offline, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())["results"][task]
    return {**found, "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


@pytest.mark.parametrize("ids", ["True", "False"])
def test_lm_eval_scores_by_the_log_probabilities_of_prompts(url: str, tmp_path: Path, ids: str) -> None:
    args = (
        f"model=demo,base_url={url}/v1/completions,tokenizer={DEMO},tokenized_requests={ids},max_length=512"
    )
    found = evaluate(tmp_path, "local-completions", args, "fox_choice", "--batch_size", "4")
    assert found["acc,none"] == 1.0  # the choices are easy, even for the demo
    sample = next(s for s in found["samples"] if s["doc"]["question"] == "Once upon a")
    (logprob, _), _ = sample["filtered_resps"]
    asked = {"model": "demo", "prompt": "Once upon a time", "echo": True, "logprobs": 0, "max_tokens": 0}
    direct = httpx.post(f"{url}/v1/completions", json=asked).json()["choices"][0]["logprobs"]
    assert float(logprob) == pytest.approx(direct["token_logprobs"][-1], abs=2e-3)


def test_lm_eval_chats(url: str, tmp_path: Path) -> None:
    args = f"model=demo,base_url={url}/v1/chat/completions,num_concurrent=2,max_length=512"
    found = evaluate(tmp_path, "local-chat-completions", args, "fox_words", "--apply_chat_template")
    assert "exact_match,none" in found and all(s["filtered_resps"][0] for s in found["samples"])
