"""The link process: how it comes up, among strangers too, and what both hosts are told when something goes wrong."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertd.link import mailbox
from expertd.link.messages import LinkConnect, LinkDown, LinkListening, LinkPeer, LinkUp
from tests import ranks
from tests.link.hosts import ADDRESS, LOOPBACK, Host, connect, open_hosts, peer_of, spawn_hosts
from tests.link.proxy import Proxy, Wrong

JOBS = Path(__file__).with_name("link_jobs.py")
DEADLINE_S = 30.0
# A living peer must not be taken for dead because the machine is busy.
SILENCE_S = 2.0


def up(*hosts: Host) -> list[LinkUp]:
    said = [host.hear() for host in hosts]
    assert all(isinstance(s, LinkUp) for s in said), said
    return said


def start_ranks(hosts: list[Host], **args: Any) -> list["subprocess.Popen[str]"]:
    """Every rank exchanges until the end; all have done so once."""
    started = [host.start_rank(JOBS, "until_down", rank, args) for host in hosts for rank in host.ranks]
    for process in started:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
    return started


def ends(processes: list["subprocess.Popen[str]"]) -> list[tuple[str, str]]:
    """Class and text of what ended each rank; all must have exchanged something before."""
    results = ranks.results_of(processes, DEADLINE_S)
    assert all(count > 0 for _, _, count in results), results
    return [(kind, text) for kind, text, _ in results]


@contextlib.contextmanager
def working(
    num_ranks: list[int], **settings: Any
) -> Iterator[tuple[list[Host], list["subprocess.Popen[str]"]]]:
    """Hosts whose ranks exchange."""
    with open_hosts(num_ranks, **settings) as hosts:
        processes = start_ranks(hosts)
        try:
            yield hosts, processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


# Coming up and going down in order.


def test_reports_say_what_was_measured() -> None:
    with spawn_hosts([1, 1, 1]) as hosts:
        secret = secrets.token_bytes(32)
        for host in hosts:
            host.set_up(secret=secret)
        connect(hosts)
        for host, said in zip(hosts, up(*hosts), strict=True):
            assert [r.host for r in said.reports] == [h for h in range(3) if h != host.index]
            for report in said.reports:
                assert (report.kind, report.device, report.attempts) == ("tcp", LOOPBACK, 1)
                assert 0 < report.latency_p50_us <= report.latency_p99_us
                assert report.bulk_p50_us > 0


@pytest.mark.parametrize("when", ["at once", "listening", "up"])
def test_hanging_up_ends_the_process(when: str) -> None:
    with spawn_hosts([1, 1]) as hosts:
        if when != "at once":
            for host in hosts:
                host.set_up(secret=bytes(32))
        if when == "listening":
            assert isinstance(hosts[0].hear(), LinkListening)
        if when == "up":
            connect(hosts)
            up(*hosts)
        hosts[0].hang_up()
        assert hosts[0].process.wait(DEADLINE_S) == 0
        if when == "up":
            hosts[1].watch()
            # Its end is told if the pump saw the lifeline before the process was gone.
            assert hosts[1].wait_down().code in {"XD_CLOSED", "XD_POISONED"}


def test_it_needs_no_mlx() -> None:
    code = "import expertd.link.process, sys; sys.exit(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_poison_ends_the_other_host_with_its_reason() -> None:
    with working([1, 1, 1]) as (hosts, processes):
        mailbox.poison(hosts[1].mailbox_fd, "rank 1 was killed by SIGKILL")
        downs = [host.wait_down() for host in hosts]
        assert [(d.stage, d.code) for d in downs] == [("running", "XD_POISONED")] * 3
        assert downs[1].host == -1
        for i in (0, 2):  # from host 1, or from the one that heard it first
            assert downs[i].host in {1, 2 - i}
            assert downs[i].reason.endswith("host 1: rank 1 was killed by SIGKILL")
        for kind, text in ends(processes):
            assert kind == "LinkDown"
            assert "rank 1 was killed by SIGKILL" in text


def test_a_mismatch_between_hosts_is_told_on_both() -> None:
    with open_hosts([1, 1]) as hosts:
        processes = [
            host.start_rank(JOBS, "until_down", host.index, {"tag_from": 50 + 100 * host.index})
            for host in hosts
        ]
        (kind, text), other = ends(processes)
        assert (kind, other[0]) == ("RemoteProtocolError", "RemoteProtocolError")
        assert "wanted exchange 51" in text
        assert "found exchange 51" in other[1]


# Refusals while setting up.


def refused(host: Host, code: str, reason: str) -> None:
    said = host.hear(DEADLINE_S)
    assert isinstance(said, LinkDown), said
    assert (said.stage, said.code) == ("setup", code)
    assert reason in said.reason
    assert host.process.wait(DEADLINE_S) == 0


def test_an_address_that_is_not_ours_is_refused() -> None:
    with spawn_hosts([1, 1]) as (host, _):
        host.set_up(secret=bytes(32), listen="192.0.2.1")
        refused(host, "XD_UNAVAILABLE", "cannot listen on 192.0.2.1")


@pytest.mark.parametrize(
    "wrong, code, reason",
    [
        ({"port": 1}, "XD_UNAVAILABLE", "host 0 at 127.0.0.1 port 1: "),
        ({"interface": "en5"}, "XD_UNAVAILABLE", "en5"),
        ({"local_address": "192.0.2.1"}, "XD_UNAVAILABLE", "over lo (192.0.2.1)"),
        ({"address": "nonsense"}, "XD_UNAVAILABLE", "host 0 at nonsense port"),
    ],
)
def test_another_way_than_the_wanted_is_refused(wrong: dict[str, Any], code: str, reason: str) -> None:
    with spawn_hosts([1, 1]) as (listener, caller), socket.create_server((ADDRESS, 0)) as server:
        del listener
        caller.set_up(secret=bytes(32))
        assert caller.hear() == LinkListening(0)
        peer = LinkPeer(0, ADDRESS, server.getsockname()[1], ADDRESS, LOOPBACK)
        caller.send(LinkConnect([replace(peer, **wrong)]))
        refused(caller, code, reason.replace("lo ", f"{LOOPBACK} "))


def test_a_call_that_comes_another_way_is_refused() -> None:
    with spawn_hosts([1, 1]) as hosts:
        for host in hosts:
            host.set_up(secret=bytes(32))
        listening = [host.hear() for host in hosts]
        hosts[0].send(LinkConnect([replace(peer_of(listening[1], 1, 0), interface="en5")]))
        hosts[1].send(LinkConnect([peer_of(listening[0], 0, 1)]))
        refused(hosts[0], "XD_UNAVAILABLE", f"leaves over {LOOPBACK} (127.0.0.1), wanted en5 (127.0.0.1)")


def test_a_host_that_does_not_come_is_named() -> None:
    with spawn_hosts([1, 1]) as (host, _):
        host.set_up(secret=bytes(32), setup_s=0.3)
        listening = host.hear()
        host.send(LinkConnect([peer_of(listening, 1, 0)]))
        refused(host, "XD_TIMEOUT", "host 1")


def test_a_listener_without_the_secret_is_refused() -> None:
    with spawn_hosts([1, 1]) as hosts:
        for host in hosts:
            host.set_up(secret=bytes([host.index]) * 32)
        connect(hosts)
        refused(hosts[1], "XD_CORRUPT", "does not know this epoch's secret")


def test_a_host_of_another_epoch_is_a_stranger() -> None:
    with spawn_hosts([1, 1]) as hosts:
        for host in hosts:
            host.set_up(secret=bytes(32), epoch=1 + host.index)
        connect(hosts)
        refused(hosts[1], "XD_CORRUPT", "it hung up")


# Strangers.


def test_strangers_hold_up_nobody() -> None:
    """Silence, garbage, slow talk and more calls than may be under proof; then the peer calls, and is let in."""
    with spawn_hosts([1, 1]) as hosts, contextlib.ExitStack() as stack:
        for host in hosts:
            host.set_up(secret=bytes(32))
        listening = [host.hear() for host in hosts]
        hosts[0].send(LinkConnect([peer_of(listening[1], 1, 0)]))
        where = (ADDRESS, listening[0].port)
        strangers = [stack.enter_context(socket.create_connection(where)) for _ in range(40)]
        for stranger, words in zip(
            strangers, [b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(46)], strict=False
        ):
            with contextlib.suppress(OSError):
                stranger.sendall(words)
        hosts[1].send(LinkConnect([peer_of(listening[0], 0, 1)]))
        up(*hosts)
        for stranger in strangers:
            stranger.settimeout(DEADLINE_S)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(100) == b""


def test_a_replayed_call_is_refused() -> None:
    """What a real caller said, said again to the same listener, which then waits for one more host."""
    with spawn_hosts([1, 1, 1]) as hosts, socket.create_server((ADDRESS, 0)) as middle:
        for host in hosts:
            host.set_up(secret=bytes(32))
        listening = [host.hear() for host in hosts]
        hosts[0].send(LinkConnect([peer_of(listening[h], h, 0) for h in (1, 2)]))
        lead = replace(peer_of(listening[0], 0, 1), port=middle.getsockname()[1])
        hosts[1].send(LinkConnect([lead, peer_of(listening[2], 2, 1)]))
        caller, _ = middle.accept()
        with caller, socket.create_connection((ADDRESS, listening[0].port)) as real:
            hello = caller.recv(46, socket.MSG_WAITALL)
            real.sendall(hello)
            caller.sendall(real.recv(64, socket.MSG_WAITALL))
            proof = caller.recv(32, socket.MSG_WAITALL)
            # The proof is for that nonce of the listener's, not for the next one.
            for said in (hello + proof, hello + hello[:32], hello[:-1] + b"\0" + proof):
                with socket.create_connection((ADDRESS, listening[0].port)) as replay:
                    replay.settimeout(DEADLINE_S)
                    replay.sendall(said)
                    answer = replay.recv(65, socket.MSG_WAITALL)
                    assert len(answer) == 64
            real.sendall(proof)
            assert real.recv(1) == b"\x01"


# Faults. What the ranks of the other host are told, and that everything ends.


@pytest.mark.fault
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_link_process_that_dies_or_hangs(sign: signal.Signals) -> None:
    with working([1, 1], silence_s=SILENCE_S) as (hosts, processes):
        hosts[1].process.send_signal(sign)
        down = hosts[0].wait_down()
        stopped = sign == signal.SIGSTOP
        assert (down.host, down.stage, down.code) == (1, "running", "XD_SILENT" if stopped else "XD_CLOSED")
        if stopped:
            assert down.reason == "nothing heard from host 1 for 2.0 s"
            before = mailbox.pulses(hosts[1].mailbox_fd)[1]
            time.sleep(0.1)
            assert mailbox.pulses(hosts[1].mailbox_fd)[1] == before  # how its supervisor notices
            hosts[1].process.kill()
        (kind, text), (other_kind, other) = ends(processes)
        assert (kind, other_kind) == ("LinkDown", "LinkDown")
        assert down.reason in text
        assert "the link process of host 1 has died" in other


@pytest.mark.fault
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_distant_rank_that_dies_or_hangs(sign: signal.Signals) -> None:
    """No supervisor says anything: the pulse alone, carried by two link processes, tells it."""
    with open_hosts([1, 1], silence_s=SILENCE_S) as hosts:
        processes = [
            host.start_rank(JOBS, "until_down", host.index, pulse_timeout_s=SILENCE_S) for host in hosts
        ]
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        processes[1].send_signal(sign)
        ((kind, text),) = ends(processes[:1])
        assert kind == "LinkDown"
        assert "with rank 1: it is dead: its pulse has stopped" in text
        down = hosts[1].wait_down()
        assert (down.host, down.code) == (0, "XD_POISONED")
        assert "host 0: rank 0, exchange" in down.reason
        processes[1].kill()
        processes[1].communicate()


@pytest.mark.fault
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_dies_or_hangs(sign: signal.Signals) -> None:
    with working([1, 1, 1], silence_s=SILENCE_S) as (hosts, processes):
        for process in (hosts[2].process, processes[2]):
            process.send_signal(sign)
        downs = [host.wait_down() for host in hosts[:2]]
        for down in downs:
            reason = "nothing heard from host 2" if sign == signal.SIGSTOP else "host 2: "
            assert reason in down.reason
        for kind, text in ends(processes[:2]):
            assert kind == "LinkDown"
            assert "host 2" in text


@pytest.mark.fault
def test_a_pause_of_all_is_no_death() -> None:
    """As of two laptops that are closed, or a machine that is suspended."""
    with open_hosts([1, 1], silence_s=1.0) as hosts:
        processes = start_ranks(hosts)
        for sign in (signal.SIGSTOP, signal.SIGCONT):
            for host in hosts:
                host.process.send_signal(sign)
            time.sleep(1.5)
        assert all(process.poll() is None for process in processes)
        mailbox.poison(hosts[0].mailbox_fd, "enough")
        assert all("enough" in text for _, text in ends(processes))


@pytest.mark.fault
def test_the_end_of_the_lifeline_ends_it() -> None:
    with open_hosts([1, 1]) as hosts:
        os.close(hosts[0].lifeline)
        hosts[0].lifeline = -1
        assert hosts[0].process.wait(DEADLINE_S) == 3
        down = hosts[1].wait_down()
        assert (down.code, down.reason) == ("XD_POISONED", "host 0: the supervisor is gone")


# Wrong bytes on the wire.


def flip(at: int) -> Wrong:
    return lambda frame: frame[:at] + bytes([frame[at] ^ 0x10]) + frame[at + 1 :]


@pytest.mark.fault
@pytest.mark.parametrize(
    "wrong, code",
    [
        (flip(70), "XD_CORRUPT"),  # the payload
        (flip(24), "XD_CORRUPT"),  # the round
        (lambda frame: b"", "XD_LOST"),
        (lambda frame: frame[:-1], "XD_CORRUPT"),
    ],
    ids=["payload", "round", "lost", "cut"],
)
def test_a_frame_that_suffers_on_its_way(wrong: Wrong, code: str) -> None:
    proxy = Proxy(wrong, number=20)
    with (
        contextlib.closing(proxy),
        open_hosts([1, 1], through=lambda _, peer: proxy_for(proxy, peer)) as hosts,
    ):
        processes = start_ranks(hosts)
        down = hosts[0].wait_down()
        assert (down.host, down.stage, down.code) == (1, "running", code)
        (kind, text), (other_kind, _) = ends(processes)
        assert (kind, other_kind) == ("LinkDown", "LinkDown")
        assert down.reason in text


@pytest.mark.fault
def test_a_frame_that_comes_twice_is_dropped() -> None:
    proxy = Proxy(lambda frame: frame + frame, number=20)
    with (
        contextlib.closing(proxy),
        open_hosts([1, 1], through=lambda _, peer: proxy_for(proxy, peer)) as hosts,
    ):
        processes = [
            host.start_rank(JOBS, "frames", host.index, {"sizes": [100, 2000] * 30}) for host in hosts
        ]
        assert ranks.results_of(processes, DEADLINE_S) == [True, True]


def proxy_for(proxy: Proxy, peer: LinkPeer) -> LinkPeer:
    return proxy.through(peer) if peer.port else peer
