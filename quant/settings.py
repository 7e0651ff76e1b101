"""What a user can choose when a checkpoint is quantized, checked before anything is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expertd.errors import ConfigError

Effort = Literal["plain", "fast", "normal", "best"]
EwqForm = Literal["normalized", "paper"]

EFFORTS: tuple[Effort, ...] = ("plain", "fast", "normal", "best")
EWQ_FORMS: tuple[EwqForm, ...] = ("normalized", "paper")
# What MLX has affine kernels for; 16 stands for "as it is in the source".
BITS = (2, 3, 4, 5, 6, 8)
WHOLE = 16
GROUP_SIZES = (32, 64, 128)
# The trunk's groups are not a setting: it is so small a part that 128 would save nothing worth having, and
# groups of 32 cost 7-14 % of decode speed (mlx issue 3251).
TRUNK_GROUP_SIZE = 64
TRUNK_MENU = (4, 16)


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    `group_size` is that of the routed experts. `trunk` is the menu of bits that EWQ chooses from, in ascending
    order; a menu of one level gives it to every block. `target_bytes` is the wanted size of the weights,
    `fit_bytes` the memory of the machine that shall run them; at most one of the two is given.
    `num_windows` windows of `window_tokens` tokens are taken from `calibrate`, at places that `seed` chooses.
    `threads` changes the time, never the result; 0 means one per core.
    """

    effort: Effort = "normal"
    experts_bits: int = 2
    group_size: int = 64
    trunk: tuple[int, ...] = TRUNK_MENU
    ewq: EwqForm = "normalized"
    ewq_x: float = 1.0
    target_bytes: int | None = None
    fit_bytes: int | None = None
    calibrate: Path | None = None
    seed: int = 0
    num_windows: int = 128
    window_tokens: int = 512
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for a choice that cannot be."""
        _check_choice("effort", self.effort, EFFORTS)
        _check_choice("ewq form", self.ewq, EWQ_FORMS)
        _check_choice("expert bits", self.experts_bits, BITS)
        _check_choice("group size", self.group_size, GROUP_SIZES)
        _check_menu(self.trunk)
        if not 0 <= self.ewq_x <= 100:
            raise ConfigError(f"ewq x {self.ewq_x}: wanted a number from 0 to 100. The usual one is 1.0.")
        for what, count in (("windows", self.num_windows), ("tokens per window", self.window_tokens)):
            if count < 1:
                raise ConfigError(f"{what} {count}: wanted at least 1.")
        if self.threads < 0:
            raise ConfigError(f"threads {self.threads}: wanted 1 or more, or 0 for one per core.")
        for what, size in (("--target-bytes", self.target_bytes), ("--fit", self.fit_bytes)):
            if size is not None and size < 1:
                raise ConfigError(f"{what} {size}: wanted at least 1 byte.")
        if self.target_bytes is not None and self.fit_bytes is not None:
            raise ConfigError(
                "--target-bytes and --fit both say how large the result may be. Give one of them."
            )


def parse_menu(text: str) -> tuple[int, ...]:
    """The bits of a menu such as "4,16". Raises ConfigError."""
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(
            f"trunk {text[:40]!r}: wanted bits with commas between them, such as 4,16 or 4,8,16."
        )
    menu = tuple(int(part) for part in parts)
    _check_menu(menu)
    return menu


def _check_menu(menu: tuple[int, ...]) -> None:
    known = (*BITS, WHOLE)
    if not 1 <= len(menu) <= 3 or list(menu) != sorted(set(menu)) or not set(menu) <= set(known):
        raise ConfigError(
            f"trunk {','.join(map(str, menu))}: wanted one to three of {', '.join(map(str, known))}, "
            "in ascending order. Choose 4,16 or 4,8 or 4,8,16."
        )


def _check_choice(what: str, found: object, wanted: tuple[object, ...]) -> None:
    if found not in wanted:
        raise ConfigError(
            f"{what} {found}: wanted one of {', '.join(map(str, wanted))}. Choose one of these."
        )
