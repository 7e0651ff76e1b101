"""An idle group that works, that hangs, and that has nobody to answer."""

import asyncio

import pytest

from expertd.cluster import probe as probe_module
from expertd.cluster.probe import Probe
from expertd.engine.messages import Submit
from expertd.errors import ClusterError
from tests.cluster.answering import Leaders, Paced
from tests.cluster.hosts import finish, until


@pytest.fixture(autouse=True)
def _hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IDLE_S": 0.05, "TIMEOUT_S": 0.1, "AGAIN_S": 0.01, "LOOK_S": 0.01}.items():
        monkeypatch.setattr(probe_module, name, value)


def test_an_idle_group_is_asked_and_a_busy_one_is_not() -> None:
    async def main() -> None:
        a = Paced(allowed=100)
        probe = Probe(a.requests)
        task = asyncio.create_task(probe.run())
        before = probe.last_step_at
        await until(lambda: len(a.asked) == 2)
        assert probe.failure == "" and probe.last_step_at > before
        assert {(s.max_tokens, s.ignore_end) for s in a.asked} == {(1, True)}
        await until(lambda: a.requests.num_open == 0)
        a.allow(0)
        events = a.requests.generate(Submit("r", prompt="x"))
        await anext(events)
        asked = len(a.asked)
        await asyncio.sleep(0.15)  # three times the idleness
        assert len(a.asked) == asked
        task.cancel()
        await events.aclose()
        await a.requests.close()

    finish(main())


def test_a_step_that_does_not_end_is_said_until_one_does() -> None:
    async def main() -> None:
        a = Paced(allowed=0)
        probe = Probe(a.requests)
        task = asyncio.create_task(probe.run())
        await until(lambda: probe.failure)
        assert probe.failure == "a step of one token has not ended within 0.1 s"
        a.allow(10**6)
        await until(lambda: not probe.failure)
        task.cancel()
        await a.requests.close()

    finish(main())


def test_nobody_to_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        a = Leaders(*[ClusterError("nobody answers")] * 1000)
        probe = Probe(a.requests)
        task = asyncio.create_task(probe.run())
        await until(lambda: probe.failure)
        assert probe.failure == "a step of one token failed: nobody answers"
        probe.stepped()
        assert probe.failure == ""
        task.cancel()

    finish(main())


def test_open_requests_without_a_step_are_an_ailment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "STUCK_S", 0.0)

    async def main() -> None:
        a = Paced(allowed=1)
        probe = Probe(a.requests)
        assert probe.failure == ""
        events = a.requests.generate(Submit("r", prompt="x"))
        await anext(events)
        assert probe.failure == "no step for 0 s with 1 requests open"
        await events.aclose()
        await a.requests.close()

    finish(main())
