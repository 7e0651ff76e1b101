import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest
from stub_group import LIMIT_S, SOON_S, StubMailbox, children, gone, group_of, received, until, until_now

from expertd.cluster import local, requests, supervisor
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Done, Started, Submit, Token
from expertd.errors import BusyError, CheckpointError, ClusterError, ConfigError, ExpertdError


@asynccontextmanager
async def open_group(folder: Path, num_ranks: int = 1, **moods: str) -> AsyncIterator[Cluster]:
    async with asyncio.timeout(LIMIT_S), Cluster.open(group_of(folder, num_ranks, **moods)) as cluster:
        yield cluster


async def text_of(cluster: Cluster, prompt: str, request_id: str = "r") -> str:
    events = [e async for e in cluster.generate(Submit(request_id, prompt=prompt))]
    assert isinstance(events[0], Started) and isinstance(events[-1], Done)
    return "".join(e.text for e in events if isinstance(e, Token))


def test_two_ranks_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 2) as cluster:
            assert cluster.ready.family == "stub" and cluster.failure is None
            assert await text_of(cluster, "one two three") == "one two three "
            assert [m["op"] for m in received(tmp_path)] == ["Submit"]

    asyncio.run(main())


def test_loading_is_told_of_all_ranks(tmp_path: Path) -> None:
    async def main() -> None:
        told: list[tuple[int, int]] = []

        def loading(num_bytes: int, total_bytes: int) -> None:
            told.append((num_bytes, total_bytes))

        async with Cluster.open(group_of(tmp_path, 2), loading=loading):
            assert len(told) == 4 and told[0] == (5, 20) and told[-1] == (20, 20)

    asyncio.run(main())


def test_two_requests_at_once_do_not_mix(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            answers = await asyncio.gather(
                text_of(cluster, "@slow:0.005 @repeat:20 a", "r1"),
                text_of(cluster, "@slow:0.005 @repeat:20 b", "r2"),
            )
            assert answers == ["a " * 20, "b " * 20]

    asyncio.run(main())


def test_rejected_is_the_users_error_and_the_group_lives(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            with pytest.raises(ConfigError, match=r"^prompt: no$"):
                await text_of(cluster, "@reject:no")
            assert await text_of(cluster, "on") == "on "
            assert "Cancel" not in [m["op"] for m in received(tmp_path)]

    asyncio.run(main())


def test_failed_request_leaves_the_group_alive(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            with pytest.raises(ClusterError, match=r"^the step failed$"):
                await text_of(cluster, "so fail")
            assert await text_of(cluster, "on", "r2") == "on "

    asyncio.run(main())


def test_leaving_early_cancels(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            async with aclosing(cluster.generate(Submit("r7", prompt="@hang"))) as events:
                assert isinstance(await anext(events), Started)
            await until(lambda: received(tmp_path)[-1] == {"op": "Cancel", "request_id": "r7"})
            assert await text_of(cluster, "on", "r8") == "on "

    asyncio.run(main())


def test_who_waits_for_a_leader_goes_on_waiting_when_it_is_gone_at_once(tmp_path: Path) -> None:
    """A rank that came to lead may be dead before those who waited for it have their turn."""

    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            leader = cluster._leader
            assert leader
            cluster.lead_by(None)
            waiting = asyncio.create_task(cluster._find_leader())
            await asyncio.sleep(0)
            cluster.lead_by(leader)
            cluster.lead_by(None)
            for _ in range(5):
                await asyncio.sleep(0)
            assert not waiting.done()
            cluster.lead_by(leader)
            assert await waiting is leader

    asyncio.run(main())


def test_cancelled_task_cancels_the_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            task = asyncio.create_task(text_of(cluster, "@hang"))
            await until(lambda: received(tmp_path))
            task.cancel()
            await until(lambda: received(tmp_path)[-1]["op"] == "Cancel")

    asyncio.run(main())


def test_slow_reader_loses_nothing_and_holds_nobody_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            async with aclosing(cluster.generate(Submit("r", prompt="@repeat:3000 x"))) as events:
                await anext(events)
                await until(lambda: not cluster._ranks[0].replies)
                rest = [e async for e in events]
            tokens = [e for e in rest if isinstance(e, Token)]
            assert [i for t in tokens for i in t.token_ids] == list(range(1, 3001))
            assert "".join(t.text for t in tokens) == "x " * 3000

    asyncio.run(main())


def test_too_many_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_OPEN_REQUESTS", 1)

    async def main() -> None:
        async with (
            open_group(tmp_path) as cluster,
            aclosing(cluster.generate(Submit("a", prompt="@hang"))) as open_one,
        ):
            await anext(open_one)
            with pytest.raises(BusyError, match="1 requests are open"):
                await text_of(cluster, "x", "b")

    asyncio.run(main())


@pytest.mark.fault
def test_last_rank_killed_in_mid_stream(tmp_path: Path, mailbox: StubMailbox) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            events = cluster.generate(Submit("r", prompt="@slow:0.01 @repeat:3000 x"))
            await anext(events)
            os.kill(cluster._ranks[0].pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(
                ClusterError, match=r"^rank 0 died: killed by SIGKILL; .* start expertd again$"
            ):
                async for _ in events:
                    pass
            assert len(mailbox.poisoned) == 1
            assert "rank 0 died" in await cluster.wait_failed()
            with pytest.raises(ClusterError, match="died: killed by SIGKILL"):
                await text_of(cluster, "x", "later")
            await until(lambda: not children())
            assert time.monotonic() - began < SOON_S

    asyncio.run(main())


def test_sick_rank_is_killed_and_reaped_though_it_ignores_everything(tmp_path: Path) -> None:
    async def main() -> float:
        async with open_group(tmp_path, 2, r0="deaf", r1="deaf") as cluster:
            os.kill(cluster._ranks[1].pid, signal.SIGSTOP)
            began = time.monotonic()
        return time.monotonic() - began

    kill_after_s = supervisor.KILL_AFTER_S
    assert kill_after_s <= asyncio.run(main()) < kill_after_s + supervisor.REAP_TIMEOUT_S
    assert children() == []


def test_healthy_ranks_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "KILL_AFTER_S", LIMIT_S)

    async def main() -> float:
        async with open_group(tmp_path, 2):
            began = time.monotonic()
        return time.monotonic() - began

    assert asyncio.run(main()) < SOON_S


def test_second_cancel_kills_without_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "KILL_AFTER_S", LIMIT_S)

    async def main() -> float:
        async def hold() -> None:
            async with open_group(tmp_path, 1, r0="deaf"):
                opened.set()
                await asyncio.sleep(60)

        opened = asyncio.Event()
        task = asyncio.create_task(hold())
        await opened.wait()
        began = time.monotonic()
        task.cancel()
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and children() == []
        return time.monotonic() - began

    assert asyncio.run(main()) < SOON_S


def start_error(folder: Path, num_ranks: int = 2, load_timeout_s: float = 20, **moods: str) -> ExpertdError:
    async def main() -> None:
        async with Cluster.open(group_of(folder, num_ranks, **moods), load_timeout_s=load_timeout_s):
            raise AssertionError("opened")

    with pytest.raises(ExpertdError) as caught:
        asyncio.run(main())
    return caught.value


def test_fatal_at_start_raises_its_own_class(tmp_path: Path) -> None:
    error = start_error(tmp_path, r1="fatal")
    assert type(error) is CheckpointError and str(error) == "model-1.safetensors: damaged. Get it again."


def test_death_at_start_names_rank_and_code(tmp_path: Path) -> None:
    error = start_error(tmp_path, r1="exit")
    assert type(error) is ClusterError and str(error).startswith("rank 1 died: exited with code 3; ")


def test_rank_that_is_never_ready(tmp_path: Path) -> None:
    # On a busy machine rank 0 may be late as well.
    error = start_error(tmp_path, load_timeout_s=0.5, r1="mute")
    assert re.match(r"rank (0, )?1: not ready after 0\.5 s\. ", str(error))


def test_cancel_while_loading_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), Cluster.open(group_of(tmp_path, 2, r0="mute")):
                raise AssertionError("opened")
        assert children() == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("@garbage x", "rank 0 broke the protocol: not a message of ours"),
        ("@exit:5 x", "rank 0 died: exited with code 5"),
        ("@raise:SIGSEGV x", "rank 0 died: killed by SIGSEGV"),
        ("@fatal:LinkDown x", "rank 1 went away"),
        ("@fatal:NoSuchClass x", "rank 0 died: rank 1 went away"),
    ],
)
def test_misbehaving_rank_ends_the_group_with_the_reason(tmp_path: Path, prompt: str, reason: str) -> None:
    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            with pytest.raises(ClusterError) as caught:
                await text_of(cluster, prompt)
            assert str(caught.value).startswith(reason)
            assert cluster.failure == str(caught.value)
            await until(lambda: not children())

    asyncio.run(main())


def test_silent_rank_ends_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SILENCE_TIMEOUT_S", 0.3)

    async def main() -> None:
        async with open_group(tmp_path) as cluster:
            await asyncio.sleep(0.5)
            assert cluster.failure is None, "silence without a request is peace"
            with pytest.raises(ClusterError, match=r"rank 0 has said nothing for 0.3 s with 1 requests open"):
                await text_of(cluster, "@hang")

    asyncio.run(main())


SUPERVISOR = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import stub_group
from expertd.cluster.supervisor import Cluster
stub_group.use_stub()
async def main():
    async with Cluster.open(stub_group.group_of(Path(sys.argv[2]), 3)) as cluster:
        print(*(rank.pid for rank in cluster._ranks), flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def test_killed_supervisor_leaves_no_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(ranks) == 3 and all(r.is_running() for r in ranks)
        process.kill()
    until_now(lambda: all(gone(rank) for rank in ranks))


@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="looks into /proc")
def test_no_rank_holds_the_write_end_of_a_lifeline(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_group(tmp_path, 3) as cluster:
            for rank in cluster._ranks:
                pipes = [fd for fd in Path(f"/proc/{rank.pid}/fd").iterdir() if _is_lifeline(fd, cluster)]
                assert [fd.name for fd in pipes] == [str(rank.process.lifeline_fd)]

    def _is_lifeline(fd: Path, cluster: Cluster) -> bool:
        ours = {os.readlink(f"/proc/self/fd/{rank.process._lifeline}") for rank in cluster._ranks}
        return os.readlink(fd) in ours

    asyncio.run(main())


def test_the_supervisor_imports_no_mlx() -> None:
    code = "import sys, expertd.cluster.supervisor; assert 'mlx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
