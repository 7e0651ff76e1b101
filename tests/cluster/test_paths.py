"""Measuring the ways between hosts: who may measure, what is said of a way that does not work, which one is taken."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from expertd.cluster.host_messages import HostAddress, Measure, PathReport
from expertd.cluster.paths import Paths, best_path
from expertd.topology.collect import collect_host
from tests.cluster.hosts import finish, sockets
from tests.cluster.stub_hosts import LO


@asynccontextmanager
async def listening(secret: bytes) -> AsyncIterator[tuple[Paths, Measure]]:
    """A host that can be measured, and what another one is told to measure it."""
    paths = Paths([i for i in collect_host().interfaces if i.kind == "loopback"], "")
    paths.secret = secret
    paths.open("127.0.0.1")
    try:
        yield paths, Measure("id-a", "a", paths.probe_port, paths.addresses("127.0.0.1"))
    finally:
        await paths.close()


def test_who_knows_the_secret_may_measure_while_strangers_wait_outside() -> None:
    async def main() -> None:
        async with listening(secrets.token_bytes(32)) as (there, message):
            here = Paths(there._interfaces, "")
            here.secret = there.secret
            garbage = b"xdlink01" + secrets.token_bytes(200)
            async with sockets(message.port, 3, garbage), sockets(message.port, 3):
                [report] = await here.measure_to(message)
            assert report.error == "" and report.local.address == report.remote.address == "127.0.0.1"
            assert 0 < report.p50_us <= report.p99_us and report.payload_bytes > 0
            here.secret = secrets.token_bytes(32)
            [report] = await here.measure_to(message)
            assert "does not know" in report.error and report.p50_us == 0

    finish(main())


def test_a_way_that_cannot_be_used_says_why() -> None:
    async def main() -> None:
        async with listening(bytes(32)) as (there, message):
            elsewhere = [replace(i, name="en99") for i in there._interfaces]
            here = Paths(elsewhere, "")
            here.secret = bytes(32)
            [report] = await here.measure_to(message)
            assert "no interface en99" in report.error
            nobody = Paths(there._interfaces, "")
            nobody.secret = bytes(32)
            await there.close()
            [report] = await nobody.measure_to(message)
            assert "refused" in report.error
            assert await nobody.measure_to(replace(message, addresses=[])) == []

    finish(main())


def test_addresses_of_the_loopback_are_for_this_machine_alone() -> None:
    async def main() -> None:
        async with listening(bytes(32)) as (paths, message):
            assert [a.address for a in message.addresses] == ["127.0.0.1"]
            assert paths.addresses("10.0.0.1") == []

    finish(main())


def test_the_fastest_way_is_taken_and_kept_unless_another_is_much_better() -> None:
    other = HostAddress("en1", "wired", "10.0.0.1", 24)
    slow, fast = PathReport(LO, LO, 64, 300.0), PathReport(other, other, 64, 100.0)
    assert best_path([slow, fast]) is fast
    assert best_path([slow, fast], slow) is fast
    assert best_path([replace(slow, p50_us=140.0), fast], slow) == replace(slow, p50_us=140.0)
    assert best_path([slow, replace(fast, error="no answer")], fast) is slow
    assert best_path([replace(slow, error="no answer")]) is None
