"""What `expertd topology` and `expertd doctor` print."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from expertd.cli import cli, doctor, topology
from expertd.cluster.doctor import Report, Rung
from expertd.cluster.identity import Peer
from expertd.topology.advice import Problem
from expertd.topology.values import Address, Host, Interface, RdmaDevice, ThunderboltPort

HOST = Host(
    "id", "studio", "Apple M3 Ultra", "Darwin 25.2.0 arm64",
    interfaces=(
        Interface("en0", "ethernet", (Address("192.168.1.5", 24),), 1500, True, 10000),
        Interface("en2", "thunderbolt", (), 1500, True),
        Interface("awdl0", "wifi", (), 1500, True),
    ),
    thunderbolt=(
        ThunderboltPort("1", "en2", "A", 80, True, "B", "laptop", True),
        ThunderboltPort("2", "en3", "C", 120),
        ThunderboltPort("3", "en4", "D", 40, True),
    ),
    rdma=(RdmaDevice("rdma_en2", "en2", "active", ("10.0.0.1",)),),
    rdma_switch="enabled",
    notes=("pmset: no answer in 5 s",),
)  # fmt: skip
HERE, THERE = (
    {"interface": "en2", "kind": "thunderbolt", "address": f"10.0.0.{n}", "prefix": 30} for n in (1, 2)
)
MEASURED = {"payload_bytes": 16384, "p50_us": 21.6, "p99_us": 40.0, "bandwidth_mb_s": 4000.0, "error": ""}
PATH = {"local": THERE, "remote": HERE, **MEASURED}
FAILED = {**PATH, "local": {**THERE, "interface": "en1", "kind": "wifi"}, "error": "no answer within 5 s"}
MEMBER = {
    "name": "laptop",
    "host_id": "b",
    "state": "in the group",
    "reason": "",
    "route": PATH,
    "paths": {"a": [PATH, FAILED]},
}
GROUP: dict[str, Any] = {"role": "leader", "epoch": 3, "link": "tcp", "hosts": [MEMBER]}


def test_host_as_tables() -> None:
    text = topology.show_host(HOST)
    assert text.startswith("studio: Apple M3 Ultra, Darwin 25.2.0 arm64, RDMA enabled\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "en0 ethernet up 10000 Mb/s 1500 192.168.1.5/24" in lines
    assert "en2 thunderbolt up - 1500 -" in lines
    assert "1 en2 80 Gb/s laptop yes" in lines
    assert "2 en3 up to 120 Gb/s - -" in lines
    assert "3 en4 40 Gb/s a device -" in lines
    assert "rdma_en2 en2 active 10.0.0.1" in lines
    assert "awdl0" not in text and "could not find out: pmset" in text


def test_columns_are_aligned() -> None:
    block = topology.show_host(HOST).split("\n\n")[2].splitlines()
    assert (
        len({line.index(word) for line, word in zip(block, ("INTERFACE", "en2", "en3", "en4"), strict=True)})
        == 1
    )


def test_group_marks_the_chosen_route() -> None:
    lines = [" ".join(line.split()) for line in topology.show_group(GROUP).splitlines()]
    assert lines[:2] == ["group: leader, epoch 3, link tcp", "laptop: in the group"]
    assert "* en2 thunderbolt 10.0.0.2 10.0.0.1 21.6 us 40.0 us 4000 MB/s" in lines
    assert "en1 wifi 10.0.0.2 10.0.0.1 no answer within 5 s" in lines


def test_routes_seen_from_here() -> None:
    good, bad = topology.routes_of(GROUP)
    assert (good.path.local_address, good.path.remote_address) == ("10.0.0.1", "10.0.0.2")
    assert good.measurements[0].p50_us == 21.6
    assert (bad.measurements, bad.failure) == ((), "no answer within 5 s")
    assert list(topology.routes_of(None)) == []


def test_peers_and_problems() -> None:
    peer = Peer("0123", "laptop", "f", "c", "10.0.0.2", "2026-01-01")
    assert "laptop" in topology.show_peers([peer]) and "expertd pair" in topology.show_peers([])
    assert (
        topology.show_problems([Problem("x", "it is loose", "push it in")])
        == "warning: it is loose\n      -> push it in"
    )


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """A server whose /health answers with the bytes in the list."""
    answers = [b"{}"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", answers
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"hosts": null}', b'{"hosts": [1]}', b"\xff"])
def test_server_without_hosts(answer: bytes, server: tuple[str, list[bytes]]) -> None:
    server[1][0] = answer
    assert topology.ask_server(server[0]) is None


def test_command(server: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    server[1][0] = json.dumps({"hosts": GROUP}).encode()
    text = CliRunner().invoke(cli, ["topology", "--server", server[0]])
    assert text.exit_code == 0 and "127.0.0.1/8" in text.output and "* " in text.output
    found = json.loads(CliRunner().invoke(cli, ["topology", "--json", "--server", server[0]]).output)
    assert found["group"]["epoch"] == 3 and found["host"]["interfaces"] and found["paired"] == []
    dot = CliRunner().invoke(cli, ["topology", "--dot", "--server", server[0]]).output
    assert dot.startswith("graph topology {") and "en2 (thunderbolt) 22 us" in dot


def test_no_server() -> None:
    assert topology.ask_server("http://127.0.0.1:9") is None
    assert topology.ask_server("nonsense") is None


# The doctor.


def report(*rungs: Rung) -> Report:
    return Report({"cpu": "x"}, list(rungs), HOST)


def test_doctor_prints_each_rung_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = [
        Rung("parts", "ok", "all load", "", 0.1),
        Rung("sleep", "warning", "sleeps after 1 min", "sudo pmset -a sleep 0", 0.1),
    ]

    def climb(tools: Any, peer: str, fast: bool, told: Any) -> Report:
        for rung in rungs if told else ():
            told(rung)
        return report(*rungs)

    monkeypatch.setattr("expertd.cluster.doctor.climb", climb)
    done = CliRunner().invoke(cli, ["doctor"], standalone_mode=False)
    assert done.return_value == 0
    assert (
        "-> sudo pmset -a sleep 0" in done.output and "expertd can run here. Look at: sleep." in done.output
    )
    value = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
    assert value["host"]["interfaces"][0]["addresses"][0]["ip"] == "<address 1>"
    assert value["host"]["name"] == value["host"]["name"].strip() != "studio"
    whole = json.loads(CliRunner().invoke(cli, ["doctor", "--json", "--addresses"]).output)
    assert whole["host"]["interfaces"][0]["addresses"][0]["ip"] == "192.168.1.5"
    rungs.append(Rung("mailbox", "failed", "no memory", "try again", 0.1))
    done = CliRunner().invoke(cli, ["doctor"], standalone_mode=False)
    assert done.return_value == 1 and "expertd cannot run here: mailbox." in done.output


def test_line_without_advice_has_no_arrow() -> None:
    assert "->" not in doctor.line(Rung("mailbox", "ok", "9 us", "", 1.0))
    assert doctor.line(Rung("hand-off", "ok", "170 us", "look here", 1.0)).endswith("-> look here")
