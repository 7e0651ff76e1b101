"""Drafts change how soon an answer comes, and nothing else."""

import random
from pathlib import Path

import numpy as np
import pytest

from expertd.engine import drafts as drafts_module
from expertd.engine.messages import Done
from expertd.engine.prefix import Prefixes
from expertd.engine.speculate import LENGTHS, Guesses, pick_length
from expertd.sampling import Sampling
from tests.engine.scripted import END, Bench
from tests.engine.test_recovery import FAMILIES, Served, load
from tests.tiny import make_tiny

# Three tokens alone, so that what follows is often guessed right, and often wrong.
FEW = Sampling(logit_bias=tuple((token, 100.0) for token in b"abc"))


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_with_drafts(
    family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit of its logits. Where a token's bits depend on its neighbours, or caches cannot be cut, there
    are no drafts at all."""
    model = load(make_tiny(tmp_path / family, family), kernels)
    lengths = random.Random(1)
    monkeypatch.setattr(drafts_module, "pick_length", lambda rate, cost_s: lengths.choice(LENGTHS))
    plain, drafted = Served(model, tmp_path / "plain"), Served(model, tmp_path / "drafted")
    drafted.engine.speculates = True
    for served in (plain, drafted):
        served.engine.prefixes = Prefixes(0, 16, model.one_by_one)
        served.ask("r", "abcbcacabacb", max_tokens=40, sampling=FEW)
        assert served.live()
    assert drafted.ids("r") == plain.ids("r")
    assert np.array_equal(drafted.logits("r"), plain.logits("r"))
    (done,) = [e for e in drafted.events if isinstance(e, Done)]
    able = not model.one_by_one and family != "qwen3_next"
    assert (drafted.plans < plain.plans, done.guessed_tokens > 0) == (able, able)


def test_a_prompt_whose_cache_is_anothers_is_answered(tmp_path: Path) -> None:
    """Its first step is a decode step, before which it has no cache of its own that could be cut."""
    model = load(make_tiny(tmp_path / "tiny", "qwen3_moe"), "native")
    served = Served(model, tmp_path / "served")
    served.engine.speculates = True
    served.engine.prefixes = Prefixes(1 << 20, 16, model.one_by_one)
    for name in ("r", "s"):
        served.ask(name, "abcbcacabacb" * 4, max_tokens=10, sampling=FEW)
        assert served.live()
    assert served.ids("r") == served.ids("s")
    assert [e.cached_tokens for e in served.events if isinstance(e, Done)] == [0, 47]


def test_right_guesses_save_steps_and_wrong_ones_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "pick_length", lambda rate, cost_s: 3)
    bench = Bench()
    bench.engine.speculates = True
    bench.ask("r", "abcdefg abc", "defg abcdex")
    bench.finish()
    assert bench.ids("r") == [*b"defg abcdex", END]
    read, *steps = bench.runner.plans
    shapes = [(bytes(p.tokens[0]), p.decode, p.logits, p.cuts) for p in steps]
    assert (bytes(read.tokens[0]), read.logits) == (b"abcdefg ab", False)
    assert shapes == [
        (b"cdef", False, True, []),
        (b"g abc"[:4], False, True, []),
        (b"cdef", False, True, []),  # the f is wrong, and what comes after it
        (b"x", True, False, [(1, 21)]),
    ]
    assert bench.done("r").guessed_tokens == 8
    assert bytes(bench.runner.caches[1]) == b"abcdefg abcdefg abcdex"


def test_an_answer_ends_where_it_would_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "pick_length", lambda rate, cost_s: 7)
    for max_tokens in range(1, 9):
        bench = Bench()
        bench.engine.speculates = True
        bench.ask("r", "abcdefghij abc", "defghij abcdefghij", max_tokens=max_tokens)
        bench.finish()
        assert bench.text("r") == "defghij abcdefghij"[:max_tokens]
    bench = Bench()
    bench.engine.speculates = True
    bench.ask("r", "abcdefghij abc", "defghij abcdefghij", stop=["gh"])
    bench.finish()
    assert (bench.text("r"), bench.done("r").finish_reason) == ("def", "stop")


def test_several_streams_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "pick_length", lambda rate, cost_s: 3)
    bench = Bench()
    bench.engine.speculates = True
    for name in "ab":
        bench.ask(name, f"{name}xyz {name}xy", "z xyz xyz")
    bench.finish()
    together = [p for p in bench.runner.plans if len(p.tokens) > 1]
    assert together and not any(p.logits for p in together)


def test_guesses_follow_the_last_time() -> None:
    guesses = Guesses([1, 2, 3, 4, 9, 1, 2, 3, 5, 1, 2, 3])
    assert guesses.draft(7) == [5, 1, 2, 3, 5, 1, 2]
    assert Guesses([1, 2, 3]).draft(3) == []
    before = guesses.rate
    guesses.add(5)
    assert guesses.rate > before
    guesses.add(7)
    assert guesses.rate < before + 0.01


@pytest.mark.parametrize(
    ("rate", "costs", "length"),
    [
        (0.9, {1: 1.0, 4: 1.2, 8: 1.5}, 7),
        (0.9, {1: 1.0, 4: 3.0, 8: 9.0}, 3),
        (0.9, {1: 1.0, 4: 3.4, 8: 6.0}, 0),  # 3.44 tokens for 3.4: not worth it
        (0.2, {1: 1.0, 4: 1.2, 8: 1.5}, 0),
        (0.9, {1: 1.0}, 3),  # to know what it costs
        (0.2, {1: 1.0}, 0),
        (0.9, {}, 0),
    ],
)
def test_a_draft_is_as_long_as_pays(rate: float, costs: dict[int, float], length: int) -> None:
    assert pick_length(rate, costs.get) == length
