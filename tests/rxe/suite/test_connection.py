"""A verbs connection between two hosts with real verbs: every byte right, and every fault seen and named in time.

Real speeds mean nothing here, and the dice of tc-netem are the kernel's own; so what is asserted is what must always
hold: no wrong byte ever, no wait without end, and a reason that fits.
"""

import re
import signal
import statistics
import subprocess
from typing import Any

import pytest

from tests import netns
from tests.rxe.suite.pair import LIMIT_S, peers, results

GIVE_UP_S = 10.0  # of a swap; a real one takes microseconds


def whole(said: list[dict[str, Any]], num_frames: int) -> None:
    """Both ends have sent and received everything, and none of it was wrong."""
    for end in said:
        assert (end["failure"], end["wrong"]) == ("", 0), end["reason"]
        assert (end["sent"], end["received"]) == (num_frames, num_frames)


def test_random_frames_on_both_queues(net: netns.Net) -> None:
    with peers(net, "frames", 1000, limit_s=LIMIT_S) as both:
        assert [peer.chosen["device"] for peer in both] == ["rxe_ab", "rxe_ba"]
        assert [peer.chosen["mtu"] for peer in both] == [4096, 4096]
        said = results(both)
    whole(said, 1000)
    assert all(end["statistics"]["duplicates"] == 0 for end in said)


@pytest.mark.parametrize("narrow_ends", [2, 1])
def test_a_narrow_cable(net: netns.Net, narrow_ends: int) -> None:
    """A path MTU above the cable's loses every message on rxe without a word: the lower of the two must be taken."""
    try:
        net.set_mtu(0, 1, 1500)
        if narrow_ends == 1:
            net.call(1, ["ip", "link", "set", "dev", net.hosts[1].cables[0].interface, "mtu", "4200"])
        with peers(net, "frames", 100, limit_s=LIMIT_S) as both:
            assert [peer.chosen["mtu"] for peer in both] == [1024, 1024 if narrow_ends == 2 else 4096]
            whole(results(both), 100)
    finally:
        net.set_mtu(0, 1, 4200)


def test_the_gid_is_found_wherever_it_is(net: netns.Net) -> None:
    """An address that came first takes the usual place, as macOS renumbers the table after a change."""
    cable = net.hosts[0].cables[1]
    other = "10.99.0.1"
    change = ["ip", "address"]
    net.call(0, [*change, "del", f"{cable.address}/24", "dev", cable.interface])
    net.call(0, [*change, "add", f"{other}/24", "dev", cable.interface])
    net.call(0, [*change, "add", f"{cable.address}/24", "dev", cable.interface])
    try:
        assert gids(net)[f"::ffff:{cable.address}"] == 2
        with peers(net, "frames", 50, limit_s=LIMIT_S) as both:
            whole(results(both), 50)
    finally:
        net.call(0, [*change, "del", f"{other}/24", "dev", cable.interface])


def gids(net: netns.Net, host: int = 0) -> dict[str, int]:
    """The host's table, as the devices' own tool shows it, which leaves out what is empty: index of each GID."""
    found = re.findall(r"GID\[ *(\d+)\]:\s*([^\s,]+)", net.call(host, ["ibv_devinfo", "-v"]))
    return {gid: int(index) for index, gid in found}


@pytest.mark.slow
def test_latency_beside_the_usual_tool(net: netns.Net, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is required of speed; the two figures stand beside each other to show that ours is no toy."""
    with peers(net, "self_test", 100, limit_s=LIMIT_S) as both:
        said = results(both)
    assert all(len(said[0][queue]) == 100 for queue in ("latency_us", "bulk_us"))
    theirs = ib_send_lat(net, size=16384)
    ours = {queue: statistics.median(said[0][queue]) / 2 for queue in ("latency_us", "bulk_us")}
    with capsys.disabled():
        print(
            f"\nhalf a round trip: ours, 16 KiB {ours['latency_us']:.0f} us, 128 KiB {ours['bulk_us']:.0f} us; "
            f"ib_send_lat, 16 KiB {theirs:.0f} us"
        )


def ib_send_lat(net: netns.Net, size: int) -> float:
    """Typical half round trip in µs, by perftest."""
    argv = []
    for host in (0, 1):
        cable = net.hosts[host].cables[1 - host]
        index = gids(net, host)[f"::ffff:{cable.address}"]
        argv.append(
            [
                "ib_send_lat",
                "-c",
                "UC",
                "-s",
                str(size),
                "-n",
                "100",
                "-F",
                "-d",
                cable.device,
                "-x",
                str(index),
            ]
        )
    server = net.run(1, argv[1], stdout=subprocess.DEVNULL)
    try:
        while "18515" not in net.call(1, ["ss", "-Hltn"]):  # its port
            assert server.poll() is None
        said = net.call(0, [*argv[0], net.hosts[1].lan_address], LIMIT_S)
        assert server.wait(LIMIT_S) == 0
    finally:
        server.kill()
        server.wait()
    return float(next(line for line in said.splitlines() if line.split()[:1] == [str(size)]).split()[4])


@pytest.mark.fault
@pytest.mark.parametrize("side_on_cable", [False, True])
def test_a_killed_peer_is_noticed_by_the_side_connection(net: netns.Net, side_on_cable: bool) -> None:
    with peers(net, "swaps", 10**9, side_on_cable=side_on_cable, swap_bytes=20_000, limit_s=LIMIT_S) as both:
        both[1].signal(signal.SIGKILL)
        said = both[0].line()
        both[0].end()
    assert (said["failure"], said["wrong"]) == ("XD_CLOSED", 0), said["reason"]


@pytest.mark.fault
def test_a_stopped_peer_ends_a_swap_at_its_deadline(net: netns.Net) -> None:
    """And what it does after it was woken reaches nobody."""
    with peers(net, "swaps", 10**9, swap_bytes=4000, limit_s=GIVE_UP_S) as both:
        both[1].signal(signal.SIGSTOP)
        said = both[0].line()
        both[0].end()
        both[1].signal(signal.SIGCONT)
        late = both[1].line()
    assert (said["failure"], said["wrong"]) == ("XD_TIMEOUT", 0), said["reason"]
    assert late["failure"] in ("XD_CLOSED", "XD_TIMEOUT") and late["wrong"] == 0, late["reason"]


@pytest.mark.fault
@pytest.mark.parametrize("end", [0, 1])
def test_a_cut_cable(net: netns.Net, end: int) -> None:
    """The end that was cut hears it from its device; the other only from the side connection, or its deadline."""
    with peers(net, "swaps", 10**9, swap_bytes=20_000, limit_s=GIVE_UP_S) as both:
        net.cut(end)
        said = results(both)
    assert [s["wrong"] for s in said] == [0, 0]
    assert {s["failure"] for s in said} <= {"XD_DEVICE", "XD_CLOSED", "XD_TIMEOUT"}, said
    assert "XD_DEVICE" in {s["failure"] for s in said} or "XD_TIMEOUT" in {s["failure"] for s in said}


@pytest.mark.fault
@pytest.mark.parametrize("what", ["loss 1%", "duplicate 1%", "corrupt 1%", "delay 2ms reorder 99%"])
def test_a_bad_cable_never_gives_a_wrong_byte(net: netns.Net, what: str) -> None:
    """Every frame is right or the link is down: of several packets a frame, one of a hundred is sure to be hit."""
    with peers(net, "frames", 1000, limit_s=GIVE_UP_S) as both:
        suffer(net, what)
        said = results(both)
    assert [s["wrong"] for s in said] == [0, 0]
    for s in said:
        went_on = s["failure"] == "" and s["received"] == 1000
        assert went_on or s["failure"] in ("XD_LOST", "XD_CLOSED") or stalled(s), s
    if what == "loss 1%":
        assert any(s["failure"] == "XD_LOST" or stalled(s) for s in said), said


def stalled(said: dict[str, Any]) -> bool:
    """The last frames under credit were lost, so no later one could tell; the deadline did."""
    return said["failure"] == "" and said["took_s"] >= GIVE_UP_S


def suffer(net: netns.Net, what: str) -> None:
    for host in (0, 1):
        net.netem(host, what)


@pytest.mark.fault
def test_a_cable_that_is_whole_again_carries_a_new_connection(net: netns.Net) -> None:
    net.cut(0)
    net.join(0)
    with peers(net, "frames", 20, limit_s=LIMIT_S) as both:
        whole(results(both), 20)
