"""Whom the leader lets in, when it forms an epoch, whom it blames, and what it says of it; without a network."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

import expertd
from expertd.cluster import member as member_module
from expertd.cluster.epoch import EpochEnded
from expertd.cluster.host_messages import (
    PROTOCOL,
    Bye,
    Connect,
    Ended,
    Hold,
    Loaded,
    Measure,
    Measured,
    Prepare,
    Ranks,
    Refused,
    Stop,
    Welcome,
)
from expertd.cluster.leader import Leader
from expertd.cluster.route_table import RouteTable
from expertd.cluster.site import LinkSettings
from expertd.engine.messages import Submit
from tests.cluster.answering import EVENTS, Leaders
from tests.cluster.hosts import finish, until
from tests.cluster.stub_hosts import FACTS, JOIN, WELCOME, StubChannel, StubCluster, StubSite, good_host

HELLO = replace(JOIN, version=expertd.__version__)


class Lead:
    """A leader among stubs."""

    def __init__(self, verbs: str = "") -> None:
        self.cluster = StubCluster()
        paths: Any = type("P", (), {"probe_port": 1, "addresses": lambda self, near: []})()
        routes = RouteTable(paths, "id-a", "a")
        nothing: Any = None
        cluster: Any = self.cluster
        self.leader = Leader(cluster, WELCOME, FACTS, nothing, routes, verbs, LinkSettings())
        self.site = StubSite(self.cluster)
        self.leader._site = cast(Any, self.site)
        self._admitted: list[asyncio.Task[None]] = []

    def join(self, channel: StubChannel, join: Any = HELLO) -> StubChannel:
        channel.say(join)
        self._admitted.append(asyncio.create_task(self.leader.admit(cast(Any, channel))))
        return channel

    def host(self, name: str = "b") -> dict[str, Any]:
        found = [h for h in self.leader.describe()["hosts"] if h["name"] == name]
        return found[-1] if found else {}

    async def formed(self, *names: str) -> None:
        await until(lambda: all(self.host(n).get("state") == "in the group" for n in names))

    @property
    def said(self) -> dict[str, Any]:
        return self.leader.describe()


@asynccontextmanager
async def leading(verbs: str = "no device") -> AsyncIterator[Lead]:
    lead = Lead(verbs)
    try:
        yield lead
    finally:
        await lead.leader.close("done")
        await asyncio.gather(*lead._admitted)


def but(kind: type, answer: Any) -> Callable[[Any], Any]:
    """A good host, but for its answer to `kind`; None: it says nothing."""
    return lambda m: answer if isinstance(m, kind) else good_host(m)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"protocol": 99}, ("protocol 99", f"has {PROTOCOL}")),
        ({"version": "0.0.9"}, ("expertd 0.0.9", f"has {expertd.__version__}")),
        ({"mlx": "0.1"}, ("mlx 0.1", "has 1.0")),
    ],
)
def test_another_version_is_refused_with_both(change: dict[str, Any], names: tuple[str, str]) -> None:
    async def main() -> None:
        async with leading() as lead:
            channel = lead.join(StubChannel(), replace(HELLO, **change))
            await until(lambda: channel.is_closed)
            [refused] = channel.sent
            assert isinstance(refused, Refused) and all(n in refused.reason for n in names)
            assert lead.said["hosts"] == []

    finish(main())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"config_hash": "0" * 64}, ("0" * 64, "f" * 64)),
        ({"content_hash": "0" * 64}, ("0" * 64, "c" * 64)),
        ({"dtype": "bfloat16"}, ("bfloat16", "float32")),
        ({"architecture": "gpu: applegpu"}, ("gpu: applegpu", "cpu: x86_64", "alone (solo)")),
        ({"kernels": "mlx"}, ("kernels is mlx", "leader's is native")),
        ({"activation_bits": 8}, ("activation bits is 8", "leader's is 16")),
        ({"num_ranks": 4}, ("4 ranks", "has 5", "most is 4")),
    ],
)
def test_an_unlike_host_stays_alone(change: dict[str, Any], names: tuple[str, ...]) -> None:
    async def main() -> None:
        async with leading() as lead:
            channel = lead.join(StubChannel(answer=but(Welcome, replace(FACTS, **change))))
            await until(lambda: channel.saw(Refused))
            [refused] = channel.saw(Refused)
            assert all(n in refused.reason for n in names), refused
            assert not channel.is_closed and channel.saw(Prepare) == []
            assert (lead.host()["state"], lead.host()["reason"]) == ("alone", refused.reason)

    finish(main())


def test_what_is_kept_is_copied_to_those_who_joined_and_waits_for_none_who_left() -> None:
    async def main() -> None:
        async with leading() as lead:
            b = lead.join(StubChannel("b", good_host))
            c = lead.join(StubChannel("c", but(Hold, None)))
            await lead.formed("b", "c")
            lead.cluster.lead_by(Leaders())
            requests = lead.cluster.requests
            events = requests.generate(Submit("r", prompt="x", keep=True))
            first = asyncio.create_task(anext(events))
            await until(lambda: b.saw(Hold) and c.saw(Hold))
            await asyncio.sleep(0)
            assert not first.done()
            c.hang_up()
            assert [await first, *[e async for e in events]] == EVENTS
            assert {copy.request_id for hold in b.saw(Hold) for copy in hold.copies} == {"r"}

    finish(main())


def test_verbs_only_when_everybody_can() -> None:
    async def main() -> None:
        async with leading(verbs="") as lead:
            b = lead.join(StubChannel("b", good_host))
            await lead.formed("b")
            c = lead.join(StubChannel("c", good_host), replace(HELLO, name="c", verbs="no port is up"))
            await lead.formed("b", "c")
            assert [m.kind for m in b.saw(Prepare)] == ["verbs", "tcp"]
            assert [m.kind for m in c.saw(Prepare)] == ["tcp"]
            assert lead.host("c")["verbs"] == "no port is up" and lead.said["link"] == "tcp"

    finish(main())


def test_a_link_that_fails_is_left_out_and_tried_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "FIRST_PAUSE_S", 0.05)

    async def main() -> None:
        async with leading(verbs="") as lead:
            b = lead.join(StubChannel("b", good_host))
            await lead.formed("b")
            epoch = lead.said["epoch"]
            b.say(Ended(epoch, 0, "running", "the port went down"))
            await until(lambda: lead.host()["state"] == "paused")
            assert lead.host()["reason"] == "the port went down" and lead.host()["pause_left_s"] >= 0
            assert "ended, says host b: the port went down" in lead.said["last_change"]
            await until(lambda: ("alone", 0) in lead.site.calls)
            assert ("stop", epoch) in lead.site.calls
            await lead.formed("b")
            assert b.saw(Prepare)[-1].kind == "tcp" and b.saw(Stop)
            assert lead.host()["verbs"].startswith("the port went down (TCP is used")
            await until(lambda: lead.host()["reason"] == "")  # once all have started

    finish(main())


def test_who_says_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module.Member._ask, "__defaults__", (0.1,))

    async def main() -> None:
        async with leading() as lead:
            lead.join(StubChannel("b", good_host))
            await lead.formed("b")
            lead.join(StubChannel("c", but(Connect, None)), replace(HELLO, name="c"))
            await until(lambda: lead.host("c").get("state") == "paused")
            assert lead.host("c")["reason"] == "host c did not answer within 0.1 s"
            # The epoch without it was not left for it.
            await lead.formed("b")
            assert [call for call in lead.site.calls if call[0] == "start"] == [("start", 1)]

    finish(main())


def test_a_host_that_cannot_measure_holds_up_only_itself() -> None:
    async def main() -> None:
        async with leading() as lead:
            lead.join(StubChannel("b", but(Measure, Measured("id-a", []))))
            lead.join(StubChannel("c", good_host), replace(HELLO, name="c"))
            await lead.formed("c")
            assert lead.host("b")["state"] == "paused"
            assert "no way from host b to host a works" in lead.host("b")["reason"]

    finish(main())


def test_four_hosts_at_most_and_one_of_them_may_come_again() -> None:
    async def main() -> None:
        async with leading() as lead:
            for name in "bcd":
                lead.join(StubChannel(name, good_host), replace(HELLO, name=name))
            await lead.formed("b", "c", "d")
            late = lead.join(StubChannel("e"), replace(HELLO, name="e"))
            await until(lambda: late.is_closed)
            assert "4 hosts are in this group already" in late.sent[0].reason
            again = lead.join(StubChannel("d", good_host), replace(HELLO, name="d"))
            await until(lambda: bool(again.saw(Prepare)))
            await lead.formed("b", "c", "d")
            assert len([h for h in lead.said["hosts"] if h["name"] == "d" and h["state"] != "gone"]) == 1

    finish(main())


def test_why_a_host_left_stays_visible_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with leading() as lead:
            for _ in range(3):
                channel = lead.join(StubChannel("b"))
                channel.say(Bye("disk: 1.0 GB free, wanted 2.0 GB"))
                await until(lambda channel=channel: channel.is_closed)  # type: ignore[misc]
            assert lead.host()["state"] == "gone"
            assert lead.host()["reason"] == "host b: disk: 1.0 GB free, wanted 2.0 GB"
            lead.join(StubChannel("b", good_host))
            await lead.formed("b")

    with caplog.at_level(logging.WARNING, "expertd"):
        finish(main())
    assert [r.getMessage() for r in caplog.records if "left" in r.getMessage()] == [
        "host b left: disk: 1.0 GB free, wanted 2.0 GB"
    ]


def test_fruitless_epochs_end_in_being_alone() -> None:
    async def main() -> None:
        async with leading() as lead:
            lead.join(StubChannel("b", good_host))
            await lead.formed("b")
            await lead.leader.changed(EpochEnded(1, "diverged", 3))
            await until(lambda: lead.cluster.running and ("alone", 0) in lead.site.calls)
            assert lead.host()["state"] == "paused"
            assert lead.host()["reason"] == "3 epochs failed without a token: diverged"

    finish(main())


def test_a_rank_that_dies_there_is_counted_out() -> None:
    async def main() -> None:
        async with leading() as lead:
            two: Loaded = replace(FACTS, num_ranks=2)
            b = lead.join(StubChannel("b", but(Welcome, two)))
            await lead.formed("b")
            b.say(Ranks(1, "rank 2 died"))
            b.say(Ended(lead.said["epoch"], -1, "running", "rank 2 died"))
            await until(lambda: b.saw(Prepare)[-1].num_ranks == [1, 1] or lead.host()["state"] == "paused")
            await until(lambda: b.saw(Prepare)[-1].num_ranks == [1, 1])
            assert b.saw(Prepare)[0].num_ranks == [1, 2]

    finish(main())


def test_nonsense_ends_the_conversation() -> None:
    async def main() -> None:
        async with leading() as lead:
            channel = lead.join(StubChannel("b", good_host))
            await lead.formed("b")
            channel.say(Stop(1, "no"))
            await until(lambda: channel.is_closed)
            assert lead.host()["state"] == "gone" and "Stop, which has no place here" in lead.host()["reason"]

    finish(main())
