"""The engine without a model: what it plans, in which order, and what it tells of each request."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from expertd.engine.messages import Cancel, Choice, Done, Failed, Observe, Rejected, Started, Submit, Token
from expertd.engine.plan import Plan, WindowsPlan
from expertd.errors import LinkDown
from tests.engine.scripted import CONTEXT, END, VOCAB, Bench, break_off, sequences, shape


def test_chunks_of_prefill_then_decode() -> None:
    bench = Bench(shares=(0.5, 0.5), prefill_chunk=4)
    bench.ask("r", "ten tokens", "ok")
    bench.finish()
    assert [shape(p) for p in bench.runner.plans] == [
        (1, 4, True, False, "experts"),
        (1, 4, False, False, "experts"),
        (1, 1, False, False, "experts"),
        (1, 1, False, True, "experts"),
        (1, 1, False, True, "experts"),
        (1, 1, False, True, "experts"),
    ]
    assert bytes(t for p in bench.runner.plans for t in p.tokens[0]) == b"ten tokensok"
    assert [type(e) for e in bench.events] == [Started, Token, Token, Token, Done]
    assert bench.events[0] == Started("r", 10)
    assert bench.text("r") == "ok"
    assert bench.ids("r") == [*b"ok", END]
    done = bench.done("r")
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("stop", 10, 3)
    assert (done.split, done.ranks) == ("experts", 2)
    assert done.prefill_tokens_per_s > 0 < done.decode_tokens_per_s


def test_prompt_of_one_token_needs_no_prefill() -> None:
    bench = Bench()
    bench.ask("r", "x", "y")
    bench.finish()
    assert [shape(p) for p in bench.runner.plans] == [(1, 1, True, True, "solo"), (1, 1, False, True, "solo")]


def test_one_after_another_and_caches_are_released() -> None:
    bench = Bench(max_streams=1)
    for name in ("a", "b", "c"):
        bench.ask(name, f"prompt {name}", name * 2)
    bench.finish()
    order = [i for p in bench.runner.plans for i in p.sequence_ids]
    assert order == sorted(order)
    assert [bench.text(name) for name in "abc"] == ["aa", "bb", "cc"]
    released = {p.sequence_ids[0]: p.released for p in bench.runner.plans if p.started}
    assert released == {1: [], 2: [1], 3: [2]}
    assert not any(p.released for p in bench.runner.plans if not p.started)
    assert list(bench.runner.caches) == [3]


@pytest.mark.parametrize("max_tokens, expected", [(1, 1), (3, 3), (None, CONTEXT - 6), (1000, CONTEXT - 6)])
def test_max_tokens_and_the_end_of_the_context(max_tokens: int | None, expected: int) -> None:
    bench = Bench()
    bench.ask("r", "prompt", "y" * CONTEXT, max_tokens=max_tokens)
    bench.finish()
    assert bench.text("r") == "y" * expected
    assert bench.done("r").finish_reason == "length"
    assert len(bench.runner.caches[1]) == 6 + expected - 1


def test_prompt_too_long_is_rejected_in_one_line() -> None:
    bench = Bench()
    bench.ask("long", "x" * CONTEXT)
    bench.ask("empty", "")
    bench.ask("fits", "x" * (CONTEXT - 1), "y")
    bench.engine.take(Submit("chat", messages=[]))
    bench.finish()
    (rejected,), (empty,), (chat,) = bench.of("long"), bench.of("empty"), bench.of("chat")
    assert isinstance(rejected, Rejected)
    assert rejected.message.startswith("the prompt has 64 tokens, but this model's context holds 64")
    assert "at most 63 tokens" in rejected.message
    assert "\n" not in rejected.message
    assert isinstance(empty, Rejected)
    assert "prompt is empty" in empty.message
    assert chat == Rejected("chat", "messages: none")
    assert bench.text("fits") == "y"
    assert bench.done("fits").finish_reason == "length"


def test_chat_messages_go_through_the_template() -> None:
    bench = Bench()
    bench.scripts["user:hi\n"] = [*b"yo", END]
    bench.engine.take(Submit("r", messages=[{"role": "user", "content": "hi"}]))
    bench.finish()
    assert bench.text("r") == "yo"


@pytest.mark.parametrize(
    "reply, stop, text, num_tokens",
    [
        ("one two three", [" t"], "one", 5),
        ("one two three", ["three", "two"], "one ", 7),
        ("one two", ["two!", "x"], "one two", 8),
        ("one", ["o"], "", 1),
    ],
)
def test_stop_strings(reply: str, stop: list[str], text: str, num_tokens: int) -> None:
    bench = Bench()
    bench.ask("r", "prompt", reply, stop=stop)
    bench.finish()
    assert bench.text("r") == text
    assert bench.done("r").finish_reason == "stop"
    assert bench.done("r").completion_tokens == num_tokens


def test_held_back_text_comes_at_the_end() -> None:
    """A stop string's beginning, and a character's first bytes, when max_tokens ends the text inside them."""
    bench = Bench()
    bench.ask("stop", "prompt", "abST", stop=["STOP"], max_tokens=4)
    bench.ask("torn", "second", "a中", max_tokens=3)
    bench.finish()
    assert bench.text("stop") == "abST"
    assert bench.text("torn") == "a\ufffd"


def test_end_id_and_ignore_end() -> None:
    bench = Bench()
    reply = [*b"ab", END, *b"cd", END]
    bench.ask("stops", "first", reply)
    bench.ask("ignores", "again", reply, ignore_end=True, max_tokens=5)
    bench.finish()
    assert (bench.text("stops"), bench.done("stops").finish_reason) == ("ab", "stop")
    assert bench.ids("stops") == [*b"ab", END]
    assert (bench.text("ignores"), bench.done("ignores").finish_reason) == ("abcd", "length")
    assert bench.ids("ignores") == [*b"ab", END, *b"cd"]


def test_cancel_before_it_began() -> None:
    bench = Bench()
    bench.ask("r", "prompt", "reply")
    bench.engine.take(Cancel("r"))
    bench.engine.take(Cancel("nobody"))
    bench.finish()
    assert bench.runner.plans == []
    assert (bench.done("r").finish_reason, bench.done("r").completion_tokens) == ("cancelled", 0)
    bench.ask("next", "other", "x")
    bench.finish()
    assert bench.text("next") == "x"
    assert bench.runner.plans[0].released == []  # it never had a cache


@pytest.mark.parametrize("prefilling", [True, False])
def test_cancel_while_running(prefilling: bool) -> None:
    bench = Bench(prefill_chunk=4, max_streams=1)
    bench.ask("r", "ten tokens", "a long reply")
    bench.ask("next", "other", "x")
    for _ in range(2 if prefilling else 5):
        bench.engine.step()
    num_plans = len(bench.runner.plans)
    bench.engine.take(Cancel("r"))
    bench.finish()
    assert sequences(bench.runner.plans[num_plans:]) == {2}
    assert bench.runner.plans[num_plans].released == [1]
    assert bench.done("r").finish_reason == "cancelled"
    assert bench.done("r").completion_tokens == (0 if prefilling else 2)
    assert bench.text("next") == "x"


def test_cancel_while_another_runs() -> None:
    bench = Bench(prefill_chunk=5)
    bench.ask("first", "prompt", "reply")
    bench.ask("second", "other", "x")
    bench.engine.step()
    bench.engine.take(Cancel("second"))
    bench.finish()
    assert bench.text("first") == "reply"
    assert bench.done("second").finish_reason == "cancelled"
    assert sequences(bench.runner.plans) == {1}


def test_seed_is_reproducible_whatever_else_runs() -> None:
    bench = Bench()
    options = {"temperature": 1.0, "max_tokens": 8, "ignore_end": True}
    bench.ask("one", "prompt", seed=1, **options)
    bench.ask("other", "prompt", seed=2, **options)
    bench.ask("noise", "noise", **options)
    bench.finish()
    bench.ask("again", "prompt", seed=1, **options)
    bench.ask("noise again", "noise", **options)
    bench.finish()
    assert len(set(bench.ids("one"))) > 1
    assert bench.ids("one") == bench.ids("again") != bench.ids("other")
    assert bench.ids("noise") != bench.ids("noise again")


def test_logits_file(tmp_path: Path) -> None:
    bench = Bench()
    file = tmp_path / "logits.safetensors"
    bench.ask("plain", "first", "ab")
    bench.ask("kept", "second", "xyz", logits_file=str(file))
    bench.ask("lost", "third", "q", logits_file=str(tmp_path / "no folder" / "x.safetensors"))
    bench.ask("after", "fourth", "ok", logits_file=str(tmp_path / "after.safetensors"))
    bench.finish()
    assert mx.load(str(tmp_path / "after.safetensors"))["logits"].shape == (3, VOCAB)
    logits = cast(dict[str, mx.array], mx.load(str(file)))["logits"]
    assert logits.shape == (4, VOCAB)
    assert mx.argmax(logits, axis=1).tolist() == [*b"xyz", END]
    failed = bench.of("lost")[-1]
    assert isinstance(failed, Failed)
    assert str(tmp_path / "no folder") in failed.message
    assert bench.text("after") == "ok"


def test_idle_step_returns_and_takes_nothing() -> None:
    bench = Bench()
    bench.engine.step()
    assert (bench.events, bench.runner.plans) == ([], [])


def test_broken_epoch_ends_the_step_without_a_token() -> None:
    bench = Bench()
    bench.ask("r", "x", "y")
    break_off(bench, 0)
    assert [type(e) for e in bench.events] == [Started]


@pytest.mark.parametrize("broken", [0, 1, 3, 4, 7])  # in the prompt, at its last token, in the answer
def test_next_epoch_goes_on_with_the_next_token(broken: int) -> None:
    bench = Bench(shares=(0.5, 0.5), prefill_chunk=4, max_streams=1)
    bench.ask("r", "ten tokens", "a long reply")
    bench.ask("next", "other", "x")
    break_off(bench, broken)
    num_known = 10 + len(bench.ids("r"))
    bench.begin()
    bench.finish()
    assert bench.ids("r") == [*b"a long reply", END]
    assert bench.text("r") == "a long reply"
    assert bench.text("next") == "x"
    assert [type(e) for e in bench.of("r")].count(Started) == 1
    again = [p for p in bench.runner.plans if p.sequence_ids == [1]]
    assert bytes(t for p in again for t in p.tokens[0]) == b"ten tokensa long reply"
    first_decode = next(i for i, p in enumerate(again) if p.decode)
    assert [p.num_tokens for p in again[:first_decode]] == [4] * ((num_known - 1) // 4) + (
        [(num_known - 1) % 4] if (num_known - 1) % 4 else []
    )
    assert (bench.done("r").split, bench.done("r").ranks) == ("solo", 1)


def test_sampling_goes_on_with_its_seed() -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "ignore_end": True, "seed": 3}
    whole, broken = Bench(), Bench()
    for bench in (whole, broken):
        bench.ask("r", "prompt", **options)
    whole.finish()
    break_off(broken, 6)
    broken.begin()
    broken.finish()
    assert broken.ids("r") == whole.ids("r")
    assert len(set(whole.ids("r"))) > 3


def test_speeds_after_an_interruption() -> None:
    """Prefilling the answer again is no prompt's speed, and decoding it counts with the time that was lost."""
    bench = Bench(shares=(0.5, 0.5))
    bench.ask("r", "ten tokens", "a long reply")
    break_off(bench, 5)
    (sequence,) = bench.engine._open
    started_at, first_token_at = sequence.started_at, sequence.first_token_at
    bench.begin()
    bench.finish()
    assert sequence.started_at == started_at < first_token_at == sequence.first_token_at
    assert bench.done("r").prefill_tokens_per_s == pytest.approx(10 / (first_token_at - started_at))
    assert bench.done("r").decode_tokens_per_s > 0


def test_prompt_interrupted_before_its_first_token_is_measured_again() -> None:
    bench = Bench(prefill_chunk=4)
    bench.ask("r", "ten tokens", "y")
    break_off(bench, 2)
    started_at = bench.engine._open[0].started_at
    bench.begin()
    bench.engine.step()
    assert bench.engine._open[0].started_at > started_at


def test_cancel_between_epochs() -> None:
    bench = Bench(prefill_chunk=5)
    bench.ask("r", "prompt", "reply")
    bench.ask("next", "other", "x")
    break_off(bench, 3)
    bench.engine.take(Cancel("r"))
    bench.begin()
    bench.finish()
    assert bench.done("r").finish_reason == "cancelled"
    assert bench.text("next") == "x"
    assert sequences(bench.runner.plans) == {2}
    assert bench.runner.plans[0].released == []  # this epoch has no cache of it


def test_epoch_that_ends_when_all_is_done_releases_nothing_later() -> None:
    bench = Bench()
    bench.ask("r", "prompt", "x")
    bench.finish()
    bench.begin()
    bench.ask("next", "other", "y")
    bench.finish()
    assert bench.text("next") == "y"
    assert bench.runner.plans[0].released == []


def test_abandoned_requests_are_given_back_with_the_reason() -> None:
    bench = Bench()
    bench.ask("r", "prompt", "reply")
    bench.ask("next", "other", "x")
    bench.engine.step()
    bench.engine.abandon("another rank leads")
    assert bench.engine.idle
    assert bench.of("r")[-1] == Failed("r", "another rank leads", lost=True)
    assert bench.of("next")[-1] == Failed("next", "another rank leads", lost=True)
    bench.begin()
    bench.ask("later", "third", "z")
    bench.finish()
    assert bench.text("later") == "z"


def test_logits_file_of_an_interrupted_answer_is_whole(tmp_path: Path) -> None:
    bench = Bench()
    bench.ask("r", "prompt", "xyz", logits_file=str(tmp_path / "l"))
    break_off(bench, 3)
    bench.begin()
    bench.finish()
    logits = cast(dict[str, mx.array], mx.load(str(tmp_path / "l"), format="safetensors"))["logits"]
    assert mx.argmax(logits, axis=1).tolist() == [*b"xyz", END]


def test_splits_follow_the_configuration() -> None:
    for wanted in ("solo", "experts", "tokens"):
        bench = Bench(split=wanted, shares=(0.75, 0.25))
        bench.ask("r", "prompt", "ok")
        bench.finish()
        assert {p.split.name for p in bench.runner.plans} == {wanted}
        assert {p.split.fractions for p in bench.runner.plans} == {(0.75, 0.25)}
        assert bench.done("r") == replace(bench.done("r"), split=wanted, ranks=2)


def test_requests_take_the_split_that_measured_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the runner turns: `experts` takes half of solo's time for a token, but longer for a prompt."""
    now, costs = [0.0], {("experts", 1): 1.0, ("solo", 1): 2.0, ("tokens", 4): 4.0, ("experts", 4): 3.0}
    monkeypatch.setattr("expertd.engine.engine.time.monotonic", lambda: now[0])
    bench = Bench(split="auto", shares=(0.5, 0.5), prefill_chunk=4)

    def work(plan: Plan) -> None:
        now[0] += 0.01 * costs.get((plan.split.name, plan.num_tokens), 2.0)

    bench.runner.before_step = work
    for i in range(4):
        bench.ask(f"r{i}", f"{i}, a prompt of many chunks, read", "an answer")
        bench.finish()
    assert {(e.work, e.split) for e in bench.events if isinstance(e, Choice)} == {
        ("decode of 1", "experts"),
        ("prefill of 4", "solo"),
    }
    del bench.runner.plans[:]
    bench.ask("r", "prompt", "ok")
    bench.finish()
    assert [(p.num_tokens, p.split.name) for p in bench.runner.plans][-3:] == [(1, "experts")] * 3
    assert bench.text("r") == "ok"


# Whole windows, for evaluation.


def test_windows_come_back_in_a_file(tmp_path: Path) -> None:
    bench = Bench(split="tokens", shares=(0.5, 0.5))
    bench.engine.take(Observe("w", [[1, 2, 3], [4, 5, 6]], str(tmp_path / "w")))
    assert not bench.engine.idle
    bench.engine.step()
    assert bench.engine.idle
    assert bench.of("w")[0] == Started("w", 6)
    assert bench.done("w") == replace(bench.done("w"), prompt_tokens=6, split="tokens", ranks=2)
    found = cast(dict[str, mx.array], mx.load(str(tmp_path / "w"), format="safetensors"))
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        "logits": ((2, 3, VOCAB), mx.float32),
        "hidden.0": ((2, 3, 1), mx.float32),
        "hidden.1": ((2, 3, 1), mx.float32),
        "experts.1": ((2, 3, 2), mx.uint32),
    }
    assert found["logits"][1, 2, 0].item() == 6


def test_windows_of_a_broken_epoch_are_read_again(tmp_path: Path) -> None:
    bench = Bench()
    bench.engine.take(Observe("w", [[1]], str(tmp_path / "w")))

    def fail(plan: WindowsPlan) -> None:
        raise LinkDown("rank 1 died")

    bench.runner.before_windows = fail
    with pytest.raises(LinkDown):
        bench.engine.step()
    assert bench.of("w") == [Started("w", 1)] and not (tmp_path / "w").exists()
    bench.begin()
    bench.engine.step()
    assert isinstance(bench.of("w")[-1], Done) and (tmp_path / "w").exists()


def test_windows_may_be_cancelled_and_abandoned(tmp_path: Path) -> None:
    bench = Bench()
    for name in ("a", "b"):
        bench.engine.take(Observe(name, [[1]], str(tmp_path / name)))
    bench.engine.take(Cancel("a"))
    bench.engine.abandon("another rank leads")
    assert bench.of("a") == [Started("a", 1)]
    assert bench.of("b")[-1] == Failed("b", "another rank leads", lost=True)
    assert bench.engine.idle


@pytest.mark.parametrize("windows", [[], [[]], [[1], [1, 2]], [[1] * (CONTEXT + 1)]])
def test_windows_that_cannot_be_are_rejected(windows: list[list[int]], tmp_path: Path) -> None:
    bench = Bench()
    bench.engine.take(Observe("w", windows, str(tmp_path / "w")))
    (event,) = bench.of("w")
    assert isinstance(event, Rejected) and f"at most {CONTEXT}" in event.message


def test_windows_that_cannot_be_written(tmp_path: Path) -> None:
    bench = Bench()
    bench.engine.take(Observe("w", [[1]], str(tmp_path / "no folder" / "w")))
    bench.ask("r", "prompt", "ok")
    bench.finish()
    failed = bench.of("w")[-1]
    assert isinstance(failed, Failed) and str(tmp_path / "no folder") in failed.message
    assert bench.text("r") == "ok"
