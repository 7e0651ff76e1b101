"""Keys and values are copied while that takes a small part of what reading the tokens would."""

import pytest

from expertd.engine.copies import TIMES_FASTER, Copies
from expertd.engine.plan import Rows

SLOT = 1 << 20
ROW = SLOT * 15 // 16 // 10  # ten tokens a frame
READ_S = 0.001


def test_the_first_frame_is_a_trial() -> None:
    assert Copies(SLOT).pay(1, ROW, READ_S)
    assert Copies(SLOT).frame_tokens(ROW) == 10


@pytest.mark.parametrize(
    ("slot", "row_bytes"), [(0, ROW), (SLOT, 0), (SLOT, SLOT)]
)  # no frames, nothing there, more than a frame
def test_what_cannot_be_copied(slot: int, row_bytes: int) -> None:
    assert not Copies(slot).pay(1000, row_bytes, READ_S)


def test_frames_count_not_tokens() -> None:
    copies = Copies(SLOT)
    for seconds in (0.001, 9.0, 0.001):  # one that had to wait
        copies.took(seconds)
    least = 0.001 * TIMES_FASTER / READ_S
    assert least == 8
    assert copies.pay(8, ROW, READ_S) and not copies.pay(7, ROW, READ_S)
    assert not copies.pay(13, ROW, READ_S) and copies.pay(18, ROW, READ_S)  # two frames


def test_a_link_that_became_slow() -> None:
    copies = Copies(SLOT)
    for seconds in (0.0001,) * 7 + (0.1,) * 4:
        copies.took(seconds)
    assert not copies.pay(100, ROW, READ_S)


def test_a_frame_holds_what_fits_of_several_sequences() -> None:
    sizes = (SLOT, 1000, SLOT // 2, SLOT // 4, SLOT // 4, 0)
    every = [Rows(i, 0, 1, [("F32", [1, 1, 1, 1], bytes(size))]) for i, size in enumerate(sizes)]
    found = [[rows.rows_of for rows in frame] for frame in Copies(SLOT).frames_of(every)]
    assert found == [[0], [1, 2, 3], [4, 5]]
    assert list(Copies(SLOT).frames_of([])) == []
