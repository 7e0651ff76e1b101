"""100 clients stream at once from a supervisor with a stub rank, and what that costs it."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from stub_group import LIMIT_S

NUM_CLIENTS = 100
SCRIPT = Path(__file__).with_name("stub_server.py")


async def stream(client: httpx.AsyncClient, num_tokens: int) -> int:
    """One answer; gives its number of tokens, which is what was asked for, without any error."""
    prompt = f"@slow:0.04 @repeat:{num_tokens} word"
    asked = {"model": "demo", "prompt": prompt, "max_tokens": num_tokens, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    text, found = "", 0
    async with client.stream("POST", "/v1/completions", json={**asked, **usage}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"] if event["choices"] else ""
                found = event["usage"]["completion_tokens"] if event.get("usage") else found
    assert text == "word " * num_tokens
    return found


@pytest.mark.parametrize("num_tokens", [10, pytest.param(500, marks=pytest.mark.soak)])
def test_a_hundred_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_tokens: int) -> None:
    """Every stream is whole. The soak form holds the supervisor to 0.3 ms of a processor for each token."""
    path = os.pathsep.join([str(SCRIPT.parents[1] / "cluster"), *sys.path])
    command, environment = [sys.executable, SCRIPT, tmp_path], {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url, process = f"http://127.0.0.1:{int(server.stdout.readline())}", psutil.Process(server.pid)

            async def ask(num: int) -> int:
                limits = httpx.Limits(max_connections=NUM_CLIENTS)
                async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as client:
                    return sum(await asyncio.gather(*(stream(client, num) for _ in range(NUM_CLIENTS))))

            asyncio.run(ask(1))  # imports, connections
            before, began = sum(process.cpu_times()[:2]), time.monotonic()
            total = asyncio.run(ask(num_tokens))
            cost_ms = 1000 * (sum(process.cpu_times()[:2]) - before) / total
            rate = total / (time.monotonic() - began)
        finally:
            server.terminate()
    with capsys.disabled():
        print(
            f"\n{NUM_CLIENTS} streams, {total} tokens at {rate:.0f}/s: {cost_ms:.3f} ms of processor time each"
        )
    assert total >= NUM_CLIENTS * num_tokens
    if num_tokens >= 500:
        assert cost_ms <= 0.3
