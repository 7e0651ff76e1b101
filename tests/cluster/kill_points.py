"""Eight streams at a time, and ranks killed and stopped at random points: every answer must be the undisturbed one.

    python -m tests.cluster.kill_points [--points 200] [--seed 1] [--ranks 3] [--family qwen3_moe] [--kernels mlx]
        [--split experts]

A point is a moment, a victim and a signal, all drawn from the seed: in prefill, in decode, at any time, in the
recovery from another one, or while a fresh rank joins. A dead rank is started again, so one group takes any number of
points, half of them under --split and half under `auto`.

Of each stream that had a token at a point, the time to its first one in the epoch after it is measured, and p50 and p99
are printed: for SIGKILL and for SIGSTOP (noticed after 0.8 s) when all ranks had been in the group for a while, and so
had the caches of all streams (but for `auto`, which may divide these among ranks), and apart for points among others:
before ranks were back and had read what they lacked, so that answers are read again from their transcripts.
"""

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expertd.cluster import restarts
from expertd.cluster.local import LocalRank
from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Submit, Token
from expertd.sampling import Sampling
from tests.cluster.forked import forked_ranks
from tests.tiny import make_tiny

NUM_STREAMS = 8
NUM_TOKENS = 24
PHASES = ("any", "prefill", "decode", "recovery", "rejoin")
# A point that has to be waited for this long does not come: another one is taken.
PATIENCE_S = 20.0
# Of the points that are not about recovery itself, this share waits until the group has been whole for so long.
CALM_SHARE, CALM_S = 0.25, 0.5
# Failures after which a stream may have had no token yet when the next one comes.
MAX_AT_ONCE = 2


def wanted(index: int) -> Submit:
    """The request of stream `index`: prompts of 8 to 92 tokens, half of them greedy, half with all that depends on
    the tokens before."""
    sampled = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, seed=index)
    return Submit(
        f"stream{index}",
        prompt="The fox met." * (1 + index) if index % 2 else "A fox, a bear, "[: 8 + index],
        max_tokens=NUM_TOKENS,
        ignore_end=True,
        sampling=sampled if index % 4 > 1 else Sampling(),
        logprobs=1 if index == 0 else None,
    )


@dataclass
class Point:
    """`gaps_s`: from the signal to the next token of each stream that had some, in another epoch than `epoch`."""

    phase: str
    number: signal.Signals
    victim: LocalRank
    split: str
    epoch: int
    is_calm: bool
    at: float = field(default_factory=time.monotonic)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return f"{self.number.name} under {self.split}" + ("" if self.is_calm else ", among others")


class Stream:
    """Asks the same question again and again, until `stop`; every answer is compared with `reference`."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.index, self._cluster = index, cluster
        self.reference: list[Token] = []
        self.tokens: list[Token] = []
        self.is_open, self.num_answers = False, 0
        self.wrong: list[str] = []
        self.waiting: list[Point] = []

    async def ask(self) -> list[Token]:
        submit = wanted(self.index)
        self.tokens, self.is_open = [], True
        try:
            async for event in self._cluster.generate(submit):
                if isinstance(event, Token):
                    self.tokens.append(event)
                    self._measure()
        finally:
            self.is_open = False
        self.waiting.clear()
        return self.tokens

    def _measure(self) -> None:
        now, cluster = time.monotonic(), self._cluster
        gone_on = [p for p in self.waiting if p.victim.dead and cluster.running and cluster.epoch > p.epoch]
        self.waiting = [point for point in self.waiting if point not in gone_on]
        for point in gone_on:
            point.is_calm &= not self.waiting and len(gone_on) == 1
            if len(self.tokens) > 1:
                point.gaps_s.append(now - point.at)

    async def run(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            try:
                answer = await self.ask()
            except Exception as e:
                self.wrong.append(f"stream {self.index}: {type(e).__name__}: {e}")
                continue
            self.num_answers += 1
            if answer != self.reference:
                found, right = ([i for t in a for i in t.token_ids] for a in (answer, self.reference))
                self.wrong.append(f"stream {self.index}: {found}, undisturbed {right}")


class Storm:
    """Draws points and carries them out on a cluster with eight streams."""

    def __init__(self, cluster: Cluster, seed: int, num_points: int) -> None:
        self._cluster, self._num_points = cluster, num_points
        self._random = random.Random(f"{seed} {cluster.group.split}")
        self.streams = [Stream(cluster, i) for i in range(NUM_STREAMS)]
        self.points: list[Point] = []
        self._stopped: set[int] = set()
        self._is_over = False

    async def run(self) -> None:
        for stream in self.streams:
            stream.reference = await stream.ask()
        runs = [asyncio.create_task(s.run(lambda: not self._is_over)) for s in self.streams]
        while len(self.points) < self._num_points and not self.wrong:
            phase = self._random.choice(PHASES)
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._reach(phase)
                    self._strike(phase)
                    await self._next_token()
        self._is_over = True
        await asyncio.gather(*runs)

    @property
    def wrong(self) -> list[str]:
        return [text for stream in self.streams for text in stream.wrong]

    async def _reach(self, phase: str) -> None:
        """Wait for the moment."""
        cluster = self._cluster
        if phase in ("any", "prefill", "decode") and self._random.random() < CALM_SHARE:
            await _until(self._is_calm)
        if phase == "prefill":
            await _until(lambda: any(s.is_open and not s.tokens for s in self.streams))
        elif phase == "decode":
            await _until(lambda: any(s.is_open and s.tokens for s in self.streams))
        elif phase == "recovery":
            epoch = cluster.epoch
            self._strike(phase)
            await _until(lambda: not cluster.running or cluster.epoch > epoch)
        elif phase == "rejoin":
            if len(cluster.living) == cluster.group.num_ranks:
                self._strike(phase)
            await _until(lambda: any(r["state"] == "joining" for r in cluster.describe()["ranks"]))
        await asyncio.sleep(self._random.random() * (0.3 if phase == "any" else 0.03))

    def _strike(self, phase: str) -> None:
        """Kill or stop a rank; rarely the last one."""
        alive = [
            rank for rank in self._cluster.living if rank.pid not in self._stopped and rank.process.running
        ]
        if not alive or (len(alive) == 1 and self._random.random() < 0.9):
            return
        victim = self._random.choice(alive)
        number = signal.SIGKILL if self._random.random() < 0.7 else signal.SIGSTOP
        os.kill(victim.pid, number)
        self._stopped.add(victim.pid)
        split, epoch = self._cluster.group.split, self._cluster.epoch
        self.points.append(Point(phase, number, victim, split, epoch, self._is_calm()))
        for stream in self.streams:
            if stream.is_open:
                stream.waiting.append(self.points[-1])

    def _is_calm(self) -> bool:
        """Whether all ranks are there, and had time to read what they lacked."""
        ranks = self._cluster.describe()["ranks"]
        return (
            all(r["state"] == "running" for r in ranks)
            and time.monotonic() - self._cluster._epochs[-1].began > CALM_S
        )

    async def _next_token(self) -> None:
        """Until every stream has gone on, or is not far from it: five leaders lost without a token are a reason to
        give up."""
        most = 0 if self.points and self.points[-1].is_calm else MAX_AT_ONCE
        await _until(lambda: all(len(stream.waiting) <= most for stream in self.streams))


def report(storms: list[Storm]) -> str:
    """For people: how many points, and how long streams waited for their next token."""
    points = [point for run in storms for point in run.points]
    lines = [f"{len(points)} points, {sum(s.num_answers for run in storms for s in run.streams)} answers"]
    gaps: dict[str, list[float]] = defaultdict(list)
    for point in points:
        gaps[point.kind] += point.gaps_s
    for kind, found in sorted(gaps.items()):
        found.sort()
        if found:
            p50, p99 = (found[int(len(found) * share)] for share in (0.5, 0.99))
            lines.append(f"{kind}: next token after p50 {p50:.2f} s, p99 {p99:.2f} s ({len(found)} streams)")
    phases = Counter(f"{point.phase} {point.number.name}" for point in points)
    lines.append(", ".join(f"{phase} {count}" for phase, count in sorted(phases.items())))
    return "\n".join([*lines, *(text for run in storms for text in run.wrong)])


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def storm(group: GroupConfig, seed: int, num_points: int) -> list[Storm]:
    """Two groups, one of them under `auto`, through half of `num_points` each."""
    storms = []
    async with forked_ranks():
        for split in (group.split, "auto"):
            async with Cluster.open(replace(group, split=split), restart=True) as cluster:
                storms.append(Storm(cluster, seed, num_points // 2))
                await storms[-1].run()
    return storms


def group_of(checkpoint: Path, **options: Any) -> GroupConfig:
    """By MLX's kernels: ours are done before much is killed."""
    settings = {"num_ranks": 3, "split": "experts", "prefill_chunk": 8, "kernels": "mlx"}
    return GroupConfig(str(checkpoint), **settings | options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--kernels", default="mlx")
    parser.add_argument("--split", default="experts")
    arguments = parser.parse_args()
    restarts.GOOD_LIFE_S = 0.0  # here, dying young is no sign of anything
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_ranks": arguments.ranks, "kernels": arguments.kernels, "split": arguments.split}
        group = group_of(make_tiny(Path(folder) / "tiny", arguments.family), **options)
        storms = asyncio.run(storm(group, arguments.seed, arguments.points))
    print(report(storms))
    raise SystemExit(1 if any(run.wrong for run in storms) else 0)


if __name__ == "__main__":
    main()
