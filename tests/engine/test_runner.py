"""Every rank carries out the leader's plans in the same way; a broken group gives no logits."""

from typing import Any, cast

import mlx.core as mx
import pytest

from expertd.engine.plan import Plan, WindowsPlan, decode_plan
from expertd.engine.runner import Runner
from expertd.errors import LinkDown, RemoteProtocolError
from expertd.link.mailbox import Mailbox
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


class FakeModel:
    """A cache is the list of its tokens; the logits are those of the next number."""

    def __init__(self) -> None:
        self.caches: list[list[int]] = []
        self.splits: list[StepSplit] = []

    def new_cache(self) -> list[int]:
        self.caches.append([])
        return self.caches[-1]

    def prefill(self, tokens: list[int], cache: list[int], split: StepSplit) -> None:
        cache += tokens
        self.splits.append(split)

    def decode(self, tokens: list[int], caches: list[list[int]], split: StepSplit) -> mx.array:
        for token, cache in zip(tokens, caches, strict=True):
            cache.append(token)
        self.splits.append(split)
        return mx.array([[token + 1.0] for token in tokens])

    def observe(self, tokens: mx.array, split: StepSplit) -> tuple[mx.array, str]:
        self.splits.append(split)
        return tokens + 1, "taps"


class FakeMailbox:
    """Brings frames, takes frames, and may break."""

    def __init__(self, num_ranks: int, frames: list[bytes | None]) -> None:
        self.num_ranks, self.frames = num_ranks, frames
        self.sent: list[bytes] = []
        self.failure: Exception | None = None

    def send_frame(self, frame: bytes) -> None:
        self.sent.append(frame)

    def wait_frame(self, idle_s: float) -> bytes | None:
        return self.frames.pop(0)

    def check(self) -> None:
        if self.failure:
            raise self.failure


def make(num_ranks: int = 2, frames: list[bytes | None] | None = None) -> tuple[Runner, Any, Any]:
    model, box = FakeModel(), FakeMailbox(num_ranks, frames or [])
    return Runner(cast(Model, model), cast(Mailbox, box)), model, box


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
