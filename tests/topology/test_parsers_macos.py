"""What macOS prints, in the shapes that several versions give it; and no change of it ends in a crash."""

import contextlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertd.topology import parsers_macos as parsers
from expertd.topology.values import Address, UnreadableError

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text()


def test_two_macs_name_each_other() -> None:
    laptop = parsers.parse_thunderbolt(sample("two_macs_laptop.json"))
    studio = parsers.parse_thunderbolt(sample("two_macs_studio.json"))
    assert [p.receptacle for p in laptop] == ["1", "2", "3"]
    (ours,), (theirs,) = [[p for p in ports if p.peer_uuid] for ports in (laptop, studio)]
    assert (ours.domain_uuid, ours.peer_uuid) == (theirs.peer_uuid, theirs.domain_uuid)
    assert (ours.peer_name, theirs.peer_name) == ("Mac Studio", "MacBook Pro")
    assert (ours.speed_gbps, ours.connected, ours.offers_rdma) == (80, True, True)
    assert laptop[1].speed_gbps == 120 and not laptop[1].connected  # what the port could do


def test_drive_is_no_host() -> None:
    port = parsers.parse_thunderbolt(sample("two_macs_studio.json"))[3]
    assert port.connected and port.peer_uuid == "" and not port.offers_rdma


def test_three_macs() -> None:
    ports = parsers.parse_thunderbolt(
        sample("three_macs.json"), parsers.parse_hardware_ports(sample("hardware_ports_mini.txt"))
    )
    assert [(p.interface, p.peer_name, p.offers_rdma) for p in ports] == [
        ("en2", "Mac Studio", True),
        ("en3", "MacBook Pro", False),
        ("en4", "", False),
    ]


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("no_cable", [("1", 120, False), ("2", 120, False), ("3", 120, False)]),
        ("thunderbolt_4", [("1", 40, True), ("2", 40, False)]),
        ("macos_11", [("", 40, False)]),
        ("host_behind_dock", [("1", 40, True)]),
    ],
)
def test_other_macs(name: str, wanted: list[Any]) -> None:
    ports = parsers.parse_thunderbolt(sample(f"{name}.json"))
    assert [(p.receptacle, p.speed_gbps, bool(p.peer_uuid)) for p in ports] == wanted


@pytest.mark.parametrize("text", ["", "no", "[]", "{}", '{"SPThunderboltDataType": 7}', "[" * 100_000])
def test_not_from_system_profiler(text: str) -> None:
    with pytest.raises(UnreadableError, match=r"system_profiler: wanted"):
        parsers.parse_thunderbolt(text)


def test_hardware_ports() -> None:
    ports = parsers.parse_hardware_ports(sample("hardware_ports_mini.txt"))
    assert (ports["Thunderbolt 3"], ports["Wi-Fi"], ports["Thunderbolt Bridge"]) == ("en4", "en1", "bridge0")
    assert len(ports) == 8


def test_kinds() -> None:
    ports = parsers.parse_hardware_ports(sample("hardware_ports_mini.txt"))
    names = ["en2", "en1", "en0", "en9", "bridge0", "utun4", "lo0", "awdl0", "gif0"]
    assert [parsers.kind_of(name, ports) for name in names] == [
        "thunderbolt", "wifi", "ethernet", "ethernet", "bridge", "vpn", "loopback", "wifi", "other",
    ]  # fmt: skip


def test_ifconfig_with_the_bridge_up() -> None:
    ports = parsers.parse_hardware_ports(sample("hardware_ports_mini.txt"))
    found = {i.name: i for i in parsers.parse_ifconfig(sample("ifconfig_bridge_up.txt"), ports)}
    assert found["bridge0"].members == ("en2", "en3", "en4")
    assert found["bridge0"].up and found["bridge0"].addresses == (Address("169.254.33.7", 16),)
    assert [found[n].up for n in ("lo0", "en0", "en1", "en2", "en3", "en4", "gif0")] == [
        True, True, False, True, True, False, False,
    ]  # fmt: skip
    assert found["en0"].addresses == (
        Address("fe80::c9e:1bff:fe00:1", 64),
        Address("192.168.1.20", 24),
        Address("2001:db8::20", 64),
    )
    assert (found["en2"].ipv4, found["en2"].kind, found["en2"].mtu) == ((), "thunderbolt", 1500)
    assert found["utun4"].addresses == (Address("100.101.7.3", 32), Address("fd7a:115c:a1e0::7", 48))


def test_ifconfig_with_the_bridge_down() -> None:
    found = {i.name: i for i in parsers.parse_ifconfig(sample("ifconfig_configured.txt"))}
    assert not found["bridge0"].up
    assert found["en2"].addresses == (Address("10.0.0.1", 30),)


def test_settings() -> None:
    assert parsers.parse_rdma_ctl("RDMA: enabled\n") == "enabled"
    assert parsers.parse_rdma_ctl("disabled") == "disabled"
    assert parsers.parse_sleep_minutes(sample("pmset.txt")) == 1
    assert parsers.parse_firewall("Firewall is enabled. (State = 1)\n")
    assert not parsers.parse_firewall("Firewall is disabled. (State = 0)\n")
    assert parsers.parse_firewall("Firewall is enabled")


@pytest.mark.parametrize(
    "parse, wanted",
    [
        (parsers.parse_hardware_ports, "networksetup: wanted lines"),
        (parsers.parse_ifconfig, "ifconfig: wanted lines"),
        (parsers.parse_rdma_ctl, "rdma_ctl status: wanted"),
        (parsers.parse_sleep_minutes, "pmset -g: wanted"),
        (parsers.parse_firewall, "socketfilterfw: wanted"),
    ],
)
def test_unreadable_text_says_so(parse: Callable[[str], Any], wanted: str) -> None:
    for text in ("", "\0\0", "command not found"):
        with pytest.raises(UnreadableError, match=wanted):
            parse(text)


# Mutated text: any result or UnreadableError, soon.

TEXTS = [
    (parsers.parse_thunderbolt, "two_macs_studio.json"),
    (parsers.parse_thunderbolt, "three_macs.json"),
    (parsers.parse_hardware_ports, "hardware_ports_mini.txt"),
    (parsers.parse_ifconfig, "ifconfig_bridge_up.txt"),
    (parsers.parse_sleep_minutes, "pmset.txt"),
]


def mutate(random_: random.Random, text: str) -> str:
    """Cut, repeat, swap or replace a few pieces."""
    for _ in range(random_.randint(1, 6)):
        a, b = sorted(random_.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + 200)
        piece = text[a:b]
        other = random_.choice(
            ["", piece * 3, piece[::-1], "\0", "é\n", "9" * 40, '{"_items" : [', ":", " flags=", "0x"]
        )
        text = (text[:a] + other + text[b:])[:20_000]
    return text


def mutate_json(random_: random.Random, value: Any) -> Any:
    """Replace values by ones of another type, keeping it JSON."""
    if random_.random() < 0.03:
        return random_.choice([None, 0, -1, 1e308, "", "é" * 300, [], {}, [[[]]], {"_items": [7]}, True])
    if isinstance(value, dict):
        return {k: mutate_json(random_, v) for k, v in value.items() if random_.random() > 0.02}
    if isinstance(value, list):
        return [mutate_json(random_, v) for v in value]
    return value


@pytest.mark.parametrize("parse, name", TEXTS)
def test_mutated_text(parse: Callable[[str], Any], name: str) -> None:
    random_, text = random.Random(name), sample(name)
    began, read = time.monotonic(), 0
    for _ in range(600):
        try:
            parse(mutate(random_, text))
            read += 1
        except UnreadableError:
            pass
    assert time.monotonic() - began < 30
    assert read or name.endswith("json")


@pytest.mark.parametrize("name", ["two_macs_studio", "three_macs", "host_behind_dock", "macos_11"])
def test_mutated_values(name: str) -> None:
    random_, value, read = random.Random(name), json.loads(sample(f"{name}.json")), 0
    for _ in range(500):
        try:
            for port in parsers.parse_thunderbolt(json.dumps(mutate_json(random_, value))):
                assert isinstance(port.domain_uuid, str) and isinstance(port.speed_gbps, int)
            read += 1
        except UnreadableError:
            pass
    assert read > 100


@pytest.mark.parametrize(
    "text", ["en0: flags=" * 20_000, "en0: flags=1\n" + "inet " * 100_000, "\tmember: " * 50_000]
)
def test_long_text_takes_no_long_time(text: str) -> None:
    began = time.monotonic()
    with contextlib.suppress(UnreadableError):
        parsers.parse_ifconfig(text)
    assert time.monotonic() - began < 10
