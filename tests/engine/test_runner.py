"""Every rank carries out the leader's plans in the same way; a broken group gives no logits."""

import itertools
import math
import time
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from expertd.engine import runner as runner_module
from expertd.engine.plan import CatchUp, Lacking, Meeting, Plan, Rows, WindowsPlan, decode_plan
from expertd.engine.runner import CATCH_UP_STEPS, MASK_BYTES, Caches, Runner
from expertd.errors import LinkDown, RemoteProtocolError
from expertd.link.mailbox import Mailbox
from expertd.model.caches import Piece, SequenceCache
from expertd.model.model import Model
from expertd.split.cut import StepSplit

SPLIT = StepSplit("experts", (0.5, 0.5))
PLANS = [
    Plan([1], [[5, 6, 7]], False, SPLIT, [1], []),
    Plan([1], [[8]], True, SPLIT, [], []),
    Plan([2], [[9]], True, SPLIT, [2], []),
    Plan([2, 1], [[10], [11]], True, SPLIT, [], []),
    Plan([2], [[12]], True, SPLIT, [], [1]),
]


class FakeLayer(KVCache):  # type: ignore[misc]
    """A cache is the list of its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        super().__init__()

    @property
    def offset(self) -> int:
        return len(self.tokens)

    @offset.setter
    def offset(self, length: int) -> None:
        del self.tokens[length:]

    @property
    def state(self) -> list[int]:
        return self.tokens[:]

    @classmethod
    def from_state(cls, state: list[int]) -> "FakeLayer":
        layer = cls()
        layer.tokens = state
        return layer


class FakeModel:
    """The logits are those of the next number."""

    one_by_one = False
    read_s = math.inf

    def __init__(self) -> None:
        self.layers: list[FakeLayer] = []
        self.splits: list[StepSplit] = []

    @property
    def caches(self) -> list[list[int]]:
        return [layer.tokens for layer in self.layers]

    def new_cache(self) -> list[FakeLayer]:
        self.layers.append(FakeLayer())
        return self.layers[-1:]

    def prefill(self, tokens: list[int], cache: list[FakeLayer], split: StepSplit) -> None:
        cache[0].tokens += tokens
        self.splits.append(split)

    def decode(
        self, tokens: list[int], caches: list[list[FakeLayer]], split: StepSplit, counts: Any = None
    ) -> mx.array:
        for token, cache in zip(tokens, caches, strict=True):
            cache[0].tokens.append(token)
        self.splits.append(split)
        return mx.array([[token + 1.0] for token in tokens])

    def observe(self, tokens: mx.array, split: StepSplit) -> tuple[mx.array, str]:
        self.splits.append(split)
        return tokens + 1, "taps"


class FakeMailbox:
    """Brings frames, takes frames, and may break."""

    rank = slot_bytes = 0

    def __init__(self, num_ranks: int, frames: list[bytes | None]) -> None:
        self.num_ranks, self.frames = num_ranks, frames
        self.sent: list[bytes] = []
        self.failure: Exception | None = None
        self.lost: Exception | None = None  # when something is sent
        self.answers: list[bytes] = []
        self.other = b""  # rank's answer

    def send_frame(self, frame: bytes) -> None:
        if self.lost:
            raise self.lost
        self.sent.append(frame)

    def wait_frame(self, idle_s: float) -> bytes | None:
        return self.frames.pop(0)

    def exchange(self, mine: bytes, sizes: list[int]) -> bytes:
        assert sizes == [len(mine)] * 2
        self.answers.append(mine)
        return mine + (self.other or mine)

    def check(self) -> None:
        if self.failure:
            raise self.failure


def make(
    num_ranks: int = 2,
    frames: list[bytes | None] | None = None,
    caches: Caches | None = None,
    slot_bytes: int = 0,
) -> tuple[Runner, Any, Any]:
    model, box = FakeModel(), FakeMailbox(num_ranks, frames or [])
    box.slot_bytes = slot_bytes
    return Runner(cast(Model, model), cast(Mailbox, box), {} if caches is None else caches), model, box


def test_leader_and_follower_do_the_same() -> None:
    leader, led, box = make()
    logits = [leader.lead(plan) for plan in PLANS]
    assert [x.tolist() if x is not None else None for x in logits] == [
        None, [[9.0]], [[10.0]], [[11.0], [12.0]], [[13.0]],
    ]  # fmt: skip
    assert [decode_plan(frame) for frame in box.sent] == PLANS
    follower, followed, _ = make(frames=[None, *box.sent, None])
    for _ in range(len(PLANS) + 2):
        follower.follow()
    assert followed.caches == led.caches == [[5, 6, 7, 8, 11], [9, 10, 12]]
    assert followed.splits == led.splits == [SPLIT] * len(PLANS)


# Steps that rank 0 takes alone.

SOLO = StepSplit("solo", (0.5, 0.5))
ALONE = [
    Plan([1], [[8]], True, SOLO, [], []),
    Plan([1, 2], [[9], [20]], True, SOLO, [2], []),
    Plan([1, 2, 3], [[10], [21], [30]], True, SOLO, [3], []),
    Plan([1, 3], [[11], [31]], True, SOLO, [], [2]),
]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_solo_steps_are_told_before_the_next_that_takes_all(one_by_one: bool) -> None:
    leader, led, box = make()
    leader.lead(PLANS[0])
    logits = [leader.lead(plan) for plan in ALONE]
    assert [x.tolist() for x in logits if x is not None] == [
        [[9.0]], [[10.0], [21.0]], [[11.0], [22.0], [31.0]], [[12.0], [32.0]],
    ]  # fmt: skip
    assert [decode_plan(frame) for frame in box.sent] == PLANS[:1]
    together = Plan([3, 1], [[32], [12]], True, SPLIT, [], [])
    leader.lead(together)
    assert [decode_plan(frame) for frame in box.sent[1:]] == [CatchUp(ALONE), CatchUp([]), together]
    follower, followed, _ = make(frames=list(box.sent))
    followed.one_by_one = one_by_one
    for _ in box.sent:
        follower.follow()
    all_tokens = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32]]
    assert led.caches == all_tokens
    # Sequence 2 was over before the follower came to it.
    assert followed.caches == (all_tokens if one_by_one else [all_tokens[0], all_tokens[2]])
    assert len(followed.splits) == (len(ALONE) if one_by_one else 2) + 2


@pytest.mark.parametrize(("paying", "num_copied"), [(9, 2), (2, 1), (0, 0)])
def test_solo_steps_are_copied_where_that_is_faster(
    paying: int, num_copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others then have what the steps left without computing anything; a link that turns out slow gets no more."""

    def pack(layers: list[Any], start: int, stop: int) -> list[Any]:
        return [("tokens", layers[0].tokens[start:stop], bytes(100))]

    def put(layers: list[Any], start: int, count: int, packed: list[Any]) -> None:
        layers[0].tokens += packed[0][1]

    asked = iter([True] * paying + [False] * 9)
    for name, function in (("row_bytes", lambda layers: 30), ("pack_rows", pack), ("put_rows", put)):
        monkeypatch.setattr(runner_module, name, function)
    monkeypatch.setattr(runner_module.Copies, "pay", lambda *_: next(asked))
    monkeypatch.setattr(SequenceCache, "evaluate", lambda cache: None)
    leader, led, box = make(slot_bytes=200)  # a frame for each sequence
    together = Plan([3, 1], [[32], [12]], True, SPLIT, [], [])
    for plan in [PLANS[0], *ALONE, together]:
        leader.lead(plan)
    rows = [
        (r.rows_of, r.start, r.num_tokens)
        for frame in map(decode_plan, box.sent)
        if isinstance(frame, CatchUp)
        for r in frame.rows
    ]
    assert rows == [(1, 3, 4), (3, 0, 2)][:num_copied]  # sequence 2 is over
    follower, followed, other = make(frames=list(box.sent))
    other.rank = 1
    for _ in box.sent:
        follower.follow()
    assert led.caches == [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32]]
    assert [tokens for tokens in followed.caches if tokens] == [led.caches[0], led.caches[2]]
    assert len(followed.splits) == 2 + (2 - num_copied)
    assert not follower.num_behind([1, 3]) and len(follower.caches[1]) == 8


def test_a_prompt_is_read_by_all_at_once_though_solo() -> None:
    leader, _, box = make()
    plan = Plan([1], [[5, 6, 7]], False, SOLO, [1], [])
    leader.lead(plan)
    assert [decode_plan(frame) for frame in box.sent] == [plan]


def test_a_solo_prompt_waits_for_nobody() -> None:
    leader, led, box = make()
    prompt = Plan([4], [[40, 41]], False, SOLO, [4], [])
    for plan in [PLANS[0], *ALONE, prompt]:
        leader.lead(plan)
    assert [decode_plan(frame) for frame in box.sent] == [PLANS[0], CatchUp(ALONE, [], [prompt])]
    follower, followed, _ = make(frames=list(box.sent))
    for _ in box.sent:
        follower.follow()
    assert led.caches[-1] == followed.caches[-1] == [40, 41]
    assert followed.caches[0] == led.caches[0]


def test_when_nothing_is_to_do_the_others_catch_up() -> None:
    leader, _, box = make()
    leader.lead(PLANS[0])
    assert not leader.is_ahead
    leader.lead(ALONE[0])
    assert leader.is_ahead
    leader.rest()
    leader.rest()
    assert not leader.is_ahead
    assert [decode_plan(frame) for frame in box.sent[1:]] == [CatchUp(ALONE[:1])]


@pytest.mark.parametrize("forked", [False, True])
def test_what_is_over_is_not_read_unless_another_begins_with_it(forked: bool) -> None:
    leader, _, box = make()
    steps = [Plan([1, 2], [[i], [i + 50]], True, SOLO, [] if i else [2], []) for i in range(40, 43)]
    start = Plan([2], [[50]], False, SPLIT, [2], [])
    forks = [(3, 1, 6)] if forked else []
    following = Plan([2] + [3] * forked, [[99]] + [[7]] * forked, True, SPLIT, [], [1], [1], forks)
    for plan in [PLANS[0], start, *steps, following]:
        leader.lead(plan)
    follower, followed, _ = make(frames=list(box.sent))
    for _ in box.sent:
        follower.follow()
    assert followed.caches == [[5, 6, 7, 40, 41, 42] if forked else [5, 6, 7], [50, 90, 91, 92, 99]]
    if forked:
        assert follower.caches[3].layers[0].tokens == [5, 6, 7, 40, 41, 42, 7]


@pytest.mark.parametrize(
    ("step_s", "one_by_one", "num_steps"),
    [(0.003, False, 100), (1e-6, False, 512), (1.0, False, CATCH_UP_STEPS), (0.0019, True, 53)],
)
def test_others_are_never_far_behind(
    step_s: float, one_by_one: bool, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they lack is read in a tenth of a second: a chunk as the first one, of three tokens, or one by one."""
    leader, led, box = make()
    led.one_by_one = one_by_one
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: step_s * next(ticks))
    leader.lead(PLANS[0])
    steps = [Plan([1], [[i]], True, SOLO, [], []) for i in range(2 * num_steps + 1)]
    for step in steps:
        leader.lead(step)
    told = [decode_plan(frame) for frame in box.sent[1:]]
    assert told == [CatchUp(steps[:num_steps]), CatchUp(steps[num_steps:-1])]


def test_a_step_that_cannot_be_told_has_not_happened() -> None:
    """Nor one whose predecessors cannot: no token of it is in a cache."""
    leader, led, box = make()
    leader.lead(PLANS[0])
    with pytest.raises(LinkDown):
        for token in range(1000):
            before = list(led.caches[0])
            if token == CATCH_UP_STEPS:
                box.lost = LinkDown("rank 1: over")
            leader.lead(Plan([1], [[token]], True, SOLO, [], []))
    assert token >= CATCH_UP_STEPS
    assert led.caches[0] == before and len(leader.caches[1]) == len(before)


def test_ranks_meet_at_what_was_told() -> None:
    caches: Caches = {}
    leader, _, box = make(caches=caches)
    leader.lead(PLANS[0])
    for token in range(4):
        leader.lead(Plan([1], [[token]], True, SOLO, [], []))
    leader, _, box = make(caches=caches)
    box.other = masks(0b1000)
    assert leader.meet() == {1: 3}
    assert met(box.sent[-1]) == ({1: [7, 6, 5, 3]}, False)


def test_windows_need_no_cache() -> None:
    leader, led, box = make()
    logits, taps = leader.lead_windows(WindowsPlan([[1, 2], [3, 4]], SPLIT))
    assert (logits.tolist(), taps) == ([[2, 3], [4, 5]], "taps")
    follower, followed, _ = make(frames=list(box.sent))
    follower.follow()
    assert followed.splits == led.splits == [SPLIT]
    assert followed.caches == led.caches == []
    box.failure = LinkDown("rank 0: over")
    with pytest.raises(LinkDown):
        leader.lead_windows(WindowsPlan([[1]], SPLIT))


def test_one_rank_sends_nothing() -> None:
    runner, _, box = make(num_ranks=1)
    runner.lead(PLANS[0])
    assert box.sent == []


def test_broken_group_gives_no_logits() -> None:
    runner, _, box = make()
    runner.lead(PLANS[0])
    box.failure = LinkDown("rank 0: over")
    with pytest.raises(LinkDown):
        runner.lead(PLANS[1])


def test_released_caches_are_gone() -> None:
    runner, _, _ = make()
    for plan in PLANS:
        runner.lead(plan)
    with pytest.raises(KeyError):
        runner.lead(PLANS[1])


def test_garbage_from_the_leader_is_an_error() -> None:
    runner, model, _ = make(frames=[b"\xc1"])
    with pytest.raises(RemoteProtocolError):
        runner.follow()
    assert model.caches == []


# Between epochs.


def masks(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(MASK_BYTES, "little") for number in numbers)


def met(frame: bytes) -> tuple[dict[int, list[int]], bool]:
    meeting = decode_plan(frame)
    assert isinstance(meeting, Meeting)
    return meeting.lengths, meeting.apart


def test_a_failed_step_is_taken_back() -> None:
    runner, model, box = make()
    for plan in PLANS[:3]:
        runner.lead(plan)
    box.failure = LinkDown("rank 0: over")
    for plan in (PLANS[3], Plan([2], [[12, 13, 14]], False, SPLIT, [], [])):
        with pytest.raises(LinkDown):
            runner.lead(plan)
        assert model.caches == [[5, 6, 7, 8], [9]]


def test_what_is_pending_is_taken_as_it_was_computed() -> None:
    cache = SequenceCache([])
    cache.add_pending([Piece([1, 2, 3], False), Piece([4], True), Piece([5], True)])
    assert cache.take_tokens(2) == [Piece([1, 2], False)]
    assert cache.take_tokens(2) == [Piece([3], False), Piece([4], True)]
    assert (cache.pending, cache.num_pending) == ([Piece([5], True)], 1)


def test_only_a_few_frames_beside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams the others lack; what is sent they do not read."""
    monkeypatch.setattr(runner_module, "row_bytes", lambda layers: 100)
    monkeypatch.setattr(runner_module, "pack_rows", lambda layers, start, stop: [])
    caches: Caches = {1: SequenceCache([FakeLayer()]), 2: SequenceCache([FakeLayer()])}
    for cache in caches.values():
        cache.home, cache.tokens = 0, [0] * 25
        cache.add_pending([Piece([0] * 25, False)])
    leader, _, box = make(caches=caches, slot_bytes=1100)  # ten tokens a frame
    halves = StepSplit("sequences", (0.5, 0.5))
    leader.lead(Plan([1, 2], [[1], [1]], True, halves, [], [], homes=[0, 0], spare=8))
    *rows, plan = [decode_plan(frame) for frame in box.sent]
    assert rows == [Rows(1, 0, 10, []), Rows(1, 10, 10, []), Rows(1, 20, 5, []), Rows(2, 0, 10, [])]
    assert isinstance(plan, Plan) and plan.spare == 0
    assert (caches[1].num_pending, caches[2].num_pending) == (1, 16)  # and this step's own


def test_what_a_rank_lacks_is_no_part_of_a_step_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one machine would seem slow after steps of divided sequences. What others lack of rank 0's they are sent."""
    monkeypatch.setattr(runner_module, "row_bytes", lambda layers: 100)
    monkeypatch.setattr(runner_module, "pack_rows", lambda layers, start, stop: [])
    leader, led, box = make(slot_bytes=1100)
    halves = StepSplit("sequences", (0.5, 0.5))
    leader.lead(Plan([1, 2], [[3, 4], [5, 6]], False, halves, [1, 2], [], homes=[0, 1]))
    num_read = len(led.splits)
    monkeypatch.setattr(
        time, "monotonic", lambda: float(len(led.splits) - num_read)
    )  # a second for each call
    leader.lead(Plan([1, 2], [[7], [8]], True, SOLO, [], []))
    assert led.caches == [[3, 4, 7], [5, 6, 8]]
    assert [decode_plan(frame) for frame in box.sent[1:]] == [Rows(1, 0, 2, [])]
    assert leader.waited_s == 1


def test_ranks_meet_at_what_all_have() -> None:
    """The leader is a step ahead with one sequence and alone in having another; a third has left the leader."""
    leads: Caches = {}
    leader, _, box = make(caches=leads)
    for plan in [*PLANS[:4], Plan([3], [[1, 2]], False, SPLIT, [3], [])]:
        leader.lead(plan)
    follows: Caches = {}
    follower, _, _ = make(caches=follows)
    for plan in [*PLANS[:3], Plan([9], [[1, 2]], False, SPLIT, [9], [])]:
        follower.lead(plan)
    box.other = masks(0b110, 0b10, 0)
    assert leader.meet() == {1: 4, 2: 1}
    assert met(box.sent[-1]) == ({1: [5, 4, 3], 2: [2, 1], 3: [2]}, False)
    assert {i: cache.tokens for i, cache in leads.items()} == {1: [5, 6, 7, 8], 2: [9]}
    follower, _, other = make(frames=box.sent[-1:], caches=follows)
    other.other = masks(0b111, 0b11, 1)
    follower.follow()
    assert other.answers == [masks(0b110, 0b10, 0)]
    assert {i: cache.tokens for i, cache in follows.items()} == {1: [5, 6, 7, 8], 2: [9]}


def test_ranks_that_went_on_with_other_tokens_have_nothing_in_common_after_them() -> None:
    """As may be when a link broke and both hosts live."""
    leads: Caches = {}
    leader, _, box = make(caches=leads)
    for plan in PLANS[:3]:
        leader.lead(plan)
    box.other = masks(0b10, 0b1)
    assert leader.meet() == {1: 3, 2: 1}
    follows: Caches = {}
    follower, _, _ = make(caches=follows)
    for plan in (PLANS[0], Plan([1, 2], [[88], [9]], True, SPLIT, [2], [])):
        follower.lead(plan)
    assert [len(cache) for cache in follows.values()] == [4, 1]
    follower, _, other = make(frames=box.sent[-1:], caches=follows)
    other.other = masks(0b11, 0b1)
    follower.follow()
    assert other.answers == [masks(0b10, 0b1)]


def test_where_sequences_may_be_divided_the_leader_keeps_what_it_has() -> None:
    """The others get the tokens that they lack, in the pieces in which they were computed."""
    leads: Caches = {}
    leader, _, box = make(caches=leads)
    for plan in PLANS[:4]:
        leader.lead(plan)
    box.other = masks(0b100, 0)
    assert leader.meet(apart=True, chunk=2) == {1: 5, 2: 2}
    assert met(box.sent[-3]) == ({1: [5, 4, 3], 2: [2, 1]}, True)
    lacking = [decode_plan(frame) for frame in box.sent[-2:]]
    assert lacking == [Lacking(1, [[8], [11]], [True, True]), Lacking(2, [[9], [10]], [True, True])]
    assert [(c.home, c.num_shared, c.num_pending) for c in leads.values()] == [(0, 3, 2), (0, 0, 2)]
    follows: Caches = {}
    follower, _, other = make(caches=follows)
    follower.lead(PLANS[0])
    follower, _, other = make(frames=box.sent[-3:], caches=follows)
    follower._link.rank, other.other = 1, masks(0b111, 0b11)
    for _ in range(3):
        follower.follow()
    assert {i: (c.tokens, c.known, c.home) for i, c in follows.items()} == {
        1: ([5, 6, 7], [5, 6, 7, 8, 11], 0),
        2: ([], [9, 10], 0),
    }


def test_a_prompt_is_told_in_the_chunks_in_which_it_was_read() -> None:
    cache = SequenceCache([])
    cache.extend(list(range(10)), decode=False)
    cache.extend([10], decode=True)
    whole = [Piece([0, 1, 2, 3], False), Piece([4, 5, 6, 7], False), Piece([8, 9], False), Piece([10], True)]
    assert (
        cache.pieces(0, 4) == whole and cache.pieces(8, 4) == whole[2:] and cache.pieces(10, 4) == whole[3:]
    )
    assert cache.pieces(11, 4) == []


def test_one_rank_keeps_what_it_has_and_nobody_has_nothing() -> None:
    caches: Caches = {}
    runner, _, box = make(caches=caches)
    assert runner.meet() == {} and box.answers == []
    for plan in PLANS[:3]:
        runner.lead(plan)
    runner, _, box = make(num_ranks=1, caches=caches)
    assert runner.meet() == {1: 4, 2: 1} and box.sent == []
