"""A group that was ended goes on where it was: what its ranks kept on disk, all of them have again."""

import asyncio
from pathlib import Path

import pytest

from expertd.checkpoint.locate import find_checkpoint
from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Done, Submit, Token

PROMPT = "The fox met a bear. " * 12


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


async def ask(group: GroupConfig) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt were not read."""
    tokens: list[int] = []
    async with Cluster.open(group) as cluster:
        async for event in cluster.generate(Submit("r", prompt=PROMPT, max_tokens=4, ignore_end=True)):
            if isinstance(event, Token):
                tokens += event.token_ids
            elif isinstance(event, Done):
                done = event
        while not list(Path(group.prefix_cache_dir).glob("*/[!.]*")):
            await asyncio.sleep(0.01)
    return tokens, done.cached_tokens


def test_prompts_are_known_after_a_restart(tmp_path: Path) -> None:
    group = GroupConfig(str(find_checkpoint("demo")), 2, split="experts", prefix_cache_dir=str(tmp_path))

    async def main() -> None:
        async with asyncio.timeout(60):
            first, again = await ask(group), await ask(group)
            assert first[0] == again[0] and first[1] == 0 < 60 < again[1]

    asyncio.run(main())
