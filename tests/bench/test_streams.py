"""`python -m expertd.bench.streams`: what it says of a server that does not answer."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.bench import streams
from expertd.errors import ClusterError


@pytest.fixture
def port() -> Iterator[int]:
    """Where a server hears a request and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def close_one() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)  # the rest unread: a reset

        thread = threading.Thread(target=close_one)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_a_server_that_breaks_off_is_named(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(streams, "_running", lambda row: contextlib.nullcontext())
    monkeypatch.setattr(streams, "_wait_ready", lambda row: "model")
    row = streams.Row("mlx_lm.server", [], [], port)
    with pytest.raises(ClusterError, match=r"^mlx_lm\.server broke off \(\w+Error\)\. Try again\.$"):
        streams._measure([row], tmp_path, 1, 4, 1)
