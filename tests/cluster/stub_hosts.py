"""Stand-ins for what Leader and Joiner talk to: clusters without ranks, sites without links, channels alone."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from expertd.cluster.epoch import Layout
from expertd.cluster.host_messages import (
    PROTOCOL,
    Bye,
    Connect,
    Held,
    Hold,
    HostAddress,
    Join,
    Linked,
    Loaded,
    Measure,
    Measured,
    PathReport,
    Prepare,
    Prepared,
    Running,
    Start,
    Welcome,
)
from expertd.cluster.requests import Requests
from expertd.config import GroupConfig
from expertd.errors import LinkDown
from expertd.link.messages import LinkReport

LO = HostAddress("lo", "loopback", "127.0.0.1", 8)
FACTS = Loaded(1, "c" * 64, "f" * 64, "1.0", "cpu: x86_64", "native", 16, "float32")
WELCOME = Welcome("tiny", "c" * 64, "f" * 64, [], {"link": "auto"}, bytes(32))
JOIN = Join(PROTOCOL, "0", "1.0", "b", [LO], 1, "")


class StubCluster:
    """What a site and a coordinator need of a Cluster. `layouts` are the epochs begun."""

    def __init__(self, num_ranks: int = 1) -> None:
        self.group = GroupConfig("", num_ranks)
        self.living = [SimpleNamespace(id=i, number=i) for i in range(num_ranks)]
        self.layouts: list[Layout] = []
        self.running = True
        self.failure: str | None = None
        self.mlx_link = ""
        self.leader: Any = None
        self.requests = Requests(self.find_leader)
        self.coordinator: Any = None
        self._failed = asyncio.Event()

    @property
    def epoch(self) -> int:
        return len(self.layouts)

    async def begin(self, layout: Layout, leader: Any = None) -> None:
        self.layouts.append(layout)
        self.running = True
        self.lead_by(leader)

    def lead_by(self, leader: Any) -> None:
        self.leader = leader

    async def find_leader(self, patient: bool) -> Any:
        while self.leader is None:
            await asyncio.sleep(0)
        return self.leader

    def end_epoch(self, reason: str) -> None:
        self.running = False

    def fail(self, reason: str) -> None:
        self.failure, self.living, self.running = reason, [], False
        self._failed.set()

    async def wait_failed(self) -> str:
        await self._failed.wait()
        return str(self.failure)


class StubSite:
    """The leader's own host: everything works at once. `calls` are the names and epochs of the calls."""

    def __init__(self, cluster: StubCluster) -> None:
        self.cluster, self.calls = cluster, list[tuple[str, int]]()
        self.num_ranks, self.started = 1, 0

    async def prepare(self, prepare: Prepare) -> int:
        self.calls.append((f"prepare {prepare.kind}", prepare.epoch))
        return 1

    async def connect(self, connect: Connect) -> list[LinkReport]:
        return []

    async def start(self, start: Start) -> None:
        self.calls.append(("start", start.epoch))
        self.started = start.epoch
        self.cluster.running = True

    async def stop(self, epoch: int, reason: str) -> None:
        self.calls.append(("stop", epoch))
        if epoch == self.started:
            self.cluster.running = False

    async def alone(self, split: str, shares: Any = ()) -> None:
        self.calls.append(("alone", 0))
        self.started = 0
        self.cluster.running = True

    async def close(self) -> None:
        self.calls.append(("close", 0))


class StubChannel:
    """One end of a channel to host `name`: `sent` is what we said; `say` lets the other end speak, `hang_up` leave."""

    def __init__(self, name: str = "b", answer: Callable[[Any], Any] = lambda message: None) -> None:
        self.peer = SimpleNamespace(name=name, host_id=f"id-{name}")
        self.local_address = "127.0.0.1"
        self.sent: list[Any] = []
        self.is_closed = False
        self._answer, self._heard = answer, asyncio.Queue[Any]()

    def say(self, message: Any) -> None:
        self._heard.put_nowait(message)

    def hang_up(self, reason: str = "closed the connection") -> None:
        self.say(LinkDown(f"host {self.peer.name}: {reason}"))

    async def send(self, message: Any) -> None:
        if self.is_closed:
            raise LinkDown(f"host {self.peer.name}: closed")
        self.sent.append(message)
        if (answer := self._answer(message)) is not None:
            self.say(answer)

    async def receive(self) -> Any:
        message = await self._heard.get()
        if isinstance(message, LinkDown):
            raise message
        return message

    async def close(self) -> None:
        self.is_closed = True
        self.hang_up("this side closed the channel")

    def saw(self, kind: type) -> list[Any]:
        return [m for m in self.sent if isinstance(m, kind)]


def good_host(message: Any) -> Any:
    """What a host answers with which all is well."""
    if isinstance(message, Welcome):
        return FACTS
    if isinstance(message, Measure):
        return Measured(message.host_id, [PathReport(LO, LO, 64, 5.0, 9.0, 100.0)])
    if isinstance(message, Prepare):
        return Prepared(message.epoch, 1)
    if isinstance(message, Hold):
        return Held(message.number)
    if isinstance(message, Connect):
        return Linked(message.epoch, [])
    return Running(message.epoch) if isinstance(message, Start) else None


def byes(channel: StubChannel) -> list[str]:
    return [m.reason for m in channel.saw(Bye)]
