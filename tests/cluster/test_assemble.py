"""What a host that joins makes of the leader's settings."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from expertd.cluster import assemble
from expertd.config import GroupConfig
from tests.cluster.stub_hosts import FACTS, WELCOME


@pytest.mark.parametrize(("chosen", "wanted"), [("auto", "mlx"), ("native", "native"), ("mlx", "mlx")])
def test_kernels_are_the_leaders_unless_chosen(
    chosen: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[GroupConfig] = []

    @asynccontextmanager
    async def open_cluster(group: GroupConfig, **more: Any) -> Any:
        opened.append(group)
        yield SimpleNamespace()

    async def find(*_: object) -> str:
        return "/here"

    manifest = SimpleNamespace(content_hash=WELCOME.content_hash)
    monkeypatch.setattr(assemble.Cluster, "open", open_cluster)
    monkeypatch.setattr(assemble, "check_manifest", lambda files: manifest)
    monkeypatch.setattr(assemble, "check_checkpoint", lambda folder: SimpleNamespace())
    monkeypatch.setattr(assemble, "_find_or_copy", find)
    monkeypatch.setattr(assemble, "with_memory", lambda info, group: group)
    monkeypatch.setattr(assemble, "facts_of", lambda *_: FACTS)
    leader = GroupConfig(
        "/there", 1, "experts", kernels="mlx", activation_bits=16, kv_bits=8, draft_model="/there/draft"
    )
    own = GroupConfig("", 2, cpus=((0,), (1,)), kernels=chosen, draft_model="/here/draft")
    welcome = replace(WELCOME, group={k: v for k, v in asdict(leader).items() if k not in assemble._OWN})

    async def main() -> None:
        async with AsyncExitStack() as stack:
            call: Any = None
            await assemble._load(call, own, [], call, lambda *said: None, welcome, stack)

    asyncio.run(main())
    theirs = {"checkpoint": "/here", "num_ranks": 2, "cpus": own.cpus, "draft_model": own.draft_model}
    assert opened == [replace(leader, kernels=wanted, **theirs)]
    assert opened[0].kv_bits == 8
