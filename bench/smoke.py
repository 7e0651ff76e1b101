"""One look at everything: serve a checkpoint from two ranks, ask it over HTTP, stop it, measure its speed.

    python -m expertd.bench.smoke CHECKPOINT [--prompt TEXT] [--tokens N]

Exits with 0 only if text came, the server ended within STOP_S of Ctrl-C, and both speeds could be measured.
"""

import argparse
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from expertd.errors import ClusterError, ExpertdError

HOST = "127.0.0.1"
NUM_RANKS = 2
LOAD_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 300.0
READ_TIMEOUT_S = 60.0  # between two pieces of an answer
STOP_S = 2.0
DECODE_TOKENS = 32
SAMPLING = {"temperature": 0.7, "seed": 3}  # greedy, a small model repeats itself
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.smoke", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder")
    parser.add_argument("--prompt", default="Once upon a time there was a little fox who")
    parser.add_argument("--tokens", type=int, default=100, help="at most so many new tokens (default 100)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _ask(arguments.checkpoint, arguments.prompt, arguments.tokens)
        _measure(arguments.checkpoint)
    except ExpertdError as e:
        sys.stderr.write(f"smoke: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _ask(checkpoint: Path, prompt: str, tokens: int) -> None:
    """Print an answer as it streams. Raises ClusterError when none comes, or the server does not end."""
    port = _free_port()
    with _server(checkpoint, port) as server:
        model = _wait_healthy(server, port)
        sys.stdout.write(f"\n> {prompt}\n\n")
        num_chars = 0
        for text in _stream(port, model, prompt, tokens):
            num_chars += len(text)
            sys.stdout.write(text)
            sys.stdout.flush()
        if not num_chars:
            raise ClusterError("the answer has no text. Try another --prompt.")
        seconds = _stop(server)
    sys.stdout.write(f"\n\nThe server and its {NUM_RANKS} ranks ended {seconds:.2f} s after Ctrl-C.\n")
    sys.stdout.flush()


def _measure(checkpoint: Path) -> None:
    from expertd.bench.throughput import run

    run("decode", checkpoint, [NUM_RANKS], ["auto"], DECODE_TOKENS, REPEATS, None)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as s:
        port: int = s.getsockname()[1]
        return port


# The server: its life.


@contextlib.contextmanager
def _server(checkpoint: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = ["serve", str(checkpoint), "--ranks", str(NUM_RANKS), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "expertd", *command],
        stdin=subprocess.DEVNULL,
        process_group=0,  # the terminal's Ctrl-C reaches us alone, and we end it
    )
    try:
        yield server
    finally:
        with contextlib.suppress(ClusterError):
            _stop(server)
        server.kill()
        server.wait()


def _wait_healthy(server: subprocess.Popen[bytes], port: int) -> str:
    """Wait until requests can be answered; gives the model's id."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ClusterError(f"the server ended with code {server.returncode}: see its message above.")
        health = _health(port)
        if health.get("status") == "ok":
            return str(health["model"])
        time.sleep(0.05)
    raise ClusterError(f"the server is not ready after {LOAD_TIMEOUT_S:g} s. Try a smaller checkpoint.")


def _health(port: int) -> dict[str, Any]:
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=READ_TIMEOUT_S)) as connection:
        try:
            connection.request("GET", "/health")
            body = json.loads(connection.getresponse().read())
            return body if isinstance(body, dict) else {}
        except (OSError, http.client.HTTPException, ValueError):
            return {}


def _stop(server: subprocess.Popen[bytes]) -> float:
    """Send Ctrl-C's signal; gives the seconds until the end. Raises ClusterError past STOP_S."""
    start = time.monotonic()
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired as e:
        raise ClusterError(
            f"the server still runs {STOP_S:g} s after Ctrl-C. This is a bug of expertd."
        ) from e
    return time.monotonic() - start


# The question.


def _stream(port: int, model: str, prompt: str, tokens: int) -> Iterator[str]:
    """Yield the pieces of a streamed answer's text. Raises ClusterError when it breaks off or is an error."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens} | SAMPLING
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=READ_TIMEOUT_S)) as connection:
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ClusterError(_reason(json.loads(response.read())))
            for line in response:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the answer has no end after {ANSWER_TIMEOUT_S:g} s. Try fewer --tokens."
                    )
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield _text(json.loads(line[6:]))
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise ClusterError(f"the answer broke off: {type(e).__name__}: {e}") from e
    raise ClusterError("the answer ended without [DONE].")


def _text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise ClusterError(_reason(event))
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _reason(body: dict[str, Any]) -> str:
    return f"the server refused: {body.get('error', {}).get('message', body)}"


if __name__ == "__main__":
    main()
