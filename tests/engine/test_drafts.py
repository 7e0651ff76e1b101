"""A draft model changes how soon an answer comes, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.engine import drafts as module
from expertd.engine.drafts import MAX_IN_A_ROW, Drafter, Drafts, open_drafter
from expertd.engine.messages import Done
from expertd.engine.speculate import LENGTHS, pick_length
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.model.draft import DraftModel
from expertd.model.kernels import open_kernels
from expertd.model.model import Model
from expertd.sampling import Sampling
from tests.engine.scripted import VOCAB, Bench
from tests.engine.test_recovery import CHUNK, Served, load
from tests.tiny import make_tiny

PROMPT = "abcbcacabacb of which the draft reads more than a chunk"
GREEDY = Sampling()
SEEDED = Sampling(temperature=0.3, top_p=0.9, repetition_penalty=1.05, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, "native")


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer(folder, check_checkpoint(folder).config)


def drafts_of(draft: Path, folder: Path) -> Drafts:
    kernels = open_kernels("native", ACTIVATION_BITS, num_threads=2)
    return Drafts(open_drafter(draft, tokenizer_of(folder), VOCAB, CHUNK, kernels))


def serve(model: Model, folder: Path, drafts: Drafts | None, **options: Any) -> Served:
    served = Served(model, folder)
    if drafts:
        served.engine.drafts = drafts
    served.ask("r", PROMPT, **({"max_tokens": 40} | options))
    return served


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", ["the model itself", "random"])
def test_an_answer_is_the_same_with_a_draft_model(
    kind: str, sampling: Sampling, folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit of its logits, where a step fails and where another leader goes on as well."""
    monkeypatch.setattr(module, "pick_length", lambda *_: 3)
    draft = folder if kind != "random" else make_tiny(tmp_path / "draft", "qwen3", seed=9)
    plain = serve(model, tmp_path / "plain", None, sampling=sampling)
    drafted = serve(model, tmp_path / "drafted", drafts_of(draft, folder), sampling=sampling)
    assert plain.live() and drafted.live()
    assert drafted.ids("r") == plain.ids("r")
    assert np.array_equal(drafted.logits("r"), plain.logits("r"))
    (counts,) = drafted.engine.drafts.take()
    (done,) = [e for e in drafted.events if isinstance(e, Done)]
    assert counts.source == "model" and counts.num_accepted == done.guessed_tokens
    rate = counts.num_accepted / counts.num_proposed
    if kind == "random":
        assert rate < 0.1
    else:
        assert drafted.plans < plain.plans
        assert 0.2 < rate < 1 if sampling is SEEDED else rate == 1

    broken = serve(model, tmp_path / "broken", drafts_of(draft, folder), sampling=sampling)
    assert not broken.live(6, "a step less") and not broken.live(4, "nothing")
    had = broken.ids("r")
    assert 0 < len(had) < 40
    successor = serve(model, tmp_path / "next", drafts_of(draft, folder), sampling=sampling, generated=had)
    assert successor.live()
    assert had + successor.ids("r") == plain.ids("r")
    assert successor.engine.drafts.take()


def test_what_stood_there_before_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing did, the draft model is asked about all tokens so far."""
    lengths: list[int] = []
    asked: list[list[int]] = []

    class Scripted:
        def draft(self, tokens: list[int], room: int, cost_s: Callable[[int], float | None]) -> list[int]:
            asked.append(tokens)
            return [ord("z")][:room]

        def judge(self, num_right: int, num_judged: int) -> None:
            lengths.append(num_right)

    monkeypatch.setattr(module, "pick_length", lambda *_: 3)
    bench = Bench()
    bench.engine.speculates = True
    bench.engine.drafts = Drafts(cast(Drafter, Scripted()))
    bench.ask("r", "abcdefg abc", "defgxz")
    bench.finish()
    assert bench.text("r") == "defgxz"
    assert [bytes(tokens).decode() for tokens in asked] == ["abcdefg abcdefgx"]
    assert lengths == [1]
    counts = {d.source: (d.num_proposed, d.num_accepted) for d in bench.engine.drafts.take()}
    assert counts == {"lookup": (6, 3), "model": (1, 1)}


def test_plain_steps_are_measured_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """However well guesses do."""
    monkeypatch.setattr(module, "pick_length", lambda *_: 1)
    bench = Bench()
    bench.engine.drafts = Drafts(
        cast(Drafter, SimpleNamespace(draft=lambda *_: [ord("x")], judge=lambda *_: None))
    )
    bench.ask("r", "a", "x" * 62, max_tokens=62)
    bench.finish()
    kinds = "".join("check " if plan.logits else "plain " for plan in bench.runner.plans).split()
    assert kinds == ["plain", *["check"] * MAX_IN_A_ROW, "plain", *["check"] * 14]


class CountingModel:
    """Guesses 7 for ever; no time passes."""

    num_tokens, num_read = 100, 0

    def new_cache(self) -> Any:
        from expertd.model.caches import SequenceCache

        return SequenceCache([])

    def read(self, tokens: list[int], cache: Any) -> None:
        self.num_read += len(tokens)
        cache.extend(tokens, decode=False)

    def guess(self, tokens: list[int], cache: Any, length: int) -> list[int]:
        self.num_read += len(tokens)
        cache.extend(tokens + [7] * (length - 1), decode=False)
        return [7] * length


def drafter(context_length: int = 4096) -> tuple[Drafter, CountingModel]:
    counting = CountingModel()
    return Drafter(cast(DraftModel, counting), context_length, CHUNK), counting


def test_a_draft_reads_what_it_lacks_in_chunks_and_follows_what_was_accepted() -> None:
    guessing, counting = drafter()
    costs = {1: 1.0, 4: 1.2, 8: 1.3}
    tokens = list(range(40))
    found = [guessing.draft(tokens, 99, costs.get) for _ in range(3)]
    assert found == [[], [7] * 7, [7] * 7] and counting.num_read == 40 + 1
    assert guessing.draft([*tokens, 7, 7, 9], 2, costs.get) == [7, 7]  # room for two; the 9 was another token
    assert counting.num_read == 41 + 1
    assert guessing.draft([1, 2], 99, costs.get) == [7] * 7, "another stream"
    assert guessing.draft([100], 99, costs.get) == [], "a token that it does not know"
    assert guessing.draft(tokens, 0, costs.get) == []
    assert drafter(context_length=46)[0].draft(tokens, 99, costs.get) == [], "longer than what it can read"


def test_a_draft_that_is_wrong_is_tried_rarely_and_taken_again_once_it_is_right() -> None:
    guessing, _ = drafter()
    costs = {1: 1.0, 4: 2.0, 8: 6.0}
    tokens = [1, 2]

    def num_drafts(num_right: int, num_steps: int) -> int:
        count = 0
        for _ in range(num_steps):
            if found := guessing.draft(tokens, 99, costs.get):
                count += 1
                guessing.judge(num_right, min(num_right + 1, len(found)))
        return count

    assert num_drafts(0, 10) == 6, "until the rate is known"
    assert 10 < num_drafts(0, 2000) < 40, (
        "each takes one step's time for nothing, and one in a hundred is for that"
    )
    assert num_drafts(3, 2000) > 1000


def test_a_draft_s_own_time_counts() -> None:
    costs = {1: 1.0, 4: 1.2, 8: 1.5}
    assert [pick_length(0.9, costs.get, guess_s) for guess_s in (0.0, 0.2, 0.5, 0.9)] == [7, 7, 3, 0]
    assert [pick_length(0.9, costs.get, 0.2, ahead_s) for ahead_s in (0.1, 0.7)] == [7, 0]
    assert LENGTHS == (3, 7)


def test_a_draft_that_cannot_serve_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", "qwen3")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        ConfigError, match=r"2 of 257 tokens differ, such as 'a' .* Choose a small model of the same"
    ):
        drafts_of(other, folder)
    with pytest.raises(
        ConfigError, match=r"a gpt_oss keeps KVCache, RotatingKVCache, of which wrong guesses"
    ):
        drafts_of(make_tiny(tmp_path / "windows", "gpt_oss"), folder)
