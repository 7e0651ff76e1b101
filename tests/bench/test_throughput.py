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

    @asynccontextmanager
    async def open_group(group: GroupConfig) -> AsyncIterator[Any]:
        key = (group.kernels, group.num_ranks)
        seen.append(f"open {group.kernels} {group.num_ranks}")
        bits = group.activation_bits if group.kernels == "native" else 0
        ready = SimpleNamespace(
            splits=["solo", "experts"], kernels=group.kernels, activation_bits=bits, isa="avx2"
        )
        yield SimpleNamespace(key=key, ready=ready)

    async def ask(cluster: Any, request: dict[str, Any]) -> Any:
        seen.append(f"{cluster.key[0]} {cluster.key[1]}")
        speed = SPEEDS[cluster.key]
        return SimpleNamespace(completion_tokens=4, decode_tokens_per_s=speed, prefill_tokens_per_s=speed)

    monkeypatch.setattr(throughput, "Cluster", SimpleNamespace(open=open_group))
    monkeypatch.setattr(throughput, "_ask", ask)
    return seen


def rows_of(wanted: list[tuple[int, str]], kernels: list[str]) -> list[dict[str, Any]]:
    groups = [GroupConfig("", kernels=name, activation_bits=8) for name in kernels]
    return asyncio.run(throughput._measure("decode", groups, wanted, {"max_tokens": 4}, 3))


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
    assert "experts        2  native/8" in capsys.readouterr().out


def test_the_table_says_what_the_second_kernels_are_of_the_first(
    groups: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([], ["native", "mlx"])
    machine = throughput.describe_machine()
    throughput._print({"machine": machine, "model": "m", "tokens": 4, "kind": "decode", "rows": rows})
    assert "0.0333x of solo by native/8" in capsys.readouterr().out


def test_each_rank_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "own_cores", lambda num_ranks: [3, 5][:num_ranks])
    group = throughput.with_ranks(GroupConfig("folder", kernels="mlx"), 2, "experts")
    assert (group.cpus, group.split, group.kernels) == (((3,), (5,)), "experts", "mlx")
