from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from expertd.checkpoint.locate import demo_folder
from expertd.errors import ConfigError
from expertd.quant.windows import default_text, read_text, read_windows


class Bytes:
    """One token per character, numbered from 0: a window's tokens are its place in the text."""

    def encode(self, text: str) -> list[int]:
        return list(range(len(text)))


def starts(length: int, num_windows: int, window_tokens: int, seed: int) -> list[int]:
    windows = read_windows("x" * length, Bytes(), num_windows, window_tokens, seed)
    assert windows.dtype == np.int32 and windows.shape == (num_windows, window_tokens)
    assert (windows == windows[:, :1] + np.arange(window_tokens)).all(), "a window is no run of the text"
    assert windows.min() >= 0 and windows.max() < length
    return [int(start) for start in windows[:, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_windows_do_not_overlap(seed: int) -> None:
    found = starts(1000, 12, 50, seed)
    assert all(b - a >= 50 for a, b in pairwise(found))


def test_seed_alone_decides() -> None:
    assert starts(1000, 12, 50, seed=3) == starts(1000, 12, 50, seed=3)
    assert starts(1000, 12, 50, seed=3) != starts(1000, 12, 50, seed=4)
    # For ever: a resumed run and a published figure need the same windows.
    assert starts(100, 3, 20, seed=0) == [27, 49, 74]


def test_every_place_can_be_a_window() -> None:
    found = {start for seed in range(300) for start in starts(12, 2, 4, seed)}
    assert found == set(range(9))


def test_whole_text_is_one_choice() -> None:
    assert starts(40, 4, 10, seed=7) == [0, 10, 20, 30]


@pytest.mark.parametrize(("num_windows", "window_tokens"), [(5, 10), (1, 50)])
def test_short_text_is_refused(num_windows: int, window_tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"40 tokens, wanted at least 50 .*Give a longer text"):
        read_windows("x" * 40, Bytes(), num_windows, window_tokens, seed=0)


@pytest.mark.parametrize(("num_windows", "window_tokens"), [(0, 10), (3, 0), (-1, 10)])
def test_no_windows_are_refused(num_windows: int, window_tokens: int) -> None:
    with pytest.raises(ConfigError, match="wanted at least 1"):
        read_windows("x" * 40, Bytes(), num_windows, window_tokens, seed=0)


def test_default_text_is_training_text() -> None:
    assert len(read_text(default_text())) > 100_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"abc\xff\xfe", "byte 3 is no UTF-8"), (b"abc\0def", "holds NUL bytes")],
)
def test_binary_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_text(tmp_path / "x")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="Give a plain text file"):
            read_text(path)


@pytest.mark.parametrize("part", [slice(None), slice(1000, 50_000)])
def test_held_out_text_is_refused(part: slice, tmp_path: Path) -> None:
    held_out = (demo_folder() / "valid.txt").read_text(encoding="utf-8")
    (tmp_path / "copy.txt").write_text(held_out[part], encoding="utf-8")
    (tmp_path / "more.txt").write_text(f"Once upon a time.\n{held_out}\nThe end.", encoding="utf-8")
    for name in ("copy.txt", "more.txt")[: 2 if part == slice(None) else 1]:
        with pytest.raises(ConfigError, match="is the held-out text"):
            read_text(tmp_path / name)
