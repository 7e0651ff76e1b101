"""Two hosts, and every process of theirs killed or stopped in mid-stream: who survives says so, and goes on.

The time from the fault to the survivor's word in /health is printed (pytest -s): about a second at most where nothing
else runs. What is asserted is that it comes.
"""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from tests.cluster.computers import (
    END_S,
    Answer,
    Computer,
    Health,
    Stream,
    answers,
    computers,
    follows,
    in_group,
)

pytestmark = pytest.mark.fault

PROMPT = "Once upon a time there was a little fox who"
NUM_TOKENS = 48
# With ours the demo model would have said all of it before anything is killed.
SLOWLY = ("--kernels", "mlx")
REPORT_S = 10.0
RECOVERY_S = 60.0


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Computer]]:
    with computers(tmp_path_factory.mktemp("hosts"), "ab") as made:
        made[0].serve("demo", *SLOWLY)
        made[0].wait(answers)
        made[1].join(made[0])
        yield made


@pytest.fixture(scope="module")
def undisturbed(hosts: list[Computer]) -> Answer:
    answer = hosts[0].ask(PROMPT, NUM_TOKENS)
    assert answer.num_tokens == NUM_TOKENS
    return answer


@pytest.fixture
def group(hosts: list[Computer]) -> Iterator[list[Computer]]:
    """The two of them, together again after the test before."""
    a, b = hosts
    if a.running.process.poll() is not None:
        a.serve("demo", *SLOWLY)
    if b.running.process.poll() is not None:
        b.join(a)
    a.wait(in_group(1))
    b.wait(follows)
    yield hosts
    for host in hosts:  # a supervisor that a failed test left stopped; what it started is its own business
        if host.running.process.poll() is None:
            host.running.process.send_signal(signal.SIGCONT)


def require_report(host: Computer, since: float, what: str) -> None:
    """The host says that it is alone."""
    while not ((health := host.health(timeout_s=1)) and alone(health)):
        assert time.monotonic() - since < REPORT_S, f"{host.name} does not report {what}: {health}"
        time.sleep(0.01)
    print(f"{what}: reported by {host.name} after {time.monotonic() - since:.2f} s")


def alone(health: Health) -> bool:
    """On either host: no epoch with the other one runs."""
    hosts = health["hosts"]
    if hosts["role"] == "leader":
        return not in_group(1)(health)
    return not hosts["epoch"]


def disturb(host: Computer, part: str, number: signal.Signals) -> float:
    os.kill(host.part(part).pid, number)
    return time.monotonic()


def require_answer(host: Computer, wanted: Answer) -> None:
    began = time.monotonic()
    assert host.ask(PROMPT, NUM_TOKENS) == wanted
    print(f"the next answer of {host.name} took {time.monotonic() - began:.1f} s")


NUMBERS = (signal.SIGKILL, signal.SIGSTOP)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("index", "part"), [(1, "rank"), (1, "link"), (0, "link"), (1, "supervisor")])
def test_the_stream_survives(
    group: list[Computer], undisturbed: Answer, index: int, part: str, number: signal.Signals
) -> None:
    leader, follower = group
    stream: Stream = leader.stream(PROMPT, NUM_TOKENS)
    stream.wait_pieces(4)
    since = disturb(group[index], part, number)
    what = f"{number.name} of {group[index].name}'s {part}"
    require_report(leader, since, what)
    assert stream.result() == undisturbed
    print(f"{what}: longest gap of the stream {stream.longest_gap_s:.2f} s")
    require_answer(leader, undisturbed)
    if (part, number) == ("supervisor", signal.SIGSTOP):
        os.kill(follower.part("supervisor").pid, signal.SIGCONT)
    elif part == "supervisor":
        assert follower.running.process.wait(END_S) == -signal.SIGKILL
        follower.require_no_orphan()
        return
    leader.wait(in_group(1), RECOVERY_S)
    follower.wait(follows, RECOVERY_S)
    require_answer(follower, undisturbed)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("part", ["rank", "supervisor"])
def test_the_follower_goes_on_without_its_leader(
    group: list[Computer], undisturbed: Answer, part: str, number: signal.Signals
) -> None:
    leader, follower = group
    stream: Stream = follower.stream(PROMPT, NUM_TOKENS)
    stream.wait_pieces(4)
    leader.children()
    since = disturb(leader, part, number)
    what = f"{number.name} of host-a's {part}"
    require_report(follower, since, what)
    assert stream.result() == undisturbed
    print(f"{what}: longest gap of the stream {stream.longest_gap_s:.2f} s")
    require_answer(follower, undisturbed)
    if (part, number) == ("supervisor", signal.SIGKILL):
        leader.require_no_orphan()
        return
    if part == "supervisor":
        os.kill(leader.part("supervisor").pid, signal.SIGCONT)
    leader.wait(in_group(1), RECOVERY_S)  # with a rank that was started again
    follower.wait(follows, RECOVERY_S)
    require_answer(leader, undisturbed)


def responses(host: Computer, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
    """The events of a streamed response."""
    with closing(host._connection(RECOVERY_S)) as connection:
        headers = {"content-type": "application/json"}
        connection.request(method, f"/v1/responses{path}", json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        with suppress(OSError, http.client.HTTPException):  # its host is killed
            yield from (json.loads(line[6:]) for line in answer if line.startswith(b"data: {"))


def deltas(events: list[Any]) -> list[tuple[int, str]]:
    return [(e["sequence_number"], e["delta"]) for e in events if e["type"] == "response.output_text.delta"]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_response_is_picked_up_on_the_other_host(group: list[Computer], victim: int) -> None:
    """Its client was on the host that dies: the one that leads, and the one that follows."""
    asked = {"model": "demo", "input": PROMPT, "stream": True, "max_output_tokens": 40, "temperature": 0}
    undisturbed = deltas(list(responses(group[0], "POST", "", asked)))
    events = responses(group[victim], "POST", "", asked)
    seen = [next(events)]
    while len(deltas(seen)) < 5:
        seen.append(next(events))
    host = group[victim]
    host.children()
    os.kill(host.part("supervisor").pid, signal.SIGKILL)
    seen += list(events)
    after, response_id = seen[-1]["sequence_number"], seen[0]["response"]["id"]
    rest = responses(group[1 - victim], "GET", f"/{response_id}?stream=true&starting_after={after}")
    assert deltas(seen) + deltas(list(rest)) == undisturbed and len(deltas(seen)) < len(undisturbed)
    assert host.running.process.wait(END_S) == -signal.SIGKILL
    host.require_no_orphan()


def test_nobody_has_shown_a_traceback(hosts: list[Computer]) -> None:
    for host in hosts:
        for running in host._started:
            assert "Traceback" not in running.said(), running.said()
            assert "never retrieved" not in running.said(), running.said()
            assert "bug of expertd" not in running.said(), running.said()
