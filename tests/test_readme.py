"""Every command of the README runs, as it stands there."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
# Tried by the tests below (serve, curl), or the way we were started ourselves (make).
SERVE = [c for c in COMMANDS if " serve " in c]
CURL = [c for c in COMMANDS if c.startswith("curl ")]
PLAIN = [c for c in COMMANDS if c not in SERVE + CURL and not c.startswith("make ")]


def start(command: str, folder: Path) -> "subprocess.Popen[str]":
    words = shlex.split(command)
    assert words[0] == "expertd", command
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_make_targets_exist() -> None:
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    makefile = README.with_name("Makefile")
    if not makefile.exists():
        pytest.skip("no checkout")
    assert targets == {"demo", "test"}
    for target in targets | {"smoke", "check", "bench"}:
        assert f"\n{target}: " in makefile.read_text()


def test_plain_commands(tmp_path: Path) -> None:
    """In their order, in one empty folder: a later command may use what an earlier one made."""
    assert len(PLAIN) >= 4
    for command in PLAIN:
        process = start(command, tmp_path)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, f"{command}\n{err}"
        assert out.strip(), command


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        number: int = listener.getsockname()[1]
        return number


def test_serve_and_curl(tmp_path: Path, port: int) -> None:
    """The server streams an answer to the README's curl line and ends within two seconds of Ctrl-C."""
    (serve,), (curl,) = SERVE, CURL
    server = start(serve.replace("8080", str(port)), tmp_path)
    try:
        wait_healthy(server, port)
        words = shlex.split(
            curl.replace("8080", str(port)).replace("demo-2bit", "demo").replace(": 60", ": 4")
        )
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count("data: ") > 3
        assert answer.stdout.rstrip().endswith("data: [DONE]")
        server.send_signal(signal.SIGINT)
        assert server.wait(2) in (0, 130, -signal.SIGINT)
    finally:
        server.kill()
        server.communicate()


def wait_healthy(server: "subprocess.Popen[str]", port: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, server.communicate()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                assert response.status == 200
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not become healthy")


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
