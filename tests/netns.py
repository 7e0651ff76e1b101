"""Several hosts on one Linux machine: network namespaces, a cable between each pair, and a LAN between all.

    with netns.hosts(2) as net:
        server = net.run(0, ["python3", "server.py", net.hosts[0].cables[1].address])
        net.netem(0, "delay 5ms loss 1%")
        net.cut(1)

Each host is a namespace, so processes in it see its interfaces and no others. A cable is a veth pair; the LAN is a
bridge in a namespace of its own, so that cutting cables leaves it. Namespaces carry the creator's process id in their
names: users beside each other do not meet, and what a killed user left behind is removed by the next one.

The guest of tests/rxe builds its hosts with the same code and adds an RDMA device to each end of every cable.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MAX_HOSTS = 8
LAN_INTERFACE = "lan"


@dataclass(frozen=True)
class Cable:
    """One host's end of the cable to another host. `device` is its RDMA device, "" when it has none."""

    interface: str
    address: str
    peer_address: str
    mac: str
    device: str = ""


@dataclass(frozen=True)
class Host:
    """`cables` maps the index of each other host to our end of the cable to it."""

    name: str
    namespace: str
    lan_address: str
    cables: dict[int, Cable]


class Net:
    """Hosts that exist. `peer` chooses a host's cable; None means all of its cables."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)

    def run(self, host: int, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host; options are those of Popen. Its pid is the process's own."""
        return subprocess.Popen([*self.launcher(host), *argv], **options)

    def launcher(self, host: int) -> list[str]:
        """What to put before a command so that it runs on the host; it keeps its process id."""
        return ["ip", "netns", "exec", self.hosts[host].namespace]

    def call(self, host: int, argv: Sequence[str], timeout_s: float = 60) -> str:
        """Run a command on a host to its end and give its output. Raises RuntimeError when it fails."""
        return _command([*self.launcher(host), *argv], timeout_s)

    def inside(self, host: int, function: Callable[[], T]) -> T:
        """Call a function in a thread that is on the host, and give its result.

        What it opens stays there: a socket made inside can be used outside.
        """
        with ThreadPoolExecutor(1, initializer=lambda: _enter(self.hosts[host].namespace)) as thread:
            return thread.submit(function).result()

    def netem(self, host: int, what: str, peer: int | None = None) -> None:
        """Let frames that leave this host suffer, in the words of tc-netem(8); "" ends it.

        Half of a real fault: for both directions call it for both hosts.
        """
        for cable in self._cables(host, peer):
            tc = ["tc", "-n", self.hosts[host].namespace, "qdisc"]
            if what:
                _command([*tc, "replace", "dev", cable.interface, "root", "netem", *what.split()])
            else:
                # An interface without a qdisc of its own answers with an error: that is what was wanted.
                subprocess.run([*tc, "del", "dev", cable.interface, "root"], capture_output=True, check=False)

    def cut(self, host: int, peer: int | None = None) -> None:
        """Pull the cable: this end goes down, and the other loses its carrier."""
        self._set(host, peer, "down")

    def join(self, host: int, peer: int | None = None) -> None:
        """Plug the cable in again."""
        self._set(host, peer, "up")

    def set_mtu(self, a: int, b: int, mtu: int) -> None:
        """Change the MTU of the cable between two hosts, at both ends."""
        for host, peer in ((a, b), (b, a)):
            self._set(host, peer, "mtu", str(mtu))

    def processes(self, host: int) -> list[int]:
        """The ids of all processes on a host."""
        return [int(pid) for pid in _command(["ip", "netns", "pids", self.hosts[host].namespace]).split()]

    def as_dict(self) -> list[dict[str, Any]]:
        """What `from_dict` makes a Net of."""
        return [asdict(host) for host in self.hosts]

    @classmethod
    def from_dict(cls, hosts: Sequence[Mapping[str, Any]]) -> "Net":
        """Hosts that another process made."""
        return cls(
            [
                Host(
                    h["name"],
                    h["namespace"],
                    h["lan_address"],
                    {int(p): Cable(**c) for p, c in h["cables"].items()},
                )
                for h in hosts
            ]
        )

    def _cables(self, host: int, peer: int | None) -> list[Cable]:
        cables = self.hosts[host].cables
        return list(cables.values()) if peer is None else [cables[peer]]

    def _set(self, host: int, peer: int | None, *what: str) -> None:
        for cable in self._cables(host, peer):
            _command(["ip", "-n", self.hosts[host].namespace, "link", "set", "dev", cable.interface, *what])


@contextlib.contextmanager
def hosts(num_hosts: int, mtu: int = 1500) -> Iterator[Net]:
    """Hosts for the length of a `with`. At its end their processes are killed and nothing is left.

    Raises RuntimeError with what the system said; ask `available` before.
    """
    _remove_abandoned()
    prefix = f"xd{os.getpid()}x{time.monotonic_ns() % 10**6}-"
    try:
        yield build(num_hosts, mtu, prefix)
    finally:
        for name in (n for n in namespaces() if n.startswith(prefix)):
            _remove(name)


def build(num_hosts: int, mtu: int, prefix: str = "") -> Net:
    """Make hosts a, b, ... that stay until their namespaces are removed."""
    if not 2 <= num_hosts <= MAX_HOSTS:
        raise ValueError(f"{num_hosts} hosts, wanted 2 to {MAX_HOSTS}")
    made = [_host(i, num_hosts, prefix) for i in range(num_hosts)]
    switch = f"{prefix}switch"
    for namespace in (switch, *(h.namespace for h in made)):
        _command(["ip", "netns", "add", namespace])
    _batch(switch, [f"link add {LAN_INTERFACE} type bridge", f"link set {LAN_INTERFACE} up"])
    for host in made:
        _quick_addresses(host.namespace)
        _batch(host.namespace, _interfaces(host, made, mtu, switch))
        _batch(switch, [f"link set port{host.name} master {LAN_INTERFACE} up"])
    return Net(made)


def namespaces() -> list[str]:
    """All named namespaces of this machine."""
    return [line.split()[0] for line in _command(["ip", "netns", "list"]).splitlines() if line]


@functools.cache
def available(netem: bool = False) -> str:
    """ "" when hosts can be made here (and, with `netem`, can be made to suffer), else the reason."""
    if sys.platform != "linux":
        return f"network namespaces exist on Linux only, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [c for c in ("ip", "tc") if shutil.which(c) is None]:
        return f"no command {missing[0]!r}: apt-get install iproute2"
    try:
        with hosts(2) as net:
            if netem:
                net.netem(0, "delay 1ms")
    except RuntimeError as e:
        return str(e)
    return ""


def _enter(namespace: str) -> None:
    """Move this thread into a network namespace (setns(2) with CLONE_NEWNET)."""
    with open(f"/run/netns/{namespace}") as f:
        if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _host(index: int, num_hosts: int, prefix: str) -> Host:
    cables = {
        peer: Cable(
            interface=f"en_{_letter(index)}{_letter(peer)}",
            address=_cable_address(index, peer),
            peer_address=_cable_address(peer, index),
            mac=f"02:78:64:00:{index:02x}:{peer:02x}",  # so that link-local addresses are known beforehand
        )
        for peer in range(num_hosts)
        if peer != index
    }
    name = _letter(index)
    return Host(name, prefix + name, f"10.78.0.{index + 1}", cables)


def _letter(index: int) -> str:
    return chr(ord("a") + index)


def _cable_address(host: int, peer: int) -> str:
    low, high = sorted((host, peer))
    return f"10.77.{low * MAX_HOSTS + high}.{1 if host == low else 2}"


def _interfaces(host: Host, made: Sequence[Host], mtu: int, switch: str) -> list[str]:
    """The lines for `ip -batch` on one host. Of each cable, the host with the lower index makes both ends."""
    lines = [
        "link set lo up",
        f"link add {LAN_INTERFACE} type veth peer name port{host.name} netns {switch}",
        f"address add {host.lan_address}/24 dev {LAN_INTERFACE}",
        f"link set {LAN_INTERFACE} up",
    ]
    index = made.index(host)
    for peer, cable in host.cables.items():
        if index < peer:
            other = made[peer].cables[index]
            lines.append(
                f"link add {cable.interface} address {cable.mac} mtu {mtu} type veth "
                f"peer name {other.interface} address {other.mac} mtu {mtu} netns {made[peer].namespace}"
            )
        lines += [f"address add {cable.address}/24 dev {cable.interface}", f"link set {cable.interface} up"]
    return lines


def _quick_addresses(namespace: str) -> None:
    """Link-local addresses from the MAC and at once: detecting duplicates takes a second and delays GIDs."""
    write = "for f in all default; do echo 0 >/proc/sys/net/ipv6/conf/$f/accept_dad; done"
    _command(["ip", "netns", "exec", namespace, "sh", "-c", write])


def _remove_abandoned() -> None:
    for name in namespaces():
        found = re.match(r"xd(\d+)x\d+-", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)


def _remove(namespace: str) -> None:
    """Never fails: another user may be removing the same abandoned namespace."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _batch(namespace: str, lines: Sequence[str]) -> None:
    _command(["ip", "-n", namespace, "-batch", "-"], text_in="\n".join(lines) + "\n")


def _command(argv: Sequence[str], timeout_s: float = 60, text_in: str = "") -> str:
    done = subprocess.run(argv, input=text_in, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(f"{' '.join(argv)} gave {done.returncode}: {said[-300:]}")
    return done.stdout
