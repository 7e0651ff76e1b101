"""`expertd quality`: checkpoints beside each other and beside their reference, in figures that can be repeated.

Every checkpoint reads the same windows of the same text (evaluate.py), with the same arithmetic: float32 where each of
them, widened, fits in memory, MLX's own kernels for all where one does not. The number of ranks and the split
change no digit, so they are not recorded.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import psutil

from expertd.checkpoint.config import read_json, text_config
from expertd.checkpoint.inspect import CheckpointInfo
from expertd.checkpoint.locate import demo_folder
from expertd.checkpoint.manifest import QUANTIZATION_MANIFEST
from expertd.checkpoint.sizes import size_in_words
from expertd.config import GroupConfig
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.quant.evaluate import (
    MEMORY_MARGIN,
    NUM_WINDOWS,
    PASS_WINDOWS,
    WINDOW_TOKENS,
    LocalReader,
    Quality,
    Reader,
    ReferenceRun,
    count_parameters,
    cut_windows,
    evaluate,
    fits_wide,
)
from expertd.quant.group_reader import GroupReader
from expertd.quant.metrics import Array
from expertd.quant.report import Facts, write_report

REPORT = "report.html"
# The logits of a pass: MLX's, NumPy's, and the reference's beside them.
NUM_LOGITS = 3

# What is being done, how many windows of it, of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """What to measure: `checkpoints` beside `reference` on windows of `text`, on ranks of this machine.

    Raises ConfigError for ranks or a split that cannot be.
    """

    checkpoints: Sequence[CheckpointInfo]
    reference: CheckpointInfo | None = None
    text: Path | None = None
    num_windows: int = NUM_WINDOWS
    num_ranks: int = 1
    split: str = "auto"

    def __post_init__(self) -> None:
        GroupConfig("", self.num_ranks, self.split)

    @property
    def everything(self) -> list[CheckpointInfo]:
        return [*([self.reference] if self.reference else []), *self.checkpoints]

    @property
    def text_file(self) -> Path:
        return self.text or demo_folder() / "valid.txt"


@dataclass(frozen=True)
class Compared:
    """What `compare` found; `labels` are the checkpoints' names in tables, `text` is the name of the text's file."""

    text: str
    window_tokens: int
    reference: str | None
    labels: tuple[str, ...]
    qualities: tuple[Quality, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "num_windows": self.qualities[0].num_windows,
            "window_tokens": self.window_tokens,
            "reference": self.reference,
            "checkpoints": [quality.to_json() for quality in self.qualities],
        }


def compare(
    asked: Asked, progress: Progress = lambda what, done, total: None, scratch: Path | None = None
) -> Compared:
    """Measure every checkpoint. `scratch` is the folder for the reference's logits (by default the system's).

    Raises ConfigError for a text that is none or too short, checkpoints that do not fit each other, or too
    little memory or disk; CheckpointError for a damaged one; ClusterError when every rank died.
    """
    labels = name_all(asked.checkpoints)
    windows = common_windows(asked)
    wide = choose_arithmetic(asked)
    qualities = []
    try:
        with ExitStack() as stack:
            reference = None
            if asked.reference:
                with open_reader(asked, asked.reference, wide, scratch) as reader:
                    told = partial(progress, f"reference {asked.reference.folder.name}")
                    told(0, len(windows))
                    reference = stack.enter_context(ReferenceRun(reader, windows, scratch, told))
                del reader
            for info, label in zip(asked.checkpoints, labels, strict=True):
                told = partial(progress, label)
                told(0, len(windows))
                with open_reader(asked, info, wide, scratch) as reader:
                    qualities.append(evaluate(info.folder, windows, reference, reader, progress=told))
                del reader
    except (MemoryError, RuntimeError) as e:
        # MLX raises RuntimeError for much else, all of it unexpected.
        if isinstance(e, MemoryError) or "alloc" in str(e):
            raise ConfigError(_no_memory(f"ran out of it ({' '.join(str(e).split())[:100]})")) from e
        raise
    name = str(asked.reference.folder) if asked.reference else None
    return Compared(asked.text_file.name, windows.shape[1] - 1, name, tuple(labels), tuple(qualities))


@contextmanager
def open_reader(
    asked: Asked, info: CheckpointInfo, wide: bool, scratch: Path | None = None
) -> Iterator[Reader]:
    """A reader for as long as the block runs; then its memory is free."""
    if asked.num_ranks > 1:
        with GroupReader(info.folder, asked.num_ranks, asked.split, wide, scratch) as group:
            yield group
        return
    yield LocalReader(info.folder, wide)
    gc.collect()  # modules and their model hold each other
    mx.clear_cache()


def name_all(infos: Sequence[CheckpointInfo]) -> list[str]:
    """The folders' names, or whole paths where two are the same."""
    names = [info.folder.name for info in infos]
    return names if len(set(names)) == len(names) else [str(info.folder) for info in infos]


# Windows.


def read_text(path: Path) -> str:
    """Raises ConfigError when there is no text in the file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"--text {path}: byte {e.start} is no UTF-8, so it is no text. Give a plain text file."
        ) from e
    except OSError as e:
        raise ConfigError(f"--text {path}: {e.strerror or e}. Give a plain text file.") from e


def common_windows(asked: Asked) -> Array:
    """The windows that every checkpoint reads, no longer than the shortest context.

    Raises ConfigError when the text is too short, or two vocabularies or tokenizers differ.
    """
    text = read_text(asked.text_file)
    infos = asked.everything
    length = min([WINDOW_TOKENS, *(info.context_length for info in infos)])
    first = infos[0]
    windows = cut_windows(text, Tokenizer(first.folder, first.config), asked.num_windows, length)
    for info in infos[1:]:
        _check_vocabulary(first, info)
        tokens = cut_windows(text, Tokenizer(info.folder, info.config), asked.num_windows, length)
        if not np.array_equal(tokens, windows):
            raise ConfigError(
                f"{info.folder}: its tokenizer makes other tokens of the text than that of {first.folder}, so "
                "they cannot be compared. Give the checkpoint that it was quantized from."
            )
    return windows


def _check_vocabulary(first: CheckpointInfo, info: CheckpointInfo) -> None:
    wanted, found = (text_config(i.config).get("vocab_size") for i in (first, info))
    if found != wanted:
        raise ConfigError(
            f"{info.folder}: its vocabulary has {found} entries, that of {first.folder} has {wanted}, so they "
            "cannot be compared. Give the checkpoint that it was quantized from."
        )


def warnings_of(asked: Asked) -> list[str]:
    """Why the figures may flatter: a text on which a checkpoint was calibrated."""
    text = asked.text_file
    known = demo_folder() / "calibration.txt"
    if text.resolve() == known or (text.is_file() and text.read_bytes() == known.read_bytes()):
        return [f"--text {text}: is the text that checkpoints are calibrated on, so the figures flatter them"]
    return [
        f"--text {text}: {info.folder} was calibrated on a text of that name; if it is the same, the figures flatter"
        for info in asked.checkpoints
        if text.name == _read_manifest(info.folder).get("settings", {}).get("calibrate")
    ]


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / QUANTIZATION_MANIFEST
    return read_json(path) if path.is_file() else {}


# Memory.


def choose_arithmetic(asked: Asked) -> bool:
    """Whether all checkpoints are read as float32. Raises ConfigError when they do not fit in memory at all.

    The choice is that of one rank, so that more of them change no digit.
    """
    infos = asked.everything
    wide = all(fits_wide(info) for info in infos)
    for info in infos:
        size = 4 * count_parameters(info) if wide else info.total_bytes
        logits = PASS_WINDOWS * WINDOW_TOKENS * int(text_config(info.config).get("vocab_size", 0)) * 4
        needed = asked.num_ranks * size * MEMORY_MARGIN + NUM_LOGITS * logits
        if needed > (free := psutil.virtual_memory().available):
            ranks = f" on {asked.num_ranks} ranks" if asked.num_ranks > 1 else ""
            found = f"{info.folder}{ranks} needs {size_in_words(int(needed))}, {size_in_words(free)} is free"
            raise ConfigError(_no_memory(found))
    return wide


def _no_memory(found: str) -> str:
    return f"memory: {found}. Use fewer --ranks, close other programs, or take a larger machine."


# What people read.


def describe(compared: Compared) -> str:
    """The table, and below it one of each checkpoint's layers."""
    first = compared.qualities[0]
    beside = f"; reference {Path(compared.reference).name}" if compared.reference else ""
    if first.divergence:
        beside += f", perplexity {first.divergence.reference_perplexity:.4f}"
    head = f"{compared.text}: {first.num_windows} windows of {compared.window_tokens} tokens{beside}"
    columns = [figures(quality) for quality in compared.qualities]
    rows = [["", *compared.labels], *([name, *(c[name] for c in columns)] for name in columns[0])]
    layers = [
        f"\n{label}, layer by layer\n{align(layer_rows(quality))}"
        for label, quality in zip(compared.labels, compared.qualities, strict=True)
    ]
    return "\n".join([head, align(rows), *layers])


def figures(quality: Quality) -> dict[str, str]:
    """One checkpoint's figures, as they are printed."""
    found = {
        "size": size_in_words(quality.num_bytes),
        "bits per weight": f"{quality.bits_per_weight:.3f}",
        "perplexity": f"{quality.perplexity:.4f}",
        "arithmetic": {"float32": "float32", "stock": "MLX's kernels"}[quality.kernels],
    }
    if not (d := quality.divergence):
        return found
    return {
        "mean KL (nats/token)": f"{d.mean_kl:.5f} ± {d.kl_error:.5f}",
        "median KL": f"{d.median_kl:.5f}",
        "p95 KL": f"{d.p95_kl:.4f}",
        "p99 KL": f"{d.p99_kl:.4f}",
        "same top token": f"{d.top1_agreement:.2%}",
        "perplexity ratio": f"{d.ppl_ratio:.4f} ± {d.ppl_ratio_error:.4f}",
        **found,
    }


def layer_rows(quality: Quality) -> list[list[str]]:
    """Header and rows: size, and, beside a reference, error and agreement."""
    header = ["layer", "size", "bits per weight"]
    if quality.divergence:
        header += ["relative error", "same experts"]
    rows = [header]
    for layer in quality.layers:
        row = [str(layer.index), size_in_words(layer.num_bytes), f"{layer.bits_per_weight:.3f}"]
        if quality.divergence:
            row.append("–" if layer.relative_error is None else f"{layer.relative_error:.4f}")
            row.append("–" if layer.router_agreement is None else f"{layer.router_agreement:.2%}")
        rows.append(row)
    return rows


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


# The report.


def check_report(info: CheckpointInfo) -> None:
    """Raises ConfigError when there is nothing to make a report of."""
    if missing := Facts.__required_keys__ - _read_manifest(info.folder).keys():
        raise ConfigError(
            f"--report: {info.folder / QUANTIZATION_MANIFEST} is absent or lacks {sorted(missing)[0]!r}, so there is "
            "nothing to report. Leave --report out, or quantize with `expertd quantize`."
        )


def update_report(folder: Path, compared: Compared, quality: Quality) -> Path:
    """Draw `folder`'s report.html again, with its quality; gives the file. Raises ConfigError when it cannot."""
    manifest = _read_manifest(folder)
    keys = (Facts.__required_keys__ | Facts.__optional_keys__) & manifest.keys()
    values = {k: v for k, v in quality.to_json().items() if k not in ("checkpoint", "layers", "seconds")}
    reference = {"reference": Path(compared.reference).name} if compared.reference else {}
    told = {"text": compared.text, **reference, **values}
    facts = cast(Facts, {**{key: manifest[key] for key in keys}, "quality": told})
    try:
        write_report(folder / REPORT, facts)
    except OSError as e:
        raise ConfigError(f"--report: {folder / REPORT}: {e.strerror or e}. Check its folder.") from e
    return folder / REPORT
