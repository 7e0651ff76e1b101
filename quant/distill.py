"""Distillation: the experts' scales and biases, trained so that the model answers as at full precision.

Theory of operation. Calibration makes each layer's output right by itself; what the layers' errors do together
only the end of the model shows. So the codes stay, and the scales and biases of the routed experts (a 16th of
their bytes at 2 bits in groups of 64) are trained by Adam on the Kullback-Leibler divergence of the next-token
distribution from the full-precision model's, over calibration text. The format does not change.

1. *Targets.* The teacher runs once over all windows; the logits of its likeliest tokens lie in a file, with
   one more that stands for all others together. The teacher then leaves the memory.
2. *Parameters.* A group's weights are code * scale + bias. Trained are two numbers a and b around nought:
   scale = s (1 + a) and bias = z + s (b - c a), where s and z are the calibrated ones and c is the group's mean
   code. So a stretches the group about its mean and b moves it, both in units of the scale: the two
   hardly disturb each other, and one learning rate fits all groups.
3. *Rounding.* The forward pass sees scales and biases as they will be written (bfloat16); gradients go past
   the rounding to float32 ones. What is validated is what is kept.
4. *Choice.* Some calibration windows are set aside; every few steps their divergence is measured, and the best scales and
   biases so far are kept. The first candidate is the start itself, so the result is never worse there.

The state is written every few steps; minibatches, learning rates and roundings depend on the step's number and the seed alone,
so a run that was killed ends in the same bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import psutil
from mlx.nn.layers.base import Module

from expertd.errors import ConfigError
from expertd.model.classes import Weights
from expertd.quant.student import Array, build, coded_experts, inner, library, outer

Progress = Callable[[int, int, str], None]
Windows = npt.NDArray[np.int32]

BETAS, EPSILON = (0.9, 0.99), 1e-10


@dataclass(frozen=True)
class Distillation:
    """How to train. `learning_rate` is in units of each group's scale."""

    num_steps: int = 160
    batch_tokens: int = 1536
    learning_rate: float = 4e-3
    num_warmup_steps: int = 10
    temperature: float = 1.0
    valid_share: float = 0.125
    num_steps_between: int = 20
    num_kept: int = 4096
    seed: int = 0


def distil(
    config: dict[str, Any],
    teacher: Callable[[], Weights],
    student: Weights,
    windows: Windows,
    settings: Distillation,
    state: Path,
    progress: Progress | None = None,
) -> Weights:
    """New `<path>.scales` and `<path>.biases` of all quantized experts of `student`, in the same dtype."""
    targets = Targets(state, windows, settings)
    if not targets.complete:
        model = build(config, teacher())
        targets.compute(model, progress)
        del model
        mx.clear_cache()
    dtypes = {name: array.dtype for name, array in student.items()}
    run = Run(build(config, student), dtypes, targets, settings, state)
    run.train(progress)
    return run.best


def fingerprint(windows: Windows, settings: Distillation) -> str:
    text = json.dumps(asdict(settings), sort_keys=True).encode()
    return hashlib.sha256(text + str(windows.shape).encode() + windows.tobytes()).hexdigest()


class Targets:
    """The teacher's logits for every position of every window, of its likeliest tokens, in files of `state`.

    Per position: the `num_kept` highest logits less their maximum (float16: near 0, where the probability is,
    its steps are finest), their token ids, and, where the vocabulary is larger, one logit that stands for all
    other tokens at the training's temperature.
    """

    def __init__(self, state: Path, windows: Windows, settings: Distillation) -> None:
        self.windows, self.settings, self.state = windows, settings, state
        self._mark = state / "targets.json"
        self._fingerprint = fingerprint(windows, settings)
        self._num_done, self._vocab = 0, 0
        if self._mark.is_file() and (found := json.loads(self._mark.read_text()))["of"] == self._fingerprint:
            self._num_done, self._vocab = found["num_done"], found["vocab"]
            self._open("r+")

    @property
    def complete(self) -> bool:
        return self._num_done == len(self.windows)

    @property
    def _kept(self) -> int:
        return min(self.settings.num_kept, self._vocab)

    def _open(self, mode: Any) -> None:
        shape = self.windows.shape
        width = self._kept + (self._kept < self._vocab)
        self._logits = np.memmap(self.state / "targets.f16", np.float16, mode, shape=(*shape, width))
        self._ids = None
        if self._kept < self._vocab:
            self._ids = np.memmap(self.state / "targets.ids", np.int32, mode, shape=(*shape, self._kept))

    def compute(self, model: Module, progress: Progress | None) -> None:
        """Run `model`, the teacher, over the windows that are still to do."""
        while not self.complete:
            start = self._num_done
            window = self.windows[start]
            logits = model(mx.array(window[None]))[0].astype(mx.float32)
            if not start:
                self._vocab = logits.shape[-1]
                self.state.mkdir(parents=True, exist_ok=True)
                self._open("w+")
            self._store(start, logits)
            self._num_done += 1
            self._mark_done()
            if progress:
                progress(self._num_done, len(self.windows), "full-precision model")

    def _store(self, index: int, logits: mx.array) -> None:
        logits = logits - logits.max(-1, keepdims=True)
        if self._ids is not None:
            ids = mx.argpartition(-logits, self._kept, axis=-1)[:, : self._kept]
            self._ids[index] = np.array(ids)
            logits = with_rest(logits, ids, self.settings.temperature)
        self._logits[index] = np.array(logits.astype(mx.float16))

    def _mark_done(self) -> None:
        if self._num_done % 16 and not self.complete:
            return
        self._logits.flush()
        if self._ids is not None:
            self._ids.flush()
        text = json.dumps({"of": self._fingerprint, "num_done": self._num_done, "vocab": self._vocab})
        replace(self._mark, lambda path: path.write_text(text))

    def divergence(self, model: Module, chosen: npt.NDArray[np.intp], temperature: float) -> mx.array:
        """The mean Kullback-Leibler divergence of `model` from the teacher over the chosen windows."""
        logits = model(mx.array(self.windows[chosen]))
        if self._ids is not None:
            logits = with_rest(logits, mx.array(self._ids[chosen]), temperature)
        return divergence(logits / temperature, self._logits[chosen].astype(np.float32) / temperature)


def divergence(logits: mx.array, wanted: npt.NDArray[np.float32]) -> mx.array:
    """The mean Kullback-Leibler divergence of softmax(logits) from softmax(wanted), both [..., vocab]."""
    target = inner(mx.array(wanted)) if library() is mx else wanted

    def forward(logits: mx.array) -> mx.array:
        p, q = log_softmax(target), log_softmax(inner(logits))
        return outer((library().exp(p) * (p - q)).sum(-1).mean())

    def backward(logits: mx.array, d_y: mx.array, _: mx.array) -> mx.array:
        exp, num_rows = library().exp, logits.size // logits.shape[-1]
        difference = exp(log_softmax(inner(logits))) - exp(log_softmax(target))
        return outer(difference * (inner(d_y) / num_rows))

    mean = mx.custom_function(forward)
    mean.vjp(backward)
    result: mx.array = mean(logits)
    return result


def log_softmax(logits: Array) -> Array:
    xp = library()
    logits = logits - logits.max(-1, keepdims=True)
    return logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))


def with_rest(logits: mx.array, ids: mx.array, temperature: float) -> mx.array:
    """The logits of `ids` and, last, one that weighs as much as all others do at this temperature."""
    kept = mx.take_along_axis(logits, ids, axis=-1)
    whole = mx.logsumexp(logits / temperature, axis=-1, keepdims=True)
    share = mx.exp(kept / temperature - whole).sum(-1, keepdims=True)
    rest = temperature * (whole + mx.log(mx.maximum(1 - share, 1e-6)))
    return mx.concatenate([kept, rest], axis=-1)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path` that takes its name when it is complete and on the disk."""
    new = path.with_name(f"new-{path.name}")
    write(new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


class Run:
    """The training of one student."""

    def __init__(
        self, model: Module, dtypes: dict[str, mx.Dtype], targets: Targets, settings: Distillation, state: Path
    ) -> None:
        self.model, self.targets, self.settings = model, targets, settings
        self._dtypes, self._file = dtypes, state / "distilled.safetensors"
        self.experts = dict(sorted(coded_experts(model)))
        self._start = {path: (m.scales, m.biases, m.mean_codes()) for path, m in self.experts.items()}
        self.params = {
            f"{path}.{leaf}": mx.zeros(m.scales.shape) for path, m in self.experts.items() for leaf in "ab"
        }
        self.means = {name: mx.zeros_like(array) for name, array in self.params.items()}
        self.squares = dict(self.means)
        self.step, self.best_loss, self.best = 0, math.inf, Weights()
        order = np.random.default_rng([settings.seed, 0]).permutation(len(targets.windows))
        num_valid = max(1, round(len(order) * settings.valid_share))
        self._valid, self._train = np.sort(order[:num_valid]), order[num_valid:]

    def rounded(self, params: Weights) -> Weights:
        """Scales and biases by name, as they would be written, in float32."""
        result = Weights()
        for path, (scales, biases, mean) in self._start.items():
            a, b = params[f"{path}.a"], params[f"{path}.b"]
            for leaf, exact in (("scales", scales * (1 + a)), ("biases", biases + scales * (b - mean * a))):
                name = f"{path}.{leaf}"
                written = exact.astype(self._dtypes[name]).astype(mx.float32)
                result[name] = exact + mx.stop_gradient(written - exact)
        return result

    def place(self, arrays: Weights) -> None:
        for path, module in self.experts.items():
            module.scales, module.biases = arrays[f"{path}.scales"], arrays[f"{path}.biases"]

    def loss(self, params: Weights, chosen: npt.NDArray[np.intp]) -> mx.array:
        self.place(self.rounded(params))
        t = self.settings.temperature
        return self.targets.divergence(self.model, chosen, t) * t * t

    def batch(self, step: int) -> npt.NDArray[np.intp]:
        size = max(1, self.settings.batch_tokens // self.targets.windows.shape[1])
        size = min(size, len(self._train))
        epoch, index = divmod(step, len(self._train) // size)
        order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(self._train)
        return np.sort(order[index * size : (index + 1) * size])

    def rate(self, step: int) -> float:
        s = self.settings
        warm = min(1.0, (step + 1) / s.num_warmup_steps)
        return s.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / s.num_steps))

    def take_step(self) -> float:
        loss, grads = mx.value_and_grad(self.loss)(self.params, self.batch(self.step))
        self.step += 1
        rate, (b1, b2) = self.rate(self.step - 1), BETAS
        for name, g in grads.items():
            self.means[name] = m = b1 * self.means[name] + (1 - b1) * g
            self.squares[name] = v = b2 * self.squares[name] + (1 - b2) * g * g
            m, v = m / (1 - b1**self.step), v / (1 - b2**self.step)
            self.params[name] = self.params[name] - rate * m / (mx.sqrt(v) + EPSILON)
        mx.eval(loss, self.params, self.means, self.squares)
        return float(loss.item())

    def validate(self) -> float:
        arrays = self.rounded(self.params)
        self.place(arrays)
        total = 0.0
        for window in self._valid:
            total += self.targets.divergence(self.model, np.array([window]), 1.0).item()
        loss = total / len(self._valid)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {n: array.astype(self._dtypes[n]) for n, array in arrays.items()}
            mx.eval(self.best)
        return loss

    def train(self, progress: Progress | None) -> None:
        s = self.settings
        while True:
            if self.step % s.num_steps_between == 0 or self.step == s.num_steps:
                loss = self.validate()
                if progress:
                    progress(self.step, s.num_steps, f"valid {loss:.5f}")
            if self.step == s.num_steps:
                return
            loss = self.take_step()
            if progress:
                progress(self.step, s.num_steps, f"{loss:.5f}")
