"""A request that goes on with another leader: wherever it was cut, its client gets the events of an undisturbed run."""

from dataclasses import replace
from typing import Any

import pytest

from expertd.engine.messages import Done, Started, Submit, Token
from expertd.sampling import Sampling
from tests.engine.scripted import END, Bench

SAMPLED = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5, seed=7)


def events_of(submit: Submit, script: list[int] | None) -> list[Any]:
    """What a fresh engine says."""
    bench = Bench(prefill_chunk=4)
    assert submit.prompt
    if script:
        bench.scripts[submit.prompt] = script
    bench.engine.take(submit)
    bench.finish()
    assert bench.engine.idle and bench.runner.caches.keys() <= {1}
    return bench.of(submit.request_id)


@pytest.mark.parametrize(
    ("options", "script"),
    [
        ({}, [*b"plain", END]),
        ({"stop": ["STOP"]}, [*b"aSTSTO", *b"STOP", *b"x"]),
        ({"stop": ["STOP"], "max_tokens": 3}, [*b"abSTOP"]),
        ({"stop": ["ab"], "min_tokens": 4}, [*b"abcab", END]),
        ({"max_tokens": 8}, [*"ä中\N{GRINNING FACE}".encode()]),
        ({"ignore_end": True, "max_tokens": 4, "stop_ids": [ord("c")]}, [*b"a", END, *b"bc"]),
        ({"sampling": SAMPLED, "max_tokens": 20}, None),
        ({"sampling": SAMPLED, "max_tokens": 20, "logprobs": 2}, None),
    ],
)
def test_no_token_is_repeated_or_missing(options: dict[str, Any], script: list[int] | None) -> None:
    submit = Submit("r", prompt="a prompt", **options)
    started, *tokens, done = events_of(submit, script)
    assert isinstance(started, Started) and isinstance(done, Done)
    for cut in range(len(tokens) + 1):
        had = [i for token in tokens[:cut] for i in token.token_ids]
        again, *rest, end = events_of(replace(submit, generated=had, resumed=True), script)
        assert again == started
        assert rest == tokens[cut:]
        assert (end.finish_reason, end.completion_tokens) == (done.finish_reason, done.completion_tokens)
        assert end.prompt_tokens == done.prompt_tokens and end.decode_tokens_per_s < 1e6


def test_a_resumed_request_is_never_one_too_many() -> None:
    bench = Bench(max_streams=1, max_waiting=0)
    bench.ask("first", "a", "one")
    bench.engine.take(Submit("second", prompt="b", resumed=True, max_tokens=2))
    bench.ask("third", "c", "x")
    bench.finish()
    assert bench.text("first") == "one" and len(bench.ids("second")) == 2
    assert [getattr(e, "busy", None) for e in bench.of("third")] == [True]
    assert not any(isinstance(e, Token) for e in bench.of("third"))
