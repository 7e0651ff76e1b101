"""What a group has done so far: the leader's counts, summed, and what happened to it, for people and for /metrics."""

import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import zip_longest

from expertd.engine.messages import Stats, Steps

MAX_EVENTS = 50


@dataclass(frozen=True)
class Happening:
    """`at` is in seconds since 1970; `number` counts from 1.

    Kinds: begun, ended (an epoch), failed (one that a living rank found broken), died (a rank), plan (another split).
    """

    number: int
    at: float
    kind: str
    text: str


class Record:
    """Lives as long as its cluster. `latest` is None while no rank of this host leads, or has said nothing yet."""

    def __init__(self) -> None:
        self.latest: Stats | None = None
        self.steps: dict[tuple[str, bool], Steps] = {}
        self.waits: list[int] = []
        self.waited_s = 0.0
        self.loads: dict[int, list[int]] = {}
        self.num_preempted = 0
        self.proposed: Counter[str] = Counter()  # tokens of drafts, by their source
        self.accepted: Counter[str] = Counter()
        self.num_events: Counter[str] = Counter()
        self._events: dict[
            str, deque[Happening]
        ] = {}  # by kind: plans are many, and must not crowd out a death
        self._last = ""
        self._splits: dict[bool, str] = {}

    @property
    def events(self) -> list[Happening]:
        """The last MAX_EVENTS of each kind, in their order."""
        return sorted((e for kind in self._events.values() for e in kind), key=lambda e: e.number)

    def happened(self, kind: str, text: str) -> None:
        """Note what happened; a consequence that says the same as its cause is counted, not told again."""
        self.num_events[kind] += 1
        if text != self._last:
            of_kind = self._events.setdefault(kind, deque(maxlen=MAX_EVENTS))
            of_kind.append(Happening(self.num_events.total(), time.time(), kind, text))
        self._last = text

    def hear(self, stats: Stats) -> None:
        """Add up what the leader has done since its last report."""
        self.latest = stats
        for new in sorted(stats.steps, key=lambda s: s.num_steps):
            self._splits[new.decode] = new.split
        for new in stats.steps:
            key = (new.split, new.decode)
            old = self.steps.get(key, Steps(*key, 0, 0, 0.0))
            self.steps[key] = replace(
                new,
                num_steps=old.num_steps + new.num_steps,
                num_tokens=old.num_tokens + new.num_tokens,
                seconds=old.seconds + new.seconds,
            )
        self.waits, self.waited_s = _added(self.waits, stats.waits), self.waited_s + stats.waited_s
        for load in stats.loads:
            self.loads[load.layer] = _added(self.loads.get(load.layer, []), load.chosen)
        self.num_preempted += stats.num_preempted
        for drafted in stats.drafts:
            self.proposed[drafted.source] += drafted.num_proposed
            self.accepted[drafted.source] += drafted.num_accepted

    def split_of(self, decode: bool) -> str | None:
        """The split of most steps of a kind in the latest report that had any; None while no rank here leads."""
        return self._splits.get(decode) if self.latest else None


def _added(old: list[int], new: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(old, new, fillvalue=0)]


def quantile_s(waits: list[int], q: float) -> float | None:
    """The q-quantile of waits counted as in Stats, in seconds, by interpolation; None when there was no wait at all.

    A bucket spans a factor of two, so the figure is within a factor of two of the truth, and usually far nearer.
    """
    total, seen = sum(waits), 0.0
    for i, count in enumerate(waits):
        if count and seen + count >= q * total:
            low, high = (2.0 ** (i - 1), 2.0**i) if i else (0.0, 0.0)
            return (low + (high - low) * (q * total - seen) / count) * 1e-9
        seen += count
    return None
