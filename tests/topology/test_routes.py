"""Which paths there are, which is taken, when it is changed, and what a host is told about its cables."""

import json
import re
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest

from expertd.topology import parsers_macos as parsers
from expertd.topology.advice import find_problems, has_thunderbolt_5
from expertd.topology.routes import (
    candidate_paths,
    choose_route,
    exchange_us,
    format_dot,
    keep_or_change,
    should_change,
)
from expertd.topology.values import Address, Host, Interface, Measurement, Path, Route, as_json

SAMPLES = FilePath(__file__).parent / "samples"
CABLE = Interface("en2", "thunderbolt", (Address("10.0.0.1", 30), Address("fe80::1", 64)), up=True)
LAN = Interface("en0", "ethernet", (Address("192.168.1.5", 24), Address("2001:db8::5", 64)), up=True)
VPN = Interface("utun4", "vpn", (Address("100.64.0.5", 10),), up=True)
DOWN = Interface("en1", "wifi", (Address("192.168.1.6", 24),), up=False)


def mac(name: str, interfaces: str = "ifconfig_configured", **more: Any) -> Host:
    ports = parsers.parse_hardware_ports((SAMPLES / "hardware_ports_mini.txt").read_text())
    found = parsers.parse_ifconfig((SAMPLES / f"{interfaces}.txt").read_text(), ports)
    thunderbolt = parsers.parse_thunderbolt((SAMPLES / f"{name}.json").read_text(), ports)
    return Host("id", "mini", "Apple M4 Pro", "Darwin 25.2.0 arm64", found, thunderbolt, **more)


def test_paths_are_pairs_on_one_subnet() -> None:
    paths = candidate_paths(
        [CABLE, LAN, VPN, DOWN], ["192.168.1.9", "10.0.0.2", "10.0.0.6", "fe80::2", "2001:db8::9", "no"]
    )
    assert paths == (
        Path("en0", "ethernet", "192.168.1.5", "192.168.1.9"),
        Path("en2", "thunderbolt", "10.0.0.1", "10.0.0.2"),
        Path("en0", "ethernet", "2001:db8::5", "2001:db8::9"),
    )


def test_link_local_ipv4_may_pair_with_several() -> None:
    two = [Interface(f"en{n}", "thunderbolt", (Address(f"169.254.0.{n}", 16),), up=True) for n in (2, 3)]
    assert [p.interface for p in candidate_paths(two, ["169.254.9.9"])] == ["en2", "en3"]


def test_own_address_is_no_path() -> None:
    assert candidate_paths([LAN], ["192.168.1.5"]) == ()


def route(interface: Interface, p50_us: float, bandwidth_mb_s: float = 1000.0) -> Route:
    path = Path(interface.name, interface.kind, interface.addresses[0].ip, "10.0.0.2")
    return Route(path, tuple(Measurement(p50_us, p50_us, bandwidth_mb_s, size, 200) for size in (64, 16384)))


def test_measurement_decides_not_the_name() -> None:
    cable, lan, vpn = route(CABLE, 300), route(LAN, 200), route(VPN, 40_000)
    assert choose_route([vpn, cable, lan], 16384) is lan
    assert choose_route([vpn, cable], 16384) is cable
    assert choose_route([vpn], 16384) is vpn
    assert choose_route([Route(cable.path, failure="refused"), vpn], 16384) is vpn
    assert choose_route([Route(cable.path, failure="refused")], 16384) is None


def test_bandwidth_counts_for_large_payloads() -> None:
    """A link that is quick to answer but narrow loses once the payload is large."""
    quick, wide = route(LAN, 100, bandwidth_mb_s=100), route(CABLE, 300, bandwidth_mb_s=4000)
    assert choose_route([quick, wide], 16384) is quick
    assert choose_route([quick, wide], 1 << 20) is wide


def test_exchange_is_predicted_from_the_nearest_smaller_payload() -> None:
    both = [Measurement(50, 60, 1000, 16384, 9), Measurement(20, 30, 1000, 64, 9)]
    assert exchange_us(both, 16384) == 50
    assert exchange_us(both, 16384 + 1000) == 51  # 1000 bytes at 1000 MB/s
    assert exchange_us(both, 1064) == 21
    assert exchange_us(both, 8) == 20
    assert exchange_us([], 8) == float("inf")


@pytest.mark.parametrize(
    "current_us, other_us, change",
    [(300, 40, True), (100, 60, False), (90, 45, False), (100, 49, True), (95, 46, False), (40, 300, False)],
)
def test_change_needs_twice_and_a_margin(current_us: float, other_us: float, change: bool) -> None:
    assert should_change(current_us, other_us) is change


def test_route_is_kept_unless_another_is_much_better() -> None:
    cable, lan = route(CABLE, 300), route(LAN, 200)
    assert keep_or_change(cable, [cable, lan], 64) is cable
    assert keep_or_change(cable, [cable, route(LAN, 100)], 64) == route(LAN, 100)
    assert keep_or_change(None, [cable, lan], 64) is lan
    assert keep_or_change(cable, [Route(cable.path, failure="no answer"), lan], 64) is lan
    assert keep_or_change(cable, [], 64) is None


# Advice.


def about(host: Host) -> list[str]:
    return [problem.about for problem in find_problems(host)]


def test_bridge_with_two_cables_is_warned_of() -> None:
    host = mac("three_macs", "ifconfig_bridge_up")
    assert about(host) == ["bridge", "address", "address"]
    bridge = find_problems(host)[0]
    assert "bridge0 joins 2 Thunderbolt cables (en2, en3)" in bridge.found
    assert "sudo ifconfig bridge0 down" in bridge.next


def test_bridge_with_one_cable_is_not() -> None:
    host = mac("three_macs", "ifconfig_bridge_up")
    one = replace(host, thunderbolt=host.thunderbolt[:1] + host.thunderbolt[2:])
    assert about(one) == ["address"]


def test_all_is_well() -> None:
    assert about(mac("three_macs")) == []
    assert about(mac("no_cable", "ifconfig_bridge_up")) == []


def test_peer_without_rdma() -> None:
    host = mac("three_macs", rdma_switch="enabled")
    (problem,) = find_problems(host)
    assert "MacBook Pro, on en3, offers no RDMA" in problem.found and "rdma_ctl enable" in problem.next
    assert about(mac("thunderbolt_4", rdma_switch="enabled")) == []  # no cure there: it cannot


def test_thunderbolt_5() -> None:
    assert has_thunderbolt_5(mac("no_cable"))
    assert not has_thunderbolt_5(mac("thunderbolt_4"))


def test_both_ends_are_told_addresses_of_one_subnet() -> None:
    commands = []
    for name in ("two_macs_laptop", "two_macs_studio"):
        (problem,) = find_problems(mac(name, "ifconfig_bridge_up"))
        found = re.fullmatch(r"sudo ifconfig en\d inet ([\d.]+) netmask 255.255.255.252", problem.next)
        assert found
        commands.append(found[1])
    assert commands[0] != commands[1]
    assert Address(commands[0], 30).holds(commands[1])


# Output.


def test_dot_joins_hosts_by_their_ports() -> None:
    laptop, studio = mac("two_macs_laptop"), replace(mac("two_macs_studio"), name='st"udio\n')
    text = format_dot([laptop, studio], [route(CABLE, 21.6), Route(route(LAN, 1).path, failure="refused")])
    assert text.count("h0 -- h1") == 1 and 'label="en2 80 Gb/s"' in text
    assert 'label="st\\"udio\\n' in text
    assert 'h0 -- "10.0.0.2" [style=dotted label="en2 (thunderbolt) 22 us"];' in text
    assert text.startswith("graph topology {") and text.endswith("}\n")


def test_dot_shows_hosts_known_by_their_cable() -> None:
    text = format_dot([mac("three_macs")])
    assert 'label="Mac Studio" style=dashed' in text and 'label="MacBook Pro" style=dashed' in text


def test_json_holds_everything() -> None:
    host = mac("three_macs")
    value = json.loads(json.dumps(as_json(host)))
    assert value["thunderbolt"][0]["peer_name"] == "Mac Studio"
    assert value["interfaces"][2]["addresses"][1] == {"ip": "192.168.1.20", "prefix_length": 24}
