"""When tokens are told: beside the next step where others compute it, and never too late."""

import time
from pathlib import Path

import pytest

from expertd.engine.messages import Cancel, Done, Message, Observe, Started, Token
from expertd.engine.plan import Plan
from tests.engine.scripted import END, Bench, break_off


def _told_at_plans(bench: Bench) -> list[int]:
    """How many tokens have been told each time that the others get a plan."""
    found: list[int] = []

    def before_step(plan: Plan) -> None:
        found.append(sum(isinstance(event, Token) for event in bench.events))

    bench.runner.before_step = before_step
    return found


def test_the_others_get_the_next_plan_before_the_texts_are_made() -> None:
    bench = Bench(shares=(0.5, 0.5))
    told = _told_at_plans(bench)
    bench.ask("a", "prompt", "xyz")
    bench.finish()
    assert told == [0, 0, 0, 1, 2]  # the prompt, and four tokens: each is told with the plan after the next
    assert bench.text("a") == "xyz" and bench.ids("a") == [*b"xyz", END]
    assert [type(e) for e in bench.events] == [Started, *[Token] * 4, Done]


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5)])
def test_a_rank_that_computes_alone_tells_at_once(shares: tuple[float, ...]) -> None:
    bench = Bench(shares=shares)
    bench.begin("solo", shares)
    told = _told_at_plans(bench)
    bench.ask("a", "prompt", "xyz")
    bench.finish()
    assert told == [0, 0, 1, 2, 3]


def test_a_text_that_may_end_the_answer_is_made_before_the_next_plan() -> None:
    """No token is computed after a stop string, whoever is beside it."""
    bench = Bench(shares=(0.5, 0.5))
    bench.ask("a", "prompt", "abcdef", stop=["cd"])
    bench.ask("b", "another", "uvwxyz")
    bench.finish()
    assert (bench.text("a"), bench.done("a").stop, bench.done("a").completion_tokens) == ("ab", "cd", 4)
    assert bench.text("b") == "uvwxyz"
    assert [len(p.sequence_ids) for p in bench.runner.plans if p.decode] == [2, 2, 2, 2, 1, 1, 1]


def test_what_was_chosen_is_told_when_the_next_step_fails() -> None:
    bench = Bench(shares=(0.5, 0.5))
    bench.ask("a", "prompt", "xyz")
    break_off(bench, 3)  # a chunk, and two tokens
    assert bench.text("a") == "xy"
    bench.begin()
    bench.finish()
    assert bench.ids("a") == [*b"xyz", END]


def test_what_was_chosen_is_told_when_an_epoch_ends() -> None:
    for ends in ("begin", "abandon"):
        bench = Bench(shares=(0.5, 0.5))
        bench.ask("a", "prompt", "xyz")
        for _ in range(3):
            bench.engine.step()
        assert bench.text("a") == "x"
        bench.begin() if ends == "begin" else bench.engine.abandon("gone")
        assert bench.text("a") == "xy", ends


def test_what_was_chosen_is_told_before_windows_are_read(tmp_path: Path) -> None:
    bench = Bench(shares=(0.5, 0.5))
    told: list[str] = []
    bench.runner.before_windows = lambda plan: told.append(bench.text("a"))
    bench.ask("a", "prompt", "xyz")
    for _ in range(3):
        bench.engine.step()
    bench.engine.take(Observe("w", [[1]], str(tmp_path / "w")))
    bench.finish()
    assert told == ["xy"] and bench.text("a") == "xyz"


def test_a_cancelled_request_ends_after_its_tokens() -> None:
    bench = Bench(shares=(0.5, 0.5))
    bench.ask("a", "prompt", "xyz")
    bench.ask("b", "another", "uvw")
    for _ in range(3):
        bench.engine.step()
    bench.engine.take(Cancel("a"))
    bench.finish()
    assert [type(e) for e in bench.of("a")] == [Started, Token, Token, Done]
    assert bench.done("a").finish_reason == "cancelled" and bench.text("b") == "uvw"


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5)])
def test_nothing_is_told_without_a_flush(shares: tuple[float, ...]) -> None:
    """Messages are gathered, and the last of a request must not wait for another step."""
    bench = Bench(shares=shares)
    flushed: list[int] = []
    bench.engine._delivery._flush = lambda: flushed.append(len(bench.events))
    bench.ask("a", "prompt", "xyz")
    bench.finish()
    assert flushed[-1] == len(bench.events) == 6 and len(flushed) == 4


def test_the_rank_that_tells_is_home_to_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, and each event one more: with eight streams, nearly all of the time goes into telling."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def spend(what: object) -> None:
        clock[0] += 1

    def send(event: Message) -> None:
        bench.events.append(event)
        spend(event)

    bench = Bench()
    bench.engine.splits = ["solo", "sequences"]
    bench.begin("sequences", (0.5, 0.5))
    bench.engine._delivery._send = send
    bench.runner.before_step = spend
    for turn, at_home in (("first", [4, 4]), ("second", [3, 5])):
        num_plans = len(bench.runner.plans)
        for i in range(8):
            bench.ask(f"{turn} {i}", f"prompt {i}", "ten tokens")
        bench.finish()
        decode = [p for p in bench.runner.plans[num_plans:] if p.decode]
        assert [decode[0].homes.count(rank) for rank in (0, 1)] == at_home, turn
