"""As many idle connections as descriptors allow, 10,000 at most, from one client to a real server. `make soak`."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stub_group import LIMIT_S, until_now

from expertd.server.protocol import BACKLOG, MAX_CONNECTIONS, OWN_DESCRIPTORS
from tests.cluster.computers import LOOPBACK, Computer, answers, computers
from tests.server.test_hostile import BODIES, CORPUS, POST

pytestmark = pytest.mark.soak
# More than a connection that waits for its first byte should cost the server.
MAX_BYTES = 64 << 10
# Gives the server what a shell gives, and lets it raise that.
SHELL = ("sh", "-c", 'ulimit -Sn 1024; exec "$@"', "sh")
ASKED = {"prompt": "Once upon a time", "max_tokens": 300, "logit_bias": {"0": -100}}
BODY = b"Content-Length: %d\r\n\r\n%s"
ATTACKS = [data for data, _ in CORPUS.values()] + [POST + BODY % (len(b), b) for b in BODIES.values()]


@contextlib.contextmanager
def all_descriptors() -> Iterator[int]:
    """Give this process as many as it can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_idle_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streams have all of their tokens, descriptors return, and after the second time no more memory is taken.

    The first finds nothing that waits to be collected, the second what the first has left.
    """
    with computers(tmp_path, "a") as (server,), all_descriptors() as own_limit:
        server.serve("demo", wrap=SHELL)
        server.wait(answers)
        process = server.part("supervisor")
        limit = process.rlimit(psutil.RLIMIT_NOFILE)[0]
        num = min(MAX_CONNECTIONS, limit - OWN_DESCRIPTORS - BACKLOG, own_limit - 200)
        assert num > 1024 - OWN_DESCRIPTORS - BACKLOG, "the server has raised its limit"
        wanted = server.ask(**ASKED)
        assert not wanted.error and wanted.num_tokens > 100
        before, peaks = (process.num_fds(), used_bytes(process)), []
        for _ in range(3):
            peaks.append(hold(server, process, num, wanted.text))
            until_now(lambda: process.num_fds() <= before[0] + 4)
        after = used_bytes(process)
    each = (peaks[0] - before[1]) / num
    with capsys.disabled():
        mb = [round(n / 1e6, 1) for n in (before[1], *peaks, after)]
        print(
            f"\n{num} idle connections: {each / 1000:.1f} kB each; MB before, three times during, after: {mb}"
        )
    assert each < MAX_BYTES
    assert peaks[2] - peaks[1] < 0.1 * (peaks[0] - before[1])


def hold(server: Computer, process: psutil.Process, num: int, wanted: str) -> int:
    """Hold `num` idle connections; one stream runs from before them, another begins. Gives the server's memory."""
    first = server.stream(**ASKED)
    first.wait_pieces(1)
    with contextlib.ExitStack() as held:
        for _ in range(num):
            held.enter_context(socket.create_connection((LOOPBACK, server.port), LIMIT_S))
        # A few of the oldest may have given way to what else is asked.
        until_now(lambda: process.num_fds() >= num - 16)
        second = server.stream(**ASKED)
        second.wait_pieces(1)
        for data in ATTACKS:
            attack(server.port, data)
        for stream in (first, second):
            answer = stream.result()
            assert not answer.error and answer.text == wanted
        assert server.health()["status"] == "ok" and process.num_fds() >= num - 200
        return used_bytes(process)


def attack(port: int, data: bytes) -> None:
    """Send it; what comes back, if anything does, is no fault of the server."""
    with socket.create_connection((LOOPBACK, port), LIMIT_S) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        status = sock.recv(12)
        assert not status or (status.startswith(b"HTTP/1.1") and status[9:10] in (b"2", b"4")), data[:100]


def used_bytes(process: psutil.Process) -> int:
    """Memory that only this process has."""
    return int(process.memory_full_info().uss)
