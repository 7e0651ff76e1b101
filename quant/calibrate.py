"""Rounds a model's experts by what they are really asked, one layer at a time.

Theory of operation. All windows of calibration text go through the model as one batch, in one call of
mlx-lm's own forward function. Each layer is an instance of a subclass whose __call__ lands here, so whatever
masks and other arguments a family passes come along. For each layer, in order:

1. its weights are read. The trunk is rounded as its recipe says, and the layer runs with the rounded trunk
   in float32, so that the experts see what the rounded model will show them;
2. the layer runs with a recorder in the place of its experts (quant/experts.py): the rows that the router
   sends to each expert, and the routing weights;
3. each expert's input projections are rounded by the second moments of its own rows (quant/hessian.py), then its
   output projection by the moments of what the *rounded* input projections give;
4. the layer runs again with the rounded experts: that is the next layer's input.

So every matrix is chosen for the errors before it as they are, and no more than one layer is at full width in
memory. The layers' outputs are kept on disk after each layer: a run that was killed goes on from there, and
gives the same bytes. After the last layer the call is left by an exception.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from expertd.errors import ConfigError
from expertd.model.classes import Layer, MoeBlock, become, layers_of
from expertd.quant import codes
from expertd.quant.codes import Codes
from expertd.quant.dense import use_dense
from expertd.quant.experts import Asked, Experts, Recorder
from expertd.quant.hessian import Matrix, gram, shrunk
from expertd.quant.recipe import Recipe
from expertd.quant.rounding import DTYPES, Rounded, from_codes, round_module
from expertd.quant.windows import Windows

CHUNK_TOKENS = 4096  # what a layer runs on at a time: bounds the memory of its activations

Arrays = dict[str, mx.array]
Emit = Callable[[str, Arrays, dict[str, Any]], None]
Progress = Callable[[int, int, str], None]


class Weights(Protocol):
    """The source's weights by the model's names, as quant/weights.py's SourceWeights."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def num_parameters(self) -> int: ...
    def take(self, names: Sequence[str]) -> Arrays: ...


def calibrate(
    model: Module,
    weights: Weights,
    recipe: Recipe,
    windows: Windows,
    threads: int,
    out_state: Path,
    done: Callable[[str], bool],
    emit: Emit,
    progress: Progress | None = None,
    sync: Callable[[], None] = lambda: None,
) -> None:
    """Give every parameter of `model` (never computed) to `emit`, quantized by `recipe`, layer by layer.

    `emit(unit, arrays, note)` gets one tensor of the model with its scales and biases; a unit for which `done`
    is true is not emitted again. Notes of experts hold `error_mean` and `error_max` over experts (relative,
    weighted by the moments), `tokens_min` and `tokens_median` per expert, and the block's `seconds`. `windows` are
    token ids [num_windows, window_tokens]; `out_state` is a folder that this run and its resumptions share.
    `progress(done_weights, all_weights, what)` is called after each unit and each expert; `sync` waits until all
    that was emitted outlives a kill.
    Raises ConfigError for a family that does not say what its layers are.
    """
    sink = _Sink(done, emit, weights, progress, sync)
    _Run(model, weights, recipe, windows, threads, out_state, sink).run()


class _Finished(Exception):
    """The last layer is done: leave the model's forward call."""


class _HookedLayer:
    """A layer whose call lands in `_hook(call, args, kwargs)`."""

    _hook: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(super().__call__, args, kwargs)  # type: ignore[misc]


class _HookedSwitch:
    """A switch that `_answer(x, ids)` stands in for."""

    _answer: Callable[[mx.array, mx.array], mx.array]

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return self._answer(x, ids)


class _HookedBlock:
    """A block that `_probe(call, *args, **kwargs)` may run more than once."""

    _probe: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        return self._probe(call, *args, **kwargs) if self._probe else call(*args, **kwargs)


@dataclass
class _Sink:
    """Where units go, and the count of the weights that went."""

    done: Callable[[str], bool]
    give: Emit
    weights: Weights
    progress: Progress | None
    sync: Callable[[], None]
    num_done: int = 0

    def emit(self, path: str, array: mx.array | Rounded, note: dict[str, Any] | None = None) -> None:
        """`path` is a module's for a Rounded, else the parameter's own name."""
        name = f"{path}.weight" if isinstance(array, Rounded) else path
        if not self.done(name):
            arrays = array.arrays(path) if isinstance(array, Rounded) else {name: array}
            mx.eval(arrays)
            self.give(name, arrays, note or {})

    def count(self, num_weights: int, what: str) -> None:
        self.num_done += num_weights
        if self.progress:
            self.progress(self.num_done, self.weights.num_parameters, what)


@dataclass
class _Run:
    model: Module
    weights: Weights
    recipe: Recipe
    windows: Windows
    threads: int
    out_state: Path
    sink: _Sink

    def __post_init__(self) -> None:
        self.layers = layers_of(self.model)
        if not self.layers or not any(layer.blocks for layer in self.layers):
            raise ConfigError(
                f"--effort normal: expertd does not know the layers of {type(self.model).__module__}, "
                "so it cannot calibrate this family. Use --effort fast."
            )
        self.left = dict.fromkeys(self.weights.names)  # an ordered set: what is not quantized yet

    def run(self) -> None:
        inside = tuple(f"{layer.path}." for layer in self.layers)
        self.outside = [name for name in self.left if not name.startswith(inside)]
        self.restored = self._restore()
        for number, layer in enumerate(self.layers):
            become(layer.module, _HookedLayer)
            layer.module._hook = self._hook(number)
        self._round(self.outside, is_outside=True)
        with suppress(_Finished):
            self.model(mx.array(self.windows))
        self._round(list(self.left), is_outside=True)  # what the forward call did not come by

    # A layer.

    def _hook(self, number: int) -> Callable[..., Any]:
        def hook(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            last_restored, output = self.restored
            if number > last_restored:
                args, kwargs = tree_map(_to_float32, (args, kwargs))
                mx.eval([leaf for _, leaf in _leaves((args, kwargs)) if isinstance(leaf, mx.array)])
                self._forget(self.outside)
                output = self._quantize_layer(self.layers[number], call, args, kwargs)
                self._save(number, output)
            if number == len(self.layers) - 1:
                raise _Finished
            return output

        return hook

    def _quantize_layer(self, layer: Layer, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        names = [name for name in self.left if name.startswith(f"{layer.path}.")]
        switches = tuple(f"{block.path}." for block in layer.blocks)
        self._round([name for name in names if not name.startswith(switches)])
        use_dense(layer.module)
        for block in layer.blocks:
            become(block.switch, _HookedSwitch)
            become(block.module, _HookedBlock)
        for (
            block
        ) in layer.blocks:  # a later one sees what the earlier ones give; the earlier ones do not see it
            recorder = Recorder()
            block.switch._answer, block.module._probe = recorder.switch, recorder.block
            for _ in self._chunks(call, args, kwargs):
                pass
            block.module._probe = None
            block.switch._answer = self._quantize_experts(block, recorder.result())
        outputs = []
        for output in self._chunks(call, args, kwargs):
            mx.eval(output)
            outputs.append(output)
        for block in layer.blocks:
            del block.switch._answer
        self._forget(names)
        joined = tree_map(lambda *parts: _join(parts), outputs[0], *outputs[1:])
        mx.eval(joined)
        mx.clear_cache()
        return joined

    def _chunks(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Any]:
        """The layer's outputs for some windows after the other, not computed."""
        num_windows, window_tokens = self.windows.shape
        step = max(1, CHUNK_TOKENS // window_tokens)
        for start in range(0, num_windows, step):
            part_args, part_kwargs = tree_map(
                lambda leaf, start=start: leaf[start : start + step] if self._is_batch(leaf) else leaf,
                (args, kwargs),
            )
            yield call(*part_args, **part_kwargs)

    def _is_batch(self, leaf: Any) -> bool:
        """Whether an argument is one row per window: hidden states and what goes with them, not masks."""
        if not isinstance(leaf, mx.array) or leaf.ndim < 2 or leaf.shape[0] != len(self.windows):
            return False
        return leaf.ndim > 2 or (leaf.shape == self.windows.shape and mx.issubdtype(leaf.dtype, mx.integer))

    # Weights.

    def _round(self, names: Sequence[str], is_outside: bool = False) -> None:
        """Take parameters one by one, round what the recipe rounds, emit them and put them into the model.

        Those of a layer are put in as float32, the others in their own dtype and not computed: an embedding is as
        large as a layer of experts, and the head is never asked.
        """
        for name in names:
            array = self._take([name])[name]
            path = _module_of(name)
            rounded: mx.array | Rounded = array
            if path is not None and path in self.recipe.bits:
                bits, group_size = self.recipe.bits[path], self.recipe.group_sizes[path]
                rounded = round_module(array, bits, group_size, "fast", self.threads)
                self.sink.emit(path, rounded)
            else:
                self.sink.emit(name, array)
            if isinstance(rounded, Rounded):
                array = rounded.lazy() if is_outside else rounded.dequantized()
            self._put({name: array if is_outside else _to_float32(array)})
            self.sink.count(array.size, name)

    def _quantize_experts(self, block: MoeBlock, asked: Asked) -> Experts:
        names = [name for name in self.left if name.startswith(f"{block.path}.")]
        arrays = self._take(names)
        weights = {p: arrays[f"{block.path}.{p}.weight"] for p in (*block.inputs, block.output)}
        biases = {p: arrays[b] for p in weights if (b := f"{block.path}.{p}.bias") in arrays}
        experts = Experts(block, weights, biases)
        num_biases = sum(bias.size for bias in biases.values()) // experts.num_experts
        for name in biases:
            self.sink.emit(f"{block.path}.{name}.bias", biases[name])
        _ExpertRounding(experts, asked, self.recipe, self.threads).run(self.sink, num_biases)
        return experts

    def _take(self, names: Sequence[str]) -> Arrays:
        for name in names:
            del self.left[name]
        return self.weights.take(names)

    def _put(self, arrays: Arrays) -> None:
        self.model.update(tree_unflatten(list(arrays.items())))

    def _forget(self, names: Sequence[str]) -> None:
        """Drop parameters; what stands in for them is not computed, so it takes no memory."""
        shapes = dict(tree_flatten(self.model.parameters()))
        self._put({name: mx.zeros(shapes[name].shape) for name in names if name in shapes})

    # State.

    def _save(self, number: int, output: Any) -> None:
        self.sink.sync()  # a state without its layer's units would have to be made again, from the first layer on
        leaves = _leaves(output)
        arrays = {f"leaf.{key}": leaf for key, leaf in leaves if isinstance(leaf, mx.array)}
        others = json.dumps([[key, leaf] for key, leaf in leaves if not isinstance(leaf, mx.array)])
        path = self.out_state / f"layer-{number:05}.safetensors"
        partial = self.out_state / "layer.partial.safetensors"
        mx.save_safetensors(str(partial), arrays, {"others": others})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        for older in self.out_state.glob("layer-*.safetensors"):
            if older != path:
                older.unlink()

    def _restore(self) -> tuple[int, Any]:
        """The last layer that needs no work, and its output; -1 when there is none."""
        for path in self.out_state.glob("layer-*.safetensors"):
            number = int(path.stem.removeprefix("layer-"))
            paths = tuple(f"{layer.path}." for layer in self.layers[: number + 1])
            names = [name for name in self.left if name.startswith(paths)]
            if not all(self.sink.done(name) for name in names):
                continue  # the state is ahead of the units: begin again
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = loaded
            leaves = [(key.removeprefix("leaf."), leaf) for key, leaf in arrays.items()]
            sizes = {name: leaf.size for name, leaf in _leaves(self.model.parameters())}
            for name in names:
                del self.left[name]
                self.sink.count(sizes[name], name)
            return number, tree_unflatten([*leaves, *json.loads(metadata["others"])])
        return -1, None


@dataclass
class _ExpertRounding:
    """Rounds the experts of one block by what they were asked."""

    experts: Experts
    asked: Asked
    recipe: Recipe
    threads: int

    def run(self, sink: _Sink, num_biases: int) -> None:
        start, block = time.monotonic(), self.experts.block
        tokens = self.asked.by_expert(self.experts.num_experts)
        self._errors: dict[str, list[float]] = {name: [] for name in self.experts.weights}
        mean_input, mean_inner = self._means(tokens)
        num_weights = num_biases + sum(w[0].size for w in self.experts.weights.values())
        for expert, (indices, scores) in enumerate(tokens):
            rows = self.asked.rows[indices]
            self._round(block.inputs, expert, shrunk(gram(rows, scores), scores.size, mean_input))
            inner = self.experts.inner(rows, expert)
            self._round((block.output,), expert, shrunk(gram(inner, scores), scores.size, mean_inner))
            mx.clear_cache()
            sink.count(num_weights, f"{block.path} expert {expert}")
        counts = [scores.size for _, scores in tokens]
        note = {"tokens_min": min(counts), "tokens_median": float(np.median(counts))}
        self._emit(sink, {**note, "seconds": round(time.monotonic() - start, 3)})

    def _means(self, tokens: list[tuple[mx.array, mx.array]]) -> tuple[Matrix, Matrix]:
        """The moments per routed token, over all experts, of their inputs and, at full width, of what the output
        projection reads."""
        rows, num_routed = self.asked.rows, np.float32(self.asked.ids.size)
        of_input = gram(rows, mx.array(np.sqrt((self.asked.scores**2).sum(-1))))
        of_inner: Any = sum(
            gram(self.experts.inner(rows[indices], expert), scores)
            for expert, (indices, scores) in enumerate(tokens)
        )
        return np.asarray(of_input / num_routed), np.asarray(of_inner / num_routed)

    def _round(self, names: Sequence[str], expert: int, hessian: Matrix) -> None:
        """Round projections that read the same input; those of one format in one go, as they share what is made of
        the Hessian."""
        paths = {name: f"{self.experts.block.path}.{name}" for name in names}
        bits_of, sizes = self.recipe.bits, self.recipe.group_sizes
        formats = {name: (bits_of[path], sizes[path]) for name, path in paths.items() if path in bits_of}
        for bits, group_size in sorted(set(formats.values())):
            same = [name for name, f in formats.items() if f == (bits, group_size)]
            wanted = [np.array(self.experts.weight(name, expert)) for name in same]
            dtype = self.experts.weights[same[0]].dtype
            chosen = codes.calibrated(
                np.concatenate(wanted), hessian, bits, group_size, DTYPES[dtype], threads=self.threads
            )
            start = 0
            for name, weight in zip(same, wanted, strict=True):
                own = _rows(chosen, slice(start, start + len(weight)))
                start += len(weight)
                self._errors[name].append(codes.relative_error(weight, own, hessian))
                self.experts.rounded[name].append(from_codes([own], weight.shape, dtype))

    def _emit(self, sink: _Sink, note: dict[str, Any]) -> None:
        """Emit every projection, and drop it at full width."""
        for name in list(self.experts.weights):
            path, errors = f"{self.experts.block.path}.{name}", self._errors[name]
            if not errors:
                sink.emit(f"{path}.weight", self.experts.weights[name])
                continue
            del self.experts.weights[name]
            means = {"error_mean": float(np.mean(errors)), "error_max": float(max(errors))}
            sink.emit(path, _stack(self.experts.rounded[name]), {**means, **note})


def _rows(chosen: Codes, rows: slice) -> Codes:
    return replace(chosen, codes=chosen.codes[rows], scales=chosen.scales[rows], biases=chosen.biases[rows])


def _stack(parts: Sequence[Rounded]) -> Rounded:
    weight, scales, biases = (
        mx.stack([getattr(part, name) for part in parts]) for name in ("weight", "scales", "biases")
    )
    return Rounded(weight, scales, biases, parts[0].bits, parts[0].group_size)


def _join(parts: Sequence[Any]) -> Any:
    """One output of the layer from those for some windows each."""
    first = parts[0]
    return mx.concatenate(list(parts)) if isinstance(first, mx.array) and first.ndim > 2 else first


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves: Any = tree_flatten(tree)
    return [(key, leaf) for key, leaf in leaves]


def _module_of(name: str) -> str | None:
    """The path of the module that a parameter is the weight of, if it is one."""
    path, _, leaf = name.rpartition(".")
    return path if leaf == "weight" else None


def _to_float32(leaf: Any) -> Any:
    return (
        leaf.astype(mx.float32)
        if isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)
        else leaf
    )
