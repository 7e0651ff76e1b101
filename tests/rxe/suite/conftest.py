"""These tests need hosts with RDMA devices: `make rxe` makes them, everywhere else they are skipped."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import netns

IN_GUEST = "XD_RXE_HOSTS" in os.environ
HERE = Path(__file__).parent
_passed: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not IN_GUEST:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs hosts with RDMA devices: make rxe"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In the guest, a run in which nothing passed is a failure: there the tests have all they need."""
    if IN_GUEST and not _passed and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def net() -> Iterator[netns.Net]:
    """The guest's hosts; their cables are whole again after each test, and no process is left."""
    made = netns.Net.from_dict(json.loads(os.environ["XD_RXE_HOSTS"]))
    yield made
    for host in range(len(made.hosts)):
        made.netem(host, "")
        made.join(host)
        assert made.processes(host) == []
