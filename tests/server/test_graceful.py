"""Ending and loading again under the eyes of clients: what runs comes to its end, the listener is never dropped."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from stub_group import LIMIT_S, children, group_of, received, until

from expertd.cluster.supervisor import Cluster
from expertd.config import ServerConfig
from expertd.engine.messages import Submit
from expertd.errors import ConfigError
from expertd.server import serve as serving
from expertd.server.generation import Renewal, Wishes

SLOW = "@slow:0.01 @repeat:60 x"


class Served:
    """A server over stub ranks: `clusters` are those that have answered requests, `task` runs it."""

    def __init__(self, folder: Path, wishes: Wishes, num_ranks: int = 1, **moods: str) -> None:
        self.config = ServerConfig(port=0, group=group_of(folder, num_ranks, **moods))
        self.wishes, self.folder = wishes, folder
        listener = serving.take_port(self.config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.cluster: asyncio.Future[Cluster] = asyncio.get_running_loop().create_future()
        announce = self.cluster.set_result
        self.task = asyncio.create_task(serving.serve(self.config, listener, announce, None, wishes))
        self.client = httpx.AsyncClient(base_url=self.url, timeout=LIMIT_S)

    async def ask(self, prompt: str) -> httpx.Response:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 100}
        return await self.client.post("/v1/completions", json=body)

    async def health(self) -> dict[str, object]:
        found: dict[str, object] = (await self.client.get("/health")).json()
        return found


def with_served(
    folder: Path, wishes: Wishes, test: Callable[[Served], Awaitable[None]], **options: str
) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            served = Served(folder, wishes, **options)
            async with served.client:
                try:
                    await test(served)
                finally:
                    served.task.cancel()
                    await asyncio.gather(served.task, return_exceptions=True)
        assert children() == []

    asyncio.run(main())


async def refuses(served: Served) -> bool:
    try:
        async with httpx.AsyncClient(base_url=served.url) as stranger:
            await stranger.get("/health")
    except httpx.ConnectError:
        return True
    return False


def test_what_runs_comes_to_its_end_and_nothing_new_is_taken(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.cluster
        await asyncio.gather(served.health(), served.health())  # two connections that stay open
        slow = asyncio.create_task(served.ask(SLOW))
        await until(lambda: received(tmp_path))
        assert served.wishes.take(15) and not served.wishes.take(15), "the second one ends at once"
        while not await refuses(served):
            await asyncio.sleep(0.01)
        late = await served.ask("late")  # over the other one
        assert late.status_code == 503 and "stopping" in late.json()["error"]["message"]
        assert (await slow).json()["choices"][0]["text"] == "x " * 60
        await served.task

    with_served(tmp_path, Wishes(drain_timeout_s=LIMIT_S), test)


def test_what_does_not_end_in_time_is_ended_with_the_reason(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.cluster
        hangs = asyncio.create_task(served.ask("@hang x"))
        await until(lambda: received(tmp_path))
        served.wishes.drain.set()
        answer = await hangs
        assert answer.status_code == 503
        assert "stopping, and this did not end within --drain-timeout 0.1 s" in answer.text
        await served.task

    with_served(tmp_path, Wishes(drain_timeout_s=0.1), test)


def test_nothing_is_waited_for_while_it_loads(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await until(children)
        served.wishes.drain.set()
        await asyncio.wait({served.task})
        assert served.task.cancelled()

    with_served(tmp_path, Wishes(), test, r0="mute")


@pytest.mark.parametrize("fits", [True, False])
def test_loading_again_drops_nothing(tmp_path: Path, fits: bool) -> None:
    wishes = Wishes(drain_timeout_s=LIMIT_S)

    async def test(served: Served) -> None:
        first = await served.cluster
        wishes.renew = lambda: Renewal(replace(served.config, model_id="new"), None, fits)
        old = psutil.Process(first._ranks[0].pid)
        kept = first.generate(Submit("kept", prompt="a b", keep=True))
        assert len([e async for e in kept]) == 4
        slow = asyncio.create_task(served.ask(SLOW))
        await until(lambda: len(received(tmp_path)) == 2)
        assert wishes.take(1)
        while (health := await served.health())["model"] != "new":
            assert health["status"] in ("ok", "loading")
            await asyncio.sleep(0.01)
        answer = await served.client.post("/v1/completions", json={"model": "new", "prompt": "a b"})
        assert answer.json()["choices"][0]["text"] == "a b "
        assert (await slow).json()["choices"][0]["text"] == "x " * 60
        await until(lambda: not old.is_running())
        assert len(children()) == 1 and not served.task.done()

    with_served(tmp_path, wishes, test)


def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wishes = Wishes()

    def renew() -> Renewal:
        raise ConfigError("model.safetensors: gone. Get it again.")

    async def test(served: Served) -> None:
        await served.cluster
        wishes.renew = renew
        wishes.take(1)
        await until(lambda: caplog.messages)
        assert caplog.messages == ["reload: model.safetensors: gone. Get it again. What was served goes on."]
        assert (await served.ask("a b")).json()["choices"][0]["text"] == "a b "

    with_served(tmp_path, wishes, test)
