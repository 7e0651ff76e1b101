"""`bench decode` and `prefill`: rows of several kernels side by side, on groups that are made up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from expertd.bench import throughput
from expertd.config import GroupConfig

SPEEDS = {("native", 1): 30.0, ("native", 2): 45.0, ("mlx", 1): 1.0, ("mlx", 2): 1.8}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened and asked, in order, as "kernels ranks"."""
    seen: list[str] = []

    def make(checkpoint: str, num_ranks: int, split: str, kernels: str) -> Any:
        return SimpleNamespace(key=(kernels, num_ranks))

    @asynccontextmanager
    async def open_group(group: Any) -> AsyncIterator[Any]:
        seen.append(f"open {group.key[0]} {group.key[1]}")
        yield SimpleNamespace(key=group.key, ready=SimpleNamespace(splits=["solo", "experts"]))

    async def ask(cluster: Any, request: dict[str, Any]) -> Any:
        seen.append(f"{cluster.key[0]} {cluster.key[1]}")
        speed = SPEEDS[cluster.key]
        return SimpleNamespace(completion_tokens=4, decode_tokens_per_s=speed, prefill_tokens_per_s=speed)

    monkeypatch.setattr(throughput, "make_group", make)
    monkeypatch.setattr(throughput, "Cluster", SimpleNamespace(open=open_group))
    monkeypatch.setattr(throughput, "_ask", ask)
    return seen


def rows_of(wanted: list[tuple[int, str]], kernels: list[str]) -> list[dict[str, Any]]:
    return asyncio.run(throughput._measure("decode", "", wanted, kernels, {"max_tokens": 4}, 3))


def test_kernels_take_turns_and_are_compared_with_the_first(groups: list[str]) -> None:
    rows = rows_of([], ["native", "mlx"])
    assert [(row["kernels"], row["decode_tokens_per_s"], row["repeats"]) for row in rows] == [
        ("native", 30.0, 3),
        ("mlx", 1.0, 3),
    ]
    assert [row["ratio_to_first"] for row in rows] == [1.0, 0.0333]
    assert groups[2:] == [
        f"{name} 1" for name in ["native", "mlx", "native", "mlx", "mlx", "native", "native", "mlx"]
    ]


def test_a_split_stands_beside_the_solo_of_its_own_kernels(groups: list[str]) -> None:
    rows = rows_of([(2, "experts")], ["native", "mlx"])
    found = [(row["split"], row["ranks"], row["kernels"], row["ratio_to_solo"]) for row in rows]
    assert found == [
        ("solo", 1, "native", 1.0),
        ("experts", 2, "native", 1.5),
        ("solo", 1, "mlx", 1.0),
        ("experts", 2, "mlx", 1.8),
    ]
    assert [row["repeats"] for row in rows] == [6, 3, 6, 3]


def test_one_kernels_solo_is_measured_beside_the_splits_alone(
    groups: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([(2, "experts")], ["native"])
    assert [row["repeats"] for row in rows] == [3, 3] and "ratio_to_first" not in rows[0]
    machine = throughput.describe_machine()
    throughput._print({"machine": machine, "model": "m", "tokens": 4, "kind": "decode", "rows": rows})
    assert "experts        2  native" in capsys.readouterr().out


def test_the_table_says_what_the_second_kernels_are_of_the_first(
    groups: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([], ["native", "mlx"])
    machine = throughput.describe_machine()
    throughput._print({"machine": machine, "model": "m", "tokens": 4, "kind": "decode", "rows": rows})
    assert "0.0333x of solo by native" in capsys.readouterr().out


def test_groups_are_made_with_their_kernels() -> None:
    group = throughput.make_group("folder", 1, "auto", "auto")
    assert isinstance(group, GroupConfig) and group.checkpoint == "folder"
