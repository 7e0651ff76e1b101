"""Every command of docs/running.md runs, as it stands there; systemctl alone has a stand-in."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd import demo
from expertd.cluster import doctor
from tests.cluster.computers import END_S, free_port
from tests.test_readme import wait_healthy

PAGE = Path(__file__).parents[1] / "docs/running.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
SPANS = re.findall(r"`((?:expertd|sudo) [^`]*)`", TEXT)
TALK = LINES[:3]
INSTALL = "expertd service install --dry-run serve demo --ranks 2"
DRAFT = "expertd serve big-model --draft-model small-model"
LIMIT_S = 60.0


class Shell:
    """A user's shell: a home of its own, and `expertd` on the path. `systemctl` writes down what it was asked."""

    def __init__(self, folder: Path, port: int) -> None:
        self.home, self.asked = folder, folder / "systemctl.log"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, does in (
            ("expertd", f'exec "{sys.executable}" -m expertd "$@"'),
            ("systemctl", f'echo "$@" >>"{self.asked}"'),
        ):
            (bin_folder / name).write_text(f"#!/bin/sh\n{does}\n")
            (bin_folder / name).chmod(0o755)
        self.config = folder / ".config/expertd/config.toml"
        self.config.parent.mkdir(parents=True)
        (config,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
        self.config.write_text(config)
        url = f"http://127.0.0.1:{port}"
        # Flags by their variables: the commands stay as they are, and find this server instead of one on 8080.
        own = {"EXPERTD_SERVE_PORT": str(port), "EXPERTD_CHAT_SERVER": url, "EXPERTD_STATUS_SERVER": url}
        own["EXPERTD_CHAT_MAX_TOKENS"] = "16"
        names = {"HOME": str(folder), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
        self.env = {**kept, **names, **own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(self, command: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["sh", "-c", f"exec {command}"], cwd=self.home, env=self.env, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, command: str, code: int = 0) -> str:
        """What the command prints, on both."""
        options = {"cwd": self.home, "env": self.env, "capture_output": True, "text": True}
        done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, timeout=LIMIT_S, **options)
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        return str(done.stdout + done.stderr)

    def type(self, command: str, text: str) -> str:
        """What the command prints in a terminal in which `text` is typed, until it ends."""
        pid, fd = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            terminal = {"TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execvpe("sh", ["sh", "-c", command], {**self.env, **terminal})
        seen, deadline = "", time.monotonic() + LIMIT_S
        try:
            while True:
                assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], seen
                if not (data := self._read(fd)):
                    return seen
                seen += data
                if text and "\x1b[?2004h" in seen:  # an input line waits
                    os.write(fd, text.encode())
                    text = ""
        finally:
            os.kill(pid, signal.SIGKILL)
            os.close(fd)
            os.waitpid(pid, 0)

    @staticmethod
    def _read(fd: int) -> str:
        try:
            return os.read(fd, 1 << 16).decode(errors="replace")
        except OSError:  # Linux, when the other end has closed
            return ""


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Shell]:
    """With a server that runs by the page's config file alone."""
    shell = Shell(tmp_path_factory.mktemp("home"), port)
    server = shell.start("expertd serve")
    try:
        wait_healthy(server, port)
        yield shell
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=END_S)
        assert server.returncode == 0
        assert f"watch: http://127.0.0.1:{port}/\n" in out
        assert "\x1b" not in out + err and "\r" not in out + err, "plain where it is no terminal"
    finally:
        server.kill()
        server.communicate()


def test_the_page_has_no_other_commands() -> None:
    """A new one needs a test here; AIPerf's is run by tests/compat."""
    assert [line.split("#")[0].strip() for line in LINES if not line.startswith("aiperf ")] == [
        "expertd status",
        "expertd chat",
        'echo "Why?" | expertd chat',
        INSTALL,
        DRAFT,
    ]
    assert set(SPANS) == {
        "expertd completion bash",
        "expertd service show",
        "expertd doctor",
        "expertd serve --split solo",
        "expertd join",  # by name only; the README's two machines run it
        "sudo pmset -a sleep 0",
        "sudo sysctl iogpu.wired_limit_mb=...",
    }


def test_the_server_runs_by_the_config_file(shell: Shell, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    asked = urllib.request.Request(
        f"{url}/status.json?since=0&experts=no", headers={"origin": "https://a.example"}
    )
    with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert b'"experts":null' in answer.read().replace(b" ", b"")
    with urllib.request.urlopen(f"{url}/health", timeout=LIMIT_S) as answer:
        assert b'"ranks":2' in answer.read()


def test_a_wrong_key_is_refused_whatever_command_is_run(shell: Shell) -> None:
    right = shell.config.read_text()
    shell.config.write_text(right.replace("max-streams", "max-stream"))
    try:
        said = shell.run("expertd hosts", code=2)
    finally:
        shell.config.write_text(right)
    assert "max-stream" in said and "max-streams" in said and said.count("\n") == 1


def test_status_and_one_message(shell: Shell) -> None:
    status, _, message = TALK
    assert "demo at http://127.0.0.1:" in shell.run(status)
    assert shell.run(message).strip()


def test_a_conversation(shell: Shell) -> None:
    said = shell.type(TALK[1], "/help\r/exit\r")
    assert "/system" in said, said


def test_completion_is_shell_text(shell: Shell) -> None:
    shell.run("expertd completion bash >completion && bash -n completion")


def test_a_service_from_install_to_uninstall(shell: Shell) -> None:
    """The page's line, then without --dry-run; the file says how to start what ran above."""
    planned = shell.run(INSTALL)
    assert "systemctl --user enable --now expertd" in planned and not shell.asked.exists()
    shell.run(INSTALL.replace("--dry-run ", ""))
    unit = shell.home / ".config/systemd/user/expertd.service"
    assert unit.read_text() in planned
    assert shell.asked.read_text() == "--user daemon-reload\n--user enable --now expertd\n"
    assert unit.read_text() in shell.run("expertd service show")
    shell.run("expertd service uninstall")
    assert not unit.exists() and shell.asked.read_text().endswith("--user disable --now expertd\n")


def test_a_server_with_a_draft_model(shell: Shell) -> None:
    """The demo guesses for itself: two names for its folder."""
    for name in ("big-model", "small-model"):
        (shell.home / name).symlink_to(Path(demo.__file__).parent)
    port = free_port()
    shell.env["EXPERTD_SERVE_PORT"] = str(port)
    server = shell.start(DRAFT)
    try:
        wait_healthy(server, port)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=END_S)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate()


def test_the_settings_of_a_mac_are_those_that_doctor_prints() -> None:
    source = Path(doctor.__file__).read_text()
    for span in SPANS:
        if span.startswith("sudo "):
            assert span.removesuffix("...") in source
