"""`expertd status`, `chat` and `completion` against a server with stub ranks, with and without a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from stub_group import LIMIT_S, received

from expertd.cli import chat, cli, status
from expertd.cli.client import Client
from expertd.errors import ClusterError, ConfigError
from tests.server.page_status import busy_status

Expertd = Callable[..., SimpleNamespace]
Start = Callable[..., "subprocess.Popen[str]"]

# The terminal's bracketed paste is switched on: an input line waits.
PROMPT = "\x1b[?2004h"


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "model"
    folder.mkdir()
    process = start("serve", folder, "--port", 0, "--ranks", 2)
    assert process.stdout
    yield process.stdout.readline().split()[3].removesuffix("/v1")


def test_status_and_chat_through_pipes(server: str, expertd: Expertd, tmp_path: Path) -> None:
    ask = subprocess.run(["printf", "@stats one two three"], capture_output=True, text=True).stdout
    reader, writer = os.pipe()
    os.write(writer, ask.encode())
    os.close(writer)
    talk = expertd("chat", "--server", server, "--system", "be brief", "--temperature", 0, stdin=reader)
    os.close(reader)
    assert (talk.code, talk.out, talk.err) == (0, "one two three \n", "")
    asked = received(tmp_path / "model")[0]
    assert [m["role"] for m in asked["messages"]] == ["system", "user"]
    shown = expertd("status", "--server", server)
    assert shown.code == 0 and "\x1b" not in shown.out
    for words in (
        "model at http://127.0.0.1:",
        "serving, up",
        "2 running, 1 waiting; reading 512 of 2,048",
        "leads",
    ):
        assert words in shown.out, shown.out
    assert "decode experts, prefill tokens" in shown.out and "epoch 1 began with 2 rank(s)" in shown.out
    plain = json.loads(expertd("status", "--server", server, "--json").out)
    assert plain["engine"]["kv_tokens"] == 300 and plain["experts"] is None


def test_nothing_answers(expertd: Expertd) -> None:
    for command in ("status", "chat"):
        got = expertd(command, "--server", "http://127.0.0.1:9")
        assert (got.code, got.out) == (1, "") and got.err.startswith("expertd: http://127.0.0.1:9: ")
        assert "Is `expertd serve` running there?" in got.err and got.err.count("\n") == 1


@contextmanager
def terminal(*args: str) -> Iterator[Callable[[str, str], str]]:
    """A command in a terminal of its own: what gives text to type and returns all output up to some words."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "expertd", *args])
    seen = ""

    def talk(typed: str, until: str) -> str:
        nonlocal seen
        os.write(fd, typed.encode())
        deadline, begin = time.monotonic() + LIMIT_S, len(seen)
        while until not in seen[begin:]:
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, seen
            seen += os.read(fd, 4096).decode(errors="replace")
        return seen[begin:]

    try:
        yield talk
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(fd)


def test_chat_in_a_terminal(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with terminal("chat", "--server", server) as talk:
        talk("", PROMPT)
        assert "one two" in talk("@stats one\x1b\rtwo\r", "per second")
        talk("/retry\r", "per second, experts")
        talk("@slow:0.01 @repeat:4000 x\r", "x x x")
        talk("\x03", PROMPT)  # Ctrl-C ends the answer, not the conversation
        assert "0 to 2" in talk("/temperature 9\r", "such as")
        assert "no such command" in talk("/nope\r", "lists them")
        talk("/status\r", "epoch 1 began")
        talk(f"/save {tmp_path}/talk.md\r", PROMPT)
        talk("/clear\r", PROMPT)
        talk("last\r", "1 tokens")
    submits = [m for m in received(tmp_path / "model") if m["op"] == "Submit"]
    assert submits[0]["messages"][0]["content"] == "@stats one\ntwo" == submits[1]["messages"][0]["content"]
    assert [m["role"] for m in submits[2]["messages"]] == ["user", "assistant", "user"]
    assert len(submits[-1]["messages"]) == 1
    assert (
        (tmp_path / "talk.md")
        .read_text()
        .startswith("**user**\n\n@stats one\ntwo\n\n**assistant**\n\none two")
    )
    assert "@stats one" in (tmp_path / "cache/expertd/chat-history").read_text()
    assert (tmp_path / "cache/expertd/chat-history").stat().st_mode & 0o077 == 0


def test_watch_redraws_on_a_terminal(server: str) -> None:
    with terminal("status", "--watch", "--server", server) as talk:
        first = talk("", "epoch 1 began")
        assert first.startswith("\x1b[2J\x1b[H") and "\x1b[32m" not in first  # NO_COLOR
        talk("", "\x1b[J\x1b[H")
        talk("\x03", "\n")


class FakeClient:
    """Answers with scripted events, or raises; keeps what it was asked."""

    url = "http://there"

    def __init__(self, *answers: list[dict[str, Any]] | Exception) -> None:
        self.answers, self.asked = list(answers), list[tuple[str, dict[str, Any]]]()

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.asked.append((path, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield from answer


def test_a_model_without_chat_template_continues_text(capsys: pytest.CaptureFixture[str]) -> None:
    events = [{"choices": [{"text": "a \x1b[2Jfox\x9b"}]}, {"choices": [], "usage": {"completion_tokens": 2}}]
    client = FakeClient(
        ConfigError("this model has no chat template. Ask /v1/completions."), events, ClusterError("gone")
    )
    talk = chat.Chat(client, model="m")  # type: ignore[arg-type]
    talk.ask("there was ")
    assert capsys.readouterr().out == "a [2Jfox\n"  # nothing that moves a cursor
    assert [path for path, _ in client.asked] == ["/v1/chat/completions", "/v1/completions"]
    with pytest.raises(ClusterError):
        talk.ask("and then")
    assert client.asked[-1][1]["prompt"] == "there was a \x1b[2Jfox\x9band then"
    assert [t["role"] for t in talk.turns] == ["user", "assistant"]  # the failed one is forgotten
    with pytest.raises(ConfigError, match="empty"):
        talk.ask(" ")


def test_screen_of_two_hosts_and_of_nothing() -> None:
    text = status.screen(busy_status(), "http://there")
    for words in (
        "Qwen3-235B-A22B-2bit",
        "61.4 tokens/s generated, 212 read",
        "48,312 tokens, 9.3 GB",
        "waits 7.4 us, p99 61 us; 3,100,200 so far",
        "link verbs, leader",
        "laptop  in the group  6.2 us",
        "solo 23.9 ms, experts 16.1 ms, tokens 24.4 ms",
        "host laptop: silent for 0.8 s",
    ):
        assert words in text, text
    bars = next(line for line in text.splitlines() if "speed" in line).split()[-1]
    assert len(bars) == 60 and set(bars) <= set(status.BARS)
    nothing = dict.fromkeys(("ready", "group", "hosts", "engine"))
    loading = busy_status() | nothing | {"status": "loading", "loaded": 0.42, "history": [], "events": []}
    assert "loading the model, 42 %" in status.screen(loading, "http://there")
    assert status.line(loading).split("  ")[1] == "loading"


def test_what_a_request_waits_for() -> None:
    assert (
        chat.waiting_for(busy_status()) == "reading the prompt [===                     ] 512 of 4,096 tokens"
    )
    waiting = busy_status()
    waiting["engine"]["reading"] = []
    assert chat.waiting_for(waiting) == "2 requests wait"
    assert chat.waiting_for({"engine": None}) == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0 and "_EXPERTD_COMPLETE" in result.output


def test_bash_completes_commands_and_values() -> None:
    for words, wanted in (("expertd st", "status"), ("expertd serve --split ", "experts")):
        env = {**os.environ, "_EXPERTD_COMPLETE": "bash_complete", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        done = subprocess.run([sys.executable, "-m", "expertd"], env=env, capture_output=True, text=True)
        assert f"plain,{wanted}" in done.stdout.splitlines(), done


def test_flags_have_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_STATUS_SERVER", "http://127.0.0.1:1")
    result = CliRunner().invoke(cli, ["status"])
    assert "http://127.0.0.1:1" in str(result.exception)


def test_help_lists_commands_by_what_they_are_for() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    assert text.index("Serve:") < text.index("  join") < text.index("Use:") < text.index("  chat")
    assert all(f"  {name} " in text for name in cli.commands)


def test_wrong_urls_are_named() -> None:
    for url in ("http://[", "nowhere", "ftp://there", "http://"):
        with pytest.raises(ConfigError, match="wanted an address such as http"):
            Client(url)
