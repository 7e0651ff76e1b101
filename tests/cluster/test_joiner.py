"""What a joined host does when its leader comes, refuses, goes, or when it cannot load; without a network."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, cast

import pytest

from expertd.cluster import joiner as joiner_module
from expertd.cluster.copies import copy_of
from expertd.cluster.host_messages import (
    Bye,
    Connect,
    Ended,
    Held,
    Hold,
    Join,
    Loaded,
    Measure,
    Measured,
    Refused,
    Start,
    Stop,
    Welcome,
)
from expertd.cluster.joiner import Joiner
from expertd.cluster.site import LinkSettings
from expertd.cluster.transcripts import Transcript
from expertd.engine.messages import Submit
from expertd.errors import CheckpointError, ClusterError, ConfigError, LinkDown
from tests.cluster.answering import ANSWER, EVENTS, Leaders
from tests.cluster.hosts import finish, until
from tests.cluster.stub_hosts import FACTS, WELCOME, StubChannel, StubCluster, byes


@pytest.fixture(autouse=True)
def _hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner_module, "FIRST_PAUSE_S", 0.01)


class StubPaths:
    mlx_version, probe_port, verbs, secret = "1.0", 1, "no device", b""

    def addresses(self, near: str) -> list[Any]:
        return []

    async def measure_to(self, message: Measure) -> list[Any]:
        return []


class Follow:
    """A joiner among stubs. `answers` is what each call gives: a channel or an error; the last one again and again."""

    def __init__(self, *answers: StubChannel | Exception, failing: int = 0) -> None:
        self._answers, self._failing = list(answers), failing
        self.num_calls = 0
        self.clusters: list[StubCluster] = []
        self.shown: list[Any] = []
        paths: Any = StubPaths()
        show: Callable[[Any, str], None] = lambda cluster, model_id: self.shown.append(cluster)  # noqa: E731
        self.joiner = Joiner(self._call, self._load, show, paths, LinkSettings(), "b")
        self.task = asyncio.create_task(self.joiner.run())

    async def _call(self) -> Any:
        self.num_calls += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _load(self, welcome: Welcome, stack: AsyncExitStack) -> tuple[Any, Loaded]:
        if self._failing:
            self._failing -= 1
            raise CheckpointError("disk: 1.0 GB free, wanted 2.0 GB")
        self.clusters.append(StubCluster())
        return self.clusters[-1], FACTS

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def lets_in(welcome: Welcome = WELCOME, name: str = "a") -> StubChannel:
    return StubChannel(name, lambda m: welcome if isinstance(m, Join) else None)


def gone() -> LinkDown:
    return LinkDown("host a: connection refused")


async def following(follow: Follow, channel: StubChannel) -> None:
    await until(lambda: bool(channel.saw(Loaded)) and follow.joiner.state == "following")


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (ClusterError("does not know this machine"), ClusterError, "does not know this machine"),
        (StubChannel, ConfigError, "host a refused this host: it has mlx 0.1"),
    ],
)
def test_what_does_not_pass_ends_join(answer: Any, error: type[Exception], text: str) -> None:
    async def main() -> None:
        refuses = StubChannel("a", lambda m: Refused("it has mlx 0.1") if isinstance(m, Join) else None)
        follow = Follow(answer if isinstance(answer, Exception) else refuses)
        with pytest.raises(error, match=text):
            await follow.task

    finish(main())


def test_a_leader_that_is_not_there_is_called_again_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        channel = lets_in()
        follow = Follow(gone(), gone(), gone(), channel)
        await following(follow, channel)
        assert follow.num_calls == 4
        await follow.end()
        assert byes(channel) == ["expertd is stopping there"]

    with caplog.at_level(logging.WARNING, "expertd"):
        finish(main())
    assert [r.getMessage() for r in caplog.records] == [
        "host a: connection refused. Calling again until it answers."
    ]


def test_without_its_leader_it_goes_on_alone_and_keeps_its_ranks() -> None:
    async def main() -> None:
        first, second = lets_in(), lets_in(replace(WELCOME, probe_secret=b"x" * 32))
        follow = Follow(first, ClusterError("does not know this machine"), gone(), second)
        await following(follow, first)
        first.say(Bye("expertd is stopping there"))
        await until(lambda: len(follow.clusters[0].layouts) >= 1)
        await following(follow, second)  # a ClusterError that came later did not end it
        assert len(follow.clusters) == 1, "loaded once"
        third = lets_in(replace(WELCOME, content_hash="d" * 64))
        follow._answers = [third]
        second.hang_up()
        await following(follow, third)
        assert len(follow.clusters) == 2, "another checkpoint"
        assert follow.shown[-2:] == [None, follow.clusters[1]]
        await follow.end()

    finish(main())


def test_what_cannot_be_loaded_is_told_the_leader_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        channels = [lets_in() for _ in range(4)]
        follow = Follow(*channels, failing=3)
        await following(follow, channels[3])
        assert [byes(c) for c in channels[:3]] == [["disk: 1.0 GB free, wanted 2.0 GB"]] * 3
        await follow.end()

    with caplog.at_level(logging.WARNING, "expertd"):
        finish(main())
    assert [r.getMessage() for r in caplog.records] == [
        "disk: 1.0 GB free, wanted 2.0 GB. Calling again until it answers."
    ]


def test_ranks_that_all_died_are_loaded_again() -> None:
    async def main() -> None:
        first, second = lets_in(), lets_in()
        follow = Follow(first, second)
        await following(follow, first)
        follow.clusters[0].fail("rank 0 died: killed by SIGKILL")
        await following(follow, second)
        assert byes(first) == ["rank 0 died: killed by SIGKILL; loading again"]
        assert len(follow.clusters) == 2
        # The same while nobody leads.
        follow._answers = [gone()]
        second.hang_up()
        await until(lambda: follow.joiner.state == "looking")
        follow.clusters[1].fail("rank 0 died: killed by SIGKILL")
        await until(lambda: len(follow.clusters) == 3 and bool(follow.clusters[2].layouts))
        await follow.end()

    finish(main())


def test_a_refused_host_answers_alone() -> None:
    async def main() -> None:
        channel = lets_in()
        follow = Follow(channel)
        await following(follow, channel)
        channel.say(Refused("its architecture is another"))
        await until(lambda: follow.joiner.state == "alone")
        assert follow.joiner.reason == "its architecture is another"
        assert follow.clusters[0].layouts[-1].num_ranks == 1
        await follow.end()

    finish(main())


def test_the_leader_is_told_of_changes_and_rounds_that_fail() -> None:
    async def main() -> None:
        channel = lets_in()
        follow = Follow(channel)
        await following(follow, channel)
        channel.say(Measure("id-a", "a", 1, []))
        await until(lambda: bool(channel.saw(Measured)))
        channel.say(Connect(7, []))
        channel.say(Start(8, "auto", []))
        await until(lambda: len(channel.saw(Ended)) == 2)
        assert {(e.epoch, e.stage, e.reason) for e in channel.saw(Ended)} == {
            (7, "setup", "epoch 7 is over on this host"),
            (8, "setup", "epoch 8 is over on this host"),
        }
        channel.say(Stop(8, "it was not set up"))
        channel.say(WELCOME)  # has no place here
        await until(lambda: follow.num_calls == 2)
        await follow.end()

    finish(main())


def test_what_the_leader_had_kept_goes_on_without_it() -> None:
    async def main() -> None:
        channel = lets_in()
        follow = Follow(channel)
        await following(follow, channel)
        transcript = Transcript(Submit("r", prompt="x", keep=True))
        for event in EVENTS[:4]:
            transcript.add(event)
        channel.say(Hold(7, [copy_of(transcript)]))
        await until(lambda: channel.saw(Held) == [Held(7)])
        second = lets_in()
        follow._answers = [second]
        channel.hang_up()
        await following(follow, second)
        [hold] = second.saw(Hold)  # it may be another leader, who knows nothing of it
        assert hold.copies[0].request_id == "r" and not hold.copies[0].is_led
        leaders = Leaders()
        follow.clusters[0].lead_by(leaders)
        assert [e async for e in follow.clusters[0].requests.resume("r")] == EVENTS
        assert leaders.asked[0].generated == ANSWER[:3]
        await follow.end()

    finish(main())


def test_a_bug_ends_the_session_and_is_named() -> None:
    async def main() -> None:
        channel = lets_in()
        follow = Follow(channel)
        await following(follow, channel)
        cast(Any, follow.joiner)._paths.measure_to = None
        channel.say(Measure("id-a", "a", 1, []))
        await until(lambda: bool(byes(channel)))
        assert byes(channel) == ["TypeError: 'NoneType' object is not callable. This is a bug of expertd."]
        await follow.end()

    finish(main())
