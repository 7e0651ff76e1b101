"""Ranks that die and are started again: who comes back, who does not, and that streams wait for them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from stub_group import LIMIT_S, begun, children, group_of, until

from expertd.cluster import restarts, supervisor
from expertd.cluster.restarts import MAX_RESTARTS, Restarts
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Submit, Token
from expertd.errors import ClusterError


@asynccontextmanager
async def open_group(folder: Path, num_ranks: int) -> AsyncIterator[Cluster]:
    group = group_of(folder, num_ranks)
    async with asyncio.timeout(2 * LIMIT_S), Cluster.open(group, restart=True) as cluster:
        yield cluster


async def ids_of(cluster: Cluster, prompt: str, request_id: str = "r") -> list[int]:
    events = [e async for e in cluster.generate(Submit(request_id, prompt=prompt))]
    return [i for e in events if isinstance(e, Token) for i in e.token_ids]


def kill(cluster: Cluster, rank_id: int) -> None:
    os.kill(cluster._ranks[rank_id].pid, signal.SIGKILL)


def states(cluster: Cluster) -> list[str]:
    return [rank["state"] for rank in cluster.describe()["ranks"]]


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_comes_back_while_streams_go_on(tmp_path: Path, victim: int) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 2) as cluster:
            await until(lambda: states(cluster) == ["running"] * 2)
            answer = asyncio.create_task(ids_of(cluster, "@slow:0.01 @repeat:100 x"))
            await until(lambda: cluster.requests.num_open and len(begun(tmp_path)) == 1)
            pids = [rank.pid for rank in cluster._ranks]
            kill(cluster, victim)
            await until(lambda: cluster.epoch == 2)
            await until(lambda: cluster.epoch == 3 and states(cluster) == ["running"] * 2)
            assert await answer == list(range(1, 101))
            assert [rank.pid == pid for rank, pid in zip(cluster._ranks, pids, strict=True)] == [
                i != victim for i in (0, 1)
            ]
            assert cluster.describe()["reason"] == f"rank {victim} is back"
            assert cluster._ranks[victim].number == 1, "who went on goes on leading"
            assert cluster.record.num_events["back"] == 1

    asyncio.run(main())


@pytest.mark.fault
def test_a_stream_waits_for_the_only_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LEADER_TIMEOUT_S", 5.0)

    async def main() -> None:
        async with open_group(tmp_path, 1) as cluster:
            events = cluster.generate(Submit("r", prompt="@slow:0.01 @repeat:40 x"))
            await anext(events)
            monkeypatch.setattr(supervisor, "LEADER_TIMEOUT_S", 0.01)
            kill(cluster, 0)
            await until(lambda: states(cluster) != ["running"])
            with pytest.raises(ClusterError, match="rank 0 died: killed by SIGKILL; nobody answers"):
                await ids_of(cluster, "new", "s")
            assert [i async for e in events if isinstance(e, Token) for i in e.token_ids] == list(
                range(1, 41)
            )
            assert cluster.ready.family == "stub"

    asyncio.run(main())


@pytest.mark.fault
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_keeps_dying_stays_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(restarts, "MAX_RESTARTS", 2)

    async def main() -> None:
        async with open_group(tmp_path, num_ranks) as cluster:
            group_of(tmp_path, num_ranks, r0="exit")  # the next one ends as it starts
            kill(cluster, 0)
            if num_ranks == 1:
                assert (await cluster.wait_failed()).startswith("rank 0 died: exited with code 3; look above")
            else:
                await until(lambda: cluster.record.num_events["died"] == 3)
                assert await ids_of(cluster, "a b") == [1, 2]
                assert states(cluster) == ["dead", "running"] and cluster.failure is None
            assert cluster.record.num_events["died"] == 3 and not cluster._restarting

    asyncio.run(main())


@pytest.mark.fault
def test_the_end_comes_while_a_rank_starts(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 2) as cluster:
            group_of(tmp_path, 2, r1="mute")  # the next one never says that it has loaded
            kill(cluster, 1)
            await until(lambda: states(cluster) == ["running", "loading"])
        assert children() == []

    asyncio.run(main())


def test_pauses_grow_and_a_good_life_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Restarts()
    counted.started(0)
    assert [counted.pause_s(0) for _ in range(MAX_RESTARTS + 1)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, None]
    assert counted.pause_s(1) == 0.0
    monkeypatch.setattr(restarts, "GOOD_LIFE_S", -1.0)
    assert counted.pause_s(0) == 0.0
