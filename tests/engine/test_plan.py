"""Plans as frames: they come back as they were, and damage is nothing but an error."""

import random

import msgpack
import pytest

from expertd.engine.plan import CatchUp, Lacking, Meeting, Plan, Rows, WindowsPlan, decode_plan
from expertd.errors import RemoteProtocolError
from expertd.split.cut import StepSplit

PLANS = [
    Plan([1], [[1, 2, 3]], False, StepSplit("tokens", (0.5, 0.5)), [1], []),
    Plan([2**40], [[2**31]], True, StepSplit("experts", (0.1, 0.2, 0.7)), [], [1, 2]),
    Plan([3], [list(range(512))], False, StepSplit("solo", (1.0,)), [3], []),
    Plan([7], [[1]], False, StepSplit("solo", (1.0,)), [], [3], [4], [(7, 2**40, 12)], True),
    Plan([4, 5, 6], [[0], [7], [8]], True, StepSplit("experts", (1 / 3, 1 / 3, 1 / 3)), [], []),
]


@pytest.mark.parametrize(
    "plan", [*PLANS, WindowsPlan([[1, 2**31], [3, 4]], StepSplit("tokens", (0.25, 0.75)))]
)
def test_round_trip(plan: Plan | WindowsPlan) -> None:
    again = decode_plan(plan.encode())
    assert again == plan
    assert type(again.split.fractions) is tuple


def test_meetings_come_back_as_they_were() -> None:
    meeting = Meeting({2**60: [3, 2], 1: []}, {2**60: [2**32 - 1, 7], 1: []}, apart=True)
    assert decode_plan(meeting.encode()) == meeting
    for wrong in (
        {"lengths": [1]},
        {"lengths": {"x": [1]}},
        {"lengths": {1: 5}},
        {"lengths": {1: [5]}},
        {"lengths": {1: [5]}, "digests": {1: []}},
        {"lengths": {}, "digests": {}, "more": 1},
    ):
        with pytest.raises(RemoteProtocolError):
            decode_plan(msgpack.packb(wrong))


def test_rows_come_back_as_they_were() -> None:
    rows = Rows(2**60, 7, 2, [("BF16", [1, 2, 2, 64], bytes(range(256)) * 2), ("U32", [1, 2, 2, 0], b"")])
    assert decode_plan(rows.encode()) == rows
    values = msgpack.unpackb(rows.encode())
    for wrong in (
        {"arrays": [["F32", [1]]]},
        {"arrays": [["F32", [1], 5]]},
        {"start": "x"},
        {"num_tokens": None},
    ):
        with pytest.raises(RemoteProtocolError):
            decode_plan(msgpack.packb(values | wrong))


def test_frame_of_a_whole_prefill_chunk_fits_a_slot() -> None:
    """GroupConfig's defaults: 512 tokens of at most five bytes each, 1 MiB."""
    assert (
        len(Plan([1], [[2**31] * 512], False, StepSplit("tokens", (0.25,) * 4), [1], []).encode()) < 1 << 20
    )


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\xc0", b"\x90", b"\x80", b"\x05", b"\xa3abc", PLANS[0].encode()[:-1]]
)
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="rank 0 sent no plan"):
        decode_plan(frame)


@pytest.mark.parametrize(
    "change",
    [
        {"split": None},
        {"split": []},
        {"split": {"name": "solo"}},
        {"more": 1},
        {"split": {"name": 1, "fractions": 2}},
        {"forks": [[1, 2]]},
        {"forks": 1},
    ],
)
def test_other_fields_are_refused(change: dict[str, object]) -> None:
    values = msgpack.unpackb(PLANS[0].encode()) | change
    with pytest.raises(RemoteProtocolError):
        decode_plan(msgpack.packb(values))


def test_missing_fields_are_refused() -> None:
    for name in ("sequence_ids", "tokens", "decode", "split", "started", "released"):
        values = msgpack.unpackb(PLANS[0].encode())
        del values[name]
        with pytest.raises(RemoteProtocolError):
            decode_plan(msgpack.packb(values))


def test_mutated_frames_parse_or_are_refused() -> None:
    rng = random.Random(5)
    num_refused = 0
    others = [
        Rows(1, 7, 2, [("BF16", [1, 2, 2, 4], bytes(range(32))), ("U32", [1, 2, 2, 0], b"")]),
        CatchUp([PLANS[1]], [3], [PLANS[0]]),
        Lacking(5, [[1, 2], [3]], [False, True]),
        Meeting({7: [3, 2]}, {7: [2**32 - 1, 7]}, apart=True),
    ]
    for _ in range(3000):
        data = bytearray(rng.choice([*PLANS[:2], *others]).encode())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode_plan(bytes(data))
        except RemoteProtocolError:
            num_refused += 1
    assert num_refused > 500
