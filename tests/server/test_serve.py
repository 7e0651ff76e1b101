"""A real server on loopback, the official client, and connections that break."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import openai
import pytest
from stub_group import LIMIT_S, SOON_S, children, group_of, received, until

from expertd.cluster import restarts
from expertd.cluster.supervisor import Cluster
from expertd.config import DoorConfig, ServerConfig
from expertd.errors import ClusterError, ConfigError
from expertd.server import serve as serving
from expertd.server import stream

OPEN_DOOR = DoorConfig()


def with_server(
    folder: Path,
    test: Callable[[str], Awaitable[None]],
    num_ranks: int = 1,
    limit_s: float = LIMIT_S,
    door: DoorConfig = OPEN_DOOR,
    **moods: str,
) -> float:
    """Run `test` against a server, stop that server, and give the seconds that the stop took."""

    async def main() -> float:
        config = ServerConfig(port=0, group=group_of(folder, num_ranks, **moods), door=door)
        listener = serving.take_port(config)
        ready: asyncio.Future[Cluster] = asyncio.get_running_loop().create_future()
        url = f"{config.scheme}://127.0.0.1:{listener.getsockname()[1]}"
        server = asyncio.create_task(serving.serve(config, listener, ready.set_result))
        try:
            await asyncio.wait({server, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=LIMIT_S)
            assert not server.done(), server
            await asyncio.wait_for(test(url), limit_s)
        finally:
            began = time.monotonic()
            server.cancel()
            await asyncio.wait({server}, timeout=LIMIT_S)
            took_s = time.monotonic() - began
            for writer in raw:
                writer.transport.abort()
            raw.clear()
            await asyncio.gather(*background)
            background.clear()
            assert server.done() and children() == []
        return took_s

    return asyncio.run(main())


raw: list[asyncio.StreamWriter] = []
background: list[asyncio.Task[None]] = []


async def send_raw(url: str, body: bytes | None = None) -> asyncio.StreamReader:
    """Open a connection by hand, send one completion request, and leave the rest to the test."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    raw.append(writer)
    if body is not None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
    return reader


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)


def test_the_official_client_works(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            assert [m.id async for m in client.models.list()] == ["demo"]
            assert (await client.models.retrieve("demo")).owned_by == "expertd"
            messages = [{"role": "user", "content": "one two"}]
            answer = await client.chat.completions.create(model="demo", messages=messages)
            assert answer.choices[0].message.content == "one two " and answer.usage.total_tokens == 4
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = [
                c
                async for c in await client.chat.completions.create(
                    model="demo", messages=messages, **options
                )
            ]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "one two "
            assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.total_tokens == 4
            text = await client.completions.create(model="demo", prompt="a b", max_tokens=1)
            assert text.choices[0].text == "a " and text.choices[0].finish_reason == "length"
            stream = await client.completions.create(model="demo", prompt="a b", stream=True)
            assert "".join([c.choices[0].text async for c in stream]) == "a b "

    with_server(tmp_path, test, num_ranks=2)


def test_the_official_client_understands_our_errors(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="demo", prompt="x", best_of=2)
            assert caught.value.param == "best_of"
            stream = await client.completions.create(model="demo", prompt="so fail", stream=True)
            with pytest.raises(openai.APIError, match="the step failed"):
                async for _ in stream:
                    pass

    with_server(tmp_path, test)


def test_two_requests_at_once(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        async with client_of(url) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="demo", prompt=f"@slow:0.01 {w} {w}") for w in "abc")
            )
            assert [a.choices[0].text for a in answers] == ["a a ", "b b ", "c c "]

    with_server(tmp_path, test)


@pytest.mark.parametrize("prompt", ["@slow:0.01 @repeat:3000 x", "@hang x"])
@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_leaves_cancels_its_request(tmp_path: Path, prompt: str, streamed: bool) -> None:
    async def test(url: str) -> None:
        asked = {"model": "demo", "prompt": prompt, "stream": streamed, "max_tokens": 3000}
        await send_raw(url, json.dumps(asked).encode())
        await until(lambda: received(tmp_path))
        await asyncio.sleep(0.1)
        assert [m["op"] for m in received(tmp_path)] == ["Submit"]
        raw[0].transport.abort()
        await until(lambda: [m["op"] for m in received(tmp_path)] == ["Submit", "Cancel"])

    with_server(tmp_path, test)


def test_stop_with_open_streams_is_quick_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for streams to drain, only for the deaf rank's KILL_AFTER_S."""
    monkeypatch.setattr(serving, "DRAIN_TIMEOUT_S", LIMIT_S)
    seen: list[str] = []

    async def read(url: str) -> None:
        asked = {"model": "demo", "prompt": "@slow:0.01 @repeat:3000 x", "stream": True, "max_tokens": 3000}
        async with httpx.AsyncClient() as client:
            seen.append((await client.post(f"{url}/v1/completions", json=asked)).text)

    async def test(url: str) -> None:
        background.append(asyncio.create_task(read(url)))
        await send_raw(url)
        await until(lambda: received(tmp_path))

    assert with_server(tmp_path, test, num_ranks=2, r1="deaf") < SOON_S
    assert "expertd is stopping" in seen[0] and "[DONE]" not in seen[0]


def test_client_that_never_reads_does_not_delay_the_stop(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        asked = {"model": "demo", "prompt": "@repeat:4000 " + "x" * 5000, "stream": True, "max_tokens": 4000}
        reader = await send_raw(url, json.dumps(asked).encode())
        reader._transport.pause_reading()
        await asyncio.sleep(0.5)

    assert with_server(tmp_path, test) < SOON_S


def test_client_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT_S", 0.2)

    async def test(url: str) -> None:
        # 20 MB in 4 s or more: far more than sockets hold, and not at its end when the client is given up.
        prompt = "@slow:0.001 @repeat:4000 " + "x" * 5000
        asked = {"model": "demo", "prompt": prompt, "stream": True, "max_tokens": 4000}
        reader = await send_raw(url, json.dumps(asked).encode())
        reader._transport.pause_reading()
        await until(lambda: [m["op"] for m in received(tmp_path)] == ["Submit", "Cancel"])

    with_server(tmp_path, test)


@pytest.mark.fault
def test_server_ends_with_the_reason_when_no_rank_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MAX_RESTARTS", 0)

    async def main() -> None:
        config = ServerConfig(port=0, group=group_of(tmp_path, 2))
        listener = serving.take_port(config)

        def kill(cluster: Cluster) -> None:
            for rank in cluster._ranks:
                rank.process.kill()

        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"^rank \d died: killed by SIGKILL"):
            await asyncio.wait_for(serving.serve(config, listener, kill), LIMIT_S)
        assert time.monotonic() - began < SOON_S and children() == []

    asyncio.run(main())


def test_port_in_use_is_one_line() -> None:
    with serving.take_port(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--host 127.0.0.1 --port {port}: the port is in use"):
            serving.take_port(ServerConfig(port=port))


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no such host", 0), ("127.0.0.1", 70000)])
def test_impossible_address_is_one_line(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"^--host .*: cannot listen there"):
        serving.take_port(ServerConfig(host=host, port=port))
