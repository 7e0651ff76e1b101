"""Two and three real hosts, undisturbed: the same tokens wherever one asks, and what /health says of it all."""

import json
import re
import secrets
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from expertd.cluster.identity import make_peer
from tests import netns
from tests.cluster.computers import Answer, Computer, Health, answers, computers, follows, in_group
from tests.tiny import make_tiny

PROMPT = "The fox met a bear. " * 4
GREEDY = {"max_tokens": 40}
SEEDED = {"max_tokens": 40, "temperature": 1.0, "seed": 7}
# With libibverbs and without.
NO_VERBS = re.compile("verbs: (no RDMA device|cannot load )")


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[list[Computer]]:
    """Three hosts, the first two of them a group; each in a namespace of its own where that is possible."""
    with ExitStack() as stack:
        net = None
        if why := netns.available():
            warnings.warn(f"hosts share the loopback: {why}", pytest.PytestWarning, stacklevel=1)
        else:
            net = stack.enter_context(netns.hosts(3))
        made = stack.enter_context(computers(tmp_path_factory.mktemp("hosts"), "abc", net))
        made[0].serve(model)
        made[0].wait(answers)
        yield made


@pytest.fixture(scope="module")
def solo(hosts: list[Computer]) -> tuple[Answer, Answer]:
    """What one host answers, greedy and seeded; asked before another joins."""
    return hosts[0].ask(PROMPT, **GREEDY), hosts[0].ask(PROMPT, **SEEDED)


@pytest.fixture(scope="module")
def pair(hosts: list[Computer], solo: tuple[Answer, Answer], model: Path) -> list[Computer]:
    a, b, _ = hosts
    b.join(a, "--checkpoint", str(model))
    a.wait(in_group(1))
    b.wait(follows)
    return [a, b]


def require_same(hosts: list[Computer], solo: tuple[Answer, Answer]) -> None:
    greedy, seeded = solo
    assert greedy.num_tokens > 10 and seeded.num_tokens > 10 and not greedy.error + seeded.error
    for host in hosts:
        assert host.ask(PROMPT, **GREEDY) == greedy
        assert host.stream(PROMPT, **SEEDED).result() == seeded


def epoch_of(host: Computer) -> int:
    return int(host.health()["hosts"]["epoch"])


def test_two_hosts_give_the_tokens_of_one(pair: list[Computer], solo: tuple[Answer, Answer]) -> None:
    require_same(pair, solo)
    assert [h.health()["group"]["split"] for h in pair] == ["auto", "auto"]
    assert epoch_of(pair[0]) == epoch_of(pair[1]), "one epoch, which nothing has disturbed"


def test_both_say_how_they_are_linked(pair: list[Computer]) -> None:
    a, b = pair
    leads: Health = a.health()["hosts"]
    follows_: Health = b.health()["hosts"]
    assert (leads["role"], follows_["role"], follows_["leader"]) == ("leader", "joined", "host-a")
    for said, other in ((leads, b), (follows_, a)):
        assert said["link"] == "tcp" and NO_VERBS.search(said["verbs"])
        [host] = said["hosts"]
        assert host["name"] == other.name and host["host_id"] == other.identity.host_id
        route = host["route"]
        assert not route["error"] and 0 < route["p50_us"] <= route["p99_us"] and route["bandwidth_mb_s"] > 0
        assert any(route == path for paths in host["paths"].values() for path in paths)
    assert NO_VERBS.search(leads["hosts"][0]["verbs"])
    assert leads["hosts"][0]["links"] == follows_["links"]
    assert follows_["links"][0]["kind"] == "tcp" and follows_["links"][0]["latency_p50_us"] > 0


def test_a_second_host_joins_and_leaves(
    hosts: list[Computer], pair: list[Computer], solo: tuple[Answer, Answer], model: Path
) -> None:
    a, b, c = hosts
    c.join(a)  # which copies the checkpoint
    a.wait(in_group(2))
    c.wait(follows)
    [copy] = (c.cache / "checkpoints").iterdir()
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert a.health()["hosts"]["last_change"].endswith("with 3 ranks over tcp: this host, host-b, host-c")
    require_same([a, c], solo)
    assert c.end() == 0
    health = a.wait(in_group(1))
    b.wait(follows)
    gone = next(h for h in health["hosts"]["hosts"] if h["name"] == "host-c")
    assert (gone["state"], gone["reason"]) == ("gone", "host host-c: expertd is stopping there")
    require_same([b], solo)
    c.join(a)  # which finds its copy
    a.wait(in_group(2))
    assert list((c.cache / "checkpoints").iterdir()) == [copy]
    c.wait(follows)
    require_same([c], solo)
    assert c.end() == 0
    a.wait(in_group(1))
    b.wait(follows)


CALL = """
import json, socket, sys, time
address, ports, data = sys.argv[1], json.loads(sys.argv[2]), [bytes.fromhex(d) for d in json.loads(sys.argv[3])]
for port in ports:
    for piece in data:
        with socket.create_connection((address, port), 5) as s:
            s.settimeout(0.3)
            try:
                s.sendall(piece)
                s.recv(100)
            except OSError:
                pass
"""


def listening_ports(host: Computer) -> list[int]:
    """All that our supervisor and its children listen on, HTTP aside. (The link listens only until it has met.)"""
    if host._net is None:
        processes = [host.part("supervisor"), *host.children()]
        connections = [c for p in processes for c in p.net_connections("tcp")]
        found = {c.laddr.port for c in connections if c.status == "LISTEN"}
    else:  # the namespace is all its own; 0A is LISTEN
        tables = [
            Path(f"/proc/{host.part('supervisor').pid}/net/{name}").read_text() for name in ("tcp", "tcp6")
        ]
        rows = [line.split() for table in tables for line in table.splitlines()[1:]]
        found = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    return sorted(found - {host.port})


def test_strangers_are_refused_and_disturb_nothing(
    hosts: list[Computer], pair: list[Computer], solo: tuple[Answer, Answer]
) -> None:
    a, b = pair
    before = epoch_of(a)
    ports = listening_ports(a)
    assert a.control_port in ports and len(ports) >= 2
    stream = a.stream(PROMPT, **SEEDED)
    garbage = [b"", b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(4096), b"xdlink01" + bytes(70)]
    argv = [sys.executable, "-c", CALL, a.address, json.dumps(ports), json.dumps([g.hex() for g in garbage])]
    net = hosts[2]._net
    caller = net.run(2, argv) if net else subprocess.Popen(argv)
    try:
        assert caller.wait(60) == 0
    finally:
        caller.kill()
        caller.wait()
    assert stream.result() == solo[1]
    require_same([b], solo)
    assert epoch_of(a) == epoch_of(b) == before
    said = a.running.said()
    assert "refused" in said and "Traceback" not in said


def test_an_unpaired_host_is_told_what_to_do(
    tmp_path: Path, hosts: list[Computer], pair: list[Computer]
) -> None:
    a = hosts[0]
    with computers(tmp_path, "x") as [stranger]:
        stranger._net, stranger._index = a._net, 2
        stranger.store.add(make_peer(a.name, a.identity.certificate, a.address))
        running = stranger.join(a)
        assert running.process.wait(60) == 1
        assert "does not know this machine: run `expertd pair`" in running.said()
        assert len(running.said().splitlines()) == 1
    assert epoch_of(a)


def test_a_leader_that_comes_back_with_another_checkpoint(
    pair: list[Computer], solo: tuple[Answer, Answer], tmp_path: Path
) -> None:
    a, b = pair
    other = make_tiny(tmp_path / "other", "qwen3_moe", seed=1)
    a.end()
    b.wait(lambda h: h["hosts"]["state"] == "looking")
    require_same([b], solo)
    a.serve(other)
    a.wait(answers)
    a.wait(in_group(1))
    b.wait(follows)
    assert b.health()["model"] == "other"
    answer = b.ask(PROMPT, **GREEDY)
    assert answer == a.ask(PROMPT, **GREEDY) != solo[0] and not answer.error


def test_a_host_that_is_removed_is_cut_off(pair: list[Computer]) -> None:
    """The last test of the two: afterwards the other one is no longer paired."""
    a, b = pair
    a.start("hosts", "remove", "host-b").process.wait(60)
    a._started.pop()
    removed = time.monotonic()
    a.wait(in_group(0), 20)
    print(f"cut off {time.monotonic() - removed:.2f} s after `expertd hosts remove`")
    b.wait(lambda h: h["hosts"]["state"] == "looking", 20)
    assert a.ask(PROMPT, **GREEDY) == b.ask(PROMPT, **GREEDY) != Answer("")
    for host in pair:
        assert "Traceback" not in host.running.said() and "never retrieved" not in host.running.said()
