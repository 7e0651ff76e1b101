"""HTTP as no client of ours writes it: an answer of 4xx or a closed connection, and healthy streams go on."""

import asyncio
import gzip
import json
import os
import resource
import sys
import time
from pathlib import Path

import h11
import httpx
import pytest
from stub_group import LIMIT_S, received, until

from expertd.server import protocol, stream
from tests.server.test_app import TEXT
from tests.server.test_serve import raw, with_server

BODY = json.dumps(TEXT).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
# What is sent, and the statuses that may come back; none: the connection is closed without an answer.
CORPUS: dict[str, tuple[bytes, set[int]]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), {400}),
    "no HTTP, with lines": (b"hello\r\n\r\n", {400}),
    "two lengths": (POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY, {400}),
    "length and chunks": (POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + BODY, {400}),
    "a chunk's size is no number": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY, {400}),
    "a chunk's size has a sign": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
        {400},
    ),
    "an unknown coding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", {400, 501}),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", {400}),
    "a huge length": (POST + b"Content-Length: 99999999999999999999\r\n\r\n", {400, 413}),
    "a header across lines": (POST + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY, {200, 400}),
    "a space before the colon": (POST + b"X : a\r\n" + LENGTH + b"\r\n" + BODY, {400}),
    "a zero byte in a header": (POST + b"X: a\0b\r\n" + LENGTH + b"\r\n" + BODY, {400}),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400}),
    "a head without end": (POST + b"X: " + b"a" * (1 << 20), {400}),
    "ten thousand headers": (POST + b"".join(b"X%d: a\r\n" % i for i in range(10_000)) + b"\r\n", {400}),
    "a long path": (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
    "HTTP/3.0": (b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n", {200, 400}),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        {200, 400},
    ),
    "an absolute path of another host": (b"GET http://evil/health HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "a path with dots": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "a path that is no UTF-8": (b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", {400, 404, 405}),
}
BODIES: dict[str, bytes] = {
    "empty": b"",
    "no UTF-8": b'{"model": "demo", "prompt": "\xff\xfe"}',
    "UTF-16": json.dumps(TEXT).encode("utf-16"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep where anything may be": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"guided_json":'
    + b'{"a":' * 500
    + b"1"
    + b"}" * 501,
    "a number of a million digits": b'{"model": "demo", "prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}",
    "a zip bomb": gzip.compress(bytes(1 << 20)),
    "a thousand equal names": b'{"model": "demo", ' + b'"prompt": "x", ' * 1000 + b'"n": 0}',
    "a long wrong name": b'{"' + b"x" * (1 << 20) + b'": 1}',
    "cut off": BODY[:-3],
}


async def answer_to(url: str, data: bytes) -> int | None:
    """The status of what comes back, None if nothing does."""
    reader, writer = await connect(url)
    try:
        writer.write(data)
        line = await asyncio.wait_for(reader.readline(), LIMIT_S)
        return int(line.split()[1]) if line else None
    except ConnectionError:
        return None


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that ends with the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    raw.append(writer)
    return reader, writer


async def is_healthy(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        response = await client.post("/v1/completions", json={**TEXT, "stream": True})
        return response.status_code == 200 and "[DONE]" in response.text


def test_a_corpus_of_hostile_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 2.0)

    async def test(url: str) -> None:
        streaming = {**TEXT, "prompt": "@slow:0.01 @repeat:100 x", "max_tokens": 100, "stream": True}
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            healthy = asyncio.create_task(client.post("/v1/completions", json=streaming))
            found = await asyncio.gather(*(answer_to(url, data) for data, _ in CORPUS.values()))
            for (name, (_, statuses)), status in zip(CORPUS.items(), found, strict=True):
                assert status in statuses or status is None, (name, status)
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"):
                for name, body in BODIES.items():
                    response = await client.post(path, content=body)
                    assert response.status_code == 400, (path, name, response.status_code)
                    assert len(response.content) < 10_000, name
                packed = {"content-encoding": "gzip"}
                response = await client.post(path, content=gzip.compress(BODY), headers=packed)
                assert response.status_code == 415
            text = (await healthy).text
        assert text.count('"text":"x "') == 100 and text.endswith("data: [DONE]\n\n")

    with_server(tmp_path, test)


def test_a_truncated_body_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BODY_TIMEOUT_S", 0.2)

    async def test(url: str) -> None:
        assert await answer_to(url, POST + b"Content-Length: 1000\r\n\r\n" + BODY) == 408
        assert await is_healthy(url)
        assert len(received(tmp_path)) == 1

    with_server(tmp_path, test)


def test_bodies_that_are_read_at_once_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_BODIES_BYTES", 3_000_000)

    async def test(url: str) -> None:
        part = POST + b"Content-Length: 2000000\r\n\r\n" + bytes(1_000_000)
        held = [await connect(url) for _ in range(3)]
        for _, writer in held:
            writer.write(part)
        await until(lambda: stream._num_bytes == 3_000_000)
        assert await answer_to(url, part) == 429
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: stream._num_bytes == 0)
        assert await is_healthy(url)

    with_server(tmp_path, test)


def test_a_head_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly its bytes come; a client that waits between two requests is one too."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.4)

    async def test(url: str) -> None:
        reader, writer = await connect(url)
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < LIMIT_S:
                writer.write(b"G")
                await writer.drain()
                await asyncio.sleep(0.05)
        reader, writer = await connect(url)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1 << 20), LIMIT_S)
        assert await is_healthy(url)

    with_server(tmp_path, test)


def test_idle_connections_give_way_to_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 20)

    async def test(url: str) -> None:
        idle = [await connect(url) for _ in range(60)]
        assert await is_healthy(url)
        closed = [reader for reader, _ in idle if await is_closed(reader)]
        assert 35 <= len(closed) <= 45

    with_server(tmp_path, test)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 0.01) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


IDLER = """
import socket, sys, urllib.request
port, num = int(sys.argv[1]), int(sys.argv[2])
held = []
for _ in range(num):
    held.append(socket.socket())
    held[-1].setblocking(False)
    held[-1].connect_ex(("127.0.0.1", port))
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).status)
"""


def test_when_no_descriptor_is_left_idle_connections_give_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`accept` fails, a stream goes on, one line says what happened, and the next client is answered."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test(url: str) -> None:
        streaming = {**TEXT, "prompt": "@slow:0.02 @repeat:150 x", "max_tokens": 150, "stream": True}
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            healthy = asyncio.create_task(client.post("/v1/completions", json=streaming))
            await until(lambda: received(tmp_path))
            idler = await asyncio.create_subprocess_exec(
                sys.executable, "-c", IDLER, url.rsplit(":", 1)[1], "80", stdout=asyncio.subprocess.PIPE
            )
            used = {int(fd) for fd in os.listdir("/dev/fd")}
            free = [fd for fd in range(len(used) + 30) if fd not in used]
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[25], limits[1]))
            out, _ = await idler.communicate()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert out == b"200\n"
            assert (await healthy).text.count('"text":"x "') == 150

    with_server(tmp_path, test)
    (said,) = caplog.records
    assert "no descriptor is left" in said.getMessage() and said.name == protocol.__name__


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"10")]])
def test_the_short_way_out_is_h11s(version: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """What a stream's pieces look like on the wire, and when they are refused, h11 itself says the same."""

    def written(connection: h11.Connection) -> list[bytes | None]:
        connection.receive_data(b"GET / HTTP/%b\r\nhost: x\r\n\r\n" % version)
        assert isinstance(connection.next_event(), h11.Request)
        assert isinstance(connection.next_event(), h11.EndOfMessage)
        pieces = [h11.Data(b"hello"), h11.Data(b""), h11.Data(b"again")]
        sent = [connection.send(event) for event in [h11.Response(status_code=200, headers=headers), *pieces]]
        sent.append(connection.send(h11.EndOfMessage()))
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(b"too late"))
        return sent

    assert written(protocol._Connection(h11.SERVER)) == written(h11.Connection(h11.SERVER))
