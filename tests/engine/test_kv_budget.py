"""Memory for keys and values: who waits for it, who gives it back, and that no answer changes."""

import pytest

from expertd.engine import kv_budget
from expertd.engine.kv_budget import KvBudget
from expertd.engine.messages import Rejected, Submit
from tests.engine.scripted import Bench


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "GROWTH_TOKENS", 4)


def bytes_of(num_tokens: int) -> int:
    return 10 * num_tokens


def test_how_long_one_sequence_may_be() -> None:
    for num_bytes, wanted in (
        (0, 50),
        (39, 0),
        (40, 4),
        (79, 4),
        (80, 8),
        (480, 48),
        (519, 48),
        (520, 50),
        (9999, 50),
    ):
        assert KvBudget(num_bytes, bytes_of).most_tokens(50) == wanted


def test_the_last_gives_its_cache_up_and_is_read_again() -> None:
    """Of 16 tokens two sequences of 8 are served; when the first grows beyond, the second waits for its end."""
    bench = Bench(kv=KvBudget(160, bytes_of))
    bench.ask("a", "1234567", "abcdefgh")
    bench.ask("b", "prompt", "ABCDEFGH")
    bench.ask("c", "z", "xy")
    most = 0

    def measure(plan: object) -> None:
        nonlocal most
        held = sum(-(-len(cache) // 4) * 40 for cache in bench.runner.caches.values())
        most = max(most, held)

    bench.runner.before_step = measure
    bench.finish()
    assert [bench.text(name) for name in "abc"] == ["abcdefgh", "ABCDEFGH", "xy"]
    assert most <= 160
    # 3 takes over what 2 gave up; c, which would have had room beside a, waits for its turn.
    assert [p.sequence_ids for p in bench.runner.plans if p.started] == [[1, 2], [4], [3]]
    assert [i for p in bench.runner.plans for i in p.released] == [2, 1, 3]
    assert bench.done("b").prompt_tokens == 6 and bench.done("b").completion_tokens == 9
    told = bench.engine.stats()
    assert (told.num_preempted, told.kv_budget_bytes) == (1, 160)
    assert bench.engine.stats().num_preempted == 0


def test_the_first_may_have_all_and_no_more() -> None:
    bench = Bench(kv=KvBudget(160, bytes_of))
    bench.ask("long", "x" * 16)
    bench.ask("fits", "x" * 15, "abc")
    bench.ask("grows", "12345678", "y" * 60)
    bench.finish()
    (rejected,) = bench.of("long")
    assert isinstance(rejected, Rejected) and not rejected.busy
    assert rejected.message == (
        "the prompt has 16 tokens, but the memory for keys and values (--kv-cache) holds 16, the answer included. "
        "Shorten it to at most 15 tokens, or serve with more --kv-cache, or --kv-bits 8."
    )
    assert [bench.text(name) for name in ("fits", "grows")] == ["a", "y" * 8]
    assert bench.done("grows").finish_reason == "length"


def test_what_a_leader_with_more_memory_has_taken_is_not_lost() -> None:
    bench = Bench(kv=KvBudget(160, bytes_of))
    prompt = "x" * 18
    bench.scripts[prompt] = list(b"abcdef")
    bench.engine.take(Submit("r", prompt=prompt, generated=list(b"abc"), resumed=True))
    bench.finish()
    assert bench.text("r") == "d" and bench.done("r").finish_reason == "length"
