import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The stubs are imported by name here, and by the ranks that are started with our sys.path.
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

import stub_group


@pytest.fixture(autouse=True)
def stub_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stub_group.use_stub(monkeypatch.setattr)
    yield
    assert stub_group.children() == [], "a test left processes behind"
