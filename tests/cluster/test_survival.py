"""Real ranks on the demo model: whatever dies, the tokens are those of an undisturbed run."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from stub_group import children, until

from expertd.checkpoint.locate import find_checkpoint
from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Done, Started, Submit, Token
from expertd.engine.text import Tokenizer
from expertd.sampling import Sampling
from tests.engine.test_recovery import Served, load
from tests.tiny import make_tiny

pytestmark = pytest.mark.fault

PROMPT = "Once upon a time there was a little fox who"
LONG_PROMPT = "The fox met a bear. " * 12
NUM_TOKENS = 16
GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=11)


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


@asynccontextmanager
async def open_group(num_ranks: int) -> AsyncIterator[Cluster]:
    """By MLX's kernels, and every token with all ranks: slow enough that something can happen in the middle."""
    demo = str(find_checkpoint("demo"))
    group = GroupConfig(
        demo, num_ranks, split="experts", prefill_chunk=4, kernels="mlx", prefix_cache_bytes=0
    )
    async with asyncio.timeout(100), Cluster.open(group) as cluster:
        yield cluster
    assert children() == []


class Listener:
    """Asks, and counts what comes: token_ids, the Done, the longest time between two events."""

    def __init__(
        self,
        cluster: Cluster,
        request_id: str,
        prompt: str = PROMPT,
        sampling: Sampling = GREEDY,
        num_tokens: int = NUM_TOKENS,
    ) -> None:
        self.token_ids: list[int] = []
        self.started = False
        self.done: Done | None = None
        self.longest_gap_s = 0.0
        submit = Submit(request_id, prompt=prompt, max_tokens=num_tokens, ignore_end=True, sampling=sampling)
        self.task = asyncio.create_task(self._listen(cluster, submit))

    async def _listen(self, cluster: Cluster, submit: Submit) -> None:
        last = time.monotonic()
        async for event in cluster.generate(submit):
            now = time.monotonic()
            self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
            if isinstance(event, Started):
                self.started = True
            elif isinstance(event, Token):
                self.token_ids += event.token_ids
            elif isinstance(event, Done):
                self.done = event


def signal_rank(cluster: Cluster, rank_id: int, number: int) -> None:
    os.kill(cluster._ranks[rank_id].pid, number)


def test_followers_killed_and_stopped_in_mid_stream() -> None:
    """Three ranks, then two, then one: the last runs undisturbed and alone, so its tokens are the reference."""

    async def main() -> None:
        async with open_group(3) as cluster:
            first = Listener(cluster, "first", sampling=SAMPLED)
            await until(lambda: len(first.token_ids) >= 8)
            signal_rank(cluster, 1, signal.SIGKILL)
            await first.task
            assert cluster.epoch == 2 and first.done and first.done.ranks == 2
            second = Listener(cluster, "second", sampling=SAMPLED)
            await until(lambda: len(second.token_ids) >= 8)
            signal_rank(cluster, 2, signal.SIGSTOP)
            await second.task
            assert cluster.describe()["reason"] == "rank 1 stopped answering: no pulse for 0.8 s"
            assert second.done and second.done.ranks == 1
            assert second.longest_gap_s < 5  # about 1 s, and patience with a busy machine
            alone = Listener(cluster, "alone", sampling=SAMPLED)
            await alone.task
            assert first.token_ids == second.token_ids == alone.token_ids
            assert len(alone.token_ids) == NUM_TOKENS
            assert cluster.epoch == 3 and cluster.failure is None

    asyncio.run(main())


def test_killed_in_prefill_and_the_leader_after_it() -> None:
    async def main() -> None:
        async with open_group(3) as cluster:
            first = Listener(cluster, "first", LONG_PROMPT)
            waiting = Listener(cluster, "waiting")
            await until(lambda: first.started and waiting.started)
            signal_rank(cluster, 2, signal.SIGKILL)
            await until(lambda: cluster.epoch == 2)
            assert first.token_ids == []
            await asyncio.gather(first.task, waiting.task)
            assert first.done and first.done.prefill_tokens_per_s < 5000
            again = Listener(cluster, "again", LONG_PROMPT)
            await until(lambda: len(again.token_ids) >= 5)
            signal_rank(cluster, 0, signal.SIGKILL)
            await again.task
            assert again.done and (again.done.completion_tokens, again.done.ranks) == (NUM_TOKENS, 1)
            alone = Listener(cluster, "alone", LONG_PROMPT)
            await alone.task
            assert first.token_ids == again.token_ids == alone.token_ids
            short = Listener(cluster, "short")
            await short.task
            assert waiting.token_ids == short.token_ids

    asyncio.run(main())


def test_the_next_leader_guesses_by_its_own_draft_model(tmp_path: Path) -> None:
    """The draft is the model itself, so that guesses are right; the answer is that of one rank without a draft."""
    folder = make_tiny(tmp_path / "tiny", "qwen3_moe")
    group = GroupConfig(str(folder), 2, split="experts", draft_model=str(folder), prefix_cache_bytes=0)
    sampling = Sampling(temperature=0.3, seed=3)
    calm = Served(load(folder, "native"), tmp_path / "calm")
    calm.engine.tokenizer = Tokenizer(folder, {})
    calm.ask("calm", PROMPT, sampling=sampling, max_tokens=400)
    assert calm.live()

    async def main() -> None:
        async with asyncio.timeout(100), Cluster.open(group) as cluster:
            stream = Listener(cluster, "stream", sampling=sampling, num_tokens=400)
            await until(lambda: len(stream.token_ids) >= 40)
            signal_rank(cluster, 0, signal.SIGKILL)
            await until(lambda: cluster.epoch == 2)
            assert len(stream.token_ids) < 400 and not cluster.record.accepted["model"]
            await stream.task
            await until(lambda: cluster.record.accepted["model"] > 0)
            assert stream.token_ids == calm.ids("calm") and len(stream.token_ids) == 400

    asyncio.run(main())
