"""Answers that follow a grammar, over a tokenizer of bytes and logits that know nothing of it."""

import json
from typing import Any, cast

import jsonschema
import pytest

from expertd.dialect import Dialect
from expertd.engine.grammar import Grammars
from expertd.engine.messages import Failed, Grammar, Rejected
from expertd.engine.text import Tokenizer
from expertd.server.tools import Function, strict_calls
from tests.engine.scripted import END, VOCAB, Bench, break_off
from tests.tiny import write_json, write_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["a", "bb"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "list"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA), "response_format")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The bytes in another order than ScriptedRunner's, which does not matter: it has no scripts here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    write_json(folder / "config.json", {"model_type": "qwen3_moe"})
    return Tokenizer(folder, {"eos_token_id": END})


@pytest.fixture
def bench(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Bench:
    tokenizer.speak(Dialect())
    return bench_of(tokenizer)


def bench_of(tokenizer: Tokenizer) -> Bench:
    bench = Bench()
    bench.engine.tokenizer, bench.engine.context_length = tokenizer, 4096
    bench.engine._grammars = Grammars(tokenizer, VOCAB)
    return bench


@pytest.mark.parametrize("seed", range(8))
def test_json_follows_its_schema(bench: Bench, seed: int) -> None:
    bench.ask("a", f"seed {seed}", grammar=JSON, temperature=1.5, seed=seed)
    bench.finish()
    jsonschema.validate(json.loads(bench.text("a")), SCHEMA)
    assert bench.done("a").finish_reason == "stop" and bench.text("a").endswith("}")


@pytest.mark.parametrize(
    "grammar, wanted",
    [
        (Grammar("regex", "[ab]{3}c", "guided_regex"), "[ab]{3}c"),
        (Grammar("lark", 'start: "yes" | "no"', "guided_choice"), "yes|no"),
        (Grammar("regex", "a+", "guided_regex"), "a+"),  # may end, need not
    ],
)
def test_other_grammars(bench: Bench, grammar: Grammar, wanted: str) -> None:
    import re

    for seed in range(5):
        bench.ask(f"r{seed}", "x", grammar=grammar, temperature=1, seed=seed, max_tokens=50, min_tokens=2)
    bench.finish()
    for seed in range(5):
        assert re.fullmatch(wanted, bench.text(f"r{seed}")), bench.text(f"r{seed}")


def test_calls_of_strict_tools(bench: Bench) -> None:
    """Text is free, and so is whether there is a call; what a call says is not."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammar = strict_calls([Function(name="f", parameters=schema, strict=True)])
    call = '<tool_call>\n{"name": "f", "arguments": {"a": %s}}\n</tool_call>'
    for text, wanted in (("a <tool", ""), (f"Hm {call % 1} and {call % 2}.", ""), (call % 3, "error")):
        matcher = bench.engine._grammars.compile(grammar)  # type: ignore[arg-type]
        for token_id in cast(Any, bench.engine.tokenizer).encode(text):
            matcher.take(token_id)
        assert bool(matcher.error) == bool(wanted), (text, matcher.error)


def test_an_answer_that_is_cut_is_told_apart(bench: Bench) -> None:
    bench.ask("a", "x", grammar=JSON, max_tokens=3)
    bench.finish()
    assert bench.done("a").finish_reason == "length"


def test_an_interruption_changes_nothing(tokenizer: Tokenizer) -> None:
    texts = []
    for interrupted in (False, True):
        bench = bench_of(tokenizer)
        bench.ask("a", "x", grammar=JSON, temperature=1, seed=1)
        if interrupted:
            break_off(bench, 9)
            bench.begin()
        bench.finish()
        texts.append(bench.text("a"))
    assert texts[0] == texts[1]


def test_the_grammar_begins_after_reasoning(tokenizer: Tokenizer) -> None:
    """The prompt ends inside reasoning, so the text begins with the mark; the end of it is likely here."""
    tokenizer.speak(Dialect(think_start="<t>", think_end="</t>"))
    bench = bench_of(tokenizer)
    inner = cast(Any, tokenizer).inner
    inner.chat_template = "{{ messages[0].content }}<t>"
    grammar = Grammar("regex", "ab", "guided_regex")
    likely = tuple((token_id, 100.0) for token_id in inner.encode("</t>"))
    from expertd.engine.messages import Submit
    from expertd.sampling import Sampling

    messages = [{"role": "user", "content": "hi"}]
    bench.engine.take(Submit("a", messages=messages, grammar=grammar, sampling=Sampling(logit_bias=likely)))
    sequence = bench.engine._open[0]
    assert sequence.opening == "<t>" and sequence.grammar_after == inner.encode("</t>")
    sequence.replay(inner.encode("why</t>"))  # as a continuation takes tokens, too
    sequence.num_computed = 0
    bench.finish()
    assert bench.text("a") == "ab"
    inner.chat_template = None
    tokenizer.speak(Dialect())


@pytest.mark.parametrize(
    "grammar, words",
    [
        (Grammar("regex", "(", "guided_regex"), "guided_regex: this regex cannot be followed: "),
        (Grammar("lark", "start: nothing", "guided_grammar"), "guided_grammar: this lark cannot"),
        (Grammar("json_schema", '{"$ref": "#/x"}', "response_format"), "response_format: this json schema"),
        (
            Grammar("json_schema", '{"type": "object", "minProperties": 5, "maxProperties": 1}', "p"),
            "p: this json",
        ),
        (Grammar("regex", "a" * 300_000, "guided_regex"), "guided_regex: 300000 bytes, at most 262144."),
        (Grammar("lark", "start: " + " | ".join(f'"w{i}x"' for i in range(3000)), "p"), "p: this lark"),
    ],
)
def test_a_wrong_grammar_is_refused_by_name(bench: Bench, grammar: Grammar, words: str) -> None:
    bench.ask("a", "x", grammar=grammar)
    (refused,) = bench.of("a")
    assert isinstance(refused, Rejected) and refused.message.startswith(words), refused


def test_a_matcher_that_fails_fails_its_request_alone(bench: Bench) -> None:
    bench.ask("a", "x", grammar=JSON)
    bench.ask("b", "y", max_tokens=3)
    bench.engine._open[0].matcher.take(0)  # type: ignore[union-attr]
    bench.finish()
    failed = bench.of("a")[-1]
    assert isinstance(failed, Failed) and "can no longer follow its grammar" in failed.message
    assert bench.done("b").completion_tokens == 3
