"""Distillation: the experts' scales and biases, trained so that the model answers as at full precision.

Theory of operation. Calibration makes each layer's output right by itself; what the layers' errors do together
only the end of the model shows. So the codes stay, and the scales and biases of the routed experts (a fifth of their
bytes at 2 bits in groups of 64) are trained by Adam on the Kullback-Leibler divergence of the next-token
distribution from the full-precision model's, over calibration text. The format does not change.

1. *Targets.* The teacher runs once over all windows; the logits of its likeliest tokens lie in a file, with
   one more that stands for all others together. The teacher then leaves the memory.
2. *Parameters.* A group's weights are code * scale + bias. Trained are two numbers a and b around nought:
   scale = s (1 + a) and bias = z + s (b - c a), where s and z are the calibrated ones and c is the group's mean
   code. So a stretches the group about its mean and b moves it, both in units of the scale: the two
   hardly disturb each other, and one learning rate fits all groups.
3. *Rounding.* The forward pass sees scales and biases as they will be written (bfloat16); gradients go past
   the rounding to float32 ones. What is validated is what is kept.
4. *Choice.* Some calibration windows are set aside; every few steps their divergence is measured, and the best scales
   and biases so far are kept. The first candidate is the start itself, so the result is never worse there.

The state is written whenever the divergence was measured. Minibatches and learning rates depend on the step and
the seed alone, so a run that was killed ends in the same bytes. (Products are the BLAS library's: another library,
or another number of its threads, may change a last bit, and with it the result a little.)
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import psutil
from mlx.nn.layers.base import Module

from expertd.checkpoint.config import top_k
from expertd.errors import ConfigError
from expertd.model.classes import Weights, build_model, is_switch
from expertd.quant.student import CodedExperts, attention_for_training, build
from expertd.quant.targets import Targets, replace_file

Progress = Callable[[int, int, str], None]
Windows = npt.NDArray[np.int32]
Chosen = npt.NDArray[np.intp]

STATE = "distill.safetensors"
# Adam's. The second moment forgets faster than usual, because a run has a few hundred steps at most.
BETAS, EPSILON = (0.9, 0.99), 1e-10
# float32 numbers per group: scale, bias and mean code; a and b, their gradients and two moments each; rounded ones.
FLOATS_PER_GROUP = 3 + 2 * 4 + 2


@dataclass(frozen=True)
class Distillation:
    """How to train. The defaults were chosen on the demo model (bench/LOG.md).

    `learning_rate` is in units of each group's scale: it rises over `num_warmup_steps` and falls as a cosine.
    `valid_share` of the windows are set aside and looked at every `num_steps_between` steps. Of a vocabulary
    larger than `num_kept` only the teacher's likeliest tokens are told apart.
    """

    num_steps: int = 120
    batch_tokens: int = 1536
    learning_rate: float = 6e-3
    num_warmup_steps: int = 10
    temperature: float = 1.0
    valid_share: float = 0.1
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
    """New `<path>.scales` and `<path>.biases` of all quantized experts of `student`, in the dtypes they have there.

    `config` is normalised. `teacher()` gives every parameter at full precision by the model's names (a dict
    that is emptied; not asked for when `state` has the targets). `student` has the converted checkpoint's
    arrays by name and is emptied as well. `windows` [num_windows, tokens] are token ids of calibration text.
    `state` is a folder for files that a later call with the same arguments goes on from; once the training is
    done it answers from there, whatever `student` then holds. `progress(done, total, what)` counts windows, then steps.
    Raises ConfigError when the windows are too few or the memory is too small.
    """
    if len(windows) < 2:
        raise ConfigError(
            f"distillation: {len(windows)} windows of calibration text, wanted at least 2. Give more."
        )
    state.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(windows, settings)
    if (done := finished(state / STATE, mark, settings)) is not None:
        return done
    check_memory(config, student, windows, settings, psutil.virtual_memory().available)
    with attention_for_training():
        targets = Targets(state, windows, settings.num_kept, settings.temperature, mark)
        if not targets.complete:
            targets.compute(build(config, teacher()), progress)
            mx.clear_cache()
        dtypes = {name: array.dtype for name, array in student.items()}
        run = Run(build(config, student), dtypes, targets, settings, state / STATE, mark)
        run.resume()
        run.train(progress)
    return run.best


def fingerprint(windows: Windows, settings: Distillation) -> str:
    """What a state must have been made for."""
    text = json.dumps([asdict(settings), windows.shape], sort_keys=True).encode()
    return hashlib.sha256(text + windows.tobytes()).hexdigest()


def finished(file: Path, mark: str, settings: Distillation) -> Weights | None:
    """The result in a state, when its training is done."""
    arrays, meta = read_state(file, mark)
    if int(meta.get("step", -1)) < settings.num_steps:
        return None
    return {name.removeprefix("best:"): array for name, array in arrays.items() if name.startswith("best:")}


def read_state(file: Path, mark: str) -> tuple[Weights, dict[str, str]]:
    """Arrays and numbers of a state; nothing when there is none for `mark`."""
    if not file.is_file():
        return Weights(), {}
    arrays, meta = cast(tuple[Weights, dict[str, str]], mx.load(str(file), return_metadata=True))
    return (arrays, meta) if meta["of"] == mark else (Weights(), {})


def check_memory(
    config: dict[str, Any], student: Weights, windows: Windows, settings: Distillation, available: int
) -> None:
    """Raises ConfigError, with the arithmetic, when distilling needs more than `available` bytes.

    Per row of a minibatch are counted four copies of the logits and, once each, what every linear module reads and
    writes.
    """
    num_weights = num_codes = num_groups = row_floats = vocab = 0
    for path, module in build_model(config).named_modules():
        if "weight" not in module:
            continue
        shape = module.weight.shape
        num_weights += math.prod(shape)
        if len(shape) < 2:
            continue
        row_floats += sum(shape[-2:]) * (top_k(config) if is_switch(module) else 1)
        if is_switch(module) and f"{path}.scales" in student:
            num_codes += math.prod(shape)
            num_groups += student[f"{path}.scales"].size
        elif not is_switch(module):
            vocab = max(vocab, shape[-2])
    num_rows = max(settings.batch_tokens, windows.shape[1])
    parts = {
        "teacher": 4 * num_weights,
        "trunk": 4 * (num_weights - num_codes),
        "codes": num_codes,
        "training": 4 * FLOATS_PER_GROUP * num_groups,
        "activations": 4 * num_rows * (row_floats + 4 * vocab),
    }
    needed = max(parts["teacher"], parts["trunk"] + parts["codes"] + parts["training"]) + parts["activations"]
    if needed > available:
        raise ConfigError(
            f"--effort best: distillation needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free. "
            f"It has first the teacher in float32 ({parts['teacher'] / 1e9:.1f} GB), then the student's trunk "
            f"({parts['trunk'] / 1e9:.1f}), codes ({parts['codes'] / 1e9:.1f}) and scales, biases, gradients and "
            f"moments ({parts['training'] / 1e9:.1f}); beside either, activations of {num_rows} tokens "
            f"({parts['activations'] / 1e9:.1f}). Use --effort normal, or a machine with more memory."
        )


class Run:
    """The training of one student."""

    def __init__(
        self,
        model: Module,
        dtypes: dict[str, mx.Dtype],
        targets: Targets,
        settings: Distillation,
        file: Path,
        mark: str,
    ) -> None:
        self.model, self.targets, self.settings = model, targets, settings
        self._dtypes, self._file, self._mark = dtypes, file, mark
        self.experts = dict(sorted((p, m) for p, m in model.named_modules() if isinstance(m, CodedExperts)))
        self._start = {path: (m.scales, m.biases, m.mean_codes()) for path, m in self.experts.items()}
        self.params = {
            f"{path}.{leaf}": mx.zeros(m.scales.shape) for path, m in self.experts.items() for leaf in "ab"
        }
        self.means = {name: mx.zeros_like(array) for name, array in self.params.items()}
        self.squares = dict(self.means)
        self.step, self.best_loss, self.best = 0, math.inf, Weights()
        self._valid, self._train = divided(len(targets.windows), settings)

    def train(self, progress: Progress | None) -> None:
        """Go on to the last step; the result is `best` then."""
        s = self.settings
        while True:
            due = self.step % s.num_steps_between == 0 or self.step == s.num_steps
            if due:
                self.validate()
                self.save()
            if self.step == s.num_steps:
                return
            loss = self.take_step()
            if progress:
                progress(self.step, s.num_steps, f"KL {loss:.4f}, best {self.best_loss:.4f}")

    def take_step(self) -> float:
        """One step of Adam; the minibatch's loss before it."""
        loss, grads = mx.value_and_grad(self._loss)(self.params, self.batch(self.step))
        rate, (b1, b2) = self.rate(self.step), BETAS
        self.step += 1
        for name, g in grads.items():
            self.means[name] = m = b1 * self.means[name] + (1 - b1) * g
            self.squares[name] = v = b2 * self.squares[name] + (1 - b2) * g * g
            m, v = m / (1 - b1**self.step), v / (1 - b2**self.step)
            self.params[name] = self.params[name] - rate * m / (mx.sqrt(v) + EPSILON)
        mx.eval(loss, self.params, self.means, self.squares)
        return float(np.asarray(loss))

    def _loss(self, params: Weights, chosen: Chosen) -> mx.array:
        """In units of the divergence at temperature 1, whatever the temperature is."""
        self._place(self.rounded(params))
        t = self.settings.temperature
        return self.targets.divergence(self.model, chosen, t) * t * t

    def rounded(self, params: Weights) -> Weights:
        """Scales and biases by name, float32 with the values that will be written; gradients go past the rounding."""
        result = Weights()
        for path, (scales, biases, mean) in self._start.items():
            a, b = params[f"{path}.a"], params[f"{path}.b"]
            for leaf, exact in (("scales", scales * (1 + a)), ("biases", biases + scales * (b - mean * a))):
                name = f"{path}.{leaf}"
                written = exact.astype(self._dtypes[name]).astype(mx.float32)
                result[name] = exact + mx.stop_gradient(written - exact)
        return result

    def _place(self, arrays: Weights) -> None:
        for path, module in self.experts.items():
            module.scales, module.biases = arrays[f"{path}.scales"], arrays[f"{path}.biases"]

    def batch(self, step: int) -> Chosen:
        """The windows of one step; every epoch has an order of its own."""
        size = max(1, self.settings.batch_tokens // self.targets.windows.shape[1])
        size = min(size, len(self._train))
        epoch, index = divmod(step, len(self._train) // size)
        order = np.random.RandomState([self.settings.seed, epoch]).permutation(self._train)
        return np.sort(order[index * size : (index + 1) * size])

    def rate(self, step: int) -> float:
        s = self.settings
        warm = min(1.0, (step + 1) / s.num_warmup_steps)
        return s.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / s.num_steps))

    def validate(self) -> float:
        """The divergence over the windows set aside; keeps the scales and biases if they are the best so far."""
        arrays = self.rounded(self.params)
        self._place(arrays)
        each = [
            float(np.asarray(self.targets.divergence(self.model, np.array([w]), 1.0))) for w in self._valid
        ]
        loss = sum(each) / len(each)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: array.astype(self._dtypes[name]) for name, array in arrays.items()}
            mx.eval(self.best)
        return loss

    def save(self) -> None:
        """Write the state; a later run goes on from here."""
        kinds = {"param": self.params, "mean": self.means, "square": self.squares, "best": self.best}
        arrays = {f"{kind}:{name}": array for kind, of in kinds.items() for name, array in of.items()}
        meta = {"of": self._mark, "step": str(self.step), "best_loss": self.best_loss.hex()}
        replace_file(self._file, lambda path: mx.save_safetensors(str(path), arrays, meta))

    def resume(self) -> None:
        """Go on from the state, if there is one for these arguments."""
        arrays, meta = read_state(self._file, self._mark)
        if not meta:
            return
        self.step, self.best_loss = int(meta["step"]), float.fromhex(meta["best_loss"])
        kinds: dict[str, Weights] = {
            "param": Weights(),
            "mean": Weights(),
            "square": Weights(),
            "best": Weights(),
        }
        for name, array in arrays.items():
            kind, _, rest = name.partition(":")
            kinds[kind][rest] = array
        mx.eval(kinds)  # the file is replaced later
        self.params, self.means, self.squares, self.best = kinds.values()


def divided(num_windows: int, settings: Distillation) -> tuple[Chosen, Chosen]:
    """Which windows are set aside for choosing, and which are trained on."""
    order = np.random.RandomState(settings.seed).permutation(num_windows)
    num_valid = min(max(1, round(num_windows * settings.valid_share)), num_windows - 1)
    return np.sort(order[:num_valid]), np.sort(order[num_valid:])
