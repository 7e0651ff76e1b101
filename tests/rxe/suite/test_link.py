"""Link processes on two hosts with real verbs: what ranks swap crosses, and each fault ends both ends with a reason.

A link process takes half a minute to start in the virtual machine, so CI cuts the cable and `make soak` does the rest;
the faults of bare connections (test_connection.py) are all in CI.
"""

import contextlib
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.link.messages import LinkPeer, LinkUp
from tests import netns, ranks
from tests.link import link_jobs
from tests.link.hosts import Host, connect

SETUP_S = 360.0  # six steps; the longest is 100 MB of self-test, on a busy machine
SILENCE_S = 8.0  # ten times what a real machine gets
DOWN_S = 60.0


@contextlib.contextmanager
def linked(net: netns.Net, slot_bytes: int = 1 << 16) -> Iterator[list[Host]]:
    """Two hosts with a rank each, whose link is up over verbs."""

    def over_the_cable(caller: int, peer: LinkPeer) -> LinkPeer:
        cable = net.hosts[caller].cables[peer.host]
        return replace(
            peer, address=cable.peer_address, local_address=cable.address, interface=cable.interface
        )

    with contextlib.ExitStack() as stack:
        hosts = []
        for index in (0, 1):
            hosts.append(Host(index, [1, 1], slot_bytes, {}, net.launcher(index)))
            stack.callback(hosts[-1].close)
        secret = secrets.token_bytes(32)
        for index, host in enumerate(hosts):
            listen = net.hosts[0].cables[1].address if index == 0 else ""
            settings = {"kind": "verbs", "lint": True, "setup_s": SETUP_S, "silence_s": SILENCE_S}
            host.set_up(secret=secret, listen=listen, **settings)
        connect(hosts, over_the_cable)
        for index, host in enumerate(hosts):
            said = host.hear(SETUP_S)
            assert isinstance(said, LinkUp), said
            (report,) = said.reports
            assert (report.kind, report.device) == ("verbs", net.hosts[index].cables[1 - index].device)
            host.watch()
        yield hosts


def rounds_cross(hosts: list[Host]) -> None:
    jobs = Path(link_jobs.__file__)
    args = {"seed": 3, "num_rounds": 20, "around_bytes": 100_000}
    processes = [host.start_rank(jobs, "swap", rank, args) for host in hosts for rank in host.ranks]
    one, other = ranks.results_of(processes, 120)
    assert one == other


@pytest.mark.fault
@pytest.mark.parametrize(
    "fault, codes",
    [
        pytest.param("kill", {"XD_CLOSED"}, marks=pytest.mark.slow),
        pytest.param("stop", {"XD_SILENT"}, marks=pytest.mark.slow),
        ("cut", {"XD_DEVICE", "XD_SILENT", "XD_CLOSED"}),
    ],
)
def test_rounds_cross_until_a_fault_takes_the_link_down(net: netns.Net, fault: str, codes: set[str]) -> None:
    with linked(net, slot_bytes=400_000) as (host, other):
        if fault == "cut":
            rounds_cross([host, other])
            net.cut(1)
        else:
            other.process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        down = host.wait_down(DOWN_S)
        assert (down.stage, down.host) == ("running", 1)
        assert down.code in codes, down
        if fault == "cut":
            assert other.wait_down(DOWN_S).code in codes, other.down
