"""Keys and values are copied while that takes a small part of what reading the tokens would."""

import pytest

from expertd.engine.copies import TIMES_FASTER, Copies

SLOT = 1 << 20
ROW = SLOT * 15 // 16 // 10  # ten tokens a frame


def test_the_first_frame_is_a_trial() -> None:
    assert Copies(0.001, SLOT).pay(1, ROW)
    assert Copies(0.001, SLOT).frame_tokens(ROW) == 10


@pytest.mark.parametrize(
    ("read_s", "slot", "row_bytes"),
    [(0.0, SLOT, ROW), (0.001, 0, ROW), (0.001, SLOT, 0), (0.001, SLOT, SLOT)],
)  # never tried, no frames, nothing there, more than a frame
def test_what_cannot_be_copied(read_s: float, slot: int, row_bytes: int) -> None:
    assert not Copies(read_s, slot).pay(1000, row_bytes)


def test_frames_count_not_tokens() -> None:
    copies = Copies(0.001, SLOT)
    for seconds in (0.001, 9.0, 0.001):  # one that had to wait
        copies.took(seconds)
    least = 0.001 * TIMES_FASTER / 0.001
    assert least == 8
    assert copies.pay(8, ROW) and not copies.pay(7, ROW)
    assert not copies.pay(13, ROW) and copies.pay(18, ROW)  # two frames


def test_a_link_that_became_slow() -> None:
    copies = Copies(0.001, SLOT)
    for seconds in (0.0001,) * 7 + (0.1,) * 4:
        copies.took(seconds)
    assert not copies.pay(100, ROW)
