"""What a checkpoint is worth: perplexity, divergence from a reference, error per layer, bytes.

Theory of operation. The text is cut into windows at fixed places, evenly spread, and both models read the same
windows, PASS_WINDOWS of them per forward pass and without a cache. The reference runs first and leaves its logits,
hidden states and expert choices in files of a temporary folder (float32; a vocabulary of 150,000 makes 0.6 MB per
token), so that two large models are never in memory together and one reference serves many candidates.

Where the weights fit in memory as float32 they are widened at load: what is measured is then the rounding of the
weights alone, not that of bfloat16 activations, and a CPU is many times as fast (expertd/model/tiles.py). Where
they do not fit, MLX's kernels run them as they are; `kernels` says which.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten

from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint, check_shards
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.model.classes import build_model
from expertd.model.model import Model
from expertd.quant.metrics import Agreement, Array, Comparison, Divergence, RelativeError, TextScore
from expertd.split.cut import StepSplit

NUM_WINDOWS = 120
WINDOW_TOKENS = 192
# Fixed, because it may change the last bit of a logit: part of what is measured.
PASS_WINDOWS = 8
# What a forward pass needs beside the weights, as a share of them; measured on the demo model, where it is largest.
MEMORY_MARGIN = 1.25

SOLO = StepSplit("solo", (1.0,))
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Observed:
    """What a model gave for windows [num_windows, num_tokens], all float32 but the ids.

    logits [num_windows, num_tokens, vocab]; hidden[layer] [num_windows, num_tokens, width], the layers' outputs;
    experts[layer] [num_windows, num_tokens, top_k], for layers that have experts.
    """

    logits: Array
    hidden: dict[int, Array]
    experts: dict[int, Array]


class Reader(Protocol):
    """A model that reads windows: on this process's MLX (LocalReader), or on several ranks."""

    def observe(self, tokens: Array) -> Observed: ...


@dataclass(frozen=True)
class LayerQuality:
    """One layer. `relative_error` is of its output against the reference's, |a - b| / |b| over all tokens;
    `router_agreement` the fraction of tokens that go to the same set of experts, None without a router."""

    index: int
    num_bytes: int
    bits_per_weight: float
    relative_error: float | None = None
    router_agreement: float | None = None


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found. `divergence` is None without a reference; `kernels` is "float32" or "stock"."""

    checkpoint: str
    num_bytes: int
    num_parameters: int
    bits_per_weight: float
    num_windows: int
    num_tokens: int
    perplexity: float
    kernels: str
    seconds: float
    divergence: Divergence | None
    layers: tuple[LayerQuality, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cut_windows(
    text: str, tokenizer: Tokenizer, num_windows: int = NUM_WINDOWS, window_tokens: int = WINDOW_TOKENS
) -> Array:
    """Windows int32 [num_windows, window_tokens + 1] at fixed places of a text, evenly spread from its first token to
    its last, none overlapping: the model reads all but the last token of each and foretells all but the first.

    Raises ConfigError when the text is too short.
    """
    if num_windows < 1 or window_tokens < 1:
        raise ConfigError(f"{num_windows} windows of {window_tokens} tokens: wanted at least 1 and 1.")
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    length = window_tokens + 1
    if tokens.size < num_windows * length:
        raise ConfigError(
            f"--text: has {tokens.size} tokens, wanted {num_windows * length} for {num_windows} windows of "
            f"{window_tokens}. Give a longer text or fewer windows."
        )
    last = tokens.size - length
    starts = [last * i // max(num_windows - 1, 1) for i in range(num_windows)]
    return np.stack([tokens[start : start + length] for start in starts])


class LocalReader:
    """A checkpoint on this process's MLX. `wide` None: float32 where it fits in memory.

    Raises CheckpointError when the checkpoint is damaged.
    """

    def __init__(self, folder: Path, wide: bool | None = None) -> None:
        info = check_checkpoint(folder)
        self.wide = fits_wide(info) if wide is None else wide
        self._model = Model(folder, info.config, wide=self.wide)

    def observe(self, tokens: Array) -> Observed:
        logits, taps = self._model.observe(mx.array(tokens), SOLO)
        hidden = {layer: np.array(h.astype(mx.float32)) for layer, h in taps.hidden.items()}
        experts = {layer: np.array(ids).astype(np.int32) for layer, ids in taps.experts.items()}
        return Observed(np.array(logits), hidden, experts)


def count_parameters(info: CheckpointInfo) -> int:
    """The number of weights of a checkpoint, however they are stored."""
    parameters: Any = tree_flatten(build_model(info.config).parameters())
    return sum(array.size for _, array in parameters)


def fits_wide(info: CheckpointInfo) -> bool:
    """Whether all weights, as float32, fit in the memory that is free now."""
    needed = 4 * count_parameters(info) * MEMORY_MARGIN
    return bool(needed < psutil.virtual_memory().available)


class ReferenceRun:
    """What the reference gave for all windows, in files of a temporary folder until `close`.

    `reader` reads the windows; `scratch` is the folder for the files (the system's by default).
    Raises ConfigError when that disk has no room.
    """

    def __init__(
        self,
        reader: Reader,
        windows: Array,
        scratch: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.windows = windows
        self._folder = tempfile.TemporaryDirectory(prefix="expertd-reference-", dir=scratch)
        self._files: dict[str, Array] = {}
        try:
            for start, observed in _passes(reader, windows, progress):
                self._keep(start, observed)
        except BaseException:
            self.close()
            raise

    def observed(self, start: int, num_windows: int) -> Observed:
        """What the reference gave for windows start to start + num_windows."""
        parts: dict[str, dict[int, Array]] = {"hidden": {}, "experts": {}}
        for name, values in self._files.items():
            kind, _, layer = name.partition("-")
            if layer:
                parts[kind][int(layer)] = values[start : start + num_windows]
        return Observed(self._files["logits"][start : start + num_windows], **parts)

    def close(self) -> None:
        self._files.clear()
        self._folder.cleanup()

    def __enter__(self) -> "ReferenceRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, start: int, observed: Observed) -> None:
        arrays = {"logits": observed.logits}
        arrays |= {f"hidden-{layer}": values for layer, values in observed.hidden.items()}
        arrays |= {f"experts-{layer}": values for layer, values in observed.experts.items()}
        if not self._files:
            self._make_files(arrays)
        for name, values in arrays.items():
            self._files[name][start : start + len(values)] = values

    def _make_files(self, arrays: dict[str, Array]) -> None:
        shapes = {name: (len(self.windows), *values.shape[1:]) for name, values in arrays.items()}
        needed = sum(int(np.prod(shapes[name])) * values.itemsize for name, values in arrays.items())
        folder = Path(self._folder.name)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ConfigError(
                f"{folder.parent}: the reference's logits and hidden states take {needed / 1e9:.1f} GB, the disk has "
                f"{free / 1e9:.1f} GB. Set TMPDIR to a larger disk or take fewer windows."
            )
        for name, values in arrays.items():
            self._files[name] = np.memmap(folder / name, values.dtype, "w+", shape=shapes[name])


def evaluate(
    folder: Path,
    windows: Array,
    reference: ReferenceRun | None = None,
    reader: Reader | None = None,
    wide: bool | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure checkpoint `folder` on `windows` (cut_windows), beside a reference that read the same ones.

    `reader` computes elsewhere, on ranks say; by default the checkpoint is loaded here, as LocalReader does.
    `progress(num_windows_done, num_windows)`. Raises CheckpointError for a damaged checkpoint, ConfigError when
    the reference is of another kind of model.
    """
    start_s = time.monotonic()
    info = check_checkpoint(folder)
    reader = reader or LocalReader(folder, wide)
    findings = _Findings(reference)
    for start, observed in _passes(reader, windows, progress):
        findings.add(start, observed, windows)
    num_parameters = count_parameters(info)
    score = findings.score
    return Quality(
        checkpoint=str(folder),
        num_bytes=info.total_bytes,
        num_parameters=num_parameters,
        bits_per_weight=8 * info.total_bytes / num_parameters,
        num_windows=len(windows),
        num_tokens=score.num_tokens,
        perplexity=score.perplexity,
        kernels="float32" if getattr(reader, "wide", False) else "stock",
        seconds=time.monotonic() - start_s,
        divergence=score.divergence() if isinstance(score, Comparison) else None,
        layers=tuple(findings.layer(size) for size in layer_sizes(info)),
    )


class _Findings:
    """What one evaluation adds up."""

    def __init__(self, reference: ReferenceRun | None) -> None:
        self.score: TextScore | Comparison = Comparison() if reference else TextScore()
        self._reference = reference
        self._errors: dict[int, RelativeError] = {}
        self._agreements: dict[int, Agreement] = {}

    def add(self, start: int, observed: Observed, windows: Array) -> None:
        if self._reference is None:
            assert isinstance(self.score, TextScore)
            for i, logits in enumerate(observed.logits):
                self.score.add(logits, windows[start + i, 1:])
            return
        assert isinstance(self.score, Comparison)
        if not np.array_equal(self._reference.windows, windows):
            raise ConfigError("the reference read other windows than the model. Run it again on these.")
        wanted = self._reference.observed(start, len(observed.logits))
        _check_alike(wanted, observed)
        for i, logits in enumerate(observed.logits):
            self.score.add(wanted.logits[i], logits, windows[start + i, 1:])
            for layer, hidden in observed.hidden.items():
                self._errors.setdefault(layer, RelativeError()).add(hidden[i], wanted.hidden[layer][i])
            for layer, experts in observed.experts.items():
                self._agreements.setdefault(layer, Agreement()).add(experts[i], wanted.experts[layer][i])

    def layer(self, size: LayerQuality) -> LayerQuality:
        error, agreement = self._errors.get(size.index), self._agreements.get(size.index)
        return LayerQuality(
            size.index,
            size.num_bytes,
            size.bits_per_weight,
            error.value if error else None,
            agreement.value if agreement else None,
        )


def _check_alike(wanted: Observed, found: Observed) -> None:
    def shapes(observed: Observed) -> list[tuple[int, ...]]:
        kinds = (observed.hidden, observed.experts)
        return [observed.logits.shape, *(kind[layer].shape for kind in kinds for layer in sorted(kind))]

    if shapes(wanted) != shapes(found):
        raise ConfigError(
            "--reference: its vocabulary, layers or experts are not the model's. "
            "Give the checkpoint that this one was quantized from."
        )


def _passes(reader: Reader, windows: Array, progress: Progress | None) -> Iterator[tuple[int, Observed]]:
    for start in range(0, len(windows), PASS_WINDOWS):
        yield start, reader.observe(windows[start : start + PASS_WINDOWS, :-1])
        if progress:
            progress(min(start + PASS_WINDOWS, len(windows)), len(windows))


LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_sizes(info: CheckpointInfo) -> list[LayerQuality]:
    """Bytes and bits per weight of each layer, in order."""
    parameters: Any = tree_flatten(build_model(info.config).parameters())
    num_weights = _sum_by_layer((name, array.size) for name, array in parameters)
    entries = (item for shard in check_shards(info.folder).values() for item in shard.items())
    num_bytes = _sum_by_layer((name, entry.end - entry.begin) for name, entry in entries)
    return [
        LayerQuality(layer, num_bytes.get(layer, 0), 8 * num_bytes.get(layer, 0) / num_weights[layer])
        for layer in sorted(num_weights)
    ]


def _sum_by_layer(sizes: Iterator[tuple[str, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for name, size in sizes:
        if found := LAYER.search(name):
            total[int(found[1])] = total.get(int(found[1]), 0) + size
    return total
