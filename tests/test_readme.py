"""Every command of the README runs, as it stands there."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.computers import END_S, free_port

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
# Tried by the tests below (serve, curl, two machines), or the way we were started ourselves (make).
TWO_MACHINES = next(block.splitlines() for block in BLOCKS if "expertd pair" in block)
SERVE = [c for c in COMMANDS if " serve " in c and c not in TWO_MACHINES]
CURL = [c for c in COMMANDS if c.startswith("curl ")]
PLAIN = [c for c in COMMANDS if c not in SERVE + CURL + TWO_MACHINES and not c.startswith("make ")]


def start(command: str, folder: Path, machine: str = "one") -> "subprocess.Popen[str]":
    """Start a command of the README in `folder`; each machine has settings of its own there."""
    words = shlex.split(command)
    assert words[0] == "expertd", command
    own = {f"XDG_{kind}_HOME": str(folder / machine / kind) for kind in ("CONFIG", "CACHE")}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *words],
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
    return free_port()


def test_serve_and_curl(tmp_path: Path, port: int) -> None:
    """The server streams an answer to the README's curl line and ends by Ctrl-C."""
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
        assert server.wait(END_S) in (0, 130, -signal.SIGINT)
    finally:
        server.kill()
        server.communicate()


def test_two_machines(tmp_path: Path, port: int) -> None:
    """The four lines, as two machines of one address: paired, served, joined, and asked at the second."""
    pair, pair_with, serve, join = TWO_MACHINES
    control, pairing = f"--control-port {free_port()}", f"--port {port}"
    offer = start(f"{pair} {pairing}", tmp_path, "first")
    try:
        assert offer.stdout
        code = next(m[0] for line in offer.stdout if (m := re.search(r"\b\d{4}-\d{4}\b", line)))
        line = pair_with.replace("192.168.10.1", "127.0.0.1").replace("1234-5678", code)
        answer = start(f"{line} {pairing}", tmp_path, "second")
        out, err = answer.communicate(timeout=60)
        assert answer.returncode == 0, out + err
        assert offer.wait(30) == 0
    finally:
        offer.kill()
        offer.communicate()
    processes = [start(f"{serve} {control} --port {port}", tmp_path, "first")]
    try:
        wait_healthy(processes[0], port)
        processes.append(start(f"{join} {control} --port 0", tmp_path, "second"))
        assert processes[1].stdout
        url = next(m[0] for line in processes[1].stdout if (m := re.search(r"http://\S+", line)))
        body = json.dumps({"model": "demo", "prompt": "Once upon a time", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["choices"][0]["text"]
        for process in reversed(processes):
            process.send_signal(signal.SIGINT)
            assert process.wait(END_S) in (0, 130, -signal.SIGINT)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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
    assert len(README.read_text().splitlines()) <= 200
