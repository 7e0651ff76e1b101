"""CI's share of kill_points.py; `make soak` has the long form."""

import asyncio
from pathlib import Path

import pytest
from stub_group import children

from expertd.cluster import restarts
from tests.cluster.kill_points import group_of, report, storm
from tests.tiny import make_tiny

pytestmark = pytest.mark.fault

NUM_POINTS = 200


@pytest.fixture(autouse=True)
def mailbox() -> None:
    """The real one: this module wants none of the stubs of its neighbours."""


def test_every_stream_has_the_tokens_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "GOOD_LIFE_S", 0.0)  # dying young is no sign of anything here
    group = group_of(make_tiny(tmp_path / "tiny", "qwen3_moe"))
    storms = asyncio.run(storm(group, seed=1, num_points=NUM_POINTS))
    print(report(storms))
    assert [run.wrong for run in storms] == [[], []]
    assert sum(len(run.points) for run in storms) >= NUM_POINTS
    assert all(stream.num_answers for run in storms for stream in run.streams)
    assert children() == []
