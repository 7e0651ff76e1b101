"""A host that has joined, as its leader sees it: the far end of a control channel, with the calls of a site."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypeVar

from expertd.cluster.channel import Channel
from expertd.cluster.host_messages import (
    Connect,
    Ended,
    Held,
    Hold,
    Join,
    Linked,
    Loaded,
    Measure,
    Measured,
    PathReport,
    Prepare,
    Prepared,
    Ranks,
    Running,
    Start,
    Stop,
)
from expertd.cluster.site import SetupFailed
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Cancel, Failed, Rejected, Submit
from expertd.errors import BusyError, ClusterError, ConfigError, ExpertdError
from expertd.link.messages import LinkReport

# The far link process has its own, shorter deadline; this one is for a host that answers nothing at all.
ANSWER_TIMEOUT_S = 30.0
MEASURE_TIMEOUT_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Member:
    """`changed` is called when this host may take part now or no longer can; `ended` when an epoch ended on it."""

    def __init__(
        self,
        channel: Channel,
        join: Join,
        cluster: Cluster,
        changed: Callable[[], None],
        ended: Callable[["Member", Ended], None],
    ) -> None:
        self.channel, self.join = channel, join
        self.host_id, self.name = channel.peer.host_id, channel.peer.name
        self.num_ranks = 0
        self.state, self.reason = "loading", "it has just joined"
        self.verbs = join.verbs
        self.paths: dict[str, list[PathReport]] = {}
        self.reports: list[LinkReport] = []
        self._cluster, self._changed, self._ended = cluster, changed, ended
        self._answers: dict[tuple[type, Any], asyncio.Future[Any]] = {}
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._pause_s, self._paused_until = FIRST_PAUSE_S, 0.0

    @property
    def is_ready(self) -> bool:
        return self.state == "ready" and self.num_ranks > 0 and self.pause_left_s == 0

    @property
    def pause_left_s(self) -> float:
        """Seconds for which this host is still left out."""
        return max(0.0, self._paused_until - time.monotonic())

    def pause(self, reason: str) -> float:
        """Leave this host out for a while, longer each time; gives the seconds."""
        pause_s, self.reason = self._pause_s, reason
        self._paused_until = time.monotonic() + pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s

    def went_well(self) -> None:
        self._pause_s = FIRST_PAUSE_S

    def describe(self) -> dict[str, Any]:
        """In plain values, for /health."""
        left_s = self.pause_left_s if self.state == "ready" else 0
        return {
            "name": self.name,
            "host_id": self.host_id,
            "state": "paused" if left_s else self.state,
            "pause_left_s": round(left_s, 1),
            "reason": self.reason,
            "ranks": self.num_ranks,
            "verbs": self.verbs or "usable",
            "paths": {host_id: [asdict(p) for p in paths] for host_id, paths in self.paths.items()},
            "links": [asdict(r) for r in self.reports],
        }

    # The calls of a site.

    async def prepare(self, prepare: Prepare) -> int:
        answer = await self._ask(prepare, Prepared, prepare.epoch)
        return answer.port

    async def connect(self, connect: Connect) -> list[LinkReport]:
        answer = await self._ask(connect, Linked, connect.epoch)
        self.reports = answer.reports
        return self.reports

    async def start(self, start: Start) -> None:
        await self._ask(start, Running, start.epoch)

    async def stop(self, epoch: int, reason: str) -> None:
        await self.channel.send(Stop(epoch, reason))

    async def measure(self, measure: Measure) -> list[PathReport]:
        """Let this host measure every path to another one."""
        answer = await self._ask(measure, Measured, measure.host_id, MEASURE_TIMEOUT_S)
        self.paths[measure.host_id] = answer.paths
        return answer.paths

    async def _ask(self, message: Any, answer: type[_T], key: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> _T:
        future = asyncio.get_running_loop().create_future()
        self._answers[answer, key] = future
        try:
            await self.channel.send(message)
            async with asyncio.timeout(timeout_s):
                found: _T = await future
                return found
        except TimeoutError:
            raise SetupFailed(f"host {self.name} did not answer within {timeout_s:g} s") from None
        finally:
            self._answers.pop((answer, key), None)

    # What the host says.

    def take(self, message: Any) -> None:
        """Act on one message. Raises ConfigError for one that has no place in this conversation."""
        if isinstance(message, Prepared | Linked | Running):
            self._answer(type(message), message.epoch, message)
        elif isinstance(message, Measured):
            self._answer(Measured, message.host_id, message)
        elif isinstance(message, Loaded):
            self.num_ranks, self.state, self.reason = message.num_ranks, "ready", ""
            requests = self._cluster.requests
            requests.copies.add(self.host_id, self.channel.send, requests.kept.all())
            self._changed()
        elif isinstance(message, Ranks):
            self.num_ranks, self.reason = message.num_ranks, message.reason
            self._changed()
        elif isinstance(message, Ended):
            self._fail_setup(message)
            self._ended(self, message)
        elif isinstance(message, Held):
            self._cluster.requests.copies.held(self.host_id, message.number)
        elif isinstance(message, Hold):
            self._cluster.requests.hold(message)
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            if task := self._requests.get(message.request_id):
                task.cancel()
        else:
            raise ConfigError(f"host {self.name} sent {type(message).__name__}, which has no place here")

    def _answer(self, kind: type, key: Any, message: Any) -> None:
        future = self._answers.get((kind, key))
        if future and not future.done():
            future.set_result(message)

    def _fail_setup(self, ended: Ended) -> None:
        for (_, key), future in self._answers.items():
            if key == ended.epoch and not future.done():
                future.set_exception(SetupFailed(ended.reason, ended.host))

    # Requests of this host's own clients, which the leader's engine answers.

    def _submit(self, submit: Submit) -> None:
        if submit.request_id in self._requests or submit.logits_file:
            raise ConfigError(f"host {self.name} sent a request that cannot be carried out for another host")
        task = asyncio.create_task(self._answer_request(submit))
        self._requests[submit.request_id] = task
        task.add_done_callback(lambda _: self._requests.pop(submit.request_id, None))

    async def _answer_request(self, submit: Submit) -> None:
        try:
            try:
                async with aclosing(self._cluster.requests.carry(submit, self.host_id)) as events:
                    async for event in events:
                        await self.channel.send(event)
            except (ConfigError, BusyError) as e:
                await self.channel.send(Rejected(submit.request_id, str(e), isinstance(e, BusyError)))
            except ClusterError as e:
                # Lost with our ranks: the host may go on without us.
                await self.channel.send(Failed(submit.request_id, str(e), self._cluster.failure is not None))
        except ExpertdError as e:  # the channel itself: whoever reads it sees the same
            _log.debug("request %s of host %s: %s", submit.request_id, self.name, e)

    def leave(self, reason: str) -> None:
        """The channel is gone: nobody here waits for this host any longer."""
        self.num_ranks, self.state, self.reason = 0, "gone", reason
        self._cluster.requests.copies.remove(self.host_id)
        self.reports = []
        for future in self._answers.values():
            if not future.done():
                future.set_exception(SetupFailed(reason))
        for task in self._requests.values():
            task.cancel()
