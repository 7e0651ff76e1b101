"""A connection stays where it was put, or is refused."""

import socket
from collections.abc import Iterator

import psutil
import pytest

from expertd.topology.pin import RouteError, bind_to_route, check_route, interface_of, source_for

LOOPBACK = interface_of("127.0.0.1")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A connection over the loopback, its first end bound to the interface before it connected."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as ours:
        bind_to_route(ours, "127.0.0.1", LOOPBACK)
        ours.connect(server.getsockname())
        theirs, _ = server.accept()
        with theirs:
            yield ours, theirs


def test_bound_connection_passes_at_both_ends(pair: Pair) -> None:
    for end in pair:
        check_route(end, "127.0.0.1", LOOPBACK)
    pair[0].sendall(b"x")
    assert pair[1].recv(1) == b"x"


def test_other_interface_is_refused(pair: Pair) -> None:
    message = rf"the connection to 127.0.0.1 leaves over {LOOPBACK} \(127.0.0.1\), wanted en5 \(10.0.0.1\)"
    with pytest.raises(RouteError, match=message):
        check_route(pair[1], "10.0.0.1", "en5")


def test_address_on_another_interface_is_refused(pair: Pair) -> None:
    with pytest.raises(RouteError, match=r"leaves over eth7 \(127.0.0.1\), wanted lo9"):
        check_route(pair[0], "127.0.0.1", "lo9", owner=lambda ip: "eth7")


def test_route_over_another_interface_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket has the right address, but may not be bound to the interface, and the table routes elsewhere."""
    monkeypatch.setattr("expertd.topology.pin._bind_to_interface", lambda sock, interface: False)
    check_route(pair[0], "127.0.0.1", LOOPBACK)
    monkeypatch.setattr("expertd.topology.pin.source_for", lambda remote: "192.168.1.5")
    owners = {"127.0.0.1": "en5", "192.168.1.5": "eth0"}
    with pytest.raises(
        RouteError, match=r"to 127.0.0.1 leaves over eth0 \(192.168.1.5\), wanted en5 \(127.0.0.1\)"
    ):
        check_route(pair[0], "127.0.0.1", "en5", owner=lambda ip: owners[ip])


def test_what_is_not_there_is_named() -> None:
    with socket.socket() as sock:
        with pytest.raises(RouteError, match=r"no interface en99. Run `expertd topology`"):
            bind_to_route(sock, "127.0.0.1", "en99")
        with pytest.raises(RouteError, match=rf"cannot bind to 203.0.113.1 on {LOOPBACK}: "):
            bind_to_route(sock, "203.0.113.1", LOOPBACK)


def test_owners() -> None:
    assert interface_of("127.0.0.77") == LOOPBACK != ""
    assert interface_of("203.0.113.1") == ""
    assert source_for("127.0.0.1") == "127.0.0.1"
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert interface_of(entry.address) == name
