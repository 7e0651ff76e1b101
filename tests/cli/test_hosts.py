"""`expertd pair` and `expertd hosts`: two processes that pair over loopback, and what the user reads."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from expertd.cli import cli, hosts, pair
from expertd.cli.options import config_folder
from expertd.cluster.discovery import Found
from expertd.cluster.identity import PeerStore, load_identity, make_peer
from expertd.errors import ConfigError


def command(folder: Path, *args: str) -> tuple[list[str], dict[str, str]]:
    env = {**os.environ, "XDG_CONFIG_HOME": str(folder)}
    return [sys.executable, "-W", "error", "-m", "expertd", *args], env


def run(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    words, env = command(folder, *args)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)


@contextmanager
def offering(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """`expertd pair` that waits, and the arguments of the command that it prints for the other machine."""
    words, env = command(folder, "pair", "--port", "0")
    with subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            lines = iter(process.stdout.readline, "")
            told = next(line for line in lines if line.startswith("  expertd pair ")).split()
            next(line for line in lines if line.endswith("Ctrl-C ends it.\n"))
            yield process, ["pair", "127.0.0.1", *told[3:]]
        finally:
            process.kill()


def test_two_machines_pair_and_list_and_forget_each_other(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with offering(a) as (process, told):
        code = told[2]
        wrong = [*told[:2], f"{(int(code.replace('-', '')) + 1) % 10**8:08d}", *told[3:]]
        got = run(b, *wrong)
        assert (got.returncode, got.stdout) == (1, "")
        assert got.stderr == (
            "expertd: 127.0.0.1: wrong code, or another machine is in between. Compare the code (2 tries left).\n"
        )
        got = run(b, *told)
        assert got.returncode == 0 and got.stderr == "" and got.stdout.startswith("paired with ")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.startswith("paired with ") and "next: expertd hosts" in out
        assert err == "expertd: 127.0.0.1 gave a wrong code (2 tries left)\n" and code not in err
    ids = [load_identity(folder / "expertd").host_id for folder in (a, b)]
    for folder, other in ((a, ids[1]), (b, ids[0])):
        (listed,) = json.loads(run(folder, "hosts", "--json").stdout)["paired"]
        assert listed["host_id"] == other and listed["address"] == "127.0.0.1"
    got = run(a, "hosts", "remove", ids[1])
    assert got.returncode == 0 and ids[1] in got.stdout
    assert run(a, "hosts").stdout == "no paired hosts. Run: expertd pair\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_waiting_ends_cleanly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with offering(tmp_path) as (process, _):
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and out == "" and err.strip() == ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "expertd"


def test_config_folder_follows_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_folder() == folder
    for unusable in ("", "relative/path"):  # the XDG specification says to ignore these
        monkeypatch.setenv("XDG_CONFIG_HOME", unusable)
        assert config_folder() == Path.home() / ".config" / "expertd"


def test_instructions_can_be_typed() -> None:
    text = pair.instructions("studio", ["10.0.0.1", "fd00::2"], 7421, "1234-5678", 600)
    assert "\n  expertd pair 10.0.0.1 1234-5678\n" in text and "fd00::2" in text and "10 minutes" in text
    assert "\n  expertd pair 127.0.0.1 1234-5678 --port 9\n" in pair.instructions(
        "x", [], 9, "1234-5678", 600
    )


def test_host_without_code_says_where_it_is(folder: Path) -> None:
    got = CliRunner().invoke(cli, ["pair", "studio"])
    assert got.exit_code == 2 and "CODE is missing: run `expertd pair` on studio" in got.output
    assert not folder.exists()


def test_errors_are_of_the_users_kind(folder: Path) -> None:
    for args, words in (
        (["pair", "127.0.0.1", "12"], "wanted the 8 digits"),
        (["hosts", "remove", "nobody"], "nobody: no paired host has this name or id"),
    ):
        got = CliRunner().invoke(cli, args)
        assert isinstance(got.exception, ConfigError) and words in str(got.exception)
    (folder / "peers.json").write_text("{")
    (folder / "peers.json").chmod(0o600)
    for args in (["hosts"], ["pair"]):
        got = CliRunner().invoke(cli, args)
        assert isinstance(got.exception, ConfigError) and "not a list of paired hosts" in str(got.exception)


def test_table_and_found_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = load_identity(tmp_path / "other", "studio")
    PeerStore(folder).add(make_peer("studio", other.certificate, "10.0.0.7"))
    found = Found("mini", "0123456789abcdef", ["10.0.0.8"], 7420, "0.1.0", "org/model", False)
    monkeypatch.setattr(hosts, "_find", lambda: [found])
    lines = CliRunner().invoke(cli, ["hosts", "list", "--find"]).output.splitlines()
    assert lines[0].split() == ["NAME", "ID", "ADDRESS", "PAIRED"]
    assert lines[1].split()[:3] == ["studio", other.host_id, "10.0.0.7"]
    assert lines[4].split() == ["mini", "0123456789abcdef", "10.0.0.8", "org/model", "no"]
    got = json.loads(CliRunner().invoke(cli, ["hosts", "--json", "--find"]).output)
    assert got["found"] == [vars(found)] and got["paired"][0]["fingerprint"] == other.fingerprint
    assert "PRIVATE" not in json.dumps(got)


def test_nothing_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_find", lambda: [])
    assert CliRunner().invoke(cli, ["hosts", "--find"]).output == (
        "no paired hosts. Run: expertd pair\n\nnone found\n"
    )
