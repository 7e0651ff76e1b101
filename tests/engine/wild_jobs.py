"""An engine on real ranks whose planner is wild: each step takes any split, and streams come and go meanwhile."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.engine import drafts as drafts_module
from expertd.engine import engine as engine_module
from expertd.engine.copies import Copies
from expertd.engine.engine import Engine
from expertd.engine.kv_budget import KvBudget
from expertd.engine.messages import Done, Message, Submit, Token
from expertd.engine.plan import CatchUp, Meeting, Rows, Told
from expertd.engine.planner import Planner, Work
from expertd.engine.prefix import Prefixes
from expertd.engine.runner import Runner
from expertd.engine.text import Tokenizer
from expertd.link.mailbox import Mailbox
from expertd.model.caches import SequenceCache
from expertd.model.kernels import open_kernels
from expertd.model.model import Model
from expertd.sampling import Sampling
from tests.engine.scripted import ByteTokenizer

# After so many steps comes so much of a prompt, and its answer has so many tokens.
REQUESTS = (
    (0, "a prompt that is longer than the window of any family", 16),
    (0, "short", 8),
    (2, "x", 6),
    (5, "a prompt that is longer than most and begins alike", 9),
    (6, "another that comes later, when the others are at it", 8),
    (12, "and one more", 4),
    (24, "the last one is alone for a while, and divided again", 42),
    (26, "another that comes later still", 5),
    (44, "and one that comes to another leader", 9),
)
# In these steps there is room for two blocks of keys and values only.
TOLD: Counter[str] = Counter()  # ways in which other ranks were brought up to date
SHORT, SHORT_AT = KvBudget(512, lambda num_tokens: num_tokens), (9, 10, 30)


class WildPlanner(Planner):
    def __init__(self, splits: list[str], seed: int) -> None:
        super().__init__("auto", splits, 2)
        self._random, self._splits = random.Random(seed), splits
        self.taken: set[tuple[str, str]] = set()

    def choose(self, work: Work) -> str:
        return self._random.choice([s for s in self._splits if s != "sequences" or work.kind == "decode"])

    def preferred(self, work: Work) -> str:
        return self._random.choice(["solo", "sequences"])

    def took(self, work: Work, split: str, *more: Any) -> None:
        self.taken.add((work.kind, split))


class WildCopies(Copies):
    """Copies pay by the seed, and often stop doing so between two frames."""

    random = random.Random()

    def pay(self, num_tokens: int, row_bytes: int, read_s: float) -> bool:
        return self.frame_tokens(row_bytes) > 0 and self.random.random() < 0.6


class Counting(Runner):
    """From the second meeting on, the last rank has nothing any more, as one that was started again."""

    num_meetings = num_lacking = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._copies = WildCopies(6400)  # of a few tokens

    def _meet(self, meeting: Meeting) -> dict[int, int]:
        self.num_meetings += 1
        if self.num_meetings in (2, 3) and self._link.rank == self._link.num_ranks - 1 > 0:
            self.caches.clear()
        return super()._meet(meeting)

    def _tell_lacking(self, sequence_id: int, chunk: int) -> None:
        self.num_lacking += 1
        super()._tell_lacking(sequence_id, chunk)

    def _tell(self, plan: Told) -> None:
        TOLD["copied"] += isinstance(plan, Rows)
        TOLD["read"] += isinstance(plan, CatchUp) and bool(plan.sequence_ids)
        TOLD["steps copied"] += isinstance(plan, CatchUp) and plan.copied
        super()._tell(plan)


def serve(
    mailbox: Mailbox, checkpoints: list[str], seed: int, kernels: str = "native"
) -> dict[str, list[Any]]:
    """Tokens and log-probabilities of every request, by checkpoint; {} from followers."""
    engine_module.MAX_BEHIND, engine_module.SPARE = 24, 6
    engine_module.BESIDES_WEIGHT = 0.0  # homes by the seed, not by the clock
    WildCopies.random.seed(seed)
    lengths = random.Random(seed)
    drafts_module.pick_length = lambda rate, cost_s: lengths.choice([0, 0, 0, 3])
    found = {}
    for folder in checkpoints:
        info = check_checkpoint(Path(folder))
        native = open_kernels(kernels, ACTIVATION_BITS, num_threads=1)
        model = Model(info.folder, info.config, kernels=native, kv_bits=8 if folder.endswith("kv8") else 0)
        model.attach(mailbox if mailbox.num_ranks > 1 else None)
        runner = Counting(model, mailbox, {})
        if mailbox.rank == 0:
            found[Path(folder).name] = _lead(runner, model, seed)
            runner.meet()
        else:
            while runner.num_meetings < 4:
                runner.follow()
    return found


def _engine(model: Model, events: list[Message]) -> Engine:
    engine = Engine(cast(Tokenizer, ByteTokenizer()), 512, model.splits, 16, events.append, 257)
    engine.speculates = True
    engine.prefixes = Prefixes(1 << 30, 16, model.one_by_one, min_tokens=4)
    return engine


def _told(events: list[Message]) -> dict[str, list[int]]:
    """The tokens of every request, as a supervisor knows them."""
    told: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, Token):
            told.setdefault(event.request_id, []).extend(event.token_ids)
    return told


def _is_here(runner: Runner, sequence_id: int) -> bool:
    cache = runner.caches.get(sequence_id)
    return cache is not None and not (cache.pending and cache.home)


def _ask(engine: Engine, name: str, max_tokens: int) -> None:
    # The one that is alone has three tokens to choose from, so that drafts are often right.
    bias = tuple((token, 100.0) for token in b"abc" if "alone" in name)
    sampling = Sampling(temperature=0.7, seed=5, logit_bias=bias)
    engine.take(Submit(name, name, sampling=sampling, max_tokens=max_tokens, ignore_end=True, logprobs=2))


def _lead(runner: Runner, model: Model, seed: int) -> list[Any]:
    events: list[Message] = []
    engine = _engine(model, events)
    num_ranks = runner._link.num_ranks
    engine.begin(runner, "auto", (1 / num_ranks,) * num_ranks)
    planner = WildPlanner(model.splits, seed)
    if num_ranks > 1:
        engine._planner = planner
    pending, step = list(REQUESTS), 0
    while pending or not engine.idle:
        for request in [r for r in pending if r[0] <= step]:
            pending.remove(request)
            _ask(engine, request[1], request[2])
        if num_ranks > 1:
            engine.kv = SHORT if step in SHORT_AT else KvBudget()
        engine.step()
        step += 1
        if step == 22 and num_ranks > 1:  # a new epoch
            runner = Counting(model, runner._link, runner.caches)
            engine.begin(runner, "auto", (1 / num_ranks,) * num_ranks)
            engine._planner = planner
        if (
            step == 36 and num_ranks > 1
        ):  # and one with another leader, which has the caches of the one that died
            runner = Counting(model, runner._link, runner.caches)
            assert engine._num_preempted > 0
            if seed % 2:  # else it dies between choosing tokens and telling of them
                engine._delivery.tell()
            told = _told(events)
            lost, engine = engine._open, _engine(model, events)
            engine.first_id = 100
            engine.begin(runner, "auto", (1 / num_ranks,) * num_ranks)
            engine._planner = planner
            for s in lost:
                engine.take(replace(s.submit, generated=told.get(s.submit.request_id, []), resumed=True))
            engine._meet(runner)
            found = {s.sequence_id for s in engine._open if s.num_computed}
            here = [s for s in lost if s.num_computed and _is_here(runner, s.sequence_id)]
            # What has a token that was not told is not taken over, but begun with.
            known = {s: len(s.prompt) + len(told.get(s.submit.request_id, [])) for s in here}
            assert found == {
                s.sequence_id for s in here if len(runner.caches[s.sequence_id].known) < known[s]
            }
            assert len(found) == len(here) or seed % 2 == 0
    if num_ranks > 1:
        assert {split for _, split in planner.taken} == set(model.splits), planner.taken
        assert ("decode", "sequences") in planner.taken
        assert ("prefill", "sequences") in planner.taken
    forgets = SequenceCache(model.new_cache()).forgets
    assert min(TOLD.values()) > 0 or num_ranks == 1 or not forgets, TOLD
    TOLD.clear()
    if forgets and not model.one_by_one:
        assert num_ranks == 1 or "check" in {kind for kind, _ in planner.taken}
        assert num_ranks == 1 or runner.num_lacking > 1
        cached = [e.cached_tokens for e in events if isinstance(e, Done)]
        assert sum(cached) >= 20, cached
    tokens = [e for e in events if isinstance(e, Token)]
    return [[e.request_id, e.token_ids, [p.chosen.logprob for p in e.logprobs]] for e in sorted(
        tokens, key=lambda e: e.request_id)]  # fmt: skip
