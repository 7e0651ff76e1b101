"""Pairing over loopback: the right code, the wrong one, and everybody who has none."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hosts import LOOPBACK, Host, Proxy, call, finish, logged, make_host, sockets, unchecked_context

from expertd.cluster import pairing, tls
from expertd.cluster.identity import Peer
from expertd.cluster.pairing import Code, Confirm, Hello, Refused, Stored, Welcome, codec, offer, pair_with
from expertd.errors import ClusterError, ConfigError, ExpertdError, LinkDown, RemoteProtocolError


@dataclass
class Offer:
    task: "asyncio.Task[Peer]"
    port: int
    code: Code
    notices: list[str] = field(default_factory=list)


@asynccontextmanager
async def offering(host: Host, code: Code | None = None, valid_s: float = 60) -> AsyncIterator[Offer]:
    listener, notices = tls.listen_on(LOOPBACK, 0), list[str]()
    code = code or Code()
    work = offer(host.identity, host.store, listener, code, notices.append, valid_s)
    port = listener.getsockname()[1]
    task = asyncio.create_task(work)
    try:
        yield Offer(task, port, code, notices)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def a(tmp_path: Path) -> Host:
    return make_host(tmp_path, "studio")


@pytest.fixture
def b(tmp_path: Path) -> Host:
    return make_host(tmp_path, "mini")


def wrong(code: Code) -> str:
    return f"{(int(code.text.replace('-', '')) + 1) % 10**8:08d}"


async def join(host: Host, port: int, code: str) -> Peer:
    return await pair_with(host.identity, host.store, LOOPBACK, port, code)


def test_right_code_pairs_both(a: Host, b: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def work() -> None:
        async with offering(a) as offered:
            assert len(offered.code.text) == 9 and offered.code.text[4] == "-"
            peer = await join(b, offered.port, f" {offered.code.text} ")
            assert (peer.name, peer.host_id) == ("studio", a.identity.host_id)
            back = await offered.task
            assert (back.name, back.host_id, back.address) == ("mini", b.identity.host_id, LOOPBACK)
            assert a.store.peers() == [back] and b.store.peers() == [peer]
            for secret in (offered.code.text, offered.code.text.replace("-", ""), "PRIVATE KEY"):
                assert secret not in logged(caplog.records) + repr(offered.code) + "".join(offered.notices)

    finish(work())


def test_wrong_code_three_times_voids_it(a: Host, b: Host) -> None:
    async def work() -> None:
        async with offering(a) as offered:
            for words in (
                r"wrong code.*\(2 tries left\)",
                r"wrong code.*\(1 tries left\)",
                "code is void after 3",
            ):
                with pytest.raises(ClusterError, match=words):
                    await join(b, offered.port, wrong(offered.code))
            with pytest.raises(ConfigError, match=r"void after 3 wrong tries\. Run `expertd pair` again"):
                await offered.task
            assert len(offered.notices) == 3 and a.store.peers() == b.store.peers() == []

    finish(work())


def test_right_code_after_two_wrong_ones(a: Host, b: Host) -> None:
    async def work() -> None:
        async with offering(a) as offered:
            for _ in range(2):
                with pytest.raises(ClusterError, match="wrong code"):
                    await join(b, offered.port, wrong(offered.code))
            await join(b, offered.port, offered.code.text)
            assert (await offered.task).name == "mini"

    finish(work())


def test_tries_of_many_connections_at_once_are_counted_together(a: Host, b: Host) -> None:
    """Ten guesses that are all past Welcome when the first one confirms: three are compared, no more."""

    async def work() -> None:
        async with offering(a) as offered:
            guesses = [join(b, offered.port, wrong(offered.code)) for _ in range(10)]
            errors = await asyncio.gather(*guesses, return_exceptions=True)
            assert all(isinstance(e, ClusterError | LinkDown) for e in errors), errors
            assert offered.code.tries_left == 0 and len(offered.notices) >= 3
            assert sum("wrong code" in str(e) for e in errors) <= 2
            with pytest.raises(ConfigError, match="void"):
                await offered.task

    finish(work())


def test_code_is_compared_only_while_valid() -> None:
    now = [0.0]
    code = Code(600, lambda: now[0])
    assert code.attempt(b"x", b"y") == "wrong" and code.spent() == ""
    now[0] = 599.9
    assert code.spent() == ""
    now[0] = 600.0
    assert code.spent() == "expired" and code.attempt(b"y", b"y") == "expired"
    fresh = Code()
    assert fresh.attempt(b"y", b"y") == "" and fresh.attempt(b"y", b"y") == "used" == fresh.spent()
    guessed = Code()
    assert [guessed.attempt(b"x", b"y") for _ in range(4)] == ["wrong", "wrong", "void", "void"]
    assert guessed.attempt(b"y", b"y") == "void"
    assert len({Code().text for _ in range(50)}) > 45


def test_expired_code_is_refused_and_the_offer_ends(a: Host, b: Host) -> None:
    async def work() -> None:
        async with offering(a, Code(-1)) as offered:
            with pytest.raises(ClusterError, match=r"the code has expired\. Run `expertd pair` there again"):
                await join(b, offered.port, offered.code.text)
        async with offering(a, valid_s=0.05) as offered:
            with pytest.raises(ConfigError, match="nobody paired within"):
                await offered.task

    finish(work())


def test_machine_in_the_middle_fails_on_both_sides(a: Host, b: Host, tmp_path: Path) -> None:
    middle = make_host(tmp_path, "middle").identity

    async def work() -> None:
        async with offering(a) as offered:
            async with Proxy(middle, offered.port).run() as port:
                with pytest.raises(ClusterError, match="another machine is in between"):
                    await join(b, port, offered.code.text)
            assert "gave a wrong code" in offered.notices[0] and offered.code.tries_left == 2
            # It may as well answer by itself; it cannot know the key.
            forged = codec.encode(Confirm(bytes(32)))
            refusal = len(codec.encode(Refused("wrong", 1, pairing.expertd.__version__)))

            def forge(way: str, data: bytes) -> bytes:
                return forged if way == "down" and len(data) == refusal else data

            async with Proxy(middle, offered.port, forge).run() as port:
                with pytest.raises(ClusterError, match="could not prove that it knows the code"):
                    await join(b, port, offered.code.text)
            assert not offered.task.done() and a.store.peers() == b.store.peers() == []

    finish(work())


def test_replayed_bytes_are_worth_nothing(a: Host, b: Host, tmp_path: Path) -> None:
    """Whoever recorded a caller's messages (here even in the clear) sends them again, under the same code."""

    async def work() -> None:
        async with offering(a) as offered:
            proxy = Proxy(
                a.identity, offered.port
            )  # knows even the listener's key, so that the pairing works
            async with proxy.run() as port:
                await join(b, port, offered.code.text)
            await offered.task
        code = Code()
        code._digits = offered.code._digits
        a.store.remove("mini")
        async with offering(a, code) as again:
            reader, writer = await call(again.port, unchecked_context())
            writer.write(proxy.seen["up"])
            answers = await messages(reader)
            assert [type(m) for m in answers] == [Welcome, Refused] and again.code.tries_left == 2
            await tls.close(writer)
            assert a.store.peers() == []

    finish(work())


async def messages(reader: asyncio.StreamReader) -> list[object]:
    decoder, found = codec.decoder(), list[object]()
    while data := await reader.read(4096):
        found += decoder.feed(data)
        if isinstance(found[-1], Refused):
            break
    return found


def strange_frames(host: Host) -> list[bytes]:
    rng = random.Random(7)
    hello = Hello(pairing.PROTOCOL, "0", "x", host.identity.certificate, b"A" + bytes(32))
    frames = [
        codec.encode(Hello(hello.protocol, "0", "x", hello.certificate, spake))
        for spake in (b"", b"A", b"B" + bytes(32), b"A" + b"\xff" * 32, b"A" + bytes(32), b"A" * 3000)
    ]
    frames += [codec.encode(Hello(hello.protocol, "0", "x", bad, b"A")) for bad in (b"", b"x" * 300)]
    frames += [
        codec.encode(m) for m in (Confirm(b""), Stored(), Refused("wrong", 0, ""), Welcome("", "", b""))
    ]
    frames += [b"\xff" * 8, (1 << 30).to_bytes(4, "big"), b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(4000)]
    return frames


def test_strangers_do_not_disturb_a_good_caller(a: Host, b: Host) -> None:
    async def work() -> None:
        async with (
            offering(a) as offered,
            sockets(offered.port, 80),
            sockets(offered.port, 20, b"\x16\x03x\n"),
        ):
            writers = []
            for frame in strange_frames(b):
                reader, writer = await call(offered.port, unchecked_context())
                writer.write(frame)
                writers.append(writer)
                assert await reader.read(1) == b""  # refused at once, not after a timeout
            assert not offered.task.done() and offered.code.tries_left == 3
            await join(b, offered.port, offered.code.text)
            await offered.task
            for writer in writers:
                await tls.close(writer)

    finish(work())


def test_other_protocol_is_named(a: Host) -> None:
    async def work() -> None:
        async with offering(a) as offered:
            reader, writer = await call(offered.port, unchecked_context())
            writer.write(codec.encode(Hello(99, "9.9", "x", b"", b"")))
            assert await messages(reader) == [Refused("protocol", 3, pairing.expertd.__version__)]
            await tls.close(writer)

    finish(work())


def test_silent_caller_is_given_up(a: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "READ_TIMEOUT_S", 0.1)

    async def work() -> None:
        async with offering(a) as offered:
            reader, writer = await call(offered.port, unchecked_context())
            writer.write(b"\x00\x00")  # and never the rest
            assert await reader.read(1) == b""
            await tls.close(writer)

    finish(work())


@pytest.mark.parametrize("text", ["", "9876", "9876-543", "987654321", "abcd-efgh", "１２３４-5678"])
def test_code_that_is_none_is_refused_before_any_call(b: Host, text: str) -> None:
    with pytest.raises(ConfigError, match="wanted the 8 digits") as e:
        asyncio.run(join(b, 1, text))
    assert not text or text not in str(e.value)


def test_calling_oneself_or_nobody(a: Host, b: Host) -> None:
    async def work() -> None:
        async with offering(a) as offered:
            with pytest.raises(ConfigError, match="this is the machine itself"):
                await join(a, offered.port, offered.code.text)
        with pytest.raises(LinkDown, match=r"port \d+: connection refused: nothing listens there\. Run"):
            await join(b, offered.port, offered.code.text)

    finish(work())


def test_port_in_use(a: Host) -> None:
    with tls.listen_on("", 0) as taken, pytest.raises(ConfigError, match=r"--port \d+: the port is in use"):
        tls.listen_on("", taken.getsockname()[1])


def test_caller_lost_at_the_end_is_reported(a: Host, b: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener stores nobody who has not stored it."""

    async def work() -> None:
        async with offering(a) as offered:
            monkeypatch.setattr(pairing, "Stored", lambda: (_ for _ in ()).throw(LinkDown("cable")))
            with pytest.raises(LinkDown, match="cable"):
                await join(b, offered.port, offered.code.text)
            with pytest.raises(ClusterError, match="mini knew the code but was gone"):
                await offered.task
            assert a.store.peers() == []

    finish(work())


def test_no_error_of_the_peer_escapes(a: Host, b: Host) -> None:
    """A listener that answers Hello with anything: the caller gets an ExpertdError."""
    answers = [*strange_frames(a), codec.encode(Welcome("", "\x1b[31m", b"B" + bytes(32))), b""]
    answers += [
        codec.encode(Refused(reason, 1, "\x1b[0m")) for reason in ("wrong", "void", "no such", "protocol")
    ]

    async def serve(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: str, admit: tls.Admit
    ) -> None:
        await reader.read(4096)
        writer.write(answers[-1])

    async def work() -> None:
        context = tls.make_context(True, a.identity, [])
        context.verify_mode = tls.ssl.CERT_NONE
        listener = tls.listen_on(LOOPBACK, 0)
        async with tls.Door(listener, lambda: context, serve, lambda a, e: None) as door:
            while answers:
                with pytest.raises(ExpertdError) as e:
                    await join(b, door.port, "12345678")
                assert "\x1b" not in str(e.value) and type(e.value) in (
                    ClusterError,
                    LinkDown,
                    RemoteProtocolError,
                )
                answers.pop()

    finish(work())
    assert b.store.peers() == []
