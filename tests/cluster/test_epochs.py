"""Epochs with stub ranks: who is in the next one, what a client sees of the change, and that nothing loops hot."""

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from stub_group import LIMIT_S, SOON_S, StubMailbox, begun, children, group_of, received, until

from expertd.cluster import local, supervisor
from expertd.cluster.epoch import Epoch, Event, Layout, LocalCoordinator, RankDied, RankReturned
from expertd.cluster.local import LATE_S, LOOK_S, PULSE_SILENCE_S, Pulse, Seat
from expertd.cluster.reply import Take
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Done, Ended, Started, Submit, Token
from expertd.errors import ClusterError, ConfigError


@asynccontextmanager
async def open_group(
    folder: Path, num_ranks: int = 2, coordinator: Callable[[Cluster], Any] = LocalCoordinator, **options: Any
) -> AsyncIterator[Cluster]:
    group = group_of(folder, num_ranks, **options)
    async with asyncio.timeout(2 * LIMIT_S), Cluster.open(group, coordinator=coordinator) as cluster:
        yield cluster


async def text_of(cluster: Cluster, prompt: str, request_id: str = "r") -> str:
    events = [e async for e in cluster.generate(Submit(request_id, prompt=prompt))]
    assert isinstance(events[0], Started) and isinstance(events[-1], Done)
    return "".join(e.text for e in events if isinstance(e, Token))


async def ids_of(cluster: Cluster, prompt: str, request_id: str = "r") -> list[int]:
    """The token ids; the stub's are their numbers, from 1."""
    events = [e async for e in cluster.generate(Submit(request_id, prompt=prompt))]
    assert [type(e) for e in events if not isinstance(e, Token)] == [Started, Done]
    assert {e.request_id for e in events} == {request_id}
    return [i for e in events if isinstance(e, Token) for i in e.token_ids]


def kill(cluster: Cluster, rank_id: int, number: int = signal.SIGKILL) -> None:
    os.kill(cluster._ranks[rank_id].pid, number)


def states(cluster: Cluster) -> list[str]:
    return [rank["state"] for rank in cluster.describe()["ranks"]]


async def told(folder: Path, rank_id: int, epoch: int, number: int, fractions: list[float]) -> None:
    """Wait until a rank's latest Begin says this."""

    def is_so() -> bool:
        begin = (begun(folder, rank_id) or [{}])[-1]
        return [begin.get(k) for k in ("epoch", "rank", "fractions")] == [epoch, number, fractions]

    await until(is_so)


def test_first_epoch_has_all_ranks(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            await until(lambda: states(cluster) == ["running"] * 2)
            for r in (0, 1):
                await told(tmp_path, r, 1, r, [0.5, 0.5])
            known = cluster.describe()
            assert known.pop("ranks") == [
                {"id": r, "pid": cluster._ranks[r].pid, "rank": r, "state": "running"} for r in (0, 1)
            ]
            assert known == {"epoch": 1, "split": "auto", "reason": None, "planner": {}}

    asyncio.run(main())


@pytest.mark.fault
def test_stream_outlives_a_follower(
    tmp_path: Path, mailbox: StubMailbox, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            answer = asyncio.create_task(text_of(cluster, "@slow:0.01 @repeat:30 x"))
            await until(lambda: received(tmp_path))
            kill(cluster, 1)
            assert await answer == "x " * 30
            await told(tmp_path, 0, 2, 0, [1.0])
            reason = "rank 1 died: killed by SIGKILL"
            assert begun(tmp_path)[1]["reason"] == cluster.describe()["reason"] == reason
            assert mailbox.poisoned == [reason]
            assert caplog.messages == [f"{reason}; going on with 1 rank"]
            await until(lambda: states(cluster) == ["running", "dead"])
            assert (cluster.describe()["split"], cluster.failure) == ("solo", None)
            await until(lambda: len(children()) == 1)

    asyncio.run(main())


@pytest.mark.fault
def test_next_rank_leads_when_the_leader_dies(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 3) as cluster:
            answer = asyncio.create_task(ids_of(cluster, "@slow:0.01 @repeat:50 x"))
            await until(lambda: received(tmp_path))
            kill(cluster, 0)
            assert await answer == list(range(1, 51))
            assert await text_of(cluster, "a b") == "a b "
            first, again = received(tmp_path)[0], received(tmp_path, 1)[0]
            assert again["request_id"].startswith("r~") and again["resumed"]
            assert again["generated"] == list(range(1, len(again["generated"]) + 1))
            assert again["sampling"] == first["sampling"] and first["sampling"]["seed"] is not None
            await told(tmp_path, 1, 2, 0, [0.5, 0.5])
            await told(tmp_path, 2, 2, 1, [0.5, 0.5])
            assert cluster.ready.rank == 1

    asyncio.run(main())


@pytest.mark.fault
def test_one_after_another_until_nobody_is_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 3) as cluster:
            kill(cluster, 1)
            await until(lambda: cluster.epoch == 2)
            assert cluster._ranks[2].number == 1
            kill(cluster, 0)
            await until(lambda: cluster.epoch == 3)
            assert cluster.describe()["reason"] == "rank 0 died: killed by SIGKILL"
            assert await text_of(cluster, "on") == "on "
            kill(cluster, 2)
            assert (await cluster.wait_failed()).startswith("rank 0 died: killed by SIGKILL; look above")
            await until(lambda: not children())

    asyncio.run(main())


@pytest.mark.fault
def test_all_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 3) as cluster:
            for rank_id in range(3):
                kill(cluster, rank_id)
            assert "died: killed by SIGKILL" in await cluster.wait_failed()
            await until(lambda: not children())

    asyncio.run(main())


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank_is_found_by_its_pulse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    monkeypatch.setattr(local, "PULSE_SILENCE_S", PULSE_SILENCE_S)

    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            await until(lambda: states(cluster) == ["running"] * 2)
            process = psutil.Process(cluster._ranks[victim].pid)
            kill(cluster, victim, signal.SIGSTOP)
            began = time.monotonic()
            await until(lambda: cluster.epoch == 2)
            assert time.monotonic() - began < SOON_S  # about 0.9 s
            assert cluster.describe()["reason"] == f"rank {victim} stopped answering: no pulse for 0.8 s"
            await until(lambda: not process.is_running())
            assert await text_of(cluster, "on") == "on "

    asyncio.run(main())


def test_pulse_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the first beat, not after a look of ours that was late, but after PULSE_SILENCE_S."""
    monkeypatch.setattr(local, "PULSE_SILENCE_S", PULSE_SILENCE_S)
    pulse, start = Pulse(), time.monotonic()
    times = [start + LOOK_S * i for i in range(30)]
    assert not any(pulse.is_silent(0, t) for t in times)
    assert not any(pulse.is_silent(5, t + 3) for t in times[:8])
    late = times[7] + 3 + LOOK_S + LATE_S + 10
    assert not pulse.is_silent(5, late)
    looks = [0.09 * i for i in range(1, 11)]  # none at PULSE_SILENCE_S itself, where rounding would decide
    assert [pulse.is_silent(5, late + look) for look in looks] == [look > PULSE_SILENCE_S for look in looks]
    assert not pulse.is_silent(6, late + LOOK_S * 11)


@pytest.mark.fault
def test_rank_that_does_not_join_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, exchange_timeout_s=0.3, r1="absent") as cluster:
            await until(lambda: cluster.epoch == 2)
            assert cluster.describe()["reason"] == "rank 1 did not join epoch 1 within 0.3 s"
            await until(lambda: len(children()) == 1)

    asyncio.run(main())


@pytest.mark.parametrize(("link", "limit_s"), [("", 60.0), ("mlx (ring)", local.MLX_JOIN_S)])
def test_who_may_wait_in_mlx_for_ever_is_given_up_sooner(link: str, limit_s: float) -> None:
    """Its old mailbox still beats: over our own link a long step ends by itself."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rank = local.LocalRank(0, cast(Any, SimpleNamespace(send_nowait=None)), ours)
        layouts = [Layout(n, 0, (0,), 1, "solo", (1,)) for n in (1, 2)]
        old, new = Epoch(layouts[0], 1, "", link=link), Epoch(layouts[1], 2, "", began=100.0)
        rank.seats = [Seat(old, 0, joined=True), Seat(new, 0)]
        beats = itertools.count(1)

        def ailment(now: float) -> str | None:
            return rank.ailment(lambda fd: ((next(beats) if fd == 1 else 0,), 0), now, 60.0)

        assert ailment(100 + limit_s - 0.1) is None
        assert ailment(100 + limit_s + 0.1) == f"did not join epoch 2 within {limit_s:g} s"


def test_who_has_had_its_group_of_mlx_goes_on_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another epoch over MLX could not begin; with fresh processes only it can."""

    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            cluster._ranks[0].had_mlx_group = True
            await cluster.coordinator.changed(RankReturned(1, "rank 1 is back"))
            assert cluster.epoch == 1 and "rank 1 is back, but not needed: MLX lets" in caplog.text
            assert await text_of(cluster, "@ended:torn a b") == "a b "
            await until(lambda: states(cluster) == ["running", "waiting"])
            cluster._ranks[0].had_mlx_group = False
            await cluster.coordinator.changed(RankReturned(1, "rank 1 is back"))
            await until(lambda: states(cluster) == ["running", "running"])

    asyncio.run(main())


def test_epoch_that_failed_is_followed_by_one_with_the_same_ranks(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            assert await text_of(cluster, "@ended:torn a b") == "a b "
            for r in (0, 1):
                await told(tmp_path, r, 2, r, [0.5, 0.5])
            assert cluster.describe()["reason"] == "torn"
            await until(lambda: states(cluster) == ["running"] * 2 and len(cluster._epochs) == 1)

    asyncio.run(main())


def test_late_report_of_an_old_epoch_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            await text_of(cluster, "@ended:torn a")
            await until(lambda: cluster.epoch == 2)
            cluster._epoch_failed(cluster._ranks[0], Ended(1, "LinkDown", "old news"))
            cluster._epoch_failed(cluster._ranks[0], Ended(3, "LinkDown", "prophecy"))
            assert cluster.running and cluster._events.empty()

    asyncio.run(main())


def test_link_that_fails_again_and_again_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with open_group(tmp_path, r1="unsteady") as cluster:
            await until(lambda: states(cluster) == ["running", "waiting"])
            assert (cluster.epoch, cluster.describe()["split"]) == (4, "solo")
            assert await text_of(cluster, "a b") == "a b "

    asyncio.run(main())
    assert "3 epochs in a row failed without a token: one rank goes on alone" in caplog.messages


@pytest.mark.fault
def test_idle_rank_leads_when_the_only_one_in_the_epoch_dies(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 3, r1="unsteady") as cluster:
            await until(lambda: states(cluster) == ["running", "waiting", "waiting"])
            epoch = cluster.epoch
            kill(cluster, 2)
            await until(lambda: states(cluster)[2] == "dead")
            assert [r["rank"] for r in cluster.describe()["ranks"]] == [0, None, None]
            assert (cluster.epoch, cluster.running) == (epoch, True)
            kill(cluster, 0)
            await until(lambda: states(cluster) == ["dead", "running", "dead"])
            assert await text_of(cluster, "on") == "on "

    asyncio.run(main())


def test_rank_that_fails_alone_ends_the_group_and_never_loops_hot(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, r0="hopeless", r1="hopeless") as cluster:
            reason = await cluster.wait_failed()
            assert reason == "the link is torn; this repeats itself. Start expertd again."
            assert cluster.epoch == 6

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began > 1.5  # it waited between them


def test_group_of_one_that_fails_once_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 1) as cluster:
            assert await text_of(cluster, "@ended:x a") == "a "
            await told(tmp_path, 0, 2, 0, [1.0])

    asyncio.run(main())


# The seam for groups over several hosts.


class Scripted:
    """A coordinator that begins nothing by itself after the first epoch."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.events: list[Event] = []
        self.error: Exception | None = None

    async def changed(self, event: Event) -> None:
        self.events.append(event)
        if self.error:
            raise self.error
        if len(self.events) == 1:
            await self.cluster.begin(layout(1, (0, 1)))

    def outlook(self) -> str | None:
        return "the other host goes on"


def layout(epoch: int, ids: tuple[int, ...], first_rank: int = 0, fd: int | None = None) -> Layout:
    num_ranks = first_rank + len(ids)
    return Layout(epoch, first_rank, ids, num_ranks, "auto", (1.0,) * num_ranks, fd)


def test_fractions_of_shares() -> None:
    assert layout(1, (0, 1)).fractions == (0.5, 0.5)
    assert Layout(1, 0, (0, 1), 2, "auto", (3.0, 1.0)).fractions == (0.75, 0.25)
    assert Layout(1, 0, (0, 1), 2, "auto", (0.0, 0.0)).fractions == (0.5, 0.5)


@pytest.mark.fault
def test_request_waits_for_a_leader(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            await cluster.begin(layout(2, (1, 0)))
            kill(cluster, 1)
            await until(lambda: not cluster.running)
            answer = asyncio.create_task(text_of(cluster, "a b"))
            await until(lambda: len(cluster.coordinator.events) == 2)
            assert cluster.coordinator.events[1] == RankDied(0, "rank 0 died: killed by SIGKILL")
            await cluster.begin(layout(3, (0,)))
            assert await answer == "a b "

    asyncio.run(main())


@pytest.mark.fault
def test_request_without_a_leader_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LEADER_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            events = cluster.generate(Submit("r", prompt="@hang"))
            await anext(events)
            kill(cluster, 0)
            with pytest.raises(ClusterError, match=r"^rank 0 died: killed by SIGKILL; nobody answers"):
                await anext(events)
            with pytest.raises(ClusterError, match=r"^rank 0 died: killed by SIGKILL; nobody answers"):
                await text_of(cluster, "x")

    asyncio.run(main())


def test_end_of_the_group_ends_the_wait_for_a_leader(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            cluster.end_epoch("over")
            await cluster.begin(layout(2, (0, 1), first_rank=1))
            answer = asyncio.create_task(text_of(cluster, "x"))
            await asyncio.sleep(0.05)
        with pytest.raises(ClusterError, match="expertd is stopping"):
            await answer

    asyncio.run(main())


def test_requests_go_to_another_host_that_leads(tmp_path: Path) -> None:
    class Distant:
        async def answer(self, submit: Submit, take: Take) -> None:
            take(Started(submit.request_id, 1))
            take(Token(submit.request_id, [1], "from afar"))
            take(Done(submit.request_id, "stop", 1, 1, 1.0, 1.0, "auto", 3))

    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            async with aclosing(cluster.generate(Submit("old", prompt="@hang"))) as old:
                await anext(old)
                await cluster.begin(layout(2, (1, 0), first_rank=1), leader=Distant())
                assert [e.text async for e in old if isinstance(e, Token)] == ["from afar"]
            assert await text_of(cluster, "x") == "from afar"
            assert [r.number for r in cluster._ranks] == [2, 1]
            for r in (0, 1):
                await told(tmp_path, r, 2, 2 - r, [1 / 3] * 3)
            assert cluster.describe()["reason"] == "another epoch begins"

    asyncio.run(main())


def test_given_mailbox_is_used_and_closed(tmp_path: Path, mailbox: StubMailbox) -> None:
    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            fd = mailbox.create(2, 0)
            await cluster.begin(layout(2, (0, 1), fd=fd))
            await until(lambda: min(mailbox.pulses(fd)[0]) > 0)
            cluster.end_epoch("over")
            cluster.end_epoch("again")
            assert mailbox.poisoned == ["another epoch begins", "over"]
        with pytest.raises(OSError):
            os.fstat(fd)

    asyncio.run(main())


@pytest.mark.fault
def test_epoch_with_a_dead_rank_is_over_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            kill(cluster, 1)
            await until(lambda: not cluster.running)
            await cluster.begin(layout(2, (0, 1)))
            assert not cluster.running
            assert cluster.describe()["reason"] == "rank 1 died: killed by SIGKILL"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("no."), "no."),
        (ZeroDivisionError("1/0"), "ZeroDivisionError: 1/0. This is a bug of expertd."),
    ],
)
def test_coordinator_that_fails_ends_the_group(tmp_path: Path, error: Exception, reason: str) -> None:
    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            cluster.coordinator.error = error
            cluster._ranks[1].process.kill()
            assert await cluster.wait_failed() == reason

    asyncio.run(main())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_many_epochs_leave_nothing_behind(tmp_path: Path) -> None:
    def num_fds(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    async def main() -> None:
        async with open_group(tmp_path, coordinator=Scripted) as cluster:
            await until(lambda: states(cluster) == ["running"] * 2)
            pids = [os.getpid(), *(r.pid for r in cluster._ranks)]
            before = [num_fds(pid) for pid in pids]
            for number in range(2, 12):
                await cluster.begin(layout(number, (0, 1)))
            await until(lambda: len(cluster._epochs) == 1 and states(cluster) == ["running"] * 2)
            await until(lambda: [num_fds(pid) for pid in pids] == before)

    asyncio.run(main())
