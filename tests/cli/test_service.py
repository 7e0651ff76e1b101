"""`expertd service` written into a temporary root, and the config file that it may rely on."""

import plistlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from expertd.cli import cli, service
from expertd.cli.settings import keys_of
from expertd.errors import ConfigError

ARGS = ["serve", "demo", "--ranks", "2"]


class Runs:
    """Takes commands and gives exit codes."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.commands = code, list[str]()

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(" ".join(command))
        return self.code


def machine(platform: str, root: Path, run: Runs | None = None) -> service.Machine:
    return service.Machine(
        platform, root, root / "home/ann", "ann", 501, "/opt/my env/bin/python", run or Runs()
    )


@pytest.mark.parametrize("system", [False, True])
def test_systemd_unit(system: bool, tmp_path: Path) -> None:
    run = Runs()
    linux = machine("linux", tmp_path, run)
    service.install(linux, system, [*ARGS, "--stop", 'a "b" $c 100%'], dry_run=False, no_start=False)
    path = (
        tmp_path / ("etc/systemd/system" if system else "home/ann/.config/systemd/user") / "expertd.service"
    )
    text = path.read_text()
    assert 'ExecStart="/opt/my env/bin/python" "-P" "-m" "expertd" "serve" "demo" "--ranks" "2" ' in text
    assert '"a \\"b\\" $$c 100%%"' in text
    assert (
        "User=ann" in text
    ) == system and f"WantedBy={'multi-user' if system else 'default'}.target" in text
    flag = "" if system else "--user "
    assert run.commands == [f"systemctl {flag}daemon-reload", f"systemctl {flag}enable --now expertd"]
    service.uninstall(linux, system, dry_run=False)
    assert run.commands[2:] == [f"systemctl {flag}disable --now expertd"] and not path.exists()
    with pytest.raises(ConfigError, match="no service is installed"):
        service.uninstall(linux, system, dry_run=False)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "expertd.service"
    real = service.Machine("linux", tmp_path)
    path.write_text(real.text(False, [*ARGS, "--stop", 'a "b" $c 100%']))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path],
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "expertd.service" in line]
    assert said == [] and done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", [False, True])
def test_launchd_plist(system: bool, tmp_path: Path) -> None:
    run = Runs()
    mac = machine("darwin", tmp_path, run)
    service.install(mac, system, ARGS, dry_run=False, no_start=False)
    path = (
        tmp_path / ("Library/LaunchDaemons" if system else "home/ann/Library/LaunchAgents") / "expertd.plist"
    )
    values = plistlib.loads(path.read_bytes())
    assert values["ProgramArguments"] == ["/opt/my env/bin/python", "-P", "-m", "expertd", *ARGS]
    assert values["KeepAlive"] == {"SuccessfulExit": False} and values["RunAtLoad"] is True
    assert values.get("UserName") == ("ann" if system else None)
    domain = "system" if system else "gui/501"
    assert run.commands == [f"launchctl bootstrap {domain} {path}"]
    service.uninstall(mac, system, dry_run=False)
    assert run.commands[1:] == [f"launchctl bootout {domain}/expertd"] and not path.exists()


def test_dry_run_and_no_start_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Runs()
    linux = machine("linux", tmp_path, run)
    service.install(linux, False, ARGS, dry_run=True, no_start=False)
    assert list(tmp_path.iterdir()) == []
    assert (
        "[Service]" in (said := capsys.readouterr().out) and "systemctl --user enable --now expertd" in said
    )
    service.install(linux, False, ARGS, dry_run=False, no_start=True)
    service.uninstall(linux, False, dry_run=True)
    assert linux.path(False).exists() and run.commands == []


def test_what_fails_says_what_next(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`systemctl --user daemon-reload` failed; .* run it again"):
        service.install(machine("linux", tmp_path, Runs(1)), False, ARGS, False, False)
    (tmp_path / "etc").write_text("no folder")
    with pytest.raises(ConfigError, match=r"expertd.service: .*Use sudo, or leave --system out"):
        service.install(machine("linux", tmp_path), True, ARGS, False, False)
    with pytest.raises(ConfigError, match="neither systemd nor launchd"):
        machine("freebsd14", tmp_path).path(False)


def test_only_right_commands_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    root = click.Context(cli, default_map={"join": {"ranks": 2}})
    assert service.check_command(root, ["join"]) == ["join"]
    args = service.check_command(root, ["serve", "./my model", "--ranks", "2", "--api-keys", "keys"])
    assert args == ["serve", f"{tmp_path}/my model", "--ranks", "2", "--api-keys", "keys"]
    with pytest.raises(ConfigError, match="wanted serve or join"):
        service.check_command(root, ["run", "demo", "x"])
    with pytest.raises(click.UsageError, match="No such option"):
        service.check_command(root, ["serve", "demo", "--rank", "2", "--nope"])


def test_the_commands_reach_the_machine(tmp_path: Path) -> None:
    def expertd(*args: str) -> str:
        result = CliRunner().invoke(cli, ["service", *args], obj=machine("linux", tmp_path))
        return result.output + str(result.exception or "")

    assert "wrote " in expertd("install", "--no-start", *ARGS, "--split", "solo")
    assert '"--split" "solo"' in expertd("show") and "journalctl --user -u expertd -f" in expertd("show")
    assert "removed " in expertd("uninstall")
    assert "no service is installed. Run: expertd service install" in expertd("show")


# The config file.


def effective(path: Path, *args: str) -> str:
    """What --ranks is in the end: its value is out of range, and named."""
    result = CliRunner().invoke(cli, ["--config", str(path), "run", "/no/such/model", "x", *args])
    return str(result.exception)


def test_flag_before_variable_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[run]\nranks = 9\nstop = ["a", "b"]\n[serve]\nmodel = "demo"\nport = 81\n[bench.decode]\ntokens = 8\n'
    )
    assert "--ranks 9:" in effective(path)
    monkeypatch.setenv("EXPERTD_RUN_RANKS", "8")
    assert "--ranks 8:" in effective(path)
    assert "--ranks 7:" in effective(path, "--ranks", "7")


def test_the_file_is_found_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "no such file" in str(CliRunner().invoke(cli, ["--config", f"{tmp_path}/x", "hosts"]).exception)
    (tmp_path / "expertd").mkdir()
    (tmp_path / "expertd/config.toml").write_text("[run]\nranks = 6\n")
    assert "--ranks 6:" in str(CliRunner().invoke(cli, ["run", "/no/such/model", "x"]).exception)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[serve]\nmax-stream = 3", "[serve] max-stream: no such flag. Did you mean max-streams?"),
        ("[serv]\nport = 3", "[serv]: no such command. Did you mean [serve]?"),
        ("port = 3", "port: no such command. "),
        ('[serve]\nport = "many"', "[serve] port = 'many': 'many' is not a valid int"),
        ("[serve]\nport = 70000", "70000 is not in the range"),
        ('[serve]\nsplit = "heads"', "'heads' is not one of"),
        ("[bench.decode]\ntoken = 3", "[bench.decode] token: no such flag. Did you mean tokens?"),
        ("[serve", "cannot be read: "),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    said = effective(path)
    assert words in said and str(path) in said


def test_every_flag_of_serve_has_its_key(tmp_path: Path) -> None:
    keys = keys_of(cli.commands["serve"])
    assert {"model", "ranks", "split", "max-streams", "host", "port", "api-keys", "link"} <= set(keys)
    assert len(keys) == len(cli.commands["serve"].params)
