"""This host, by asking the system: each question bounded in time, and none whose failure is fatal.

A part that cannot be found out is left empty, and `Host.notes` says why. Verbs are not asked here: any verbs call may
block for ever inside a driver, so whoever wants the devices of a Mac asks in a process that it can give up
(Linux shows them under /sys).
"""

import contextlib
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from expertd.topology import parsers_linux, parsers_macos
from expertd.topology.machine import describe_machine
from expertd.topology.parsers_psutil import parse_interfaces
from expertd.topology.values import Host, Interface, ThunderboltPort, UnreadableError

COMMAND_TIMEOUT_S = 5.0
AFTER_KILL_S = 0.5  # a process inside a wedged driver does not die: it is given up then
MAX_OUTPUT_BYTES = 4 << 20

THUNDERBOLT = ("/usr/sbin/system_profiler", "SPThunderboltDataType", "-json")
HARDWARE_PORTS = ("/usr/sbin/networksetup", "-listallhardwareports")
IFCONFIG = ("/sbin/ifconfig",)
RDMA_CTL = ("rdma_ctl", "status")

T = TypeVar("T")
Run = Callable[[Sequence[str], float], str]  # command and timeout in seconds -> standard output; CommandError


class CommandError(OSError):
    """A command is missing, failed, or took too long; the message says which and why."""


def run_command(command: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a command to its end and give its standard output. Raises CommandError within timeout_s + AFTER_KILL_S."""
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as e:
        raise CommandError(f"{name}: {e.strerror or e}") from e
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        give_up(process)
        raise CommandError(f"{name}: no answer in {timeout_s:g} s") from None
    if process.returncode:
        said = (err.strip() or out.strip() or "it said nothing").splitlines()[-1][:200]
        raise CommandError(f"{name}: ended with code {process.returncode}: {said}")
    return out[:MAX_OUTPUT_BYTES]


def give_up(process: "subprocess.Popen[str]") -> None:
    """Kill a process and take it in, without waiting for one that the kernel will not let go."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=AFTER_KILL_S)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def collect_host(
    host_id: str = "", run: Run = run_command, system: str = platform.system(), root: Path = Path("/sys")
) -> Host:
    """Give this host as it is now. Never fails, and takes at most a COMMAND_TIMEOUT_S per command (four on macOS)."""
    notes: list[str] = []
    parts = _macos_parts(run, notes) if system == "Darwin" else _linux_parts(root)
    interfaces, thunderbolt, rdma_switch = parts
    return Host(
        host_id=host_id,
        name=platform.node().removesuffix(".local"),
        processor=describe_machine()["cpu"],
        system=f"{system} {platform.release()} {platform.machine()}",
        interfaces=interfaces,
        thunderbolt=thunderbolt,
        rdma=parsers_linux.read_infiniband(root),
        rdma_switch=rdma_switch,
        notes=tuple(notes),
    )


Parts = tuple[tuple[Interface, ...], tuple[ThunderboltPort, ...], str]


def _linux_parts(root: Path) -> Parts:
    found = parse_interfaces(
        psutil.net_if_addrs(),
        psutil.net_if_stats(),
        lambda name: parsers_linux.read_interface_kind(root, name),
    )
    interfaces = tuple(_with_members(i, root) if i.kind == "bridge" else i for i in found)
    return interfaces, parsers_linux.read_thunderbolt(root), ""


def _with_members(bridge: Interface, root: Path) -> Interface:
    return Interface(**{**vars(bridge), "members": parsers_linux.read_bridge_members(root, bridge.name)})


def _macos_parts(run: Run, notes: list[str]) -> Parts:
    ports = (
        _ask(lambda: parsers_macos.parse_hardware_ports(run(HARDWARE_PORTS, COMMAND_TIMEOUT_S)), notes) or {}
    )
    interfaces = _ask(lambda: parsers_macos.parse_ifconfig(run(IFCONFIG, COMMAND_TIMEOUT_S), ports), notes)
    if not interfaces:
        interfaces = parse_interfaces(
            psutil.net_if_addrs(), psutil.net_if_stats(), lambda name: parsers_macos.kind_of(name, ports)
        )
    thunderbolt = _ask(
        lambda: parsers_macos.parse_thunderbolt(run(THUNDERBOLT, COMMAND_TIMEOUT_S), ports), notes
    )
    rdma_switch = _ask(lambda: parsers_macos.parse_rdma_ctl(run(RDMA_CTL, COMMAND_TIMEOUT_S)), notes)
    return interfaces, thunderbolt or (), rdma_switch or ""


def _ask(question: Callable[[], T], notes: list[str]) -> T | None:
    try:
        return question()
    except (CommandError, UnreadableError) as e:
        notes.append(str(e))
        return None
