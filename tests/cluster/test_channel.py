"""The control channel over loopback: who gets in, what ends it, and what strangers can do to it."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hosts import (
    LOOPBACK,
    Host,
    Proxy,
    call,
    finish,
    logged,
    make_host,
    pair,
    sockets,
    unchecked_context,
    until,
)

from expertd.cluster import channel as channels
from expertd.cluster import tls
from expertd.cluster.channel import Channel, Heartbeat, Server, connect, listen
from expertd.cluster.identity import make_peer
from expertd.errors import ClusterError, LinkDown, LocalProtocolError, RemoteProtocolError
from expertd.wire import Codec


@dataclass(frozen=True)
class Ping:
    number: int
    data: bytes = b""


@dataclass(frozen=True)
class Pong:
    number: int


codec = Codec(Ping | Pong, 1 << 20)


@dataclass
class Listening:
    server: Server
    opened: list[Channel] = field(default_factory=list)
    got: list[Any] = field(default_factory=list)
    ended: list[Exception] = field(default_factory=list)

    async def serve(self, channel: Channel) -> None:
        """Answer each Ping until the channel ends."""
        self.opened.append(channel)
        try:
            while True:
                message = await channel.receive()
                self.got.append(message)
                await channel.send(Pong(message.number))
        except (LinkDown, RemoteProtocolError) as e:
            self.ended.append(e)


@asynccontextmanager
async def listening(host: Host, **options: Any) -> AsyncIterator[Listening]:
    found = Listening(None)  # type: ignore[arg-type]
    async with listen(LOOPBACK, 0, host.identity, host.store, codec, found.serve, **options) as found.server:
        yield found


async def join(host: Host, to: Listening, name: str = "studio", **options: Any) -> Channel:
    peer = host.store.find(name)
    return await connect(LOOPBACK, to.server.port, host.identity, peer, codec, **options)


async def ask(channel: Channel, number: int) -> None:
    await channel.send(Ping(number))
    assert await channel.receive() == Pong(number)


@pytest.fixture
def a(tmp_path: Path) -> Host:
    return make_host(tmp_path, "studio")


@pytest.fixture
def b(tmp_path: Path, a: Host) -> Host:
    host = make_host(tmp_path, "mini")
    pair(a, host)
    return host


def test_messages_both_ways_and_who_is_there(a: Host, b: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def work() -> None:
        async with listening(a) as at, await join(b, at, local_address="127.0.0.1") as channel:
            for number in range(20):
                await ask(channel, number)
            await channel.send(Ping(20, bytes(900_000)))
            assert await channel.receive() == Pong(20)
            assert channel.peer.host_id == a.identity.host_id
            assert at.opened[0].peer.host_id == b.identity.host_id
            assert channel.local_address == channel.remote_address == at.opened[0].remote_address == LOOPBACK
            assert channel._writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert str(at.ended[0]) == "host mini: closed the connection"
        assert "PRIVATE" not in logged(caplog.records)

    finish(work())


def test_idle_channel_lives_by_heartbeats_alone(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a, silence_s=0.4) as at, await join(b, at, silence_s=0.4) as channel:
            await asyncio.sleep(1.0)
            await ask(channel, 1)
            assert at.got == [Ping(1)] and not at.ended

    finish(work())


def test_unpaired_is_refused_and_told_while_a_paired_one_goes_on(
    a: Host, b: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_host(tmp_path, "stranger")
    stranger.store.add(b.store.find("studio"))

    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            for number in range(3):
                with pytest.raises(
                    ClusterError, match=r"host studio at .* does not know this machine: run `expertd"
                ):
                    await join(stranger, at)
                await ask(channel, number)
            assert len(at.opened) == 1 and not at.ended

    finish(work())
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == [f"control channel: {LOOPBACK} {channels._STRANGER}"]  # three refusals, one line


def test_caller_without_a_certificate_or_with_an_old_tls_is_refused(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at:
            reader, writer = await call(at.server.port, unchecked_context())
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                assert await reader.read(1)
            await tls.close(writer)
            old = tls.make_context(False, b.identity, b.store.peers())
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(LinkDown):
                await call(at.server.port, old)
            assert not at.opened

    finish(work())


def test_certificate_that_tls_took_is_looked_up_once_more(
    a: Host, b: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should OpenSSL ever take more than the paired certificates: the list has the last word."""
    other = make_host(tmp_path, "other").identity
    lax = tls.make_context(True, a.identity, [make_peer(other.name, other.certificate, "")])
    monkeypatch.setattr(Server, "_context", lambda _: lax)

    async def work() -> None:
        async with listening(a) as at:
            reader, writer = await call(at.server.port, tls.make_context(False, other, b.store.peers()))
            assert await reader.read(1) == b"" and not at.opened
            await tls.close(writer)

    finish(work())


def test_host_paired_while_serving_may_join_and_a_removed_one_is_cut_off(
    a: Host, b: Host, tmp_path: Path
) -> None:
    late = make_host(tmp_path, "late")

    async def work() -> None:
        async with listening(a) as at, await join(b, at) as stays:
            pair(a, late)
            async with await join(late, at) as channel:
                await ask(channel, 1)
                a.store.remove("late")
                with pytest.raises(LinkDown, match="host studio: closed the connection"):
                    await channel.receive()
            assert str(at.ended[0]) == "host late: was removed from the paired hosts"
            with pytest.raises(ClusterError, match="does not know this machine"):
                await join(late, at)
            await ask(stays, 2)

    finish(work())


def test_disconnect_ends_the_channels_of_one_host(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            await ask(channel, 1)
            at.server.disconnect("0" * 16)
            await ask(channel, 2)
            at.server.disconnect(b.identity.host_id, "was told to go")
            with pytest.raises(LinkDown):
                await channel.receive()
            await until(lambda: at.ended)
            assert str(at.ended[0]) == "host mini: was told to go"

    finish(work())


def test_writing_to_a_peer_that_has_ended(a: Host, b: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A host that was stopped meanwhile has a lot to say at once; asyncio warns of each message it drops."""

    async def work(turns: int) -> None:
        async with listening(a) as at, await join(b, at) as channel:
            await ask(channel, 1)
            at.server.disconnect(b.identity.host_id)
            for _ in range(turns):
                await asyncio.sleep(0)
            with suppress(LinkDown):  # before its end has come, and long after it, all is well
                for number in range(20):
                    await channel.send(Ping(number))

    for turns in range(12):
        finish(work(turns))
    assert "SSL connection is closed" not in logged(caplog.records)


def test_damaged_list_of_hosts_leaves_open_channels_alone(
    a: Host, b: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "REVIEW_S", 0.02)

    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            (tmp_path / "studio" / "peers.json").write_text("{")
            await asyncio.sleep(0.1)
            await ask(channel, 1)
            with pytest.raises(LinkDown):
                await join(b, at)

    finish(work())
    text = logged(caplog.records)
    assert text.count("not a list of paired hosts") == 2 and "Traceback" not in text


def test_another_machine_at_the_address_is_named(a: Host, b: Host, tmp_path: Path) -> None:
    other = make_host(tmp_path, "other")

    async def work() -> None:
        async with listening(other) as at:
            words = (
                r"another identity than the one paired on \d{4}-\d\d-\d\d; .*`expertd hosts remove studio`"
            )
            with pytest.raises(ClusterError, match=words):
                await join(b, at)
        async with listening(a) as at, Proxy(other.identity, at.server.port).run() as port:
            with pytest.raises(ClusterError, match="another identity"):
                await connect(LOOPBACK, port, b.identity, b.store.find("studio"), codec)

    finish(work())


@asynccontextmanager
async def raw(a: Host, b: Host, at: Listening) -> AsyncIterator[asyncio.StreamWriter]:
    """A caller that is paired and then does what it likes."""
    context = tls.make_context(False, b.identity, b.store.peers())
    reader, writer = await call(at.server.port, context)
    assert await reader.read(100) == codec.extended(Heartbeat).encode(Heartbeat())
    yield writer
    await tls.close(writer)


def test_silent_peer_is_noticed_whether_or_not_somebody_receives(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a, silence_s=0.3) as at, raw(a, b, at):
            await until(lambda: at.ended)
        assert str(at.ended[0]) == "host mini: nothing heard for 0.3 s"

    async def unread() -> None:
        async def wait(channel: Channel) -> None:
            opened.append(channel)
            await until(lambda: channel._down)

        opened: list[Channel] = []
        async with listen(LOOPBACK, 0, a.identity, a.store, codec, wait, silence_s=0.3) as server:
            async with raw(a, b, Listening(server)):
                await until(lambda: opened and opened[0]._down)
            with pytest.raises(LinkDown, match=r"nothing heard for 0\.3 s"):
                await opened[0].send(Ping(1))

    finish(work())
    finish(unread())


def test_own_loop_that_stood_still_is_not_the_peers_silence(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a, silence_s=0.4) as at, await join(b, at, silence_s=0.4) as channel:
            await ask(channel, 1)
            for _ in range(2):
                time.sleep(0.6)
                await asyncio.sleep(0.15)
            await ask(channel, 2)
            assert not at.ended

    finish(work())


def test_slow_sender_is_understood(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at, raw(a, b, at) as writer:
            for byte in codec.encode(Ping(7)):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.005)
            await until(lambda: at.got == [Ping(7)])

    finish(work())


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc", b"\x00\x00\x00\x00"])
def test_bytes_that_are_no_message_end_the_channel(a: Host, b: Host, data: bytes) -> None:
    async def work() -> None:
        async with listening(a) as at, raw(a, b, at) as writer:
            writer.write(data)
            await until(lambda: at.ended)
            assert isinstance(at.ended[0], RemoteProtocolError) and str(at.ended[0]).startswith(
                "host mini: sent what"
            )

    finish(work())


def test_message_too_long_for_the_peer_is_our_mistake(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            with pytest.raises(
                LocalProtocolError, match="a Ping has 1048603 bytes, at most 1048576 are allowed"
            ):
                await channel.send(Ping(1, bytes(1 << 20)))
            with pytest.raises(KeyError):
                await channel.send("text")
            await ask(channel, 2)

    finish(work())


def test_peer_that_takes_nothing_is_given_up(a: Host, b: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "SEND_TIMEOUT_S", 0.2)

    async def deaf(channel: Channel) -> None:
        await until(channel._writer.is_closing)

    async def work() -> None:
        listener = listen(LOOPBACK, 0, a.identity, a.store, codec, deaf, silence_s=60)
        async with listener as server, await join(b, Listening(server)) as channel:
            with pytest.raises(LinkDown, match=r"host studio: took nothing for 0\.2 s"):
                for number in range(200):
                    await channel.send(Ping(number, bytes(1 << 19)))

    finish(work())


def test_owner_that_does_not_read_is_not_the_peers_silence(a: Host, b: Host) -> None:
    got: list[Any] = []

    async def slow(channel: Channel) -> None:
        await until(lambda: not channel._reading())
        await asyncio.sleep(0.6)
        while len(got) < 4:
            got.append((await channel.receive()).number)

    async def work() -> None:
        listener = listen(LOOPBACK, 0, a.identity, a.store, codec, slow, silence_s=0.3)
        async with listener as server, await join(b, Listening(server)) as channel:
            for number in range(4):
                await channel.send(Ping(number, bytes(1 << 19)))
            await until(lambda: got == [0, 1, 2, 3])

    finish(work())


def test_receive_may_be_cancelled_and_loses_nothing(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            for number in range(30):
                await channel.send(Ping(number))
            got: list[Any] = []
            while len(got) < 30:
                try:
                    async with asyncio.timeout(0.001):
                        got.append(await channel.receive())
                except TimeoutError:
                    pass
            assert got == [Pong(n) for n in range(30)]

    finish(work())


def test_two_hundred_strangers_leave_a_channel_and_a_new_one_alone(
    a: Host, b: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with listening(a) as at, await join(b, at) as channel:
            port = at.server.port
            async with sockets(port, 100) as silent, sockets(port, 100, b"GET / HTTP/1.1\r\n\r\n" * 100):
                for number in range(50):
                    await ask(channel, number)
                async with await join(b, at) as second:
                    await ask(second, 99)
                await until(lambda: num_strangers(at) <= tls.MAX_STRANGERS)
                assert len(silent) == 100 and not at.ended[1:]
            await ask(channel, 100)

    finish(work())
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def num_strangers(at: Listening) -> int:
    return sum("Door._run" in repr(t) for t in asyncio.all_tasks()) - len(at.opened) + len(at.ended)


def test_silent_stranger_is_given_up(a: Host, b: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def work() -> None:
        async with listening(a) as at, sockets(at.server.port, 3):
            await until(lambda: sum("Door._run" in repr(t) for t in asyncio.all_tasks()) == 3)
            await until(lambda: not any("Door._run" in repr(t) for t in asyncio.all_tasks()))

    finish(work())


def test_warnings_are_bounded(a: Host, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(a.identity, a.store, codec, lambda c: asyncio.sleep(0), 1)
    for number in range(10_000):
        server._refused(f"fd00::{number:x}", ConnectionResetError())
    assert len(server._warned) == len(caplog.records) == channels.MAX_WARNED


def test_owner_that_fails_takes_nothing_else_down(a: Host, b: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(channel: Channel) -> None:
        await channel.receive()
        raise ClusterError("the owner's reason")

    async def work() -> None:
        async with listen(LOOPBACK, 0, a.identity, a.store, codec, fail) as server:
            for _ in range(2):
                async with await join(b, Listening(server)) as channel:
                    await channel.send(Ping(1))
                    with pytest.raises(LinkDown, match="closed the connection"):
                        await channel.receive()

    finish(work())
    assert [r.getMessage() for r in caplog.records] == ["control channel: the owner's reason"] * 2


def test_server_that_ends_closes_its_channels(a: Host, b: Host) -> None:
    async def work() -> None:
        async with listening(a) as at:
            channel = await join(b, at)
            await ask(channel, 1)
        with pytest.raises(LinkDown, match="host studio: closed the connection"):
            await channel.receive()
        with pytest.raises(LinkDown, match="host studio: closed"):
            await channel.send(Ping(1))
        await channel.close()
        await channel.close()
        with pytest.raises(LinkDown, match=r"connection refused: nothing listens there\. Is `expertd serve`"):
            await join(b, at)

    finish(work())


def test_listener_that_never_lets_us_in(b: Host) -> None:
    async def work() -> None:
        with tls.listen_on(LOOPBACK, 0) as silent:
            peer, port = b.store.find("studio"), silent.getsockname()[1]
            with pytest.raises(LinkDown, match=r"no answer in time\. Is `expertd serve` running on studio"):
                await connect(LOOPBACK, port, b.identity, peer, codec, timeout_s=0.2)

    finish(work())
