"""The splits over MLX's own engine: the same bits; what is missing is said; a dead peer hangs nobody for ever."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from expertd.cluster import local
from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Done, Submit, Token
from expertd.errors import ClusterError, ConfigError, RemoteProtocolError
from expertd.model import mlx_link
from tests.ranks import run_ranks
from tests.tiny import make_tiny

JOBS = Path(__file__).with_name("exact_jobs.py")
FRAME_JOBS = Path(__file__).with_name("mlx_jobs.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe"))


@pytest.fixture(scope="module")
def solo(tiny: str) -> dict[str, str]:
    digests: dict[str, str] = run_ranks(JOBS, "run", 1, {"checkpoints": [tiny]})[0][tiny]
    return digests


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_split_over_mlx_gives_the_bits_of_one_rank(tiny: str, solo: dict[str, str], num_ranks: int) -> None:
    """Equal, unequal and empty shares, as over our own link."""
    ranks = run_ranks(JOBS, "run_over_mlx", num_ranks, {"checkpoints": [tiny]})
    assert all(rank == ranks[0] for rank in ranks)
    digests = ranks[0][tiny]
    assert {case.split(" ")[0] for case in digests} == {"solo", "experts", "tokens"}
    for case, digest in digests.items():
        assert digest == solo[f"solo (1.0,) {'one chunk' if case.endswith('one chunk') else 'several'}"], case


def test_frames_of_any_length_reach_every_rank_in_order() -> None:
    sizes = [0, 1, 4091, 4092, 4093, 4096, 9000]
    ranks = run_ranks(FRAME_JOBS, "frames", 3, {"sizes": sizes})
    assert ranks[1] == ranks[2] == ranks[0]
    assert [size for size, _ in ranks[0]] == sizes


def test_one_process_cannot_join_a_second_group() -> None:
    kind, text = run_ranks(FRAME_JOBS, "twice", 2, {})[0]
    assert kind == "RemoteProtocolError" and "one group of MLX's only: start the ranks again" in text


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_goes_on_without_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """With four exchanges in a step the leader can wait in MLX for ever: it is killed, and its answer goes on.

    Split by experts, so that each step needs the peer: under solo the answer can end before its stop is noticed.
    """
    monkeypatch.setattr(local, "MLX_JOIN_S", 2.0)
    tiny = str(make_tiny(tmp_path / "tiny", "qwen3_next"))

    async def answer(num_ranks: int, fault: int | None) -> str:
        text, group = "", GroupConfig(tiny, num_ranks, link="mlx", split="experts")
        async with asyncio.timeout(90), Cluster.open(group, restart=True) as cluster:
            submit = Submit("r", prompt="Once", max_tokens=500, ignore_end=True)
            async for event in cluster.generate(submit):
                if isinstance(event, Token):
                    text += event.text
                    if fault and len(text) > 20:
                        os.kill(cluster.living[1].pid, fault)
                        fault = None
                if isinstance(event, Done):
                    return text
        raise AssertionError("the answer has no end")

    assert asyncio.run(answer(2, number)) == asyncio.run(answer(1, None))


class FakeDistributed(SimpleNamespace):
    """MLX's module as it is on a Mac; notes what it was called with."""

    def __init__(self, **more: Any) -> None:
        super().__init__(calls=[], **more)

    def is_available(self, backend: str) -> bool:
        return True

    def init(self, strict: bool, backend: str, all_gather_factory: Callable[[int, int], Any]) -> Any:
        devices = json.loads(Path(os.environ["MLX_IBV_DEVICES"]).read_text())
        self.calls.append((strict, backend, os.environ["MLX_RANK"], devices))
        if self.failure:
            raise RuntimeError("[jaccl] Couldn't allocate\nprotection domain")
        side_channel = all_gather_factory(1, 2)
        self.calls.append(side_channel(b"abcdef", 3))
        return SimpleNamespace(rank=lambda: 1, size=lambda: 2)


DEVICES: list[list[str | None]] = [[None, "rdma_en2"], ["rdma_en3", None]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDistributed:
    fake = FakeDistributed(failure=False)
    monkeypatch.setattr(mlx_link.mx, "distributed", fake)
    monkeypatch.setattr(mlx_link, "_joined", set())
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setenv("MLX_IBV_DEVICES", "/of/the/user")
    return fake


def test_jaccl_gets_its_devices_and_our_side_channel(fake: FakeDistributed) -> None:
    link = mlx_link.open_jaccl(1, DEVICES, lambda mine: [b"xyz", mine])
    assert (link.rank, link.num_ranks) == (1, 2)
    assert fake.calls == [(True, "jaccl", "1", DEVICES), b"xyzabc"]
    assert "MLX_RANK" not in os.environ and os.environ["MLX_IBV_DEVICES"] == "/of/the/user"


@pytest.mark.parametrize(
    ("names", "devices"),
    [
        (["rdma_en2", "rdma_en3"], DEVICES),
        (["rdma_en2", ""], None),
        (["", ""], None),
        (["rdma_en2", "rdma_en3", "rdma_en3"], None),
    ],
)
def test_jaccl_is_for_two_hosts_that_both_have_it(
    names: list[str], devices: list[list[str | None]] | None
) -> None:
    assert mlx_link.jaccl_devices(names) == devices


def test_two_hosts_with_rdma_take_jaccl(fake: FakeDistributed) -> None:
    said = b"rdma_en2".ljust(mlx_link.WORD_BYTES)
    link = mlx_link.open_link(1, lambda mine: [said, mine], "10.0.0.1", "en3")
    assert link.backend == "jaccl" and fake.calls[0] == (True, "jaccl", "1", DEVICES)


def test_jaccl_that_fails_is_one_line(fake: FakeDistributed) -> None:
    fake.failure = True
    with pytest.raises(
        ClusterError, match=r"rank 1, --link mlx, back end jaccl: .* allocate protection domain"
    ):
        mlx_link.open_jaccl(1, DEVICES, lambda mine: [mine])
    assert "MLX_RANK" not in os.environ


def test_another_group_than_wanted_is_refused(fake: FakeDistributed) -> None:
    with pytest.raises(RemoteProtocolError, match="MLX made this rank 1 of 2, wanted 0 of 2"):
        mlx_link.open_jaccl(0, DEVICES, lambda mine: [mine])


@pytest.mark.parametrize("backend", ["jaccl", "mpi"])
def test_a_missing_back_end_is_named(backend: str) -> None:
    if mx.distributed.is_available(backend):
        pytest.skip(f"this machine has {backend}")
    with pytest.raises(ConfigError, match=f"back end {backend} is not available here. Use `--link tcp`"):
        if backend == "jaccl":
            mlx_link.open_jaccl(0, DEVICES, lambda mine: [mine])
        else:
            mlx_link.open_mpi(0, 2)
