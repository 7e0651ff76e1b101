"""A checkpoint at full precision to one with few bits per expert weight: the quantizer's main path.

Theory of operation. mlx-lm's model class, built but never computed, says which modules there are; the source says
where their bytes lie (weights.py). One pass over the weights finds numbers that are none and measures the
entropies (survey.py), from which the recipe follows (ewq.py, budget.py): so all shapes, and with them every
byte's place in the output, are known before anything is written (output.py). Then the weights are rounded,
one tensor or one layer at a time, and can be interrupted anywhere:

    plain    mx.quantize                              what mlx_lm.convert does
    fast     least squares and a gain per row         no text needed (codes.py)
    normal   codes by each expert's own inputs        layer by layer, on calibration text (calibrate.py)
    best     and scales and biases distilled          needs the whole model in memory (distil.py)
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint
from expertd.checkpoint.sizes import size_in_words
from expertd.checkpoint.source import Source, open_source
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.model.classes import Weights, build_model
from expertd.model.exchange import MLX_VERSION
from expertd.quant.budget import target_bytes
from expertd.quant.calibrate import calibrate
from expertd.quant.distill import Distillation, distil
from expertd.quant.output import Output, TensorPlan, Unit
from expertd.quant.recipe import ModuleInfo, Plan, decide, describe_modules
from expertd.quant.report import ExpertError, Facts, make_facts, render
from expertd.quant.rounding import aside, round_module
from expertd.quant.settings import Settings
from expertd.quant.survey import survey
from expertd.quant.weights import SourceWeights
from expertd.quant.windows import Windows, default_text, read_text, read_windows

CODES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32"}
MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32}
REPORT = "report.html"

# What is being done, how much of it, of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quantized:
    """What `quantize_checkpoint` wrote. `indivisible` are the modules left whole for want of whole groups."""

    folder: Path
    num_parameters: int
    source_bytes: int
    num_bytes: int
    indivisible: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_parameters


def quantize_checkpoint(
    src: str | Path,
    dst: Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    progress: Progress = lambda what, done, total: None,
    cache: Path | None = None,
    cache_bytes: int | None = None,
) -> Quantized:
    """Write checkpoint `src` (a folder, `demo`, a hub id or a URL) to the new folder `dst` by `settings`.

    `dst` appears only when it is complete; an interrupted run leaves `dst`.partial, and the same call goes on
    there. `cache` is this user's cache folder: bytes of a remote source are kept there while they are
    needed, up to `cache_bytes`, and the result's hashes. Raises ConfigError for settings that
    cannot be, a `dst` that is not empty and a full disk; CheckpointError for a `src` that is damaged, unknown or
    quantized already, before anything is written.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"{dst}: exists and is not an empty folder. Choose another, or delete it first.")
    with opened(src, cache, cache_bytes) as source:
        job = prepare(source, settings, progress)
        with job.output(dst) as out:
            job.write_weights(out)
            job.finish(out, cache / "manifests" if cache else None)
    plan = job.plan
    return Quantized(
        dst,
        job.num_parameters,
        job.info.total_bytes,
        plan.num_bytes,
        plan.recipe.indivisible,
        tuple(plan.warnings),
    )


@contextmanager
def opened(src: str | Path, cache: Path | None, cache_bytes: int | None) -> Iterator[Source]:
    """The source for as long as the block runs; what is not here is kept below `cache`, or a folder that goes."""
    with ExitStack() as stack:
        folder = cache / "ranges" if cache else Path(stack.enter_context(TemporaryDirectory()))
        source = open_source(str(src), folder, cache_bytes)
        stack.callback(source.close)
        yield source


def describe(
    src: str,
    settings: Settings,
    progress: Progress,
    cache: Path | None = None,
    cache_bytes: int | None = None,
) -> str:
    """What `quantize_checkpoint` would write, as a table of blocks and the size. Reads the weights, writes nothing."""
    with opened(src, cache, cache_bytes) as source:
        job = prepare(source, settings, progress)
    rows = [
        f"{b.name:24} {b.bits:4} bits {size_in_words(b.num_bytes):>10}  {b.reason}" for b in job.plan.blocks
    ]
    total = f"{size_in_words(job.info.total_bytes)} -> {size_in_words(job.plan.num_bytes)}"
    per_weight = 8 * job.plan.num_bytes / job.num_parameters
    experts = f"experts {settings.experts_bits} bits in groups of {settings.group_size}"
    return "\n".join([*rows, *job.plan.warnings, f"{experts}; {total}, {per_weight:.2f} bits per weight"])


def prepare(source: Source, settings: Settings, progress: Progress) -> "Job":
    """Check the source and decide everything; nothing is written."""
    started = time.monotonic()
    info = check_checkpoint(source.folder)
    model = build_model(info.config)
    weights = SourceWeights(model, source, info.config)
    windows = find_windows(info, settings) if settings.effort in ("normal", "best") else None
    modules = describe_modules(model, lambda name: weights.dtype(name).size)
    trunk = [m.path for m in modules if m.kind == "trunk"]
    units_of = partial(progress, "checking the weights")
    found = survey(weights, trunk, lambda done, total, name: units_of(done, total), settings.threads or None)
    errors = RoundingErrors(model, source, info, settings)
    plan = decide(modules, found.entropies, settings, target_bytes(settings, info.config), errors)
    seconds = {"checking the weights": time.monotonic() - started}
    return Job(
        source, info, model, modules, weights.num_parameters, plan, settings, windows, progress, seconds
    )


def find_windows(info: CheckpointInfo, settings: Settings) -> Windows:
    """The calibration text's windows, no longer than the model's context. Raises ConfigError."""
    text = read_text(settings.calibrate or default_text())
    window_tokens = min(settings.window_tokens, info.context_length)
    tokenizer = Tokenizer(info.folder, info.config)
    return read_windows(text, tokenizer, settings.num_windows, window_tokens, settings.seed)


class RoundingErrors:
    """The squared error of rounding a trunk module to so many bits, measured when the budget asks for it."""

    def __init__(self, model: Module, source: Source, info: CheckpointInfo, settings: Settings) -> None:
        self._open = partial(SourceWeights, model, source, info.config)
        self._settings = settings
        self._known: dict[tuple[str, int], float] = {}

    def __call__(self, path: str, bits: int) -> float:
        if (path, bits) not in self._known:
            name = f"{path}.weight"
            weight = self._open().take([name])[name]
            group_size = next(g for g in (64, 32) if weight.shape[-1] % g == 0)
            for level in {bits, *(b for b in self._settings.trunk if b < 16)}:
                rounded = round_module(weight, level, group_size, "plain", self._settings.threads)
                error = mx.square(rounded.dequantized() - weight.astype(mx.float32)).sum()
                self._known[path, level] = float(error.item())  # type: ignore[arg-type]
        return self._known[path, bits]


@dataclass
class Job:
    """One conversion: everything is decided, the weights are not rounded yet. `seconds` has each stage's time."""

    source: Source
    info: CheckpointInfo
    model: Module
    modules: list[ModuleInfo]
    num_parameters: int
    plan: Plan
    settings: Settings
    windows: Windows | None
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.settings.threads or num_cores()

    def weights(self) -> SourceWeights:
        return SourceWeights(self.model, self.source, self.info.config)

    def units(self, weights: SourceWeights) -> list[Unit]:
        """Every parameter with its scales and biases, in the model's order."""
        return [self._unit(name, weights.shape(name), CODES[weights.dtype(name)]) for name in weights.names]

    def _unit(self, name: str, shape: tuple[int, ...], dtype: str) -> Unit:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in self.plan.recipe.bits:
            return Unit(name, (TensorPlan(name, dtype, shape),))
        bits, group_size = self.plan.recipe.bits[path], self.plan.recipe.group_sizes[path]
        per_group = (*shape[:-1], shape[-1] // group_size)
        return Unit(
            name,
            (
                TensorPlan(name, "U32", (*shape[:-1], shape[-1] * bits // 32)),
                TensorPlan(f"{path}.scales", dtype, per_group),
                TensorPlan(f"{path}.biases", dtype, per_group),
            ),
        )

    def output(self, dst: Path) -> Output:
        verify = partial(self.progress, "checking what an earlier run wrote")
        return Output(
            dst,
            self.units(self.weights()),
            self.fingerprint(),
            self.num_parameters,
            progress=lambda done, total, name: verify(done, total),
        )

    def fingerprint(self) -> dict[str, Any]:
        """All that the output's bytes depend on."""
        facts = {k: v for k, v in asdict(self.settings).items() if k not in ("threads", "calibrate")}
        text = hashlib.sha256(self.windows.tobytes()).hexdigest() if self.windows is not None else ""
        # mx.quantize's codes differ between Metal and the CPU, and may between releases.
        mlx = f"{MLX_VERSION} on the {mx.default_device().type.name}"
        return {**facts, "source": self.source.identity, "calibration windows": text, "mlx": mlx}

    # The weights.

    def write_weights(self, out: Output) -> None:
        with self._timed("rounding"):
            if self.windows is None:
                self._round_all(out)
            else:
                self._calibrate(out, self.windows)
        if self.settings.effort == "best" and self.windows is not None:
            with self._timed("distilling"):
                self._distil(out, self.windows)

    def _round_all(self, out: Output) -> None:
        weights, total = self.weights(), self.num_parameters
        done = 0
        for name, following in zip(weights.names, (*weights.names[1:], None), strict=True):
            if name not in out:
                weight = weights.take([name])[name]
                if following and following not in out:
                    weights.begin(following)
                self._round(out, name, weight)
            done += int(np.prod(weights.shape(name)))
            self.progress("rounding", done, total)

    def _round(self, out: Output, name: str, weight: mx.array) -> None:
        path = name.removesuffix(".weight")
        bits = self.plan.recipe.bits.get(path) if name.endswith(".weight") else None
        arrays: Weights = {name: weight}
        if bits:
            group_size = self.plan.recipe.group_sizes[path]
            arrays = round_module(weight, bits, group_size, self.settings.effort, self.threads).arrays(path)
        out.write(name, to_buffers(arrays))

    def _calibrate(self, out: Output, windows: Windows) -> None:
        state = out.state / "calibration"
        if all(name in out for name in self.weights().names):
            return  # an earlier run got that far, and may have rewritten scales since
        with out.disk_errors():
            state.mkdir(parents=True, exist_ok=True)
        calibrate(
            self.model,
            self.weights(),
            self.plan.recipe,
            windows,
            self.threads,
            state,
            out.__contains__,
            lambda name, arrays, note: out.write(name, to_buffers(arrays), note),
            lambda done, total, what: self.progress("rounding", done, total),
            out.sync,
        )

    def _distil(self, out: Output, windows: Windows) -> None:
        state = out.state / "distillation"
        out.sync()
        with out.disk_errors():
            state.mkdir(parents=True, exist_ok=True)
        teacher = self.weights()
        student = {name: array for unit in teacher.names for name, array in read_arrays(out, unit).items()}
        config = {**self.info.config, "quantization": self._quantization()}
        trained = distil(
            config,
            lambda: teacher.take(teacher.names),
            student,
            windows,
            Distillation(seed=self.settings.seed),
            state,
            lambda done, total, what: self.progress(f"distilling: {what}", done, total),
        )
        for path in sorted({name.rpartition(".")[0] for name in trained}):
            unit = f"{path}.weight"
            arrays = {name: trained.get(name, array) for name, array in read_arrays(out, unit).items()}
            out.write(unit, to_buffers(arrays), out.notes[unit])

    # The end.

    def finish(self, out: Output, manifests: Path | None) -> None:
        facts = self.facts(out.notes)
        quantization = self._quantization()
        config = {**self.info.config, "quantization": quantization, "quantization_config": quantization}
        timed = Facts(**facts, seconds={k: round(v, 1) for k, v in self.seconds.items()})  # type: ignore[misc]
        files = {REPORT: render(timed).encode(errors="replace")}
        out.finish(config, self.source.folder, facts, files, manifests)

    def facts(self, notes: Mapping[str, Mapping[str, Any]]) -> Facts:
        """What the manifest and the report say; nothing in it changes from run to run."""
        facts = make_facts(
            self._name(), self.info.config, self.info.total_bytes, self.modules, self.plan, self.settings
        )
        layers = {m.path: (m.layer, m.role) for m in self.modules}
        errors = []
        for name, note in notes.items():
            layer, role = layers.get(name.removesuffix(".weight"), (None, ""))
            if layer is not None and "error_mean" in note:
                projection = role.rpartition(".")[2]
                errors.append(
                    ExpertError(layer=layer, projection=projection, relative_error=note["error_mean"])
                )
        if errors:
            facts["expert_errors"] = errors
        return facts

    def _name(self) -> str:
        """Of the source, without where it lies on this machine."""
        return self.source.name if self.source.is_remote else Path(self.source.name).resolve().name

    def _quantization(self) -> dict[str, Any]:
        return self.plan.recipe.settings(self.settings.experts_bits, self.settings.group_size)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_buffers(arrays: Weights) -> dict[str, Any]:
    """Computed arrays as contiguous buffers."""
    with mx.stream(aside()):
        found = {name: mx.contiguous(array) for name, array in arrays.items()}
        mx.eval(found)
    return {name: memoryview(array) for name, array in found.items()}  # type: ignore[arg-type]


def read_arrays(out: Output, unit: str) -> Weights:
    """What was written of a unit, as MLX's arrays."""
    found = {}
    stored = out.read(unit)
    for tensor in out.unit(unit).tensors:
        array = mx.array(stored[tensor.name])
        found[tensor.name] = array.view(MLX[tensor.dtype]) if array.dtype != MLX[tensor.dtype] else array
    return found
