"""Discovery on the loopback interface, and what strangers may announce."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hosts import LOOPBACK, finish, make_host, pair

import expertd
from expertd.cluster import discovery
from expertd.cluster.discovery import Found, announce, find


def test_announced_hosts_are_found_until_they_end(tmp_path: Path) -> None:
    me, friend, stranger = (make_host(tmp_path, name) for name in ("me", "friend", "stranger"))
    pair(me, friend)

    async def work() -> None:
        async with (
            announce(friend.identity, 7420, "org/model", [LOOPBACK]),
            announce(stranger.identity, 7421, "x" * 300, [LOOPBACK]),
            announce(me.identity, 7422, "mine", [LOOPBACK]),
        ):
            found: list[Found] = []
            while len(found) < 2:
                found = await find(1.5, me.store, me.identity.host_id, [LOOPBACK])
        version = expertd.__version__
        assert found == [
            Found("friend", friend.identity.host_id, [LOOPBACK], 7420, version, "org/model", True),
            Found("stranger", stranger.identity.host_id, [LOOPBACK], 7421, version, "x" * 200, False),
        ]
        assert await find(0.3, me.store, "", [LOOPBACK]) == []

    probe_multicast()
    finish(work())


def probe_multicast() -> None:
    """Containers without multicast on the loopback interface cannot run this."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        member = socket.inet_aton("224.0.0.251") + socket.inet_aton(LOOPBACK)
        try:
            receiver.bind(("", 0))
            receiver.settimeout(1)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
            receiver.sendto(b"x", ("224.0.0.251", receiver.getsockname()[1]))
            receiver.recv(1)
        except OSError as e:
            pytest.skip(f"no multicast on {LOOPBACK}: {e}")


def test_no_multicast_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery, "AsyncZeroconf", refuse)
    me = make_host(tmp_path, "me")

    async def work() -> None:
        async with announce(me.identity, 7420, "demo"):
            assert await find(0.1, me.store) == []

    finish(work())
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "name hosts by their address" in caplog.text


def test_registration_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(discovery.AsyncZeroconf, "async_register_service", refuse)
    me = make_host(tmp_path, "me")

    async def work() -> None:
        async with announce(me.identity, 7420, "demo", [LOOPBACK]):
            await asyncio.sleep(0.05)

    finish(work())
    assert "this host cannot be announced" in caplog.text


def info(**values: Any) -> Any:
    port, addresses = values.pop("port", 1), values.pop("addresses", ["10.0.0.1"])
    good = {"id": "0123456789abcdef", "name": "x", "version": "1", "model": "m"}
    return SimpleNamespace(
        decoded_properties=good | values, parsed_scoped_addresses=lambda: addresses, port=port
    )


def test_what_strangers_announce_is_cleaned_or_dropped() -> None:
    wild = discovery._read(info(name="\x1b[2Jevil\n", version="\x1b[0m", model="a\x07\n" + "b" * 999), set())
    assert wild and (wild.name, wild.version, wild.paired) == ("2Jevil", "0m", False)
    assert wild.model.isprintable() and len(wild.model) <= 200
    assert discovery._read(info(), {"0123456789abcdef"}).paired  # type: ignore[union-attr]
    for bad in ({"id": ""}, {"id": None}, {"id": "0123456789ABCDEF"}, {"id": "\x1b" * 16}, {"port": 0}):
        assert discovery._read(info(**bad), set()) is None
    assert discovery._read(info(addresses=[]), set()) is None


def test_own_addresses_are_usable_ones_and_ipv4_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def address(text: str) -> Any:
        return SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text)

    cards = {
        "lo0": ["127.0.0.1", "::1"],
        "bridge0": ["169.254.10.1", "fe80::1%bridge0"],
        "en0": ["fd00::2", "192.168.1.5"],
        "en1": ["192.168.9.9"],
    }
    status = {name: SimpleNamespace(isup=name != "en1") for name in cards}
    everything = {name: [address(a) for a in all_] for name, all_ in cards.items()}
    monkeypatch.setattr(discovery.psutil, "net_if_addrs", lambda: everything)
    monkeypatch.setattr(discovery.psutil, "net_if_stats", lambda: status)
    assert discovery.own_addresses() == ["192.168.1.5", "169.254.10.1", "fd00::2"]
