"""The link process over verbs, with the provider that has Apple's temper: bringing it up, and what can go wrong."""

import secrets
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from expertd.link.messages import LinkDown, LinkUp
from tests import ranks
from tests.link.hosts import ADDRESS, Host, connect, open_hosts, run_hosts, spawn_hosts
from tests.link.provider_fixture import Fabric

JOBS = Path(__file__).with_name("link_jobs.py")
DEADLINE_S = 30.0


def over(fabric: Fabric, *tempers: str) -> dict[str, Any]:
    """Arguments for hosts that are joined by verbs, each with its temper."""
    return {
        "kind": "verbs",
        "verbs_library": str(fabric.library),
        "lint": True,
        "environments": [fabric.environment(ADDRESS, temper) for temper in tempers],
    }


def bring_up(fabric: Fabric, *tempers: str, **settings: Any) -> list[Any]:
    """What each link process says of its set-up."""
    arguments = over(fabric, *tempers) | settings
    with spawn_hosts([1] * len(tempers), environments=arguments.pop("environments")) as hosts:
        secret = secrets.token_bytes(32)
        for host in hosts:
            host.set_up(secret=secret, **arguments)
        connect(hosts)
        return [host.hear() for host in hosts]


def test_rounds_and_frames_cross(fabric: Fabric) -> None:
    args = {"sizes": [0, 1, 4096, 17, 60_000] * 4, "pause_s": 0.01}
    assert run_hosts(JOBS, "frames", [1, 1], args, DEADLINE_S, **over(fabric, "", "")) == [True] * 2
    args = {"seed": 3, "num_rounds": 30, "around_bytes": 400_000}
    one, other = run_hosts(JOBS, "swap", [1, 1], args, DEADLINE_S, slot_bytes=400_000, **over(fabric, "", ""))
    assert one == other
    assert fabric.breaches() == []


@pytest.mark.parametrize("temper, attempts", [("", 1), ("dead:2", 2)])
def test_a_dead_direction_needs_fresh_queue_pairs(fabric: Fabric, temper: str, attempts: int) -> None:
    """The queue pairs of the first attempt hear nothing."""
    for up in bring_up(fabric, "", temper, setup_s=24.0):  # 3 s for each step
        assert isinstance(up, LinkUp), up
        (report,) = up.reports
        assert (report.kind, report.device, report.attempts) == ("verbs", "rdma_en2", attempts)
        assert 0 < report.latency_p50_us <= report.latency_p99_us
    assert fabric.breaches() == []


@pytest.mark.parametrize(
    "temper, code, reason",
    [
        ("no_device", "XD_UNAVAILABLE", "verbs, open: "),
        ("rtr:60", "XD_DEVICE", "verbs, connect: "),
        ("dead:10", "XD_TIMEOUT", "verbs, warm-up: "),
    ],
)
def test_what_does_not_mend_is_told_on_both_hosts(
    fabric: Fabric, temper: str, code: str, reason: str
) -> None:
    said = bring_up(fabric, "", temper, setup_s=6.0)
    for down in said:
        assert isinstance(down, LinkDown), down
        assert (down.stage, down.code) == ("setup", code)
        assert reason in down.reason
    assert "it says: " in said[0].reason or code == "XD_TIMEOUT"
    assert fabric.breaches() == []


def ends(hosts: list[Host]) -> list[LinkDown]:
    """Ranks exchange until it fails; no wrong byte may come."""
    processes = [host.start_rank(JOBS, "until_down", host.index, {"size": 3000}) for host in hosts]
    downs = [host.wait_down() for host in hosts]
    for kind, text, _ in ranks.results_of(processes, DEADLINE_S):
        assert kind == "LinkDown"
        assert any(down.reason in text for down in downs)
    return downs


@pytest.mark.fault
@pytest.mark.parametrize("temper, code", [("loss:1200", "XD_LOST"), ("corrupt:1200", "XD_CORRUPT")])
def test_a_frame_that_is_lost_or_damaged(fabric: Fabric, temper: str, code: str) -> None:
    """After the self-test, whose frames number below that."""
    with open_hosts([1, 1], **over(fabric, "", temper)) as hosts:
        assert code in {down.code for down in ends(hosts)}


@pytest.mark.fault
def test_a_frame_with_nothing_after_it_is_missed_at_the_next_beat(fabric: Fabric) -> None:
    """The provider's words are lost from then on, so only silence is left."""
    with open_hosts([1, 1], silence_s=2.0, **over(fabric, "", "silent:1200")) as hosts:
        downs = ends(hosts)
        assert (downs[0].code, downs[0].reason) == ("XD_SILENT", "nothing heard from host 1 for 2.0 s")


@pytest.mark.fault
def test_a_provider_that_crashes_while_setting_up(fabric: Fabric) -> None:
    arguments = over(fabric, "", "segv:modify_qp")
    with spawn_hosts([1, 1], environments=arguments.pop("environments")) as hosts:
        for host in hosts:
            host.set_up(secret=bytes(32), **arguments)
        connect(hosts)
        down = hosts[0].hear()
        assert isinstance(down, LinkDown)
        assert (down.host, down.stage, down.code) == (1, "setup", "XD_CLOSED")
        assert hosts[1].hear() is None
        assert hosts[1].process.wait(DEADLINE_S) == -signal.SIGSEGV


@pytest.mark.fault
def test_a_provider_that_crashes_at_work(fabric: Fabric) -> None:
    """As Apple's does when the cable is pulled."""
    with open_hosts([1, 1], **over(fabric, "", "segv:post_send,segv_call:1500")) as hosts:
        processes = [host.start_rank(JOBS, "until_down", host.index, {"size": 3000}) for host in hosts]
        down = hosts[0].wait_down()
        assert (down.host, down.stage, down.code) == (1, "running", "XD_CLOSED")
        assert hosts[1].process.wait(DEADLINE_S) == -signal.SIGSEGV
        assert {kind for kind, _, _ in ranks.results_of(processes, DEADLINE_S)} == {"LinkDown"}


@pytest.mark.fault
def test_a_provider_that_hangs_ends_by_its_watchdog(fabric: Fabric) -> None:
    """A supervisor would kill it; if none does, it ends itself, and the other host knows why."""
    arguments = over(fabric, "", "hang:modify_qp")
    with spawn_hosts([1, 1], environments=arguments.pop("environments")) as hosts:
        hosts[0].set_up(secret=bytes(32), **arguments)
        hosts[1].set_up(secret=bytes(32), setup_s=1.0, **arguments)
        connect(hosts)
        assert hosts[1].process.wait(DEADLINE_S) == 4
        down = hosts[0].hear()
        assert isinstance(down, LinkDown)
        assert (down.host, down.stage, down.code) == (1, "setup", "XD_CLOSED")


@pytest.mark.fault
def test_a_provider_that_hangs_at_the_end_holds_up_nobody(fabric: Fabric) -> None:
    with open_hosts([1, 1], **over(fabric, "hang:destroy_qp", "")) as hosts:
        hosts[0].hang_up()
        assert hosts[0].process.wait(DEADLINE_S) == 0


@pytest.mark.fault
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_link_process_that_dies_or_hangs(fabric: Fabric, sign: signal.Signals) -> None:
    with open_hosts([1, 1], silence_s=2.0, **over(fabric, "", "")) as hosts:
        hosts[1].process.send_signal(sign)
        down = hosts[0].wait_down()
        assert (down.host, down.code) == (1, "XD_CLOSED" if sign == signal.SIGKILL else "XD_SILENT")


def test_hanging_up_gives_all_back_in_order(fabric: Fabric) -> None:
    with open_hosts([1, 1], **over(fabric, "", "")) as hosts:
        time.sleep(0.05)
        hosts[0].hang_up()
        assert hosts[0].process.wait(DEADLINE_S) == 0
        assert hosts[1].wait_down().host == 0
    assert fabric.breaches() == []
