"""What a request asks of its tokens: that it gets them whatever runs beside it, their logprobs, and its ends."""

from typing import Any

import numpy as np
import pytest

from expertd.engine.messages import Logprobs, Rejected, Token
from tests.engine.scripted import CONTEXT, END, VOCAB, Bench, break_off, logits_after

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "plain": {"temperature": 1.0, "seed": 5},
    "cut": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**63 - 1},
    "penal": {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.8, "frequency_penalty": 0.5},
    "bias": {"temperature": 0.7, "seed": 0, "logit_bias": ((65, 6.0), (66, 5.5)), "presence_penalty": 1.5},
    "looks": {"temperature": 1.0, "seed": 7, "logprobs": 3, "min_tokens": 9},
}


def ask_all(bench: Bench) -> None:
    """Each of them begins while the others run."""
    for name, options in REQUESTS.items():
        bench.ask(name, f"the prompt of {name}", max_tokens=15, ignore_end=True, **options)
        bench.engine.step()
        bench.engine.step()


def tokens_of(bench: Bench) -> dict[str, list[Token]]:
    return {name: [e for e in bench.of(name) if isinstance(e, Token)] for name in REQUESTS}


def test_a_request_gets_the_same_tokens_alone_in_a_crowd_and_after_a_failure() -> None:
    alone = Bench()
    for name, options in REQUESTS.items():
        alone.ask(name, f"the prompt of {name}", max_tokens=15, ignore_end=True, **options)
        alone.finish()
    wanted = tokens_of(alone)
    assert {name: len(tokens) for name, tokens in wanted.items()} == dict.fromkeys(REQUESTS, 15)
    crowded = Bench(shares=(0.5, 0.5), prefill_chunk=5)
    ask_all(crowded)
    crowded.finish()
    assert tokens_of(crowded) == wanted
    broken = Bench(shares=(0.5, 0.5), prefill_chunk=5)
    ask_all(broken)
    break_off(broken, 20)
    assert any(0 < len(tokens) < 15 for tokens in tokens_of(broken).values())
    broken.begin()
    broken.finish()
    assert tokens_of(broken) == wanted


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, b"aaaa"),
        ({"frequency_penalty": 2.0}, b"aaa\0"),  # 5, 3, 1, -1
        (
            {"presence_penalty": 1.9, "logit_bias": ((97, -4.0),)},
            b"a\0\1\2",
        ),  # 1, -0.9, and so for the others
        (
            {"repetition_penalty": 10.0, "logit_bias": ((98, 1.0),)},
            b"baaa",
        ),  # the prompt's a has 0.5, b 1, then 0.1
    ],
)
def test_penalties_count_what_they_should(options: dict[str, Any], wanted: bytes) -> None:
    """The logit of a is 5, that of any other token 0."""
    bench = Bench()
    bench.ask("r", "a", "aaaa", max_tokens=4, **options)
    bench.finish()
    assert bytes(bench.ids("r")) == wanted


def logprobs_of(bench: Bench, name: str) -> list[Logprobs]:
    return [found for token in bench.of(name) if isinstance(token, Token) for found in token.logprobs]


@pytest.mark.parametrize("num_top", [0, 2, 20])
def test_logprobs_are_of_the_raw_logits(num_top: int) -> None:
    bench = Bench()
    options = {
        "temperature": 1.9,
        "top_k": 2,
        "presence_penalty": 1.0,
        "logit_bias": ((70, 50.0),),
        "seed": 1,
    }
    bench.ask("r", "prompt", max_tokens=6, ignore_end=True, logprobs=num_top, **options)
    bench.ask("quiet", "prompt", max_tokens=6, ignore_end=True, **options)
    bench.finish()
    found, ids = logprobs_of(bench, "r"), bench.ids("r")
    assert len(found) == len(ids) == 6
    for i, position in enumerate(found):
        logits = logits_after([*b"prompt", *ids[:i]]).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert position.chosen.token_id == ids[i]
        assert position.chosen.logprob == pytest.approx(exact[ids[i]], abs=1e-5)
        assert [c.token_id for c in position.top] == np.argsort(-logits)[:num_top].tolist()
        assert [c.logprob for c in position.top] == pytest.approx(np.sort(exact)[::-1][:num_top], abs=1e-5)
    assert bench.ids("quiet") == ids and logprobs_of(bench, "quiet") == []


def test_offsets_and_bytes_of_torn_characters() -> None:
    bench = Bench()
    bench.ask("r", "prompt", "a中b", logprobs=0)
    bench.ask("torn", "second", [*"é中".encode()[:4], END], logprobs=0)
    bench.finish()
    found = logprobs_of(bench, "r")
    assert [f.chosen.data for f in found] == [b"a", b"\xe4", b"\xb8", b"\xad", b"b", b"<end>"]
    assert [f.text_offset for f in found] == [0, 1, 1, 1, 2, 3]
    assert [f.chosen.text for f in found] == ["a", r"\xe4", r"\xb8", r"\xad", "b", "<end>"]
    assert bench.text("torn") == "é\ufffd"
    assert [f.text_offset for f in logprobs_of(bench, "torn")] == [0, 0, 1, 1, 2]


def test_stop_tokens_end_the_answer_and_are_not_in_it() -> None:
    bench = Bench()
    bench.ask("r", "first", "abcdef", stop_ids=[ord("x"), ord("d")])
    bench.ask("too", "again", [*b"ab", END, *b"cd"], stop_ids=[ord("d")], ignore_end=True)
    bench.finish()
    assert (bench.text("r"), bench.done("r").finish_reason, bench.ids("r")) == ("abc", "stop", [*b"abcd"])
    assert (bench.text("too"), bench.ids("too")) == ("abc", [*b"ab", END, *b"cd"])


@pytest.mark.parametrize("min_tokens", [0, 3, 4, 9])
def test_min_tokens_puts_every_end_off(min_tokens: int) -> None:
    """The script wants to end after 3 tokens; banned from that, the runner-up of equal logits is token 0."""
    bench = Bench()
    for name, prompt, options in (("end", "first", {}), ("stop", "again", {"stop_ids": [ord("d")]})):
        reply = [*b"abc", END] if name == "end" else [*b"abcd"]
        bench.ask(name, prompt, reply + reply[-1:] * 20, min_tokens=min_tokens, max_tokens=20, **options)
    bench.finish()
    held = max(0, min_tokens - 3)
    for name, end in (("end", END), ("stop", ord("d"))):
        assert bench.ids(name) == [*b"abc", *[0] * held, end]
        assert bench.done(name).finish_reason == "stop"


@pytest.mark.parametrize("min_tokens, text", [(0, "a"), (2, "a"), (3, "abcda"), (9, "abcdabcda")])
def test_min_tokens_puts_stop_strings_off(min_tokens: int, text: str) -> None:
    bench = Bench()
    bench.ask("r", "prompt", "abcd" * 5, stop=["bc"], min_tokens=min_tokens)
    bench.finish()
    assert bench.text("r") == text


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"logit_bias": ((5, 1.0), (VOCAB, 1.0))},
            f"logit_bias: token {VOCAB}, but this model's tokens are 0 to 256",
        ),
        (
            {"stop_ids": [VOCAB + 7]},
            f"stop_token_ids: token {VOCAB + 7}, but this model's tokens are 0 to 256",
        ),
    ],
)
def test_tokens_that_the_model_lacks_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    bench = Bench()
    bench.ask("r", "prompt", **options)
    bench.ask("last", "x" * (CONTEXT - 1), "y", logit_bias=((VOCAB - 1, -1.0),), stop_ids=[VOCAB - 1])
    bench.finish()
    (rejected,) = bench.of("r")
    assert isinstance(rejected, Rejected) and rejected.message.startswith(words)
    assert bench.text("last") == "y"
