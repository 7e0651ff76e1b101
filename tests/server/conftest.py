import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The stubs are imported by name here, and by the ranks that are started with our sys.path.
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

import stub_group

from expertd.cluster import supervisor


@pytest.fixture(autouse=True)
def stub_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stub = stub_group.StubMailbox()
    monkeypatch.setattr(supervisor, "RANK_MODULE", "stub_rank")
    monkeypatch.setattr(supervisor, "load_mailbox", lambda: stub)
    yield
    assert stub_group.children() == [], "a test left processes behind"
