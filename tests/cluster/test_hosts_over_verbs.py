"""`serve` and `join` over verbs, with the provider that has Apple's temper: taken when both can, left when it fails."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.computers import LOOPBACK, answers, computers, follows, in_group
from tests.link.provider_fixture import Fabric
from tests.tiny import make_tiny

pytestmark = pytest.mark.fault

PROMPT = "Hello"


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


@pytest.fixture
def fabric(tmp_path: Path, provider: Path) -> Iterator[Fabric]:
    made = Fabric(tmp_path, provider)
    yield made
    assert made.breaches() == []


def test_verbs_is_taken_and_left_for_tcp_with_its_reason(tmp_path: Path, fabric: Fabric) -> None:
    """One message in a hundred comes twice, which is no reason to leave it: what is double is dropped."""
    model = make_tiny(tmp_path / "model", "qwen3_moe")
    options = ["--verbs-library", str(fabric.library), "--lint-verbs"]
    with computers(tmp_path, "ab") as (a, b):
        a.serve(model, *options, env=fabric.environment(LOOPBACK))
        a.wait(answers)
        solo = a.ask(PROMPT, 40)
        env = fabric.environment(LOOPBACK, "duplicate_rate:10,seed:1")
        b.join(a, "--checkpoint", str(model), *options, env=env)
        health = a.wait(in_group(1))
        assert b.wait(follows)["hosts"]["link"] == "verbs"
        assert (health["hosts"]["link"], health["hosts"]["verbs"]) == ("verbs", "usable")
        for host in (b, a, b):
            assert host.ask(PROMPT, 40) == solo
        assert a.health()["hosts"]["link"] == "verbs"
        os.kill(b.part("link").pid, signal.SIGKILL)
        health = a.wait(lambda h: h["hosts"]["link"] == "tcp" and in_group(1)(h))
        [host] = health["hosts"]["hosts"]
        assert "TCP is used until expertd starts again" in host["verbs"] and host["verbs"] != "usable"
        b.wait(follows)
        assert b.ask(PROMPT, 40) == solo
        assert a.health()["hosts"]["hosts"][0]["verbs"] == host["verbs"]


# The other ends in the same way: both codes are asked of the link itself in tests/link/test_link_verbs.py.
@pytest.mark.parametrize("what", ["loss", pytest.param("corrupt", marks=pytest.mark.soak)])
def test_a_cable_that_loses_or_damages_changes_no_token(tmp_path: Path, fabric: Fabric, what: str) -> None:
    """One per cent of all messages, the self-test's among them."""
    model = make_tiny(tmp_path / "model", "qwen3_moe")
    options = ["--verbs-library", str(fabric.library), "--lint-verbs"]
    with computers(tmp_path, "ab") as (a, b):
        a.serve(model, *options, env=fabric.environment(LOOPBACK))
        a.wait(answers)
        solo = a.ask(PROMPT, 60)
        env = fabric.environment(LOOPBACK, f"{what}_rate:10,seed:1")
        b.join(a, "--checkpoint", str(model), *options, env=env)
        a.wait(in_group(1))
        for _ in range(5):
            assert a.ask(PROMPT, 60) == solo
        health = a.health()["hosts"]
        assert health["link"] == "tcp"
        assert "TCP is used" in health["hosts"][0]["verbs"] or "TCP is used" in health["verbs"]
