"""Sequences that begin with what another one has in its cache: the same bits as without, in every family."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache

from expertd.engine.messages import Done
from expertd.engine.prefix import Prefixes, num_common
from expertd.engine.text import Tokenizer
from expertd.model.caches import MAX_MARKS, Piece, SequenceCache
from expertd.model.model import Model
from tests.engine.scripted import Bench, ByteTokenizer
from tests.engine.test_recovery import CHUNK, FAMILIES, Served, load
from tests.tiny import make_tiny

SYSTEM = "a system prompt of forty-two characters: "


class CharTokenizer(ByteTokenizer):
    """One token per character, so that an answer can be a part of the next prompt."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def serve(model: Model, folder: Path, budget_bytes: int) -> Served:
    served = Served(model, folder)
    served.engine.tokenizer = cast(Tokenizer, CharTokenizer())
    served.engine.prefixes = Prefixes(budget_bytes, CHUNK, model.one_by_one)
    return served


def done(served: Served, name: str) -> Done:
    return next(e for e in served.events if isinstance(e, Done) and e.request_id == name)


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_beginning_changes_no_bit(family: str, kernels: str, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / family, family), kernels)
    served = serve(model, tmp_path / "cached", 1 << 30)
    conversation = {"a": SYSTEM + "one two three"}
    served.ask("a", conversation["a"])
    assert served.live(4, "everything") is False and served.live()
    conversation |= {
        "again": conversation["a"],
        "turn": conversation["a"] + "".join(map(chr, served.ids("a"))) + " and then?",
        "other": SYSTEM + "four five, another question",
        "none": "Something else, from the very beginning",
    }
    for name in list(conversation)[1:]:
        served.ask(name, conversation[name])
    assert served.live()
    for name, prompt in conversation.items():
        alone = serve(model, tmp_path / name, 0)
        alone.ask(name, prompt)
        assert alone.live() and done(alone, name).cached_tokens == 0
        assert served.ids(name) == alone.ids(name)
        assert np.array_equal(served.logits(name), alone.logits(name)), name
    cached = {name: done(served, name).cached_tokens for name in conversation}
    whole = len(conversation["a"])
    chunks = model.one_by_one, family == "qwen3_next"
    assert cached == {
        "a": 0,
        "again": whole - 1,
        "turn": whole // CHUNK * CHUNK if chunks[0] else whole + len(served.ids("a")) - 1,
        "other": len(SYSTEM) // CHUNK * CHUNK if any(chunks) else len(SYSTEM),
        "none": 0,
    }


def ask(bench: Bench, name: str, prompt: str, **options: Any) -> Done:
    bench.ask(name, prompt, **({"max_tokens": 3, "ignore_end": True} | options))
    bench.finish()
    return bench.done(name)


def test_the_longest_unused_goes_first() -> None:
    bench = Bench(prefix_tokens=45)
    for name in ("first", "second", "third"):
        ask(bench, name, f"{name} prompt")
    assert len(bench.runner.caches) == 3
    assert ask(bench, "again", "first prompt and more").cached_tokens == len("first prompt")
    assert not any(p.released for p in bench.runner.plans)
    ask(bench, "x", "x", max_tokens=1)
    assert bench.runner.plans[-1].released == [2, 3] and set(bench.runner.caches) == {1, 4, 5}
    assert ask(bench, "second again", "second prompt").cached_tokens == 0


def test_without_a_budget_nothing_is_shared() -> None:
    bench = Bench()
    ask(bench, "a", "the same prompt")
    assert ask(bench, "b", "the same prompt").cached_tokens == 0
    assert bench.runner.plans[-4].released == [1] and not any(p.mark for p in bench.runner.plans)


def test_a_running_stream_is_a_source_as_well() -> None:
    bench = Bench(prefix_tokens=100)
    bench.ask("a", "the same prompt", max_tokens=20, ignore_end=True)
    for _ in range(6):
        bench.engine.step()
    assert ask(bench, "b", "the same prompt!").cached_tokens == len("the same prompt")
    assert bench.runner.plans[6].forks == [(2, 1, 15)]


def test_caches_of_a_leader_that_died_are_found_and_in_the_end_released() -> None:
    """Without a budget, as with one."""
    bench = Bench()
    bench.ask("a", "the prompt", max_tokens=9, ignore_end=True)
    for _ in range(4):
        bench.engine.step()
    (tokens,) = bench.runner.caches.values()
    successor = Bench()
    successor.engine.first_id = 100
    successor.runner = bench.runner
    successor.begin(held={1: len(tokens)})
    assert ask(successor, "a", "the prompt" + bytes(tokens[10:]).decode()).cached_tokens == len(tokens) - 1
    ask(successor, "b", "x")
    assert set(successor.runner.caches) == {102}


def test_marks_are_spread_and_end_with_the_last(tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / "tiny", "qwen3_next"), "native")
    served = serve(model, tmp_path / "served", 1 << 30)
    served.ask("a", "x" * (CHUNK * 12 + 5), max_tokens=1)
    assert served.live()
    (cache,) = served.caches.values()
    marks = sorted(cache.marks)
    assert len(marks) == MAX_MARKS and marks[-1] == CHUNK * 12 + 4
    assert max(b - a for a, b in zip([0, *marks], marks, strict=False)) <= 6 * CHUNK


def test_what_lives_on_one_rank_is_for_streams_of_that_rank() -> None:
    """Others take what all ranks have: else every stream with a common beginning would go to the same rank."""
    cache = SequenceCache([])
    cache.extend([1, 2, 3, 4], decode=False)
    cache.share()
    cache.home, cache.pending = 1, [Piece([5, 6], False), Piece([7], True)]
    prefixes, tokens = Prefixes(100, min_tokens=1), [1, 2, 3, 4, 5, 6, 7, 8]
    assert [prefixes.find(8, tokens, {9: cache}, home) for home in (0, 1, None)] == [(9, 4), (9, 7), (9, 7)]
    prefixes.one_by_one = True
    assert prefixes.find(8, tokens, {9: cache}, 1) == (0, 0)


def test_only_what_every_rank_can_go_back_to_is_a_beginning() -> None:
    """States that were kept to take steps back differ between ranks after a failure; marks do not."""
    cache = SequenceCache([ArraysCache(1)])
    for token in range(1, 5):
        cache.extend([token], decode=False)
        if token < 4:
            cache.mark()
    assert cache.lengths() == [4, 3, 2, 1] and cache.starts() == [1, 2, 3, 4]
    cache.keep_marks({1, 4})
    assert cache.can_cut(2) and cache.starts() == [1, 4]
    assert Prefixes(100, min_tokens=1).find(4, [1, 2, 3, 9], {9: cache}) == (9, 1)


def test_common_beginnings() -> None:
    a = list(range(1000))
    assert [num_common(a, a[:n]) for n in (0, 1, 256, 700, 1000)] == [0, 1, 256, 700, 1000]
    for n in (0, 1, 255, 256, 257, 999):
        assert num_common(a, [*a[:n], -1, *a[n + 1 :]]) == n
    assert num_common(a, a[:20], at_least=21) == 0
