"""Two hosts on a cable that is pulled, put back, and made bad; their supervisors meet on the LAN, which stays."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import netns
from tests.cluster.computers import Answer, Computer, Health, answers, computers, follows, in_group
from tests.tiny import make_tiny

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(bool(why := netns.available()), reason=why or "network namespaces work"),
]

PROMPT = "Once upon a time there was a little fox who"
NUM_TOKENS = 60
# With ours the demo model would have said all of it before anything is pulled.
SLOWLY = ("--kernels", "mlx")


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


@pytest.fixture(scope="module")
def net() -> Iterator[netns.Net]:
    with netns.hosts(2) as made:
        for index in (0, 1):  # /32: no path for the link, which must take the cable
            lan = netns.LAN_INTERFACE
            address = made.hosts[index].lan_address
            made.call(index, ["ip", "address", "del", f"{address}/24", "dev", lan])
            made.call(index, ["ip", "address", "add", f"{address}/32", "dev", lan])
            made.call(index, ["ip", "route", "add", "10.78.0.0/24", "dev", lan])
        yield made


def paused(health: Health) -> bool:
    return [host["state"] for host in health["hosts"]["hosts"]] == ["paused"]


def start(hosts: list[Computer], model: str) -> None:
    a, b = hosts
    a.serve(model, *SLOWLY)
    a.wait(answers)
    b.join(a, "--checkpoint", model)
    a.wait(in_group(1))
    b.wait(follows)


def test_a_pulled_cable_ends_the_epoch_and_nothing_else(net: netns.Net, tmp_path: Path) -> None:
    with computers(tmp_path, "ab", net) as hosts:
        a, b = hosts
        start(hosts, "demo")
        [host] = a.health()["hosts"]["hosts"]
        assert host["route"]["remote"]["interface"] == net.hosts[0].cables[1].interface
        undisturbed = b.ask(PROMPT, NUM_TOKENS)
        stream = a.stream(PROMPT, NUM_TOKENS)
        stream.wait_pieces(4)
        net.cut(1)
        cut = time.monotonic()
        health = a.wait(in_group(0), 10)
        took_s = time.monotonic() - cut
        print(f"the pulled cable was reported after {took_s:.2f} s: {health['hosts']['last_change']}")
        assert stream.result() == undisturbed
        print(f"the stream's longest gap was {stream.longest_gap_s:.2f} s")
        assert b.ask(PROMPT, NUM_TOKENS) == undisturbed, "over the LAN, by the leader"
        # At once if the link reported the end first, after a vain setting up if a rank did.
        [host] = a.wait(paused, 40)["hosts"]["hosts"]
        assert host["reason"]
        time.sleep(1)  # so that setting up fails at least once
        net.join(1)
        a.wait(in_group(1))
        b.wait(follows)
        assert b.ask(PROMPT, NUM_TOKENS) == undisturbed
        for host_ in hosts:
            assert "Traceback" not in host_.running.said() and "bug" not in host_.running.said()


BAD = ("loss 1%", "delay 5ms", "rate 20mbit", "duplicate 1%", "corrupt 1%")


@pytest.mark.skipif(bool(why_not := netns.available(netem=True)), reason=why_not or "netem works")
def test_a_bad_cable_changes_no_token(net: netns.Net, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "qwen3_moe")
    with computers(tmp_path, "ab", net) as hosts:
        a, b = hosts
        start(hosts, str(model))
        wanted: Answer = a.ask(PROMPT, 20, temperature=1, seed=2)
        assert wanted.num_tokens >= 10
        for what in BAD:
            for index in (0, 1):
                net.netem(index, what)
            try:
                assert b.ask(PROMPT, 20, temperature=1, seed=2) == wanted, what
            finally:
                for index in (0, 1):
                    net.netem(index, "")
        assert "Traceback" not in a.running.said() + b.running.said()


@pytest.mark.skipif(bool(why_not), reason=why_not or "netem works")
def test_the_faster_of_two_paths_is_taken(tmp_path: Path) -> None:
    """Cable and LAN are both on a subnet of their own; with a slow cable the LAN is faster, whatever their names."""
    model = make_tiny(tmp_path / "model", "qwen3_moe")
    with netns.hosts(2) as net, computers(tmp_path, "ab", net) as hosts:
        net.netem(0, "delay 3ms")
        start(hosts, str(model))
        [host] = hosts[0].health()["hosts"]["hosts"]
        assert host["route"]["remote"]["interface"] == netns.LAN_INTERFACE
        assert len(next(iter(host["paths"].values()))) == 2
