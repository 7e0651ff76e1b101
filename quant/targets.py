"""What the full-precision model answers, kept in files, and how far another model is from it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module

from expertd.quant.student import Array, inner, library, node, outer

# Windows between two notes of how far the targets are.
NUM_WINDOWS_BETWEEN = 16
# The others' share of a distribution is at least this: float32 has no less beside 1.
LEAST_SHARE = 1e-6


class Targets:
    """The teacher's logits for every position of every window, of its likeliest tokens, in files of `state`.

    Per position: the `num_kept` highest logits less their maximum (float16: near 0, where the probability is,
    its steps are finest), their token ids, and, where the vocabulary is larger, one logit that stands for all
    other tokens at `temperature`. Files made for another `mark` are not used.
    """

    def __init__(
        self, state: Path, windows: npt.NDArray[np.int32], num_kept: int, temperature: float, mark: str
    ) -> None:
        self.windows = windows
        self._state, self._num_kept, self._temperature, self._mark = state, num_kept, temperature, mark
        self._progress = state / "targets.json"
        self._num_done, self._vocab = 0, 0
        if self._progress.is_file() and (found := json.loads(self._progress.read_text()))["of"] == mark:
            self._num_done, self._vocab = found["num_done"], found["vocab"]
            self._open("r+")

    @property
    def complete(self) -> bool:
        return self._num_done == len(self.windows)

    def _open(self, mode: Literal["r+", "w+"]) -> None:
        shape, kept = self.windows.shape, min(self._num_kept, self._vocab)
        width = kept + (kept < self._vocab)
        self._logits = np.memmap(self._state / "targets.f16", np.float16, mode, shape=(*shape, width))
        self._ids: npt.NDArray[np.int32] | None = None
        if kept < self._vocab:
            self._ids = np.memmap(self._state / "targets.ids", np.int32, mode, shape=(*shape, kept))

    def compute(self, model: Module, progress: Callable[[int, int, str], None] | None) -> None:
        """Run `model`, the teacher, over the windows that are still to do."""
        while not self.complete:
            logits = model(mx.array(self.windows[None, self._num_done]))[0]
            if not self._num_done:
                self._vocab = logits.shape[-1]
                self._open("w+")
            self._store(self._num_done, logits)
            self._num_done += 1
            if self.complete or self._num_done % NUM_WINDOWS_BETWEEN == 0:
                self._note()
            if progress:
                progress(self._num_done, len(self.windows), "full-precision model")

    def _store(self, index: int, logits: mx.array) -> None:
        logits = logits - logits.max(-1, keepdims=True)
        if self._ids is not None:
            ids = mx.argpartition(-logits, self._num_kept - 1, axis=-1)[:, : self._num_kept]
            self._ids[index] = np.array(ids)
            logits = with_rest(logits, ids, self._temperature)
        self._logits[index] = np.array(logits.astype(mx.float16))

    def _note(self) -> None:
        """Note how many windows are done, once their bytes are on the disk."""
        self._logits.flush()  # type: ignore[attr-defined]
        if self._ids is not None:
            self._ids.flush()  # type: ignore[attr-defined]
        text = json.dumps({"of": self._mark, "num_done": self._num_done, "vocab": self._vocab})
        replace_file(self._progress, lambda path: path.write_text(text))

    def divergence(self, model: Module, chosen: npt.NDArray[np.intp], temperature: float) -> mx.array:
        """The mean Kullback-Leibler divergence of `model` from the teacher over the chosen windows."""
        logits = model(mx.array(self.windows[chosen]))
        if self._ids is not None:
            logits = with_rest(logits, mx.array(self._ids[chosen]), temperature)
        return divergence(logits / temperature, self._logits[chosen].astype(np.float32) / temperature)


def with_rest(logits: mx.array, ids: mx.array, temperature: float) -> mx.array:
    """The logits of `ids` and, last, one that weighs as much as all others do at this temperature."""
    kept = mx.take_along_axis(logits, ids, axis=-1)
    whole = mx.logsumexp(logits / temperature, axis=-1, keepdims=True)
    share = mx.exp(kept / temperature - whole).sum(-1, keepdims=True)
    rest = temperature * (whole + mx.log(mx.maximum(1 - share, LEAST_SHARE)))
    return mx.concatenate([kept, rest], axis=-1)


def divergence(logits: mx.array, wanted: npt.NDArray[np.float32]) -> mx.array:
    """The mean Kullback-Leibler divergence of softmax(logits) from softmax(wanted), both [..., vocab].

    On a CPU it is NumPy's, because MLX's exponential takes 20 ns a number there.
    """
    target = wanted if library() is np else mx.array(wanted)

    def forward(logits: mx.array) -> mx.array:
        p, q = log_softmax(target), log_softmax(inner(logits))
        return outer((library().exp(p) * (p - q)).sum(-1).mean())

    def backward(logits: mx.array, d_y: mx.array) -> mx.array:
        exp, num_rows = library().exp, logits.size // logits.shape[-1]
        difference = exp(log_softmax(inner(logits))) - exp(log_softmax(target))
        return outer(difference * (inner(d_y) / num_rows))

    return node(forward, backward, logits)


def log_softmax(logits: Array) -> Array:
    xp = library()
    logits = logits - logits.max(-1, keepdims=True)
    return logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path` that takes its name when it is complete and on the disk."""
    new = path.with_name(f"new-{path.name}")
    write(new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)
