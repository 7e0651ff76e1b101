"""Folders as /sys shows them, and what psutil gives."""

import random
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertd.topology import parsers_linux as parsers
from expertd.topology.parsers_psutil import parse_interfaces
from expertd.topology.values import Address, Interface, RdmaDevice

IPV4_GID = "0000:0000:0000:0000:0000:ffff:0a00:0005"
ROCE = {
    "ports/1/state": "4: ACTIVE\n",
    "ports/1/gids/0": "fe80:0000:0000:0000:0000:5eff:fe10:0001\n",
    "ports/1/gids/1": f"{IPV4_GID}\n",
    "ports/1/gids/2": "0000:0000:0000:0000:0000:0000:0000:0000\n",
    "ports/1/gid_attrs/ndevs/0": "thunderbolt0\n",
    "ports/1/gid_attrs/ndevs/1": "thunderbolt0\n",
}
HOST_ON_A_CABLE = {
    "domain0/uevent": "",
    "0-0/authorized": "1\n",
    "0-0/unique_id": "d8030000-0070-6508-a3e2-a5c5a8212023\n",
    "0-1/unique_id": "c3010000-0070-7708-a3a7-a5c5a8212023\n",
    "0-1/device_name": "Mac mini\n",
    "0-1/rx_speed": "20.0 Gb/s\n",
    "0-1/rx_lanes": "2\n",
    "0-1.0/key": "network\n",
    "0-1.0/net/thunderbolt0/mtu": "65520\n",
    "0-1.1/key": "rdma\n",
    "1-3/authorized": "1\n",  # a dock
}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_infiniband(tmp_path: Path) -> None:
    write(tmp_path / "class/infiniband/rxe0", ROCE)
    write(tmp_path / "class/infiniband/rxe1", {"ports/1/state": "1: DOWN\n"})
    write(tmp_path / "class/infiniband/not_a_device", {"x": ""})
    assert parsers.read_infiniband(tmp_path) == (
        RdmaDevice("rxe0", "thunderbolt0", "active", ("10.0.0.5",)),
        RdmaDevice("rxe1", "", "down", ()),
    )


def test_thunderbolt(tmp_path: Path) -> None:
    write(tmp_path / "bus/thunderbolt/devices", HOST_ON_A_CABLE)
    (port,) = parsers.read_thunderbolt(tmp_path)
    assert (port.interface, port.speed_gbps, port.peer_name) == ("thunderbolt0", 40, "Mac mini")
    assert port.domain_uuid.startswith("d803") and port.peer_uuid.startswith("c301")
    assert port.connected and port.offers_rdma


def test_nothing_there(tmp_path: Path) -> None:
    assert parsers.read_infiniband(tmp_path) == ()
    assert parsers.read_thunderbolt(tmp_path) == ()
    assert parsers.read_interface_kind(tmp_path, "eth0") == "other"
    assert parsers.read_bridge_members(tmp_path, "br0") == ()


@pytest.mark.parametrize(
    "tree, files", [("class/infiniband/rxe0", ROCE), ("bus/thunderbolt/devices", HOST_ON_A_CABLE)]
)
def test_damaged_folders(tmp_path: Path, tree: str, files: dict[str, str]) -> None:
    """Files missing, cut, or full of other bytes; devices that vanish leave links to nowhere."""
    random_ = random.Random(tree)
    for n in range(60):
        damaged: dict[str, str | bytes] = {}
        for name, text in files.items():
            choice = random_.randrange(5)
            if choice:
                damaged[name] = text if choice > 2 else random_.randbytes(random_.randrange(64)) * choice
        root = tmp_path / str(n)
        folder = write(root / tree, damaged)
        (folder / "0-5").symlink_to(root / "gone")
        assert isinstance(parsers.read_infiniband(root), tuple)
        assert isinstance(parsers.read_thunderbolt(root), tuple)


@pytest.mark.parametrize("gid", ["", "::", "fe80::1", "::ffff:999.1.1.1", "0" * 5000, "::ffff:10.0.0.1%en0"])
def test_gid_without_ipv4(gid: str) -> None:
    assert parsers.mapped_ipv4(gid) in ("", "10.0.0.1")


def test_kinds(tmp_path: Path) -> None:
    net = tmp_path / "class/net"
    write(net / "lo", {"type": "772\n"})
    write(net / "wlan0", {"type": "1\n", "wireless/x": ""})
    write(net / "br0", {"type": "1\n", "bridge/x": "", "brif/eth0/x": "", "brif/thunderbolt0/x": ""})
    write(net / "tun0", {"type": "65534\n"})
    write(net / "tap0", {"type": "1\n", "tun_flags": "0x1002\n"})
    write(net / "ifb0", {"type": "1\n"})
    write(tmp_path / "devices/pci/net", {"x": ""})
    write(tmp_path / "bus/thunderbolt/drivers/thunderbolt-net", {"x": ""})
    write(tmp_path / "devices/xd", {"x": ""})
    (tmp_path / "devices/xd/driver").symlink_to(tmp_path / "bus/thunderbolt/drivers/thunderbolt-net")
    for name, device in (("eth0", "pci"), ("thunderbolt0", "xd")):
        write(net / name, {"type": "1\n"})
        (net / name / "device").symlink_to(tmp_path / "devices" / device)
    assert {n: parsers.read_interface_kind(tmp_path, n) for n in sorted(p.name for p in net.iterdir())} == {
        "br0": "bridge",
        "eth0": "ethernet",
        "ifb0": "other",
        "lo": "loopback",
        "tap0": "vpn",
        "thunderbolt0": "thunderbolt",
        "tun0": "vpn",
        "wlan0": "wifi",
    }
    assert parsers.read_bridge_members(tmp_path, "br0") == ("eth0", "thunderbolt0")


def entry(family: Any, address: str, netmask: str | None = None) -> Any:
    return SimpleNamespace(family=family, address=address, netmask=netmask)


def test_psutil() -> None:
    addresses = {
        "en0": [
            entry(socket.AF_INET, "192.168.1.5", "255.255.255.0"),
            entry(socket.AF_INET6, "fe80::1%en0", "ffff:ffff:ffff:ffff::"),
            entry(socket.AF_INET6, "::2", None),
            entry(18, "02:00:5e:10:00:01"),
            entry(socket.AF_INET, "not an address", "255.0.0.0"),
            entry(socket.AF_INET, "10.0.0.1", "no mask"),
        ],
        "en7": [],
    }
    stats = {
        "en0": SimpleNamespace(mtu=1500, isup=True, speed=1000),
        "en8": SimpleNamespace(mtu=9, isup=False, speed=-1),
    }
    assert parse_interfaces(addresses, stats, lambda name: "ethernet") == (
        Interface(
            "en0",
            "ethernet",
            (Address("192.168.1.5", 24), Address("fe80::1", 64), Address("::2", 128)),
            1500,
            True,
            1000,
        ),
        Interface("en7", "ethernet"),
        Interface("en8", "ethernet", (), 9, False, 0),
    )
