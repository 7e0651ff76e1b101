"""What a request may ask of its prompt: the tokens, the text, and how likely each token was."""

import math

import numpy as np
import pytest

from expertd.engine import echo
from expertd.engine.messages import Done, Rejected, Started, Token
from tests.engine.scripted import Bench, break_off, logits_after

PROMPT = "x\u00e9 and some more"


def wanted(prompt: str) -> list[float]:
    ids = list(prompt.encode())
    found = []
    for i in range(1, len(ids)):
        row = logits_after(ids[:i]).astype(np.float64)
        found.append(row[ids[i]] - math.log(np.exp(row).sum()))
    return found


def started(bench: Bench, request_id: str) -> Started:
    first = bench.of(request_id)[0]
    assert isinstance(first, Started)
    return first


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_prompt_logprobs_for_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "CHUNK", 5)
    bench = Bench(prefill_chunk=chunk)
    bench.ask("a", PROMPT, echo=True, prompt_logprobs=2, max_tokens=2)
    assert bench.of("a") == []  # Started comes when the prompt is known
    bench.finish()
    prompt = started(bench, "a").prompt
    assert prompt and prompt.token_ids == list(PROMPT.encode()) and prompt.text == PROMPT
    assert [found.chosen.token_id for found in prompt.logprobs] == prompt.token_ids[1:]
    assert np.allclose([found.chosen.logprob for found in prompt.logprobs], wanted(PROMPT), atol=1e-5)
    assert [found.text_offset for found in prompt.logprobs][:3] == [1, 1, 2]
    assert all(len(found.top) == 2 for found in prompt.logprobs)
    plain = Bench()
    plain.ask("a", PROMPT, max_tokens=2)
    plain.finish()
    assert bench.ids("a") == plain.ids("a")


def test_an_interruption_repeats_nothing() -> None:
    bench = Bench(prefill_chunk=4)
    bench.ask("a", PROMPT, echo=True, prompt_logprobs=0, max_tokens=1)
    break_off(bench, 2)
    bench.begin()
    bench.finish()
    prompt = started(bench, "a").prompt
    assert prompt and np.allclose([f.chosen.logprob for f in prompt.logprobs], wanted(PROMPT), atol=1e-5)
    assert [type(e) for e in bench.of("a")] == [Started, Token, Done]


@pytest.mark.parametrize("prompt, num_plans", [(PROMPT, 0), ("x", 0)])
def test_an_echo_alone_computes_nothing(prompt: str, num_plans: int) -> None:
    bench = Bench()
    bench.ask("a", prompt, echo=True, max_tokens=0)
    bench.finish()
    assert [type(e) for e in bench.of("a")] == [Started, Done]
    assert bench.done("a").finish_reason == "length" and bench.done("a").completion_tokens == 0
    assert len(bench.runner.plans) == num_plans


def test_scores_alone_read_the_prompt_and_no_more() -> None:
    bench = Bench()
    bench.ask("a", PROMPT, echo=True, prompt_logprobs=0, max_tokens=0)
    bench.ask("b", "x", echo=True, prompt_logprobs=0, max_tokens=0)  # one token follows nothing
    bench.finish()
    assert [plan.decode for plan in bench.runner.plans] == [False]
    assert bench.engine.idle and started(bench, "b").prompt.logprobs == []  # type: ignore[union-attr]


def test_token_ids_as_a_prompt() -> None:
    bench = Bench()
    bench.ask("a", None, prompt_ids=[120, 121], echo=True, max_tokens=0)  # type: ignore[arg-type]
    assert started(bench, "a").prompt.text == "xy"  # type: ignore[union-attr]
    bench.ask("b", None, prompt_ids=[120, 999], echo=True, max_tokens=0)  # type: ignore[arg-type]
    assert bench.of("b")[0] == Rejected(
        "b", "prompt: token 999, but this model's tokens are 0 to 256. Leave it out."
    )


def test_more_values_than_a_frame_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "MAX_CANDIDATES", 10)
    bench = Bench()
    bench.ask("a", "four", echo=True, prompt_logprobs=2, max_tokens=0)
    (refused,) = bench.of("a")
    assert isinstance(refused, Rejected) and refused.message.startswith(
        "logprobs: with echo, 4 prompt tokens"
    )
