"""Sums of what the leader reports, quantiles of its waits, and the list of what happened."""

import pytest

from expertd.cluster.record import MAX_EVENTS, Record, quantile_s
from expertd.engine.messages import Load, Stats, Steps


def test_reports_add_up() -> None:
    record = Record()
    assert record.split_of(decode=True) is None
    record.hear(
        Stats(steps=[Steps("solo", True, 1, 2, 0.5)], waits=[1, 2], loads=[Load(3, [1])], waited_s=0.5)
    )
    last = Stats(
        num_running=4,
        steps=[
            Steps("solo", True, 2, 3, 0.25),
            Steps("experts", True, 7, 7, 1.0),
            Steps("tokens", False, 1, 9, 1.0),
        ],
        waits=[0, 1, 5],
        waited_s=0.25,
        loads=[Load(3, [1, 2]), Load(4, [1])],
    )
    record.hear(last)
    assert record.latest == last
    assert record.steps["solo", True] == Steps("solo", True, 3, 5, 0.75)
    assert (record.waits, record.waited_s) == ([1, 3, 5], 0.75)
    assert record.loads == {3: [2, 2], 4: [1]}
    assert (record.split_of(decode=True), record.split_of(decode=False)) == ("experts", "tokens")
    record.hear(Stats())
    assert record.split_of(decode=True) == "experts"  # of the last work
    record.latest = None
    assert record.split_of(decode=True) is None


def test_quantiles_lie_in_their_bucket() -> None:
    assert quantile_s([], 0.5) is None and quantile_s([0, 0], 0.5) is None
    assert quantile_s([8, 0, 2], 0.5) == 0.0
    assert quantile_s([0] * 10 + [4], 0.5) == pytest.approx(768e-9)
    assert quantile_s([98, *[0] * 9, 1, 1], 0.99) == pytest.approx(1024e-9)


def test_events_are_bounded_and_a_consequence_is_told_once() -> None:
    record = Record()
    record.happened("died", "rank 1 died")
    record.happened("ended", "rank 1 died")
    assert [(e.number, e.kind) for e in record.events] == [(1, "died")]
    assert record.num_events == {"died": 1, "ended": 1}
    for i in range(2 * MAX_EVENTS):
        record.happened("begun", f"epoch {i}")
    assert [e.kind for e in record.events] == ["died", *["begun"] * MAX_EVENTS]
    assert record.events[-1].number == 2 * MAX_EVENTS + 2
