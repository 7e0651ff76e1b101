"""Other people's clients against the demo server: LiteLLM, lm-evaluation-harness, AIPerf.

They bring 190 packages, so they live in an environment of their own (`make compat`) and are run from there.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_demo import url

pytestmark = pytest.mark.compat
ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "build/compat/bin"
TASKS = Path(__file__).with_name("tasks")
DEMO = ROOT / "expertd/demo"
PAGE = (ROOT / "docs/running.md").read_text()

__all__ = ["url"]  # the fixture


def run(folder: Path, *command: str | Path, offline: str = "1") -> str:
    """Run a client in a folder, where it finds none of our packages and no hub; gives what it printed."""
    own = {"HF_HUB_OFFLINE": offline, "OPENAI_API_KEY": "none", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **own, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_litellm(url: str, tmp_path: Path) -> None:
    run(tmp_path, CLIENTS / "python", Path(__file__).with_name("litellm_client.py"), url)


def evaluate(folder: Path, model: str, model_args: str, task: str, *options: str) -> dict[str, Any]:
    """Run one of our tasks; gives its results and the first sample's answers."""
    for file in TASKS.iterdir():
        (folder / file.name).write_text(file.read_text().replace("FOLDER", str(folder)))
    asked = ["--model", model, "--model_args", model_args, "--tasks", task, "--include_path", str(folder)]
    kept = ["--output_path", str(folder / "out"), "--log_samples", *options]
    run(folder, CLIENTS / "python", "-m", "lm_eval", *asked, *kept)
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())["results"][task]
    return {**found, "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


@pytest.mark.parametrize("ids", ["True", pytest.param("False", marks=pytest.mark.soak)])
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


def test_a_load_profile_of_100_streams(url: str, tmp_path: Path) -> None:
    """The page's own command, all 100 at once: every stream comes to its end."""
    (line,) = re.findall(r"^aiperf .*$", PAGE, re.MULTILINE)
    words = shlex.split(line.replace("http://127.0.0.1:8080", url).replace("MODEL_FOLDER", str(DEMO)))
    # It takes a folder for a hub's name when it is told to stay off line; with a folder it asks no hub.
    run(tmp_path, CLIENTS / words[0], *words[1:], "--ui", "none", offline="")
    (file,) = tmp_path.rglob("profile_export_aiperf.json")
    report = json.loads(file.read_text())
    asked = int(words[words.index("--request-count") + 1])
    assert report["request_count"]["avg"] == asked and not report.get("error_summary")
    assert report["output_sequence_length"]["avg"] > 8 and report["time_to_first_token"]["p99"] > 0
