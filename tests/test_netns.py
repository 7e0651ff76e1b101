"""Hosts made of network namespaces: what crosses their cables, what a fault does, and that nothing is left."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import netns

pytestmark = pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available")
needs_netem = pytest.mark.skipif(
    bool(netns.available(netem=True)), reason=netns.available(True) or "available"
)

LIMIT_S = 20  # for what takes milliseconds


@pytest.fixture
def net() -> Iterator[netns.Net]:
    with netns.hosts(2) as made:
        yield made


@contextlib.contextmanager
def tcp(net: netns.Net, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from host 0 to an address of host 1: its two ends."""
    listener = net.inside(1, lambda: socket.create_server((address, 0)))
    listener.settimeout(LIMIT_S)
    with listener, net.inside(0, lambda: socket.create_connection(listener.getsockname(), LIMIT_S)) as ours:
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(LIMIT_S)
            yield ours, theirs


def on_cable(net: netns.Net) -> str:
    return net.hosts[1].cables[0].address


def test_each_pair_has_a_cable_of_its_own() -> None:
    with netns.hosts(3) as net:
        for host in net.hosts:
            assert len(host.cables) == 2
            interfaces = net.call(net.hosts.index(host), ["ls", "/sys/class/net"]).split()
            assert sorted(interfaces) == sorted(["lan", "lo", *(c.interface for c in host.cables.values())])
        addresses = {c.address for h in net.hosts for c in h.cables.values()}
        assert len(addresses) == 6
        peers = {c.peer_address for h in net.hosts for c in h.cables.values()}
        assert peers == addresses
        assert netns.Net.from_dict(net.as_dict()).hosts == net.hosts


def test_bytes_cross_the_cable_and_the_lan(net: netns.Net) -> None:
    for address in (on_cable(net), net.hosts[1].lan_address):
        with tcp(net, address) as (ours, theirs):
            ours.sendall(b"there")
            assert theirs.recv(5, socket.MSG_WAITALL) == b"there"
            theirs.sendall(b"back")
            assert ours.recv(4, socket.MSG_WAITALL) == b"back"


def test_a_cut_cable_stops_its_bytes_but_not_the_lan(net: netns.Net) -> None:
    with (
        tcp(net, on_cable(net)) as (ours, theirs),
        tcp(net, net.hosts[1].lan_address) as (control, far_control),
    ):
        net.cut(1)
        ours.sendall(b"held")
        control.sendall(b"lan")
        assert far_control.recv(3, socket.MSG_WAITALL) == b"lan"
        theirs.settimeout(0.3)
        with pytest.raises(TimeoutError):
            theirs.recv(4)
        net.join(1)
        theirs.settimeout(LIMIT_S)
        assert theirs.recv(4, socket.MSG_WAITALL) == b"held"


def test_a_process_runs_on_its_host_and_ends_with_it() -> None:
    with netns.hosts(2) as net:
        sleeper = net.run(0, ["sleep", "1000"])
        while sleeper.pid not in net.processes(0):
            time.sleep(0.01)
        assert net.processes(1) == []
        names = [h.namespace for h in net.hosts]
    assert sleeper.wait(LIMIT_S) == -signal.SIGKILL
    assert not set(names) & set(netns.namespaces())


def test_a_failing_command_says_what_it_said(net: netns.Net) -> None:
    with pytest.raises(RuntimeError, match=r"ip link show dev none gave 1: .*none"):
        net.call(0, ["ip", "link", "show", "dev", "none"])
    with pytest.raises(RuntimeError, match="gave 1"):
        net.netem(0, "delay nonsense")


def test_what_a_killed_user_left_is_removed() -> None:
    program = "from tests import netns\nwith netns.hosts(2):\n    print(flush=True)\n    input()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[1]}
    user = subprocess.Popen([sys.executable, "-c", program], **options)  # type: ignore[call-overload]
    with user:
        user.stdout.readline()
        left = [n for n in netns.namespaces() if n.startswith(f"xd{user.pid}x")]
        assert len(left) == 3
        user.kill()
        user.wait(LIMIT_S)
    with netns.hosts(2):
        assert not set(left) & set(netns.namespaces())


@needs_netem
def test_delay(net: netns.Net) -> None:
    with tcp(net, on_cable(net)) as (ours, theirs):
        net.netem(0, "delay 100ms")
        start = time.monotonic()
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"
        assert time.monotonic() - start > 0.09
        net.netem(0, "")
        assert "netem" not in net.call(0, ["tc", "qdisc"])


@needs_netem
@pytest.mark.parametrize("what", ["loss 5%", "duplicate 10%", "corrupt 2%", "delay 2ms reorder 25%"])
def test_tcp_mends_what_the_cable_does(net: netns.Net, what: str) -> None:
    sent = os.urandom(200_000)
    with tcp(net, on_cable(net)) as (ours, theirs):
        net.netem(0, what)
        net.netem(1, what)
        ours.settimeout(LIMIT_S)
        received = bytearray()
        for i in range(0, len(sent), 20_000):  # less than a socket's buffer: neither side waits for the other
            ours.sendall(sent[i : i + 20_000])
            received += theirs.recv(20_000, socket.MSG_WAITALL)
    assert bytes(received) == sent
