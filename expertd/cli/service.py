"""`expertd service`: expertd as a service of the system, started at boot or login and again after a crash.

On Linux a systemd unit, on macOS a launchd property list, of the user who installs it or, with --system, of the
machine. The service runs `expertd serve ...` or `expertd join ...` as it was given here; flags may as well stay in the
config file.
"""

import getpass
import os
import plistlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from expertd.errors import ConfigError

NAME = "expertd"
# From SIGTERM to SIGKILL: streams are finished or handed over, and RDMA is left in order.
STOP_S = 60
# A rank may take minutes to load: what fails at once should not try again at once.
PAUSE_S = 10

UNIT = """\
[Unit]
Description=expertd {command}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart={start}
{user}Restart=on-failure
# 2: a wrong flag or checkpoint, which another try would not mend.
RestartPreventExitStatus=2
RestartSec={pause_s}
TimeoutStopSec={stop_s}
KillMode=mixed
# RDMA registers the memory that it sends from.
LimitMEMLOCK=infinity
LimitNOFILE=65536
NoNewPrivileges=yes

[Install]
WantedBy={target}
"""


@dataclass(frozen=True)
class Machine:
    """Where a service goes. `root` is / but in tests; `run` runs a command and gives its exit code."""

    platform: str = sys.platform
    root: Path = Path("/")
    home: Path = field(default_factory=Path.home)
    user: str = field(default_factory=lambda: os.environ.get("SUDO_USER") or getpass.getuser())
    uid: int = field(default_factory=os.getuid)
    python: str = sys.executable
    run: Callable[[Sequence[str]], int] = lambda command: subprocess.run(command).returncode

    def path(self, system: bool) -> Path:
        """The file of the service. Raises ConfigError on a platform without any."""
        if self.platform == "darwin":
            folder = self.root / "Library/LaunchDaemons" if system else self.home / "Library/LaunchAgents"
            return folder / f"{NAME}.plist"
        if self.platform != "linux":
            raise ConfigError(
                f"{self.platform} has neither systemd nor launchd. Run `expertd serve` yourself."
            )
        folder = self.root / "etc/systemd/system" if system else self.home / ".config/systemd/user"
        return folder / f"{NAME}.service"

    def text(self, system: bool, args: Sequence[str]) -> str:
        """What the file says."""
        command = [self.python, "-P", "-m", "expertd", *args]
        if self.platform == "darwin":
            return plistlib.dumps(self._plist(system, command), sort_keys=False).decode()
        return UNIT.format(
            command=" ".join(args).replace("%", "%%"),
            start=" ".join(map(systemd_quoted, command)),
            user=f"User={self.user}\n" if system else "",
            pause_s=PAUSE_S,
            stop_s=STOP_S,
            target="multi-user.target" if system else "default.target",
        )

    def _plist(self, system: bool, command: list[str]) -> dict[str, object]:
        logs = self.home / "Library/Logs"
        return {
            "Label": NAME,
            "ProgramArguments": command,
            **({"UserName": self.user} if system else {}),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": PAUSE_S,
            "ExitTimeOut": STOP_S,
            "ProcessType": "Interactive",  # or macOS slows it down when nobody is at the screen
            "SoftResourceLimits": {"NumberOfFiles": 65536},
            "StandardOutPath": str(logs / f"{NAME}.log"),
            "StandardErrorPath": str(logs / f"{NAME}.log"),
        }

    def start(self, system: bool) -> list[list[str]]:
        """The commands that start what was written."""
        if self.platform == "darwin":
            return [["launchctl", "bootstrap", self._domain(system), str(self.path(system))]]
        return [self._systemctl(system, "daemon-reload"), self._systemctl(system, "enable", "--now", NAME)]

    def stop(self, system: bool) -> list[list[str]]:
        """The commands that stop it, before its file goes."""
        if self.platform == "darwin":
            return [["launchctl", "bootout", f"{self._domain(system)}/{NAME}"]]
        return [self._systemctl(system, "disable", "--now", NAME)]

    def advice(self, system: bool) -> str:
        """How to look at it, and what else it needs."""
        if self.platform == "darwin":
            return f"its log: tail -f {self.home}/Library/Logs/{NAME}.log"
        log = f"its log: journalctl {'' if system else '--user '}-u {NAME} -f"
        linger = f"\nto run without a login: sudo loginctl enable-linger {self.user}"
        return log if system else log + linger

    def _domain(self, system: bool) -> str:
        return "system" if system else f"gui/{self.uid}"

    def _systemctl(self, system: bool, *args: str) -> list[str]:
        return ["systemctl", *([] if system else ["--user"]), *args]


def systemd_quoted(word: str) -> str:
    """A word as ExecStart takes it: quoted, and without specifiers or variables."""
    for char, safe in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"), ("\n", "\\n")):
        word = word.replace(char, safe)
    return f'"{word}"'


@click.group("service", epilog="Example: expertd service install serve demo --ranks 2")
def service_command() -> None:
    """Install expertd as a service of this machine: systemd on Linux, launchd on macOS."""


_system = click.option("--system", is_flag=True, help="Of the machine, started at boot; needs root.")


@service_command.command(
    "install",
    epilog="Example: expertd service install --dry-run serve demo --ranks 2",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@_system
@click.option("--dry-run", is_flag=True, help="Print the file and the commands; change nothing.")
@click.option("--no-start", is_flag=True, help="Write the file; print the commands that start it.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def install_command(
    context: click.Context, system: bool, dry_run: bool, no_start: bool, command: tuple[str, ...]
) -> None:
    """Let COMMAND, which is `serve ...` or `join ...` with its flags, run as a service from now on."""
    args = check_command(context.find_root(), command)
    install(context.obj or Machine(), system, args, dry_run, no_start)


@service_command.command("uninstall", epilog="Example: expertd service uninstall")
@_system
@click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")
@click.pass_context
def uninstall_command(context: click.Context, system: bool, dry_run: bool) -> None:
    """Stop the service and remove its file."""
    uninstall(context.obj or Machine(), system, dry_run)


@service_command.command("show", epilog="Example: expertd service show")
@_system
@click.pass_context
def show_command(context: click.Context, system: bool) -> None:
    """Print the file of the installed service, and how to look at it."""
    machine = context.obj or Machine()
    path = machine.path(system)
    if not path.exists():
        raise ConfigError(f"{path}: no service is installed. Run: expertd service install serve MODEL")
    click.echo(f"# {path}\n{path.read_text()}\n{machine.advice(system)}")


def check_command(root: click.Context, command: Sequence[str]) -> list[str]:
    """The command with its paths absolute. Raises ConfigError for another command, click.UsageError for its flags."""
    assert isinstance(root.command, click.Group)
    name, *args = command
    if name not in ("serve", "join"):
        raise ConfigError(f"service install {name}: wanted serve or join, with its flags.")
    root.command.commands[name].make_context(name, list(args), parent=root)  # with what the config file adds
    # A service starts in another folder.
    return [name, *(str(Path(a).absolute()) if os.sep in a and Path(a).exists() else a for a in args)]


def install(machine: Machine, system: bool, args: Sequence[str], dry_run: bool, no_start: bool) -> None:
    """Write the service's file and start it. Raises ConfigError when it cannot be written or does not start."""
    path, text = machine.path(system), machine.text(system, args)
    if dry_run:
        click.echo(f"# {path}\n{text}")
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as e:
            again = "Use sudo, or leave --system out." if system else "Look at the folder's rights."
            raise ConfigError(f"{path}: {e.strerror or e}. {again}") from e
        click.echo(f"wrote {path}")
    _do(machine, machine.start(system), dry_run or no_start)
    click.echo(machine.advice(system))


def uninstall(machine: Machine, system: bool, dry_run: bool) -> None:
    """Stop the service and remove its file. Raises ConfigError when there is none."""
    path = machine.path(system)
    if not path.exists():
        raise ConfigError(f"{path}: no service is installed.{'' if system else ' Did you mean --system?'}")
    # A service that does not run cannot be stopped: no reason to keep it.
    _do(machine, machine.stop(system), dry_run, may_fail=True)
    if dry_run:
        click.echo(f"rm {path}")
        return
    path.unlink()
    click.echo(f"removed {path}")


def _do(machine: Machine, commands: list[list[str]], only_say: bool, may_fail: bool = False) -> None:
    for command in commands:
        click.echo(shlex.join(command))
        if not only_say and machine.run(command) and not may_fail:
            raise ConfigError(
                f"`{shlex.join(command)}` failed; its words are above. Mend that and run it again."
            )
