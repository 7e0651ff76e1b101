"""Calibration text to windows: runs of tokens that the calibrated modes send through the model."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from expertd.checkpoint.locate import demo_folder
from expertd.errors import ConfigError

Windows = np.ndarray[Any, np.dtype[np.int32]]


class Encoder(Protocol):
    """What turns a text into token ids, as expertd.engine.text.Tokenizer does."""

    def encode(self, text: str) -> list[int]: ...


def default_text() -> Path:
    """The calibration sample beside the demo model: training text of it, in English prose."""
    return demo_folder() / "calibration.txt"


def read_text(path: Path) -> str:
    """The text of a file for calibration. Raises ConfigError when it is missing, no UTF-8 text, or held out."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--calibrate {path}: byte {error.start} is no UTF-8, so it is no text. Give a plain text file."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--calibrate {path}: {error.strerror or error}. Give a plain text file."
        ) from error
    if "\0" in text:
        raise ConfigError(f"--calibrate {path}: holds NUL bytes, so it is no text. Give a plain text file.")
    refuse_held_out(path, text)
    return text


def refuse_held_out(path: Path, text: str) -> None:
    """Raises ConfigError for the text that quality is measured on, a piece of it, or a text that holds it.

    A model calibrated on that text would look better on it than it is.
    """
    held_out = (demo_folder() / "valid.txt").read_text(encoding="utf-8").strip()
    if (own := text.strip()) and (own in held_out or held_out in own):
        raise ConfigError(
            f"--calibrate {path}: is the held-out text that `expertd quality` measures on, and calibrating on it "
            "would flatter the result. Give another text, or leave --calibrate out."
        )


def read_windows(text: str, tokenizer: Encoder, num_windows: int, window_tokens: int, seed: int) -> Windows:
    """`num_windows` runs of tokens [num_windows, window_tokens], in the text's order, none overlapping another.

    The same text, tokenizer and seed give the same windows: every placement is equally likely. Raises
    ConfigError when the text is too short.
    """
    if min(num_windows, window_tokens) < 1:
        raise ConfigError(
            f"calibration of {num_windows} windows of {window_tokens} tokens: wanted at least 1 of 1. Give more."
        )
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    spare = len(tokens) - num_windows * window_tokens
    if spare < 0:
        raise ConfigError(
            f"calibration text: {len(tokens)} tokens, wanted at least {num_windows * window_tokens} for {num_windows} "
            f"windows of {window_tokens}. Give a longer text, or fewer windows."
        )
    # Uniform over placements: choose which of spare + num_windows places are windows; the others are one token each.
    # RandomState, because its streams are frozen for ever.
    places = np.sort(np.random.RandomState(seed).permutation(spare + num_windows)[:num_windows])
    starts = places + np.arange(num_windows) * (window_tokens - 1)
    windows: Windows = tokens[starts[:, None] + np.arange(window_tokens)]
    return windows
