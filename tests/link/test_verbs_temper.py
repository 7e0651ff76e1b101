"""What a user reads for everything that Apple's provider is known or feared to do, and that nothing hangs.

Each row puts one temper into the provider of one host and says what both hosts see.
"""

import errno
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.link.provider_fixture import Fabric, build_check
from tests.link.verbs_pair import end, outcome, run_one, run_pair, start

RESTART = "restart the machine if it stays"
HUNG_UP = ("XD_CLOSED", "the peer closed the side connection")


def seen(outcome: dict[str, Any]) -> tuple[str, str]:
    """The code and the reason with which a connection failed."""
    assert outcome.get("error") == "Failed", outcome
    return outcome["code"], outcome["text"]


# Opening.


@pytest.mark.parametrize(
    "temper, text",
    [
        (
            "no_device",
            "verbs: no RDMA device (the list is empty): a Mac needs Thunderbolt 5, `rdma_ctl enable` in "
            "Recovery (check: "
            "rdma_ctl status) and a restart; on Linux look at `rdma link`. Or use TCP",
        ),
        (
            "port_down",
            "verbs: device rdma_en2 cannot be used: its port is DOWN: check the cable, and on Macs that the "
            "peer has RDMA "
            "enabled (rdma_ctl status)",
        ),
        (
            "no_ipv4",
            "verbs: device rdma_en2 cannot be used: it has no IPv4 address: give one to its own interface "
            "(on a Mac enN of "
            "rdma_enN; bridge0 does not count)",
        ),
        (
            "pd_null",
            f"verbs: device rdma_en2: getting a protection domain failed ({errno.ENOMEM}, "
            f"{os.strerror(errno.ENOMEM)}): its "
            "port is down, or earlier runs used everything up: pull the cable and put it back; if that does "
            "not help, "
            "restart the machine",
        ),
        (
            "mrs_taken:99",
            f"verbs: device rdma_en2: registering memory failed ({errno.ENOMEM}, "
            f"{os.strerror(errno.ENOMEM)}): an Apple "
            "device has 100 memory regions: end other programs that use RDMA, then try again",
        ),
        (
            "mr_three_refused,mr_local_refused",
            f"verbs: device rdma_en2: registering memory failed ({errno.EINVAL}, "
            f"{os.strerror(errno.EINVAL)}): {RESTART}",
        ),
        (
            "qps_taken:9",
            f"verbs: device rdma_en2: creating a queue pair failed ({errno.EBUSY}, "
            f"{os.strerror(errno.EBUSY)}): an Apple "
            "device has 10: end other programs that use RDMA, then try again",
        ),
        (
            "no_uc",
            f"verbs: device rdma_en2: creating a queue pair failed ({errno.EOPNOTSUPP}, "
            f"{os.strerror(errno.EOPNOTSUPP)}): it "
            "knows no UC queue pairs: use TCP",
        ),
        (
            "grant:100",
            "verbs: device rdma_en2 grants 100 frames in flight, wanted 160 for messages of 32: use smaller "
            "bulk messages, "
            "or TCP",
        ),
    ],
)
def test_device_that_cannot_be_opened(fabric: Fabric, temper: str, text: str) -> None:
    assert run_one(fabric, "open_only", temper) == {"error": "ClusterError", "code": "", "text": text}
    assert fabric.breaches() == []  # what had been opened was closed, in order


def test_address_that_no_device_has(fabric: Fabric) -> None:
    given = run_one(fabric, "open_only", ip="10.0.9.1")
    assert given["text"] == (
        "verbs: device rdma_en2 has the address 10.0.9.1, wanted 10.0.0.1: addresses change when a link "
        "comes back; "
        "connect again"
    )


def test_device_that_is_not_there(fabric: Fabric) -> None:
    given = run_one(fabric, "open_only", config={"device": "rdma_en7"})
    assert given["text"] == "verbs: no device rdma_en7 among 1: see `rdma link`, on a Mac `ibv_devices`"


@pytest.mark.parametrize("temper, count", [("no_device", 0), ("port_down", 1), ("no_ipv4", 1)])
def test_list_says_why_a_device_cannot_be_used(fabric: Fabric, temper: str, count: int) -> None:
    given = run_one(fabric, "list_devices", temper)
    if count == 0:
        assert given["error"] == "ClusterError" and given["text"].startswith("verbs: no RDMA device (")
        return
    (device,) = given["result"]
    assert device["error"].startswith(
        {"port_down": "its port is DOWN: ", "no_ipv4": "it has no IPv4 "}[temper]
    )


# Connecting.


@pytest.mark.parametrize(
    "code, hint",
    [
        (
            errno.EINVAL,
            "no IPv4 address on the port itself, or the bridge owns it: give enN of rdma_enN (not bridge0) "
            "an address",
        ),
        (
            errno.ETIMEDOUT,
            "the peer's address is not at the other end of this cable: check which ports the cable joins, "
            "and the addresses",
        ),
        (
            errno.EBUSY,
            "the driver has no queue left, as after an earlier crash: restart this machine",
        ),
        (
            errno.ENODATA,
            "the port is stale after a long idle time: pull the cable and put it back; if that does not "
            "help, restart",
        ),
        (errno.EIO, "pull the cable and put it back; if that does not help, restart this machine"),
    ],
)
def test_peer_that_cannot_be_reached(fabric: Fabric, code: int, hint: str) -> None:
    mine, _ = run_pair(fabric, tempers=(f"rtr:{code}", ""))
    said = f"verbs: device rdma_en2: reaching the peer (RTR) failed ({code}, {os.strerror(code)}): {hint}"
    assert mine == {"error": "LinkDown", "code": "", "text": said}
    assert fabric.breaches() == []  # RTR was not tried again on the same queue pair


def test_queue_pairs_are_connected_once(fabric: Fabric) -> None:
    mine, _ = run_pair(fabric, "twice")
    assert mine["text"] == "verbs: device rdma_en2: these queue pairs were connected before: open new ones"


def test_ends_that_want_other_messages(fabric: Fabric) -> None:
    mine, theirs = run_pair(fabric, per_host=({}, {"config": {"bulk_frames": 4}}))
    assert mine["error"] == theirs["error"] == "RemoteProtocolError"
    assert mine["text"] == (
        "verbs: the peer speaks version 1 with messages of 4 and 4 frames, wanted version 1 with 4 and "
        "32: install the same "
        "expertd on both hosts and give both the same settings"
    )


@pytest.mark.parametrize("returned, temper", [("-12", "-12"), ("12", "+12")])
@pytest.mark.parametrize("what, limit, in_flight", [("receive", "truth:40", 40), ("send", "send_truth:3", 0)])
def test_queue_that_is_full_before_the_grant(
    fabric: Fabric, returned: str, temper: str, what: str, limit: str, in_flight: int
) -> None:
    """A provider that takes less than it granted, with either sign."""
    mine, _ = run_pair(fabric, tempers=(f"{limit},over:{temper}", ""))
    queue = "latency" if what == "receive" else "bulk"
    budget = 1024 - (4 if queue == "latency" else 32)
    assert mine["text"] == (
        f"verbs: device rdma_en2, queue {queue}: posting a {what} failed ({returned}, queue full) with "
        f"{in_flight} of "
        f"{budget} frames in flight"
    )


# Running.

DAMAGED = "not a frame of this connection"
LENGTH_ERROR = (
    "local length error: the ends use messages of different sizes, or the device was given more than it holds"
)


@pytest.mark.parametrize(
    "sender, receiver, code, text",
    [
        ("loss:8", "", "XD_LOST", "queue latency: frame 6 came, wanted 5"),
        ("corrupt:5", "", "XD_CORRUPT", f"queue latency: {DAMAGED}: "),
        ("corrupt:8,corrupt_at:20", "", "XD_CORRUPT", f"queue latency: {DAMAGED}: "),
        (
            "short:8",
            "",
            "XD_DEVICE",
            f"verbs: device rdma_en2, queue latency: a receive ended with status 1 ({LENGTH_ERROR})",
        ),
        ("short:8", "any_frames", "XD_DEVICE", "lint: a message with another number of frames came"),
        (
            "tiny:8",
            "any_frames",
            "XD_CORRUPT",
            "verbs: queue latency: a message of 12 bytes came, wanted 64 to 16384",
        ),
        (
            "",
            "wc_error:8",
            "XD_DEVICE",
            "verbs: device rdma_en2, queue QUEUE: a receive ended with status 4 (local protection error: "
            "the driver tore "
            "the queues down)",
        ),
        (
            "",
            "truth:40,over:accept",
            "XD_DEVICE",
            f"verbs: device rdma_en2, queue bulk: a receive ended with status 1 ({LENGTH_ERROR})",
        ),
    ],
)
def test_message_that_did_not_come_right(
    fabric: Fabric, sender: str, receiver: str, code: str, text: str
) -> None:
    """The first four messages are those of the warm-up; the sender then streams. QUEUE is either "
    "of the two."""
    mine, theirs = run_pair(fabric, tempers=(sender, receiver), num_frames=100, one_way=True)
    either = {text.replace("QUEUE", queue) for queue in ("latency", "bulk")}
    assert seen(theirs)[0] == code
    assert seen(theirs)[1].startswith(tuple(either))
    if "accept" not in receiver:
        assert seen(mine) in (HUNG_UP, ("side", "the peer is gone"))
    assert fabric.breaches() == []


@pytest.mark.parametrize("seed", [1, 2])
def test_random_loss_is_always_noticed(fabric: Fabric, seed: int) -> None:
    """1 %, either way: of 1,000 frames none that came after a loss is taken."""
    tempers = (f"loss_rate:10,seed:{seed}", f"loss_rate:10,seed:{seed + 100}")
    both = run_pair(fabric, tempers=tempers, num_frames=1000, timeout_s=3, warm_up_s=0.5)
    assert all(seen(r)[0] in {"XD_LOST", "XD_CLOSED", "XD_TIMEOUT", "side"} for r in both)


def test_duplicates_are_dropped_and_counted(fabric: Fabric) -> None:
    both = run_pair(fabric, tempers=("duplicate:8", "duplicate:20"), num_frames=200)
    assert [r["result"]["statistics"]["duplicates"] for r in both] == [1, 1]


def test_peer_that_falls_silent(fabric: Fabric) -> None:
    """The sends of both succeed for ever; the waits end."""
    both = run_pair(fabric, tempers=("silent:8", ""), swaps=20, swap_s=0.5)
    for r in both:
        code, text = seen(r)
        assert code == "XD_TIMEOUT"
        assert text.endswith(": 0 of 5000 bytes came in 0.500 s")


def test_dead_direction_is_named_by_both_ends(fabric: Fabric) -> None:
    mine, theirs = run_pair(fabric, tempers=("", "dead:2"), warm_up_s=1.5)
    assert seen(mine) == ("XD_TIMEOUT", "warm-up: queue bulk: the peer lives but does not hear us")
    assert seen(theirs) == ("XD_TIMEOUT", "warm-up: queue bulk: nothing comes from the peer")


def test_fresh_queue_pairs_mend_a_dead_direction(fabric: Fabric) -> None:
    assert [r["result"] for r in run_pair(fabric, "reopen", ("", "dead:2"), times=2)] == [[1], [1]]
    assert fabric.breaches() == []


# Words of an endpoint: see endpoint() in test_verbs.py.


def test_other_psn_hears_nothing(fabric: Fabric) -> None:
    both = run_pair(fabric, forge={"3": 1, "4": 1}, warm_up_s=0.5)
    assert seen(both[0]) == ("XD_TIMEOUT", "warm-up: queue bulk: nothing comes from the peer")


def test_queue_pair_of_an_earlier_opening(fabric: Fabric) -> None:
    mine, _ = run_pair(fabric, forge={"1": 0x7777})
    assert mine["text"].startswith("verbs: device rdma_en2: reaching the peer (RTR) failed")


def test_frames_that_do_not_match(fabric: Fabric) -> None:
    """Each end was told that the other uses its own size."""
    per_host = ({"forge": {"7": 4}}, {"forge": {"7": 1}, "config": {"latency_frames": 1}})
    both = run_pair(fabric, per_host=per_host, warm_up_s=0.5)
    reasons = {seen(r) for r in both}
    expected = f"verbs: device rdma_en2, queue latency: a receive ended with status 1 ({LENGTH_ERROR})"
    assert ("XD_DEVICE", expected) in reasons and reasons <= {("XD_DEVICE", expected), HUNG_UP}


def test_port_that_went_away_while_idle(fabric: Fabric) -> None:
    """Opening asks four times; the fifth is before the first send after 1 s."""
    mine, theirs = run_pair(fabric, tempers=("port_down_after:4", ""), idle_s=1.1, swaps=1)
    said = "verbs: device rdma_en2: its port is not active any more (state 1): check the cable"
    assert seen(mine) == ("XD_DEVICE", said)
    assert seen(theirs) == HUNG_UP


# Processes that die or never come back. What then becomes of them is their supervisor's business.


@pytest.mark.fault
def test_death_of_the_peer_is_heard_on_the_side(fabric: Fabric) -> None:
    """Its own sends succeed all the time."""
    mine, theirs = run_pair(fabric, "die")
    assert mine["result"] == ": ".join(HUNG_UP)
    assert theirs == {"status": 0}


@pytest.mark.fault
def test_segmentation_fault_in_a_post(fabric: Fabric) -> None:
    mine, theirs = run_pair(fabric, tempers=("segv:post_send,segv_call:6", ""), num_frames=50)
    assert mine == {"status": -signal.SIGSEGV}
    assert seen(theirs) in (HUNG_UP, ("side", "the peer is gone"))


@pytest.mark.fault
@pytest.mark.parametrize("function", ["alloc_pd", "modify_qp", "destroy_qp"])
def test_call_that_never_returns(fabric: Fabric, function: str) -> None:
    """The process stays in that call and can be killed: a supervisor needs no more. The other end ends by itself."""
    sides = socket.socketpair()
    both = [
        start(fabric, "pair", h, sides[h], {"num_frames": 5}, f"hang:{function}" * (h == 0)) for h in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 20
        while not fabric.hanging() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert fabric.hanging() == [function]
        with pytest.raises(subprocess.TimeoutExpired):
            both[0].wait(0.1)
        both[0].kill()
        assert outcome(both[0]) == {"status": -signal.SIGKILL}
        outcome(both[1], timeout_s=20)
    finally:
        for p in both:
            end(p)


# The provider itself, asked for what our back end never does.


@pytest.fixture(scope="module")
def check(provider: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_check(tmp_path_factory.mktemp("check"), provider)


@pytest.mark.parametrize(
    "case, temper, printed, breaches",
    [
        ("types", "", "1 1", []),
        ("qps", "", f"8 more, then {errno.EBUSY}", []),
        ("mrs", "", f"99 more, then {errno.ENOMEM}", []),
        ("early_receive", "", f"{errno.EINVAL} {errno.EINVAL}", ["post_recv: before RTS"] * 2),
        (
            "gid_index",
            "",
            f"{errno.ETIMEDOUT} {errno.EINVAL}",
            ["modify_qp: RTR was tried again on the same QP"],
        ),
        (
            "straddle",
            "",
            "1",
            ["reg_mr: 0x7ffffc000 and 32768 bytes cross a 4 GiB boundary"],
        ),
        (
            "teardown",
            "",
            f"{errno.EBUSY} {errno.EBUSY} {errno.EBUSY}",
            [
                "dereg_mr: 2 QPs may still use the memory",
                "destroy_cq: QPs are left",
                "dealloc_pd: 1 MRs and 2 QPs are left",
            ],
        ),
        ("error_state", "", f"{errno.EINVAL}", ["modify_qp: a QP was moved to ERR"]),
        ("write", "", "0 0 send 0", []),
        ("frames", "", "0 0 receive 1 send 0", []),
        ("overfill_receives", "", "-12", []),
        ("overfill_receives", "over:+12", "12", []),
        ("overfill_receives", "over:accept", "0", []),
        ("overfill_sends", "", "-12", []),
        ("empty", "", "0 0 0 send 0 send 0", []),
        ("empty", "empty:drop", "0 0 0 receive 0 send 0 send 0", []),
    ],
)
def test_provider(
    fabric: Fabric, check: Path, case: str, temper: str, printed: str, breaches: list[str]
) -> None:
    env = os.environ | fabric.environment("10.0.0.1", temper)
    done = subprocess.run([check, case], env=env, check=True, capture_output=True, text=True, timeout=20)
    assert done.stdout == printed
    found = fabric.breaches()
    assert found.pop().endswith("objects were not given back")
    assert found == breaches
